"""Missing entries: value and all gradients, us and the peers in turns in one process.

    python benchmarks/missing.py [--threads N] [--repeats N] [--seconds S]

The peers are dense torch, the Cholesky factor of U at the observed entries, and GPyTorch's masked
path (``MaskedLinearOperator`` around its Kronecker operators), with its default settings, by which
it is stochastic at these sizes. Neither is run where U would have more than 8000 rows. Times are
medians, ratios medians over turns. Error is that of our value against dense torch.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial

import linear_operator
import torch
from cases import Case, mask, problem
from common import error, markdown, ratio, take_turns, warm_up
from peers import _covariance_operator as covariance_operator
from torch import Tensor

import torch_kronlik as tk

CASES = [
    (Case(300, 4), 0.3),
    (Case(1000, 4), 0.3),
    (Case(5000, 4), 0.3),
    (Case(300, 4, "matern12"), 0.1),
    (Case(1000, 4, "matern12"), 0.1),
    (Case(1000, 4, "matern12"), 0.3),
    (Case(1000, 4, noise="full"), 0.3),
]
LARGEST_DENSE = 8000
Noise = dict[str, Tensor]


def dense(Y: Tensor, M: Tensor, K: Tensor, observed: Tensor, **noise: Tensor) -> Tensor:
    D, places = Y.shape[-1], observed.flatten().nonzero()[:, 0]
    t, d = places // D, places % D
    Sigma = noise["Sigma"] if "Sigma" in noise else torch.diag(noise["log_noise"].exp())
    U = M[t][:, t] * K[d][:, d] + Sigma[d][:, d] * (t[:, None] == t)
    normal = torch.distributions.MultivariateNormal(U.new_zeros(len(U)), U, validate_args=False)
    return -normal.log_prob(Y.flatten()[places])


def gpytorch(Y: Tensor, M: Tensor, K: Tensor, observed: Tensor, **noise: Tensor) -> Tensor:
    seen = observed.flatten()
    U = covariance_operator(M, K, noise)
    masked = linear_operator.operators.MaskedLinearOperator(U, seen, seen)
    quad, logdet = masked.inv_quad_logdet(Y.flatten()[seen][:, None], logdet=True)
    return 0.5 * (quad + logdet + int(seen.sum()) * torch.log(torch.tensor(2 * torch.pi).double()))


def ours(Y: Tensor, M: Tensor, K: Tensor, observed: Tensor, **noise: Tensor) -> Tensor:
    return tk.kron_gaussian_nll(Y, M, K, observed=observed, **noise)


def step(
    f: Callable[..., Tensor], inputs: tuple[Tensor, ...], noise: Noise, observed: Tensor
) -> Tensor:
    leaves = [x.detach().requires_grad_() for x in (*inputs, *noise.values())]
    value = f(*leaves[:3], observed, **dict(zip(noise, leaves[3:], strict=True)))
    torch.autograd.grad(value, leaves)
    return value.detach()


def compared(case: Case, share: float, repeats: int, seconds: float) -> list[str]:
    Y, M, K, noise = problem(case)
    observed = mask(case, share)
    method = tk.KroneckerPlusNoise(M, K, observed=observed, **noise).method_used
    peers = [dense, gpytorch] if case.T * case.D <= LARGEST_DENSE else []
    steps = [partial(step, f, (Y, M, K), noise, observed) for f in (ours, *peers)]
    turns = take_turns(steps, repeats, seconds)
    times = [1e3 * statistics.median(x) for x in zip(*turns, strict=True)]
    ratios = [f"{ratio(turns, i + 1).median:.3g}" for i in range(len(peers))]
    off = f"{error(steps[0](), steps[1]()):.0e}" if peers else ""
    cells = [*(f"{x:.3g}" for x in times), *[""] * (2 - len(peers))]
    return [f"{case}", f"{share:.0%}", method, *cells, *ratios, *[""] * (2 - len(peers)), off]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=30.0)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warm_up()
    header = ["problem", "missing", "route", "ms", "dense, ms", "GPyTorch, ms", "dense, ratio",
              "GPyTorch, ratio", "error"]  # fmt: skip
    rows = [compared(*case, options.repeats, options.seconds) for case in CASES]
    print(markdown(header, rows))


if __name__ == "__main__":
    main()
