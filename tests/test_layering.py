"""The source of the package: imports go in one direction, and devices are named."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "torch_kronlik"

# A package is one level with all its modules, which may import each other.
LEVEL = {
    "_version": 0.0,
    "autocast": 0.5,  # keeps everything in full precision inside autocast regions
    "capture": 0.5,  # what is different while a CUDA graph is captured
    "batch": 0.5,  # shapes
    "errors": 0.7,  # messages
    "checks": 0.8,  # arguments looked at
    "machine": 0.8,  # its memory
    "levels": 0.8,  # every private name of torch
    "records": 0.8,  # arguments and results of operators
    "derivatives": 1.0,  # how a native op gets its derivative rules
    "guards": 1.5,  # checks of values, as operators
    "ops": 1.5,
    "blocks": 1.8,
    "noise": 2.0,  # what Σ can be
    "rows": 2.0,  # what M can be
    "factor": 2.3,  # the routes
    "rules": 2.5,  # the differentiable operations over a factorisation
    "waist": 3.0,  # everything that is asked of U
    "predict": 3.5,
    "regression": 3.6,  # fixed effects
    "covariance": 3.7,  # the public face
    "linalg": 3.8,
    "likelihood": 3.8,
    "prediction": 3.8,
    "validation": 3.8,
    "loss": 4.0,
    "distribution": 4.0,
    "estimates": 4.2,
    "information": 4.5,
    "gpytorch": 5.0,
    "__init__": 6.0,
    "__main__": 7.0,
}
SIDE_ROOMS = {"matcalc", "expm"}  # may import derivatives and ops; only __init__ imports them
ORACLE = "reference"  # imports nothing of the package; only __main__, the self-check, imports it
ADAPTERS = {"gpytorch"}  # need other libraries, so nothing imports them


def unit(path: Path) -> str:
    """The name that has a level: the module, or the package that it is in."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_units(path: Path) -> set[str]:
    """Names right below torch_kronlik that a file imports, at the top or inside a function."""
    package = ["torch_kronlik", *path.relative_to(PACKAGE).parts[:-1]]
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            names |= {f"{stem}.{alias.name}" for alias in node.names}
    parts = [name.split(".") for name in names]
    return {p[1] if len(p) > 1 else "__init__" for p in parts if p[0] == "torch_kronlik"}


def allowed(importer: str, imported: str) -> bool:
    if imported == importer:
        return True
    if imported == ORACLE:
        return importer == "__main__"
    if imported in ADAPTERS or importer == ORACLE:
        return False
    if imported in SIDE_ROOMS:
        return importer in {"__init__", "__main__"}
    if importer in SIDE_ROOMS:
        return imported in {"autocast", "batch", "errors", "checks", "levels", "derivatives", "ops"}
    # A name that is no module is a public one, taken from __init__.
    return LEVEL[importer] > LEVEL.get(imported, LEVEL["__init__"])


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    importer = unit(path)
    assert importer in {*LEVEL, *SIDE_ROOMS, ORACLE}, f"{importer} has no level in this file"
    wrong = {name for name in imported_units(path) if not allowed(importer, name)}
    assert not wrong, f"{importer} must not import {sorted(wrong)}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_the_waist_is_narrow(path: Path) -> None:
    """What is above it reaches the routes and the rules through it alone."""
    above = unit(path) in LEVEL and LEVEL[unit(path)] > LEVEL["waist"]
    assert not (above and imported_units(path) & {"rules", "factor"})


def test_package_is_found() -> None:
    assert PACKAGE / "reference.py" in FILES


MAKE_TENSORS = {
    "arange", "as_tensor", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn",
    "randperm", "sparse_csr_tensor", "tensor", "tril_indices", "triu_indices", "zeros",
}  # fmt: skip


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.name)
def test_whoever_makes_a_tensor_says_where(path: Path) -> None:
    """A default device would hide it from every other test."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            of_torch = isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"
            if of_torch and node.func.attr in MAKE_TENSORS:
                named = any(keyword.arg in ("device", None) for keyword in node.keywords)
                assert named, f"line {node.lineno}: {ast.unparse(node)}"
