"""The operators under linear_operator's own battery, and what that battery does not ask.

The battery runs at its own (loose) tolerances in float32; exactness is tested below it.
"""

from __future__ import annotations

import unittest
from typing import Any

import pytest
import torch
from linear_operator.operators import LinearOperator
from linear_operator.test.linear_operator_test_case import LinearOperatorTestCase
from problems import make_problem
from torch import Tensor

from torch_kronlik import reference
from torch_kronlik.gpytorch import KroneckerPlusNoiseLinearOperator

# linear_operator compares dense matrices with torch's own symmetric square roots and logarithms.
pytestmark = pytest.mark.filterwarnings("ignore::linear_operator.utils.warnings.PerformanceWarning")


class Battery(LinearOperatorTestCase):
    """What all cases have in common."""

    seed = 0
    should_test_sample = True
    # It never iterates, at no size: these flags expect that no such method is called.
    should_call_cg = False
    should_call_lanczos = False
    should_call_lanczos_diagonalization = False
    noise: str
    batches: Any = ()

    def create_linear_op(self) -> LinearOperator:
        p = make_problem(3, 2, batch=self.batches, noise=self.noise, dtype=torch.float32, seed=3)
        M, K, *noise = (x.requires_grad_() for x in (p.M, p.K, *p.noise.values()))
        return KroneckerPlusNoiseLinearOperator(M, K, **dict(zip(p.noise, noise, strict=True)))

    def evaluate_linear_op(self, linear_op: Any) -> Tensor:
        U = reference.covariance_matrix(linear_op.M, linear_op.K, **linear_op.noise)
        return U.to(linear_op.dtype)


class TestDiagonal(Battery, unittest.TestCase):
    noise = "diagonal"


class TestFull(Battery, unittest.TestCase):
    noise = "full"


class TestDiagonalBatch(Battery, unittest.TestCase):
    noise, batches = "diagonal", (2,)


class TestFullBatch(Battery, unittest.TestCase):
    noise, batches = "full", (2,)


class TestDiagonalTwoBatches(Battery, unittest.TestCase):
    noise, batches = "diagonal", (3, 2)


class TestFullBroadcastBatches(Battery, unittest.TestCase):
    noise, batches = "full", {"Y": (), "M": (2,), "K": (), "noise": (3, 1)}
