"""The distribution of a problem, and torch's MultivariateNormal over its dense covariance."""

from __future__ import annotations

import math
from typing import Any

import torch
from problems import BATCHES, Problem
from torch import Tensor
from torch.distributions import MultivariateNormal

from torch_kronlik import reference
from torch_kronlik.distribution import KroneckerNormal

T, D = 4, 3
# torch's dense distribution refuses an empty batch: see test_empty_batches
NON_EMPTY = [name for name in BATCHES if name != "empty"]
SHAPE = (T, D)
KINDS = ("generic", "rank_one_M", "zero_K", "repeated_blocks", "replicates", "tiny_factors")


def kronecker(p: Problem, **options: Any) -> KroneckerNormal:
    """With the problem's Y for its mean."""
    return KroneckerNormal(p.Y, p.M, p.K, **p.noise, **options)


def dense(p: Problem) -> MultivariateNormal:
    """The same in float64, over vec(Y)."""
    U = reference.covariance_matrix(p.M, p.K, **p.noise)
    return MultivariateNormal(p.Y.double().flatten(-2), U)


def values_for(p: Problem, *sample: int) -> Tensor:
    batch = kronecker(p).batch_shape
    return 2 * torch.randn((*sample, *batch, *p.Y.shape[-2:]), dtype=p.Y.dtype, device=p.Y.device)


def shaped(x: Tensor) -> Tensor:
    return x.unflatten(-1, SHAPE)


def check_whitened(draws: Tensor, flat: MultivariateNormal) -> None:
    """Whitened by the dense Cholesky factor, n draws are standard normal, each batch element for
    itself and independent of the others. An entry of their mean then has standard deviation 1/√n,
    of their covariance 1/√n off the diagonal and √(2/n) on it: 6 of those are allowed, which a
    right sampler exceeds in one seed of 10³ (2·10⁴ entries, 2·10⁻⁹ each, more on the diagonal,
    whose upper tail is that of χ²)."""
    n = len(draws)
    residual = (draws.flatten(-2) - flat.loc).unsqueeze(-1)
    z = torch.linalg.solve_triangular(flat.scale_tril, residual, upper=False).reshape(n, -1)
    deviation = 1 / math.sqrt(n)
    assert z.shape[1] == flat.loc.numel()
    assert z.mean(0).abs().max() < 6 * deviation
    second = z.mT @ z / n - torch.eye(z.shape[1]).double()
    assert second.diagonal().abs().max() < 6 * math.sqrt(2) * deviation
    assert second.fill_diagonal_(0).abs().max() < 6 * deviation
