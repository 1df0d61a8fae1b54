"""The main example in short form: its claim, its parts against closed forms, its pictures."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from torch_kronlik import reference

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("train_multioutput_gp")


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_short_run(example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores = example.main(["--folds", "2", "--steps", "12", "--output", str(tmp_path / "new")])
    together, apart = scores[example.TOGETHER], scores[example.APART]
    assert together.log_density.mean() > apart.log_density.mean()
    assert example.rms(together.error_one_missing) < 0.9 * example.rms(apart.error_one_missing)
    # nothing is learned about an output from others that are independent of it
    torch.testing.assert_close(apart.error_one_missing, apart.error)
    printed = capsys.readouterr().out
    for name, score in scores.items():
        assert score.error.shape == (202, 7)
        assert f"\n{name} " in printed
    pictures = ["correlation.png", "errors.png", "fits.png", "learning_curve.png"]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == pictures
    for name in pictures:
        assert (tmp_path / "new" / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("folds", [2, 5])
def test_folds_hold_out_blocks_and_scattered_rows(example: ModuleType, folds: int) -> None:
    fold, in_block = example.assign_folds(202, folds)
    assert set(fold.tolist()) == set(range(folds))
    assert 0.4 < in_block.double().mean() < 0.6
    for start in range(0, 202, 2 * example.BLOCK):
        block = slice(start, start + example.BLOCK)
        assert in_block[block].all()
        assert len(set(fold[block].tolist())) == 1
    scattered = fold[~in_block].bincount()
    assert scattered.max() - scattered.min() <= 1


def test_standardise_uses_the_training_rows_only(example: ModuleType) -> None:
    t, series = example.load()
    train = torch.arange(len(t)) % 3 > 0
    Y, scale = example.standardise(t, series, train)
    torch.testing.assert_close(Y[train].std(0), torch.ones(7).to(Y))
    slope = (t - t[train].mean())[train] @ Y[train] / t[train].var()  # of what is left
    torch.testing.assert_close(slope, torch.zeros(7).to(Y))
    changed = series.where(train[:, None], series + 1)
    torch.testing.assert_close(
        (example.standardise(t, changed, train)[0] - Y) * scale, changed - series
    )


def test_prediction_is_the_conditional_normal(example: ModuleType) -> None:
    """Against the dense joint normal of old and new observations."""
    torch.manual_seed(0)
    model = example.MultiOutputGP(3).double()
    with torch.no_grad():
        model.root.add_(0.5 * normal(3, 3))
        model.loss.log_noise.add_(normal(3))
        t, Y, new = torch.arange(6.0).double(), normal(6, 3), torch.tensor([1.5, 7.0]).double()
        every = torch.cat([t, new])
        U = reference.covariance_matrix(
            model.M(every, every), model.K, log_noise=model.loss.log_noise
        )
    old_old, new_old, new_new = U[:18, :18], U[18:, :18], U[18:, 18:]
    gain = torch.linalg.solve(old_old, new_old.T).T
    covariance = (new_new - gain @ new_old.T).reshape(2, 3, 2, 3)
    forecast = model.predict(t, Y, new)
    torch.testing.assert_close(forecast.mean, (gain @ Y.flatten()).reshape(2, 3))
    expected = torch.stack([covariance[s, :, s] for s in range(2)])
    torch.testing.assert_close(forecast.covariance, expected)


def test_one_missing_is_the_conditional_mean(example: ModuleType) -> None:
    root, error = normal(4, 4), normal(5, 4)
    C = root @ root.T + torch.eye(4)
    others = [1, 2, 3]
    expected = error[:, others] @ torch.linalg.solve(C[others][:, others], C[others, 0])
    given = example.from_the_others(error, C.expand(5, 4, 4))
    torch.testing.assert_close(given[:, 0], expected)


def test_interpolation_is_the_brownian_bridge(example: ModuleType) -> None:
    t, new = torch.tensor([0.0, 1.0, 3.0]).double(), torch.tensor([1.5, 5.0]).double()
    Y = torch.tensor([[0.0], [1.0], [3.0]]).double()
    rate = (1 / 1 + 4 / 2) / 2
    forecast = example.interpolate(t, Y, new)
    torch.testing.assert_close(forecast.mean, torch.tensor([[1.5], [3.0]]).double())
    variance = rate * torch.tensor([0.5 * 1.5 / 2.0, 2.0]).double()
    torch.testing.assert_close(forecast.covariance[:, 0, 0], variance)
