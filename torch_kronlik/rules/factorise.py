"""The factorisation, a constant for differentiation: no gradient passes through an eigenvector."""

from __future__ import annotations

import torch
from torch import Tensor

from ..derivatives import define, register
from ..factor import eigen as kernels
from .common import Maybe, noise_batch

__all__ = ["eigen", "whiten"]

eigen = define(
    "eigen(Tensor M) -> (Tensor s, Tensor P)",
    kernels.eigen,
    lambda M: (M.new_empty(M.shape[:-1]), M.new_empty(M.shape)),
)
register(eigen, core_dims=lambda M: ([2], [1, 2]))


def _whiten_fake(K: Tensor, Sigma: Maybe, log_noise: Maybe, s: Tensor) -> tuple[Tensor, ...]:
    noise, D = noise_batch(Sigma, log_noise), K.shape[-1]
    batch = torch.broadcast_shapes(K.shape[:-2], noise)
    return K.new_empty((*batch, D)), K.new_empty((*batch, D, D)), K.new_empty(noise)


whiten = define(
    "whiten(Tensor K, Tensor? Sigma, Tensor? log_noise, Tensor s)"
    " -> (Tensor lam, Tensor R, Tensor logdet_noise)",
    kernels.whiten,
    _whiten_fake,
)
register(whiten, core_dims=lambda *_: ([2, 2, 1, 1], [1, 2, 0]))
