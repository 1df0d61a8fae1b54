"""The χ² distribution far in its tail."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["log_chi2_tail"]


def log_chi2_tail(statistic: Tensor, q: int) -> Tensor:
    """log P(χ²_q > statistic), as a finite sum of positive terms.

    With h = statistic / 2: e⁻ʰ Σ_k h^k / Γ(k + 1), k < q/2 in whole steps from 0 where q is even,
    from ½ where it is odd; then erfc(√h) is added.
    """
    h = statistic / 2
    powers = [k + (q % 2) / 2 for k in range(q // 2)]
    terms = [torch.special.xlogy(k, h) - math.lgamma(k + 1) for k in powers]
    if q % 2:
        positive = torch.where(h > 0, h, 1)  # the root has no derivative at zero
        terms.append(torch.where(h > 0, torch.special.erfcx(positive.sqrt()).log(), 0))
    if not terms:
        return torch.where(h > 0, -math.inf, 0.0).to(h)
    return (torch.logsumexp(torch.stack(terms), 0) - h).clamp(max=0)
