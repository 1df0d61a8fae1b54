"""What else is asked of U with missing entries and noise by row, against its matrix."""

from __future__ import annotations

import math

import pytest
import torch
from dense_observed import (
    Observed,
    close,
    each_noise,
    each_route,
    make_observed,
    new_rows,
    skip_border,
)
from problems import normal
from torch import Tensor
from torch.func import jacfwd, jacrev

import torch_kronlik as tk

# ---------------------------------------------------------------- everything else on U


@each_route
@each_noise
def test_linear_algebra(noise: str, method: str) -> None:
    skip_border(noise, method)
    p = make_observed(6, 3, mask="random_60", noise=noise)
    U, seen = p.covariance(method=method), p.observed.flatten()
    Q = p.padded_inverse()
    y = torch.where(seen, p.Y.flatten(), 0)
    close(U.to_dense(), p.U())
    close(U.solve(p.Y), (Q @ y).reshape(p.Y.shape))
    close(U.matmul(p.Y), torch.where(seen, p.whole() @ y, 0).reshape(p.Y.shape))
    close(U.logdet(), p.U().logdet())
    close(U.diagonal(), torch.where(seen, p.whole().diagonal(), 0).reshape(p.Y.shape))
    close(U.inverse_diagonal(), Q.diagonal().reshape(p.Y.shape))
    blocks = Q.unflatten(0, p.Y.shape).unflatten(2, p.Y.shape).diagonal(dim1=0, dim2=2)
    close(U.inverse_block_diag_sum(), blocks.sum(-1))
    inv_quad, logdet = U.inv_quad_logdet(p.Y)
    constant = int(seen.sum()) * math.log(2 * math.pi)
    close(-0.5 * (inv_quad + logdet + constant), p.density().log_prob(p.y()))


@each_route
@pytest.mark.parametrize("noise", ["full", "diagonal", "scaled"])
def test_posterior(noise: str, method: str) -> None:
    skip_border(noise, method)
    S, D = 3, 2
    p, M_cross, M_test = new_rows(make_observed(6, D, mask="random_60", noise=noise), S)
    post = p.covariance(method=method).condition(p.Y, M_cross, M_test)
    cross = torch.kron(M_cross, p.K)
    mean, covariance = p.given_the_rest(cross, torch.kron(M_test.contiguous(), p.K))
    close(post.mean, mean.reshape(S, D))
    close(post.covariance_matrix, covariance)
    close(post.variance, covariance.diagonal().reshape(S, D))
    blocks = covariance.unflatten(0, (S, D)).unflatten(2, (S, D)).diagonal(dim1=0, dim2=2)
    close(post.row_covariance, blocks.movedim(-1, 0))
    base = p._replace(noise={k: x for k, x in p.noise.items() if k != "row_scale"})
    noisy = covariance + torch.block_diag(*base.row_noise()[:1].expand(S, D, D))
    close(post.observation_variance, noisy.diagonal().reshape(S, D))
    Y_new = normal(S, D, seed=4)
    expected = torch.distributions.MultivariateNormal(mean, noisy).log_prob(Y_new.flatten())
    close(post.log_prob(Y_new), expected)


@each_route
def test_derivatives_of_posterior_variances(method: str) -> None:
    p, M_cross, M_test = new_rows(make_observed(5, 2, mask="one_missing"), 2)
    leaves = {**p.leaves(), "M_cross": M_cross}

    def structured(x: dict[str, Tensor]) -> Tensor:
        q = p.at({k: v for k, v in x.items() if k != "M_cross"})
        return q.covariance(method=method).condition(q.Y, x["M_cross"], M_test).variance

    def dense(x: dict[str, Tensor]) -> Tensor:
        q = p.at({k: v for k, v in x.items() if k != "M_cross"})
        K = ((q.K + q.K.mT) / 2).contiguous()
        rows = torch.kron(x["M_cross"].contiguous(), K)
        covariance = q.given_the_rest(rows, torch.kron(M_test.contiguous(), K))[1]
        return covariance.diagonal().reshape(2, 2)

    for transform in (jacrev, lambda f: jacfwd(jacrev(f))):
        actual, expected = transform(structured)(leaves), transform(dense)(leaves)
        flat = zip(*(torch.utils._pytree.tree_leaves(x) for x in (actual, expected)), strict=True)
        for a, b in flat:
            assert (a - b).abs().max() < 1e-10


