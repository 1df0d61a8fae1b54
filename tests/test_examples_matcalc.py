"""The examples of matrix calculus and of the matrix exponential, in short form."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("rows", "outputs"), [(4, 3), (3, 3), (2, 4)])
def test_derivations_are_judged_rightly(
    rows: int, outputs: int, capsys: pytest.CaptureFixture[str]
) -> None:
    verdicts = load("check_a_derivation").main([f"--rows={rows}", f"--outputs={outputs}"])
    assert verdicts == [False, True, True, False, True, True, False, True]
    printed = capsys.readouterr().out
    assert "W Wᵀ for Wᵀ W" in printed
    assert "the right rows in another order" in printed
    assert "none of the usual slips" in printed


def test_diffusion_learns_rates_and_draws_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    example = load("diffusion_coregionalization")
    left = example.main(["--steps=15", f"--output={tmp_path}"])
    assert {path.name for path in tmp_path.iterdir()} == {"rates.png", "left_out.png"}
    density = {name: float(found.log_density) for name, found in left.items()}
    assert density["a rate for each state"] > density["independent states"]
    assert "log likelihood" in capsys.readouterr().out


def test_a_left_out_state_is_predicted_from_the_others_alone() -> None:
    example = load("diffusion_coregionalization")
    data = example.load()
    years, states = slice(0, 12), 7
    small = data._replace(
        names=data.names[:states],
        adjacency=torch.ones(states, states).double() - torch.eye(states),
        years=data.years[years],
        Y=data.Y[years, :states],
    )
    model = example.DiffusionModel(small, "each")
    found = example.leave_states_out(small, model)
    with torch.no_grad():
        U = torch.kron(model.K().contiguous(), model.M())
        U += model.log_noise.exp() * torch.eye(len(U))
    inside = torch.zeros(states, 12, dtype=torch.bool)
    inside[2] = True
    inside = inside.flatten()
    y = small.Y.T.flatten()
    weights = torch.linalg.solve(U[~inside][:, ~inside], U[~inside][:, inside]).T
    torch.testing.assert_close(found.mean[:, 2], weights @ y[~inside])
    covariance = U[inside][:, inside] - weights @ U[~inside][:, inside]
    torch.testing.assert_close(found.deviation[:, 2], covariance.diagonal().sqrt())
