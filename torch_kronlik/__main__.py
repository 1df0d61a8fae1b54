"""``python -m torch_kronlik``: what is installed, whether it loads, whether it computes right.

Prints versions and compiled kernels, then compares small problems with the dense reference on
every device there is. Exits with 1 if a comparison fails.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor

import torch_kronlik as tk
from torch_kronlik import ops, reference

Check = Callable[[torch.device], tuple[Tensor, Tensor]]


def main() -> int:
    print_build()
    devices = [torch.device("cpu")]
    if torch.cuda.is_available() and ops.cuda_library() is not None:
        devices.append(torch.device("cuda"))
    failures = sum(not passes(name, device) for device in devices for name in CHECKS)
    print("ok" if not failures else f"{failures} self-checks FAILED")
    return 1 if failures else 0


def print_build() -> None:
    print(f"torch_kronlik {tk.__version__}, torch {torch.__version__}, {sys.platform}")
    native = torch.ops.torch_kronlik
    print(f"CPU kernels: loaded, running those for {native.cpu_instruction_set()}")
    print(f"LAPACK: {'called directly' if ops.HAS_LAPACK else 'through torch.linalg'}")
    if ops.cuda_library() is None:
        print("CUDA kernels: not built")
    else:
        found = ", ".join(f"sm_{arch // 10}" for arch in native.cuda_architectures())
        print(f"CUDA kernels: loaded, compiled for {found}")


def passes(name: str, device: torch.device) -> bool:
    """Run one check and print its line."""
    try:
        actual, expected = CHECKS[name](device)
    except Exception as error:  # a self-check reports every failure and goes on
        print(f"  {name} on {device.type}: FAILED, {type(error).__name__}: {error}")
        return False
    off = float((actual.cpu() - expected.cpu()).abs().max() / expected.abs().max().cpu())
    good = actual.shape == expected.shape and off < 1e-10
    print(f"  {name} on {device.type}: {'ok' if good else 'FAILED'}, relative error {off:.1e}")
    return good


# --- the checks ---------------------------------------------------------------------------------

T, D = 20, 3


def _problem(device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Y, M, K and log_noise; M has rank 12 of 20."""
    generator = torch.Generator("cpu").manual_seed(0)

    def randn(*shape: int) -> Tensor:
        drawn = torch.randn(*shape, dtype=torch.float64, device="cpu", generator=generator)
        return drawn.to(device)

    F, R = randn(T, 12), randn(D, D)
    return randn(T, D), F @ F.mT, R @ R.mT, randn(D)


def _block_diag_sum(device: torch.device) -> tuple[Tensor, Tensor]:
    _, M, _, _ = _problem(device)
    return tk.block_diag_sum(M, 5), reference.block_diag_sum(M, 5)


def _nll(method: str) -> Check:
    def check(device: torch.device) -> tuple[Tensor, Tensor]:
        Y, M, K, log_noise = _problem(device)
        actual = tk.kron_gaussian_nll(Y, M, K, log_noise=log_noise, method=method)
        return actual, reference.kron_gaussian_nll(Y, M, K, log_noise=log_noise)

    return check


def _gradients(method: str) -> Check:
    def check(device: torch.device) -> tuple[Tensor, Tensor]:
        Y, M, K, log_noise = _problem(device)
        leaves = [Y, M, K, log_noise.exp().diag()]
        return (
            _flat_gradients(
                lambda *a: tk.kron_gaussian_nll(*a[:3], Sigma=a[3], method=method), leaves
            ),
            _flat_gradients(lambda *a: reference.kron_gaussian_nll(*a[:3], Sigma=a[3]), leaves),
        )

    return check


def _flat_gradients(f: Callable[..., Tensor], leaves: list[Tensor]) -> Tensor:
    """Gradients at symmetric matrices, each made symmetric: how the two are comparable."""
    inputs = [leaf.detach().requires_grad_() for leaf in leaves]
    grads = torch.autograd.grad(f(*inputs), inputs)
    return torch.cat([grads[0].flatten(), *((g + g.mT).flatten() / 2 for g in grads[1:])])


CHECKS: dict[str, Check] = {"block_diag_sum": _block_diag_sum}
for _method in ("spectral", "cholesky", "low_rank"):
    CHECKS[f"likelihood, {_method}"] = _nll(_method)
    CHECKS[f"its gradients, {_method}"] = _gradients(_method)


if __name__ == "__main__":
    sys.exit(main())
