"""The prediction examples in short form: what they print and the pictures that they write."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_cross_validation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example = load("cross_validation")
    example.main(["--steps", "3", "--output", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    tables = {}
    for line in lines:
        for name in (example.MONTH, example.SEASON, example.LINE, example.CLIMATE):
            if line.startswith(name):
                tables.setdefault(name, []).append([float(x) for x in line[len(name) :].split()])
    assert [len(rows) for rows in tables.values()] == [2, 2, 1, 1]
    (climate,) = tables[example.CLIMATE]
    for error, log_density, *inside in tables[example.MONTH]:
        assert error < climate[0]  # other months of the season know more than other seasons
        assert log_density > climate[1]
        assert inside == sorted(inside)
    for name in ("residuals.png", "calibration.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_cross_validation_data() -> None:
    t, Y = load("cross_validation").load()
    assert t.shape == Y.shape == (60, 12)
    assert Y.mean(0).abs().max() < 1e-12
    assert (t[0, 0] - 1950 - 3.5 / 12).abs() < 1e-9  # the middle of April 1950
    assert (t.flatten().diff() - 1 / 12).abs().max() < 1e-9


def test_missing_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example = load("missing_data")
    example.main(["--steps", "8", "--output", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "2217 weeks measured, 71 not"
    names = ("weeks and years together", "each week by itself", "line between neighbouring weeks")
    errors = {name: [float(x[34:42]) for x in lines if x.startswith(name)] for name in names}
    together, alone, line = (errors[name] for name in names)
    assert len(together) == len(alone) == len(line) == 2  # scattered, and in blocks
    assert all(a < b for a, b in zip(together, alone, strict=True))
    assert together[1] < line[1]  # eight weeks in a row: other years know the season
    assert (tmp_path / "missing.png").read_bytes().startswith(b"\x89PNG")
