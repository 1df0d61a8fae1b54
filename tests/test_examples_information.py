"""The example of standard errors in short form: what it prints and the picture that it writes."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch

EXAMPLE = Path(__file__).parent.parent / "examples" / "standard_errors.py"


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("standard_errors", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_standard_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example = load()
    short = ["--steps", "60", "--chains", "8", "--points", "2"]
    example.main([*short, "--output", str(tmp_path)])
    printed = capsys.readouterr().out
    for name in example.NAMES:
        (line,) = (line for line in printed.splitlines() if line.startswith(name))
        value, error, expected, *ends = map(float, re.findall(r"\d+\.\d+", line))
        assert abs(expected / error - 1) < 0.2  # two estimates of the same precision
        for low, high in zip(ends[::2], ends[1::2], strict=True):
            assert low < value < high
            # the bill rate's noise has a longer tail than its standard error says
            assert 2 < (high - low) / error < 6
    assert (tmp_path / "standard_errors.png").read_bytes().startswith(b"\x89PNG")


def test_newton_ends_at_a_minimum() -> None:
    example = load()
    t, Y = example.load()
    model = example.Model(t, Y)
    assert Y.shape == (100, 2)
    assert Y.mean(0).abs().max() < 1e-12
    fit, _ = example.minimise(model, torch.zeros(6, dtype=Y.dtype), list(range(6)))
    at = fit.requires_grad_()
    (gradient,) = torch.autograd.grad(model.nll(at), at)
    assert gradient.abs().max() < 1e-6