@each_route
@each_noise
def test_leaving_out(noise: str, method: str) -> None:
    """Each entry, and each row, from what is observed elsewhere."""
    skip_border(noise, method)
    p = make_observed(5, 3, mask="random_10", noise=noise)
    U = p.covariance(method=method)
    mean, variance = U.leave_one_out(p.Y)
    row_mean, row_covariance = U.leave_one_row_out(p.Y)
    whole, total, rows_total = p.whole(), 0.0, 0.0
    for t in range(5):
        others, seen = p.observed.clone(), p.observed[t]
        others[t] = False
        own = [t * 3 + int(d) for d in seen.nonzero()[:, 0]]
        if own:
            rest = p._replace(observed=others)
            m, C = rest.given_the_rest(whole[own], whole[own][:, own])
            close(row_mean[t][seen], m)
            close(row_covariance[t][seen][:, seen], C)
            rows_total += torch.distributions.MultivariateNormal(m, C).log_prob(p.Y[t][seen])
        for d in range(3):
            i, without = t * 3 + d, p.observed.clone()
            if not without[t, d]:
                assert mean[t, d] == variance[t, d] == 0
                continue
            without[t, d] = False
            rest = p._replace(observed=without)
            m, C = rest.given_the_rest(whole[[i]], whole[[i]][:, [i]])
            close(mean[t, d], m[0])
            close(variance[t, d], C[0, 0])
            total += torch.distributions.Normal(m[0], C[0, 0].sqrt()).log_prob(p.Y[t, d])
    close(U.leave_one_out_log_prob(p.Y), torch.as_tensor(total))
    close(U.leave_one_row_out_log_prob(p.Y), torch.as_tensor(rows_total))


@each_route
@each_noise
@pytest.mark.parametrize("mask", ["row", "random_60", "all"])
def test_impute(mask: str, noise: str, method: str) -> None:
    skip_border(noise, method)
    p = make_observed(5, 3, mask=mask, noise=noise)
    Y = torch.where(p.observed, p.Y, torch.nan)
    mean, variance = p.covariance(method=method).impute(Y)
    m, C = p.given_the_rest(p.whole(), p.whole())
    close(mean, torch.where(p.observed, p.Y, m.reshape(p.Y.shape)))
    close(variance, torch.where(p.observed, 0, C.diagonal().reshape(p.Y.shape)))


def test_impute_without_a_mask_wants_all_entries() -> None:
    p = make_observed(4, 2)._replace(observed=None)
    assert torch.equal(p.covariance().impute(p.Y)[0], p.Y)
    with pytest.raises(ValueError, match=r"Y must be finite, but Y\[1, 0\] is nan"):
        p.covariance().impute(p.Y.index_fill(0, torch.tensor([1]), torch.nan))


@each_route
def test_draws_have_the_covariance(method: str) -> None:
    p = make_observed(3, 2, mask="one_missing", noise="scaled")
    generator = torch.Generator(p.Y.device).manual_seed(0)
    draws = p.covariance(method=method).sample((100_000,), generator)
    assert (draws[:, ~p.observed] == 0).all()
    found = draws[:, p.observed].mT.cov()
    assert (found - p.U()).abs().max() < 0.05 * p.U().abs().max()


@each_route
def test_posterior_draws(method: str) -> None:
    p, M_cross, M_test = new_rows(make_observed(4, 2, mask="random_60"), 2)
    post = p.covariance(method=method).condition(p.Y, M_cross, M_test)
    generator = torch.Generator(p.Y.device).manual_seed(0)
    draws = post.rsample((100_000,), generator, observation_noise=True).flatten(1)
    scale = post.covariance_matrix.abs().max()
    noise = torch.block_diag(*[p.noise["Sigma"]] * 2)
    assert (draws.mean(0) - post.mean.flatten()).abs().max() < 0.03 * scale.sqrt()
    assert (draws.mT.cov() - post.covariance_matrix - noise).abs().max() < 0.05 * scale


@each_route
@each_noise
def test_information(noise: str, method: str) -> None:
    """Expected: ½ tr(Q ∂U Q ∂U) and the mean's part; observed: the Hessian."""
    skip_border(noise, method)
    p = make_observed(4, 2, mask="random_60", noise=noise)
    key = next(k for k in p.noise if k != "row_scale")
    point = torch.tensor([0.3, -0.2, 0.1, 0.4], dtype=torch.float64)

    def at(v: Tensor) -> Observed:
        M, K = p.M * (1 + v[0] ** 2), p.K + v[1].exp() * torch.ones_like(p.K)
        shifted = p.noise[key] * (2 + v[2])
        return p._replace(M=M, K=K, noise={**p.noise, key: shifted}, Y=p.Y - v[3])

    def model(v: Tensor) -> tk.KroneckerPlusNoise:
        return at(v).covariance(method=method)

    U = at(point).U()
    moves = torch.func.jacfwd(lambda v: at(v).U())(point)
    turned = [torch.linalg.solve(U, moves[..., i]) for i in range(3)]
    expected = torch.zeros(4, 4, dtype=torch.float64)
    for i, a in enumerate(turned):
        for j, b in enumerate(turned):
            expected[i, j] = 0.5 * (a @ b).trace()
    close(tk.fisher_information(model, point).matrix[:3, :3], expected[:3, :3])
    hessian = jacrev(jacrev(lambda v: at(v)._replace(Y=p.Y).nll()))(point)
    close(tk.observed_information(model, point, Y=p.Y).matrix, hessian, 1e-9)
