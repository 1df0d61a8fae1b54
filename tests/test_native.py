"""The native library: what a direct call checks, how it is loaded, and the self-check."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from torch_kronlik import __main__ as diagnostics
from torch_kronlik import ops

s, lam, Y = torch.ones(3), torch.ones(2), torch.ones(3, 2)

BAD_CALLS = [
    (ops.block_diag_sum, (torch.ones(4), 2), "at least 2 dimensions, got 1"),
    (ops.block_diag_sum, (torch.ones(4, 4), 3), "is not made of 3 x 3 blocks"),
    (ops.block_diag_sum, (torch.ones(4, 4), 0), "num_blocks must be positive, got 0"),
    (ops.block_diag_sum, (torch.ones(4, 4).half(), 2), "expected float32 or float64"),
    (ops.block_diag_expand, (torch.ones(4), 2), "at least 2 dimensions, got 1"),
    (ops.block_diag_expand, (torch.ones(4, 4), -1), "num_blocks must be positive, got -1"),
    (ops.kron_diag_sums, (s, lam.double()), "differ in dtype"),
    (ops.kron_diag_sums, (torch.tensor(1.0), lam), "at least 1 dimensions, got 0"),
    (ops.kron_diag_sums, (s.expand(2, 3), lam.expand(3, 2)), "2 and 3 do not broadcast"),
    (ops.kron_diag_scale, (s, lam, Y[:2]), "Y and s differ in T"),
    (ops.kron_diag_scale, (s, lam, Y[:, :1]), "Y and lam differ in D"),
    (ops.kron_diag_scale, (s, lam, Y.double()), "differ in dtype"),
]


@pytest.mark.parametrize(("op", "args", "message"), BAD_CALLS)
def test_direct_calls_are_checked(op, args, message):
    with pytest.raises(RuntimeError, match=message) as error:
        op(*args)
    assert "/" not in str(error.value)  # no path of the machine that built it


def test_many_batch_dimensions():
    """Dimensions that cannot be merged are counted up to sixteen, and refused beyond."""
    A = torch.randn([2] * 12 + [2, 2])
    even = A.permute(*reversed(range(12)), 12, 13)
    assert torch.equal(ops.block_diag_sum(even, 1), even)
    too_many = torch.ones(1, 1).expand([1] * 17 + [1, 1]).as_strided([2] * 17 + [0, 0], [0] * 19)
    assert ops.block_diag_sum(too_many, 1).shape == (*[2] * 17, 0, 0)


def test_missing_library_tells_how_to_build(tmp_path, monkeypatch):
    monkeypatch.setattr(ops, "_HERE", tmp_path)
    with pytest.raises(ImportError, match=r"torch_kronlik/_C is not built.*pip install .*-e \."):
        ops._load("_C")


def test_missing_cuda_kernels_tell_how_to_build():
    with pytest.raises(NotImplementedError, match=r"CUDA kernels .* not built: .*pip install"):
        ops._cuda_not_built(torch.ones(2))
    registered = torch._C._dispatch_get_registrations_for_dispatch_key("CUDA")
    assert "torch_kronlik::block_diag_sum" in registered, "natively, or to raise this error"


def test_every_op_has_all_its_rules():
    """Where no Autograd kernel is, torch.func gives silent zeros."""
    registered = torch._C._dispatch_get_registrations_for_dispatch_key("CPU")
    names = [name for name in registered if name.startswith("torch_kronlik::")]
    assert "torch_kronlik::block_diag_sum" in names
    for name in names:
        for key in ("Autograd", "FuncTorchBatched"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(name, key), (name, key)
        fake = torch._library.simple_registry.singleton.find(name).fake_impl
        assert fake.kernel is not None, (name, "fake")


def test_instruction_set_is_one_that_is_compiled_in():
    names = ("x86-64-v4", "x86-64-v3", "baseline")
    assert torch.ops.torch_kronlik.cpu_instruction_set() in names


def test_diagnostics_run_and_pass():
    done = subprocess.run(
        [sys.executable, "-m", "torch_kronlik"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for word in (
        "torch_kronlik",
        f"torch {torch.__version__}",
        "CPU kernels",
        "CUDA kernels",
        "ok",
    ):
        assert word in done.stdout


def test_a_wrong_result_fails_the_self_check(monkeypatch, capsys):
    monkeypatch.setattr(
        diagnostics, "CHECKS", {"wrong": lambda d: (torch.ones(2), torch.ones(2) + 1)}
    )
    assert diagnostics.main() == 1
    assert "FAILED" in capsys.readouterr().out


def test_a_self_check_that_raises_fails(monkeypatch, capsys):
    def broken(device: torch.device) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(diagnostics, "CHECKS", {"broken": broken})
    assert diagnostics.main() == 1
    assert "no such kernel" in capsys.readouterr().out
