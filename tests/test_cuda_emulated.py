"""The CUDA kernels on the CPU, thread by emulated thread (tests/cuda_emulation): their index
arithmetic, barriers, shared memory and numbers, in two orders of the threads."""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import test_block_diag_sum as blocks
import test_kron_diag as kron
import test_pivoted_cholesky as pivoted
import test_small as small
import torch
from battery import NOISES, laid_out
from conftest import check_close
from cuda_emulation.build import build, compiler
from problems import BATCHES, LAYOUTS, kinds_for, make_problem, relayout
from test_whiten import arguments, dense_noise
from torch import Tensor

from torch_kronlik import ops

NAMES = ("block_diag_sum", "block_diag_expand", "kron_diag_sums", "kron_diag_scale",
         "pivoted_cholesky", "small_nll", "whiten_small")  # fmt: skip
each_noise = pytest.mark.parametrize("noise", NOISES)


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if sys.platform != "linux" or compiler() is None:
        pytest.skip("needs Linux and a C++ compiler")
    path = build(tmp_path_factory.mktemp("cuda_emulation"))
    torch.ops.load_library(str(path))
    return ctypes.CDLL(str(path))


@pytest.fixture(autouse=True, params=["forward", "backward"])
def emulated(
    library: ctypes.CDLL, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """`ops.X` is the emulated kernel, in one order of the threads; new memory is full of NaN."""
    library.emulation_set_backward(request.param == "backward")
    for name in NAMES:
        monkeypatch.setattr(ops, name, getattr(torch.ops.torch_kronlik_emulated, name))
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def cpu(name: str) -> Any:
    return getattr(torch.ops.torch_kronlik, name)


# ---------------------------------------------------------------- the emulator itself


def self_test(name: str, threads: int = 64, values: int = 1) -> tuple[Tensor, Tensor]:
    x = torch.randn(threads, dtype=torch.float64)
    return x, torch.ops.torch_kronlik_emulated.self_test(name, x, values)


def test_shuffles() -> None:
    x, out = self_test("shuffles", values=8)
    lane = torch.arange(64)
    up, down = x[(lane - 3).clamp_min(0)], x[(lane + 3).clamp_max(63)]
    halves = x.view(4, 16)
    votes = ((x.view(2, 32) > 0).double() * 2.0 ** torch.arange(32)).sum(1)
    expected = [
        x.view(2, 32).sum(1).repeat_interleave(32),
        torch.where(lane % 8 >= 3, up, x),
        torch.where(lane % 8 < 5, down, x),
        x.view(8, 8)[:, 5].repeat_interleave(8),
        halves.flip(1).reshape(-1),
        votes.repeat_interleave(32),
        (halves > 2).any(1).double().repeat_interleave(16),
        (halves > -2).all(1).double().repeat_interleave(16),
    ]
    torch.testing.assert_close(out, torch.stack(expected, 1), rtol=1e-14, atol=1e-14)


def test_shared_memory() -> None:
    x, out = self_test("reversed")
    assert torch.equal(out[:, 0], x.flip(0))


FAULTS = {
    "no_barrier": r"a race with thread \d+ for shared memory",
    "warp_barrier": r"a race with thread \d+ for shared memory, after the barrier at self_test.cu",
    "shuffle_as_barrier": r"a race with thread \d+ for shared memory",
    "overwritten_too_early": r"a race with thread \d+ for global memory",
    "returns_early": "thread 7 has returned",
    "two_barriers": r"thread 0 waits at self_test.cu:\d+, but thread 32 waits at self_test.cu",
    "absent_lane": r"waits at self_test.cu:\d+, but thread 9 has returned",
    "not_aligned": "not aligned at self_test.cu",
    "past_the_end": "index out of bounds at self_test.cu",
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_faulty_kernel_is_an_error(name: str) -> None:
    with pytest.raises(RuntimeError, match=FAULTS[name]):
        self_test(name)
    x, out = self_test("reversed")  # the next launch is not harmed
    assert torch.equal(out[:, 0], x.flip(0))


def test_shared_memory_begins_as_nan() -> None:
    self_test("reversed")
    assert self_test("not_written")[1].isnan().all()


# ---------------------------------------------------------------- the sum of blocks

MORE_SHAPES = [
    ((), 3, 64, 64),
    ((2,), 130, 4, 4),
    ((), 2, 33, 31),
    ((), 1, 1, 1030),
    ((3,), 7, 8, 16),
]


@pytest.mark.parametrize(("batch", "p", "m", "n"), blocks.SHAPES + MORE_SHAPES)
def test_block_diag_sum(batch: Any, p: int, m: int, n: int, dtype: torch.dtype) -> None:
    A = torch.randn(*batch, p * m, p * n, dtype=dtype)
    for how in LAYOUTS:
        X = A.unsqueeze(0) if how == "batch_inside" and not batch else A
        X = relayout(X, how)
        out = ops.block_diag_sum(X, p)
        assert out.is_contiguous()
        check_close(out, blocks.loop(X, p), floor=math.sqrt(p))


@pytest.mark.parametrize("view", blocks.VIEWS)
def test_block_diag_sum_of_views(view: str, dtype: torch.dtype) -> None:
    X = blocks.VIEWS[view](torch.randn(2, 3, 40, 36, dtype=dtype))
    A = X if X.shape[-2] % 2 == 0 and X.shape[-1] % 2 == 0 else X[..., :-1]
    check_close(ops.block_diag_sum(A, 2), blocks.loop(A, 2), floor=1.0)


@pytest.mark.parametrize("pitch", [(192, 16), (193, 16), (12 * 19, 19)])
def test_block_diag_sum_where_rows_or_matrices_are_not_aligned(
    pitch: tuple[int, int], dtype: torch.dtype
) -> None:
    A = torch.randn(3 * 12 * 20, dtype=dtype).as_strided((3, 12, 16), (*pitch, 1))
    check_close(ops.block_diag_sum(A, 2), blocks.loop(A, 2), floor=1.0)


def compact(p: int, m: int, n: int, dtype: torch.dtype) -> Tensor:
    """(p·m, p·n) in little memory: entries off the diagonal blocks share it with those on them.

    Small integers, whose sums are exact in any order.
    """
    storage = torch.randint(-9, 10, (p * (m * n + n),), dtype=torch.int64).to(dtype)
    return storage.as_strided((p * m, p * n), (n, 1))


def exact_sum(A: Tensor, p: int) -> Tensor:
    m, n = A.shape[0] // p, A.shape[1] // p
    shape, stride = (p, m, n), (m * A.stride(0) + n * A.stride(1), *A.stride())
    return A.as_strided(shape, stride).sum(0)


# Parts: thousands of them, added by many threads; one for each thread, of several chunks; one or
# two, in large matrices.
PARTS = [(5000, 2, 2, 1), (300, 9, 12, 1), (130, 4, 16, 4100), (17, 300, 260, 1), (3, 5, 12, 2)]


@pytest.mark.parametrize(("p", "m", "n", "batch"), PARTS)
@pytest.mark.parametrize("transposed", [False, True])
def test_block_diag_sum_of_many_and_of_large_blocks(
    p: int, m: int, n: int, batch: int, transposed: bool, dtype: torch.dtype
) -> None:
    A = compact(p, m, n, dtype)
    expected = exact_sum(A, p)
    A, expected = (A.mT, expected.mT) if transposed else (A, expected)
    out = ops.block_diag_sum(A.expand(batch, *A.shape), p)
    assert torch.equal(out, expected.expand(out.shape))
    assert out.is_contiguous()


@pytest.mark.parametrize(("batch", "p", "m", "n"), blocks.SHAPES)
def test_block_diag_expand(batch: Any, p: int, m: int, n: int, dtype: torch.dtype) -> None:
    S = torch.randn(*batch, n, m, dtype=dtype).mT
    out = ops.block_diag_expand(S, p)
    assert out.is_contiguous()
    assert torch.equal(out, blocks.expand_dense(S, p))


@pytest.mark.parametrize("shape", [(0, 4, 4), (3, 0, 4), (3, 4, 0), (0, 0), (2, 0, 0)])
def test_empty_blocks(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    out = ops.block_diag_sum(torch.zeros(shape, dtype=dtype), 2)
    assert out.shape == (*shape[:-2], shape[-2] // 2, shape[-1] // 2)
    assert ops.block_diag_expand(out, 2).shape == shape


def test_only_the_diagonal_blocks_are_read() -> None:
    blocks.test_only_the_diagonal_blocks_are_read("cpu")


# ---------------------------------------------------------------- the middle of the spectral form


@pytest.mark.parametrize("T", [0, 1, 31, 32, 33, 63, 64, 65, 200])
@pytest.mark.parametrize("D", [1, 3, 4, 8, 16, 19])
def test_kron_diag(T: int, D: int, dtype: torch.dtype) -> None:
    given = kron.problem(T, D, dtype=dtype, scale=100.0)
    kron.check(ops.kron_diag(*given), kron.expected(*given))


def test_kron_diag_of_no_columns(dtype: torch.dtype) -> None:
    given = kron.problem(5, 0, dtype=dtype)
    kron.check(ops.kron_diag(*given), kron.expected(*given))


@pytest.mark.parametrize("batch", kron.BATCHES, ids=str)
def test_kron_diag_batches(batch: Any, dtype: torch.dtype) -> None:
    kron.test_batches_broadcast(batch, dtype, "cpu")


def test_kron_diag_layouts(dtype: torch.dtype) -> None:
    kron.test_strided_inputs_are_read_in_place(dtype, "cpu")


# ---------------------------------------------------------------- pivoted Cholesky


@pytest.mark.parametrize(("T", "r"), [(1, 1), (31, 2), (33, 33), (64, 3), (257, 7)])
def test_pivoted_cholesky(T: int, r: int, dtype: torch.dtype) -> None:
    M = pivoted.of_rank(T, r, dtype=dtype)
    for how in LAYOUTS[:4]:
        F, rank = ops.pivoted_cholesky(relayout(M, how), min(T, r + 2))
        assert rank == r
        assert not F[:, r:].any()
        check_close(F @ F.mT, M.double())


def test_pivoted_cholesky_of_a_batch(dtype: torch.dtype) -> None:
    """Each matrix as it is alone: some of low rank, one that is not, one that is indefinite."""
    good = [pivoted.of_rank(24, r, dtype=dtype) for r in (0, 2, 5, 12)]
    M = torch.stack([*good, -good[1], torch.full_like(good[0], math.nan)]).view(2, 3, 24, 24)
    F, rank = ops.pivoted_cholesky(M, 8)
    assert rank.tolist() == [[0, 2, 5], [-1, -1, -1]]
    check_close(F[0] @ F[0].mT, M[0].double())
    assert torch.equal(rank, cpu("pivoted_cholesky")(M, 8)[1])


@pytest.mark.parametrize("name", pivoted.INDEFINITE)
def test_pivoted_cholesky_refuses(name: str, dtype: torch.dtype) -> None:
    M = pivoted.INDEFINITE[name].to(dtype)
    for max_rank in {0, 1, len(M)}:
        assert ops.pivoted_cholesky(M, max_rank)[1] == -1


def test_pivoted_cholesky_of_a_smooth_kernel(dtype: torch.dtype) -> None:
    M = make_problem(150, 1, kind="rbf", dtype=dtype).M
    F, rank = ops.pivoted_cholesky(M, 60)
    assert 0 < rank <= 40
    check_close(F @ F.mT, M.double())


def test_pivoted_cholesky_takes_the_first_of_equals(dtype: torch.dtype) -> None:
    eye = torch.eye(70, dtype=dtype)
    assert torch.equal(ops.pivoted_cholesky(eye, 70)[0], eye)


def test_pivoted_cholesky_of_nothing(dtype: torch.dtype) -> None:
    for shape in ((0, 0), (2, 0, 0), (0, 3, 3)):
        F, rank = ops.pivoted_cholesky(torch.zeros(shape, dtype=dtype), shape[-1])
        assert F.shape == shape
        assert not rank.any()


# ---------------------------------------------------------------- small problems

SIZES = [(1, 1), (1, 16), (31, 3), (32, 4), (33, 8), (63, 1), (64, 3), (64, 16), (0, 3), (2, 3)]


@each_noise
@pytest.mark.parametrize("size", SIZES)
def test_small_nll(size: tuple[int, int], noise: str, dtype: torch.dtype) -> None:
    small.check(make_problem(*size, noise=noise, dtype=dtype))


@each_noise
@pytest.mark.parametrize("kind", kinds_for(torch.float64))
def test_small_nll_of_every_kind(kind: str, noise: str, dtype: torch.dtype) -> None:
    if kind in kinds_for(dtype):
        small.check(make_problem(6, 3, kind=kind, noise=noise, dtype=dtype))


@each_noise
@pytest.mark.parametrize("batch", BATCHES)
def test_small_nll_batches(batch: str, noise: str, dtype: torch.dtype) -> None:
    small.check(make_problem(4, 3, batch=BATCHES[batch], noise=noise, dtype=dtype))


@each_noise
@pytest.mark.parametrize("how", LAYOUTS)
def test_small_nll_layouts(how: str, noise: str, dtype: torch.dtype) -> None:
    small.check(laid_out(make_problem(5, 3, batch=(3,), noise=noise, dtype=dtype), how))


@each_noise
@pytest.mark.parametrize("size", [(9, 3), (31, 16), (33, 4), (33, 9)])
def test_small_nll_without_gradients(size: tuple[int, int], noise: str, dtype: torch.dtype) -> None:
    p = make_problem(*size, batch=(3,), noise=noise, dtype=dtype)
    with_gradients, alone = small.native(p), small.native(p, gradients=False)
    assert torch.equal(with_gradients[0], alone[0])
    assert all(x.shape == (0,) for x in alone[1:5])


def spoiled(noise: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Y, M, K, noise: a batch in which every problem but the last two has something wrong."""
    p = make_problem(5, 3, batch=(9,), noise=noise, dtype=dtype)
    Y, M, K, N = p.Y.clone(), p.M.clone(), p.K.clone(), p.noise.popitem()[1].clone()
    Y[0, 4, 2] = math.nan
    M[1, 0, 4] = math.inf
    M[2] = -100 * M[2]
    K[3, 1, 1] = math.nan
    N[(4, *(0 for _ in N.shape[1:]))] = math.nan
    N[5] = -N[5] if noise == "full" else -1500
    M[6, 2, 2] = torch.finfo(dtype).max
    return Y, M, K, N


@each_noise
def test_small_nll_finds_the_same_faults_as_on_the_cpu(noise: str, dtype: torch.dtype) -> None:
    given = (*spoiled(noise, dtype), noise == "full", True)
    found, expected = ops.small_nll(*given), cpu("small_nll")(*given)
    assert found[-1].tolist() == expected[-1].tolist()
    assert found[-1][:7].all()
    # a captured graph cannot raise: then this is what tells
    assert all(x[:7].isnan().all() for x in found[:-1])
    for x, y in zip(found[:-1], expected[:-1], strict=True):
        check_close(x[7:], y[7:].double(), condition=10.0, dims=min(x.dim() - 1, 2))


# ---------------------------------------------------------------- K and the noise together


def check_whitened(K: Tensor, Sigma: Tensor | None, log_noise: Tensor | None) -> None:
    """RᵀΣR = I and RᵀKR = Diag(λ), λ ascending; numbers that are unique as on the CPU."""
    noise = log_noise if Sigma is None else Sigma
    given = (K, noise, Sigma is not None)
    (lam, R, *found), (cpu_lam, _, *expected) = (
        ops.whiten_small(*given),
        cpu("whiten_small")(*given),
    )
    for x, y in zip((lam, *found), (cpu_lam, *expected), strict=True):
        torch.testing.assert_close(x, y)
    assert bool((lam.diff() >= 0).all())
    rounding = 100 * K.shape[-1] * torch.finfo(K.dtype).eps
    S, K, R, lam = (x.double() for x in (dense_noise(Sigma, log_noise), K, R, lam))
    eye = torch.eye(K.shape[-1], dtype=torch.float64)
    torch.testing.assert_close(R.mT @ S @ R, eye.expand(R.shape), rtol=0, atol=rounding)
    left = (R.mT @ K @ R - torch.diag_embed(lam)).abs()
    assert bool((left <= rounding * lam.abs().amax(-1)[..., None, None]).all())


@each_noise
@pytest.mark.parametrize("D", [1, 2, 3, 4, 7, 8, 15, 16])
def test_whiten_small(D: int, noise: str, dtype: torch.dtype) -> None:
    check_whitened(*arguments(D, noise, batch=(20,), dtype=dtype))


@each_noise
@pytest.mark.parametrize("kind", ["rank_one_K", "zero_K", "identity"])
def test_whiten_small_of_singular_and_equal(kind: str, noise: str, dtype: torch.dtype) -> None:
    check_whitened(*arguments(6, noise, kind=kind, batch=(3,), dtype=dtype))


@each_noise
@pytest.mark.parametrize("how", LAYOUTS)
def test_whiten_small_layouts(how: str, noise: str, dtype: torch.dtype) -> None:
    given = arguments(3, noise, batch=(2, 3), dtype=dtype)
    relaid = [None if x is None else relayout(x, how) for x in given]
    check_whitened(*relaid)  # type: ignore[arg-type]


@each_noise
@pytest.mark.parametrize("batch", BATCHES)
def test_whiten_small_batches(batch: str, noise: str, dtype: torch.dtype) -> None:
    check_whitened(*arguments(3, noise, batch=BATCHES[batch], dtype=dtype))


@each_noise
def test_whiten_small_finds_the_same_faults(noise: str, dtype: torch.dtype) -> None:
    _, _, K, N = spoiled(noise, dtype)
    given = (K, N, noise == "full")
    assert torch.equal(ops.whiten_small(*given)[3], cpu("whiten_small")(*given)[3])
