"""The GPyTorch example in short form: the numbers before and after the change are the same."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

EXAMPLE = Path(__file__).parent.parent / "examples" / "gpytorch_dropin.py"


@pytest.fixture
def example() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location(EXAMPLE.stem, EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    torch.set_default_dtype(torch.float32)  # the example works in float64


@pytest.mark.filterwarnings("ignore:The input matches the stored training data")
def test_before_and_after_are_the_same(
    example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--steps", "4", "--sizes", "10", "20", "--repeats", "2"]
    example.main([*arguments, "--output", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    same = ["length scale", "noise variance of the first task", "log density of what was hidden"]
    compared = [line for line in lines if line.startswith(tuple(same))]
    assert len(compared) == 6  # three for each of two problems
    for line in compared:
        before, after = (float(x) for x in line.split()[-2:])
        assert abs(after - before) <= 1e-7 * abs(before)
    distances = [x for line in lines if "distance from dense" in line for x in line.split()[-2:]]
    assert len(distances) == 8
    assert max(float(x) for x in distances) < 1e-8
    assert (tmp_path / "gpytorch_dropin.png").read_bytes().startswith(b"\x89PNG")


def test_the_hidden_quarters(example: ModuleType) -> None:
    data = example.economy()
    assert data.y.shape == (179, 5)
    assert data.y_new.shape == (24, 5)
    assert data.y.numel() > 800  # where GPyTorch changes its methods
    everything = torch.cat([data.y, data.y_new])
    torch.testing.assert_close(everything.mean(0), torch.zeros(5).to(everything))
