"""The dense twin of prediction and of leaving out, by other formulas in the inverse."""

from __future__ import annotations

import pytest
import torch
from devices import to_numpy
from problems import condition_number, dense_noise, kinds_for, make_new_rows, make_problem
from scipy import stats  # type: ignore[import-untyped]
from test_reference import FUNCTIONS, Check, each_noise

from torch_kronlik import reference


@each_noise
def test_condition_equals_blocks_of_the_joint_precision(noise: str, assert_close: Check) -> None:
    p, M_cross, M_test, Y_test = make_new_rows(4, 2, 3, noise=noise)
    posterior = reference.condition(p.Y, p.M, p.K, M_cross, M_test, **p.noise)
    joint = torch.cat([torch.cat([p.M, M_cross.mT], 1), torch.cat([M_cross, M_test], 1)], 0)
    V = torch.linalg.inv(reference.covariance_matrix(joint, p.K, **p.noise))
    observed = torch.linalg.inv(V[12:, 12:])
    mean = -(observed @ V[12:, :12] @ p.Y.flatten()).reshape(2, 3)
    latent = observed - torch.kron(torch.eye(2).double(), dense_noise(p))
    kappa = condition_number(p)
    assert_close(posterior.mean, mean, condition=kappa)
    assert_close(posterior.covariance_matrix, latent, condition=kappa)
    assert_close(posterior.variance, latent.diagonal().reshape(2, 3), condition=kappa)
    expected = observed.diagonal().reshape(2, 3)
    assert_close(posterior.observation_variance, expected, condition=kappa)
    rows = torch.stack([latent[:3, :3], latent[3:, 3:]])
    assert_close(posterior.row_covariance, rows, condition=kappa)
    normal = stats.multivariate_normal(to_numpy(mean.flatten()), to_numpy(observed))
    log_density = normal.logpdf(to_numpy(Y_test.flatten()))
    chain = reference.kron_gaussian_nll(p.Y, p.M, p.K, **p.noise) - log_density
    Y = torch.cat([p.Y, Y_test])
    assert_close(reference.kron_gaussian_nll(Y, joint, p.K, **p.noise), chain, condition=kappa)


def test_condition_on_a_diagonal_only() -> None:
    p, M_cross, M_test, _ = make_new_rows(4, 2, 3, batch=(5,))
    full = reference.condition(p.Y, p.M, p.K, M_cross, M_test, **p.noise)
    diagonal = M_test.diagonal(dim1=-2, dim2=-1)
    part = reference.condition(p.Y, p.M, p.K, M_cross, diagonal, **p.noise)
    assert part.covariance_matrix is None
    for actual, expected in zip(part[:4], full[:4], strict=True):
        torch.testing.assert_close(actual, expected)


@each_noise
@pytest.mark.parametrize("kind", kinds_for(torch.float32))
def test_leaving_out_equals_formulas_in_the_inverse(
    kind: str, noise: str, assert_close: Check
) -> None:
    p, kappa = (problem := make_problem(4, 3, kind=kind, noise=noise)), condition_number(problem)
    V, A = torch.linalg.inv(FUNCTIONS["covariance_matrix"](p)), FUNCTIONS["kron_solve"](p)
    mean, variance = FUNCTIONS["leave_one_out"](p)
    d = V.diagonal().reshape(4, 3)
    assert_close(mean, p.Y - A / d, condition=kappa, floor=1.0)
    assert_close(variance, 1 / d, condition=kappa)
    mean, covariance = FUNCTIONS["leave_one_row_out"](p)
    blocks = torch.linalg.inv(
        torch.stack([V[3 * t : 3 * t + 3, 3 * t : 3 * t + 3] for t in range(4)])
    )
    assert_close(mean, p.Y - torch.einsum("tde,te->td", blocks, A), condition=kappa, floor=1.0)
    assert_close(covariance, blocks, condition=kappa)


def test_leaving_out_the_only_entry_gives_the_prior() -> None:
    p = make_problem(1, 1)
    mean, variance = FUNCTIONS["leave_one_out"](p)
    assert mean.item() == 0.0
    assert variance.item() == (p.M * p.K + p.noise["Sigma"]).item()
