"""Checks of the arguments that every function shares; each error names the argument."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Integral

import torch
from torch import Tensor

from .batch import broadcast

__all__ = [
    "check_broadcast",
    "check_data",
    "check_dtype",
    "check_eigen",
    "check_floating",
    "check_integer",
    "check_noise",
    "check_observed",
    "check_row_noise",
    "check_rows",
    "check_sample_shape",
    "check_square",
    "check_uniform",
    "versions",
]


def check_dtype(name: str, value: object) -> None:
    """A float32 or float64 tensor, of any layout."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name} must be float32 or float64, got {value.dtype}")


def check_floating(**tensors: object) -> None:
    """Each is a dense float32 or float64 tensor."""
    for name, value in tensors.items():
        check_dtype(name, value)
        assert isinstance(value, Tensor)
        if value.layout != torch.strided or value.is_nested:
            kind = "a nested tensor" if value.is_nested else f"layout {value.layout}"
            raise TypeError(f"{name} must be a dense tensor, got {kind}")


def check_integer(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (Integral, torch.SymInt)):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")


def check_uniform(**tensors: Tensor) -> None:
    """All are dense tensors that share the dtype and the device of the first."""
    check_floating(**tensors)
    (first_name, first), *others = tensors.items()
    for name, x in others:
        if x.dtype != first.dtype:
            raise TypeError(
                f"{name} must have the dtype of {first_name}, {first.dtype}, got {x.dtype}"
            )
        if x.device != first.device:
            raise ValueError(
                f"{name} must be on the device of {first_name}, {first.device}, got {x.device}"
            )


def check_square(name: str, X: Tensor, letter: str, size: int | None = None) -> None:
    shape = f"(*batch, {letter}, {letter})"
    if X.dim() < 2 or X.shape[-2] != X.shape[-1]:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(X.shape)}")
    if size is not None and X.shape[-1] != size:
        raise ValueError(
            f"{name} must have shape {shape} with {letter} = {size}, got {tuple(X.shape)}"
        )


def check_eigen(s: Tensor, P: Tensor) -> None:
    """Eigenvalues and eigenvectors of M that fit together and are constants."""
    check_uniform(**{"M.eigenvectors": P, "M.eigenvalues": s})
    if s.shape != P.shape[:-1]:
        raise ValueError(
            f"M.eigenvalues must have shape {tuple(P.shape[:-1])} to go with eigenvectors of shape "
            f"{tuple(P.shape)}, got {tuple(s.shape)}"
        )
    if s.requires_grad or P.requires_grad:
        name = "M.eigenvalues" if s.requires_grad else "M.eigenvectors"
        raise ValueError(
            f"{name} requires a gradient, but a SymmetricEigen is a constant: detach it"
        )


def check_noise(K: Tensor, Sigma: Tensor | None, log_noise: Tensor | None) -> None:
    """Exactly one noise argument, matching the D outputs of K."""
    if (Sigma is None) == (log_noise is None):
        got = "neither" if Sigma is None else "both"
        raise ValueError(f"exactly one of Sigma and log_noise must be given, got {got}")
    D = K.shape[-1]
    if D == 0:
        raise ValueError(f"K must have shape (*batch, D, D) with D >= 1, got {tuple(K.shape)}")
    if Sigma is not None:
        _check_agreement("Sigma", Sigma, "(*batch, D, D)", 2, K)
    if log_noise is not None:
        _check_agreement("log_noise", log_noise, "(*batch, D)", 1, K)


