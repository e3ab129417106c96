"""Regularization relative to the cost, and the Sinkhorn divergence."""

import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from poise.ot import (
    Euclidean,
    RelativeEpsilon,
    SqEuclidean,
    sinkhorn_divergence,
    sinkhorn_points,
)

GOLDEN = Path(__file__).parent / "golden" / "monge-gap"


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def masses(*shape: int, seed: int = 0) -> Tensor:
    return normal(*shape, seed=seed).softmax(-1)


# Regularization relative to the cost


def test_relative_epsilon_is_a_share_of_the_weighted_statistics_of_the_cost() -> None:
    x, y, a, b = normal(20, 2), normal(15, 2, seed=1), masses(20), masses(15, seed=1)
    M = SqEuclidean().pairwise(x, y)
    for epsilon, expected in (
        (RelativeEpsilon(0.1).of_matrix(M), 0.1 * M.mean()),
        (RelativeEpsilon(0.1, "std").of_matrix(M), 0.1 * M.std(correction=0)),
        (RelativeEpsilon(0.1).of_matrix(M, a, b), 0.1 * a @ M @ b),
        (RelativeEpsilon(0.1, "std").of_points(x, y, SqEuclidean()), 0.1 * M.std(correction=0)),
        (RelativeEpsilon(0.1, cost=SqEuclidean()).of_points(x, y, Euclidean(), a, b), 0.1 * a @ M @ b),
    ):
        torch.testing.assert_close(epsilon, expected)


def test_relative_epsilon_of_points_in_blocks_is_that_of_the_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = normal(2, 50, 3), normal(2, 40, 3, seed=1)
    monkeypatch.setattr("poise.ot.entropic.epsilon.BLOCK", 500)
    torch.testing.assert_close(
        RelativeEpsilon(0.1, "std").of_points(x, y, Euclidean()),
        RelativeEpsilon(0.1, "std").of_matrix(Euclidean().pairwise(x, y)),
    )


# The Sinkhorn divergence


@pytest.mark.parametrize("case", ["case_a", "case_b"])
def test_divergence_value_and_gradient_are_those_of_ott(case: str) -> None:
    golden = np.load(GOLDEN / f"{case}.npz")
    t, y = torch.from_numpy(golden["t"]).requires_grad_(), torch.from_numpy(golden["y"])
    value = sinkhorn_divergence(t, y, RelativeEpsilon(0.1), tol=1e-10, max_iter=100_000)
    (gradient,) = torch.autograd.grad(value, t)
    assert value.item() == pytest.approx(golden["sinkdiv_t_y"], rel=1e-6)
    torch.testing.assert_close(gradient, torch.from_numpy(golden["sinkdiv_grad_t"]), rtol=0, atol=1e-6)
    static = sinkhorn_divergence(t, y, float(golden["sinkdiv_epsilon"]), static_b=True, tol=1e-10, max_iter=100_000)
    (same,) = torch.autograd.grad(static, t)
    assert static.item() == pytest.approx(golden["sinkdiv_static_b"], rel=1e-6)
    torch.testing.assert_close(same, gradient)


def test_divergence_is_that_of_geomloss() -> None:
    geomloss = pytest.importorskip("geomloss")
    x, y, eps = normal(30, 2), normal(40, 2, seed=1) + 0.5, 0.2
    loss = geomloss.SamplesLoss(
        "sinkhorn", p=2, blur=math.sqrt(eps / 2), scaling=0.99, debias=True, backend="tensorized"
    )
    ours = sinkhorn_divergence(x, y, eps, tol=1e-9)
    assert ours.item() == pytest.approx(2 * loss(x, y).item(), rel=1e-3)


@given(
    n=st.integers(2, 12), m=st.integers(2, 12), d=st.integers(1, 4), eps=st.floats(0.3, 5.0), seed=st.integers(0, 999)
)
@settings(max_examples=10, deadline=None)
def test_divergence_is_symmetric_nonnegative_and_zero_for_equal_samples(
    n: int, m: int, d: int, eps: float, seed: int
) -> None:
    x, y = normal(n, d, seed=seed), normal(m, d, seed=seed + 1)
    solve = partial(sinkhorn_divergence, eps=eps, tol=1e-8, max_iter=20_000)
    assert abs(solve(x, x[torch.randperm(n)])) < 1e-7
    assert solve(x, y) > -1e-7
    torch.testing.assert_close(solve(x, y), solve(y, x), rtol=0, atol=1e-7)


def test_divergence_of_repeated_points_is_that_of_weighted_points() -> None:
    x, y = normal(6, 2), normal(5, 2, seed=1)
    a, b = torch.tensor([1, 2, 1, 1, 3, 2]), torch.tensor([2, 2, 1, 1, 1])
    for static in (False, True):
        weighted = sinkhorn_divergence(
            x, y, 0.3, static_b=static, a=a / a.sum().double(), b=b / b.sum().double(), tol=1e-10
        )
        repeated = sinkhorn_divergence(
            x.repeat_interleave(a, 0), y.repeat_interleave(b, 0), 0.3, static_b=static, tol=1e-10
        )
        expected = repeated
        if static:  # the entropy of the repeated target is larger: its self-transport in the same convention
            own = sinkhorn_points(y, None, 0.3, SqEuclidean(), b / b.sum().double(), tol=1e-10)
            full = sinkhorn_divergence(x.repeat_interleave(a, 0), y.repeat_interleave(b, 0), 0.3, tol=1e-10)
            shares = b / b.sum().double()
            expected = full + own.value / 2 - 0.3 * torch.xlogy(shares, shares).sum()
        torch.testing.assert_close(weighted, expected)


def test_divergence_of_a_batch_is_one_number_per_problem() -> None:
    x, y = normal(3, 10, 2), normal(3, 12, 2, seed=1)
    batch = sinkhorn_divergence(x, y, tol=1e-9)
    torch.testing.assert_close(batch, torch.stack([sinkhorn_divergence(x[i], y[i], tol=1e-9) for i in range(3)]))