def check_row_noise(
    shape: tuple[int, int],
    Sigma: Tensor | None,
    log_noise: Tensor | None,
    row_Sigma: Tensor | None,
    row_log_noise: Tensor | None,
    row_scale: Tensor | None,
) -> None:
    """Exactly one noise argument of four, the last two for each of the T rows; a scale for each row
    beside one of the first two."""
    given = {"Sigma": Sigma, "log_noise": log_noise, "row_Sigma": row_Sigma}
    given["row_log_noise"] = row_log_noise
    names = [name for name, x in given.items() if x is not None]
    if len(names) != 1:
        raise ValueError(
            f"exactly one of {', '.join(given)} must be given, got {' and '.join(names) or 'none'}"
        )
    T, D = shape
    if D == 0:
        raise ValueError("K must have shape (*batch, D, D) with D >= 1, got D = 0")
    cores = {
        "row_Sigma": (row_Sigma, (T, D, D), "(*batch, T, D, D)"),
        "row_log_noise": (row_log_noise, (T, D), "(*batch, T, D)"),
        "row_scale": (row_scale, (T,), "(*batch, T)"),
    }
    for name, (x, core, words) in cores.items():
        if x is not None and tuple(x.shape[-len(core) :]) != core:
            raise ValueError(
                f"{name} must have shape {words} with T = {T} (from M) and D = {D} (from K), "
                f"got {tuple(x.shape)}"
            )
    if row_scale is not None and names[0].startswith("row"):
        raise ValueError(f"row_scale goes with Sigma or log_noise, got {names[0]}")


def check_observed(observed: object, shape: tuple[int, int], device: torch.device) -> None:
    if not isinstance(observed, Tensor) or observed.dtype != torch.bool:
        got = observed.dtype if isinstance(observed, Tensor) else type(observed).__name__
        raise TypeError(f"observed must be a tensor of bool, such as ~Y.isnan(), got {got}")
    if observed.device != device:
        raise ValueError(f"observed must be on the device of K, {device}, got {observed.device}")
    if tuple(observed.shape[-2:]) != shape:
        raise ValueError(
            f"observed must have shape (*batch, T, D) with T = {shape[0]} (from M) and "
            f"D = {shape[1]} (from K), got {tuple(observed.shape)}"
        )


def _check_agreement(name: str, noise: Tensor, shape: str, core: int, K: Tensor) -> None:
    """K and the noise have the same D. Where each is well formed, either may be the wrong one."""
    D, got = K.shape[-1], tuple(noise.shape)
    if got[-core:] == (D,) * core:
        return
    well_formed = len(got) >= core and len(set(got[-core:])) == 1
    both = f"K {tuple(K.shape)} and {name} {got} disagree about D: " if well_formed else ""
    raise ValueError(f"{both}{name} must have shape {shape} with D = {D}, got {got}")


def check_data(name: str, Y: Tensor, shape: tuple[int, int]) -> None:
    if Y.dim() < 2 or tuple(Y.shape[-2:]) != shape:
        T, D = shape
        raise ValueError(
            f"{name} must have shape (*batch, T, D) with T = {T} (from M) and D = {D} (from K), "
            f"got {tuple(Y.shape)}"
        )


def check_rows(name: str, Y: Tensor, T: int) -> None:
    if Y.dim() < 2 or Y.shape[-2] != T:
        raise ValueError(
            f"{name} must have shape (*batch, T, D) with T = {T} (from M), got {tuple(Y.shape)}"
        )


def check_sample_shape(shape: Sequence[int]) -> None:
    if isinstance(shape, int):
        raise TypeError(f"sample_shape must be a sequence of ints, such as ({shape},), got {shape}")
    is_sequence = isinstance(shape, Sequence)
    is_shape = is_sequence and all(isinstance(n, (Integral, torch.SymInt)) for n in shape)
    if not is_shape or any(n < 0 for n in shape):
        raise TypeError(f"sample_shape must be a sequence of ints, none negative, got {shape!r}")


def check_broadcast(**batches: Sequence[int]) -> torch.Size:
    """The joint batch shape."""
    try:
        return broadcast(*batches.values())
    except RuntimeError:
        shapes = ", ".join(f"{name} {tuple(shape)}" for name, shape in batches.items())
        raise ValueError(f"the batch shapes must broadcast, got {shapes}") from None


def versions(tensors: Iterable[Tensor]) -> list[int]:
    """How often each was changed in place; nothing while a graph is traced."""
    if torch.compiler.is_compiling():
        return []
    return [0 if x.is_inference() else x._version for x in tensors]
