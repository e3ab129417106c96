"""The Monge gap: stored OTT results, the laws that the paper states, and agreement with exact optimal transport."""

import copy
import math
import warnings
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from poise.core.schedule import Linear
from poise.ot import (
    L1,
    STVS,
    ConvergenceWarning,
    Cosine,
    Cost,
    ElasticCost,
    Euclidean,
    EuclideanP,
    MongeGapLoss,
    PNormP,
    RelativeEpsilon,
    SphereGeodesic,
    SphereMap,
    SqEuclidean,
    SqPNorm,
    monge_gap,
    monge_gap_from_samples,
    sinkhorn_points,
)

GOLDEN = Path(__file__).parent / "golden" / "monge-gap"
COSTS: dict[str, Cost] = {
    "sqeuclidean": SqEuclidean(),
    "euclidean": Euclidean(),
    "pnormp_1.5": PNormP(1.5),
    "sqpnorm_1.5": SqPNorm(1.5),
    "euclideanp_1.5": EuclideanP(1.5),
    "cosine": Cosine(),
    "elastic_l1": ElasticCost(L1()),
    "elastic_stvs": ElasticCost(STVS(gamma=1.0)),
    "geodesic": SphereGeodesic(),
}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unit(points: Tensor) -> Tensor:
    return points / points.norm(dim=-1, keepdim=True)


def gap(x: Tensor, t: Tensor, cost: Cost = COSTS["sqeuclidean"], **settings: Any) -> float:
    return monge_gap_from_samples(x, t, cost, tol=1e-5, max_iter=20_000, **settings)[0].item()


# Stored results of OTT


@pytest.mark.parametrize("method", ["absorption", "log", "streaming"])
@pytest.mark.parametrize("name", COSTS)
@pytest.mark.parametrize("case", ["case_a", "case_b"])
def test_value_and_gradient_are_those_of_ott(
    case: str, name: str, method: Literal["absorption", "log", "streaming"]
) -> None:
    golden = np.load(GOLDEN / f"{case}.npz")
    suffix = "_sphere" if name == "geodesic" else ""
    x, t = torch.from_numpy(golden["x" + suffix]), torch.from_numpy(golden["t" + suffix]).requires_grad_()
    value, result = monge_gap_from_samples(
        x,
        t,
        COSTS[name],
        relative_epsilon=float(golden["rel_epsilon"]),
        tol=1e-9,
        max_iter=100_000,
        solver=partial(sinkhorn_points, method=method),
    )
    (gradient,) = torch.autograd.grad(value, t)
    exact = {"rel": 1e-5 if case == "case_a" and name in ("geodesic", "cosine") else 1e-6}
    assert result.converged
    assert result.reg.item() == pytest.approx(golden[f"{name}_epsilon"], rel=1e-12)
    assert result.value.item() == pytest.approx(golden[f"{name}_ent_reg_cost"], **exact)
    assert value.item() == pytest.approx(golden[f"{name}_gap"], **exact)
    matrix = torch.from_numpy(golden[f"{name}_cost_matrix"])
    assert (result.plan() * matrix).sum().item() == pytest.approx(golden[f"{name}_primal_cost"], rel=1e-5)
    torch.testing.assert_close(gradient, torch.from_numpy(golden[f"{name}_grad_t"]), rtol=0, atol=1e-5)


# Bounds and zeros


@given(
    n=st.integers(2, 12),
    d=st.integers(1, 3),
    name=st.sampled_from(sorted(COSTS)),
    relative=st.floats(0.01, 10.0),
    seed=st.integers(0, 999),
)
@settings(max_examples=25, deadline=None)
def test_gap_is_at_least_epsilon_log_n(n: int, d: int, name: str, relative: float, seed: int) -> None:
    """The plan that pairs every point with its image is feasible; holds before convergence too."""
    x, t = normal(n, d + 1, seed=seed), normal(n, d + 1, seed=seed + 1)
    if name == "geodesic":
        x, t = unit(x), unit(t)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        value, result = monge_gap_from_samples(x, t, COSTS[name], relative_epsilon=relative, max_iter=seed % 50 + 1)
    assert value.item() >= result.reg.item() * math.log(n) - 1e-9


@pytest.mark.parametrize("cost", [SqEuclidean(), Euclidean(), PNormP(1.5), ElasticCost(L1())], ids=repr)
def test_identity_has_gap_zero(cost: Cost) -> None:
    x = normal(20, 2)
    assert gap(x, x, cost, epsilon=1e-4) == pytest.approx(1e-4 * math.log(20), abs=1e-6)


def test_translation_has_gap_zero_for_the_squared_distance() -> None:
    x = normal(20, 2)
    assert gap(x, x + torch.tensor([3.0, -1.0]), epsilon=1e-4) == pytest.approx(1e-4 * math.log(20), abs=1e-6)


def test_reflecting_a_symmetric_cloud_has_a_large_gap() -> None:
    """The image is the cloud itself, so the optimal cost is 0 and the gap is all of the displacement, 4 E|x|^2."""
    half = normal(10, 2)
    x = torch.cat([half, -half])
    displacement = 4 * x.square().sum(-1).mean().item()
    assert gap(x, -x, epsilon=1e-3) == pytest.approx(displacement, rel=0.01)


def test_gradient_of_a_convex_potential_has_gap_zero_and_a_rotation_has_not() -> None:
    x = normal(24, 2)
    root = normal(2, 2, seed=1)
    positive = root @ root.T + 0.1 * torch.eye(2, dtype=torch.float64)
    small = 1e-4
    assert gap(x, x @ positive, epsilon=small) == pytest.approx(small * math.log(24), abs=1e-5)
    turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)
    assert gap(x, x @ turn.T, epsilon=small) > 0.1


@pytest.mark.parametrize("cost", [SqEuclidean(), Euclidean(), PNormP(1.5)], ids=repr)
def test_permuting_the_images_of_an_optimal_map_raises_the_gap_by_the_cost(cost: Cost) -> None:
    x, y = normal(16, 2), normal(16, 2, seed=1) + 1
    weights = np.full(16, 1 / 16)
    matrix = cost.pairwise(x, y)
    best = torch.from_numpy(ot.emd(weights, weights, matrix.numpy())).argmax(1)
    exact = float(ot.emd2(weights, weights, matrix.numpy()))
    optimal, shuffled = y[best], y[best.roll(3)]
    assert cost.elementwise(x, optimal).mean().item() == pytest.approx(exact)
    small = 2e-4
    assert gap(x, optimal, cost, epsilon=small) == pytest.approx(0, abs=2 * small * math.log(16))
    expected = cost.elementwise(x, shuffled).mean().item() - exact
    assert gap(x, shuffled, cost, epsilon=small) == pytest.approx(expected, abs=2 * small * math.log(16))


def test_monotone_map_on_the_line_has_gap_zero_for_every_convex_cost() -> None:
    x = normal(20, 1)
    for cost in (SqEuclidean(), PNormP(1.5), EuclideanP(3.0)):
        assert gap(x, x.sinh() + 2, cost, epsilon=1e-4) == pytest.approx(1e-4 * math.log(20), abs=2e-4)


# Invariances


@given(seed=st.integers(0, 999), shift=st.floats(-5, 5), scale=st.floats(0.1, 10))
@settings(max_examples=10, deadline=None)
def test_gap_ignores_order_and_common_translation_and_scales_with_the_cost(
    seed: int, shift: float, scale: float
) -> None:
    x, t = normal(12, 2, seed=seed), normal(12, 2, seed=seed + 1)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
    value = gap(x, t, relative_epsilon=0.1)
    assert gap(x[order], t[order], relative_epsilon=0.1) == pytest.approx(value, rel=1e-5)
    assert gap(x + shift, t + shift, relative_epsilon=0.1) == pytest.approx(value, rel=1e-5)
    root = math.sqrt(scale)
    assert gap(root * x, root * t, relative_epsilon=0.1) == pytest.approx(scale * value, rel=1e-5)


def test_problems_of_a_batch_do_not_mix() -> None:
    """Contexts far apart: the gap of all points at once would call a swap between contexts an improvement."""
    x = normal(3, 10, 2) + torch.arange(3)[:, None, None]
    t = normal(3, 10, 2, seed=1)
    solve = partial(monge_gap_from_samples, relative_epsilon=0.05, tol=1e-8)
    batch, result = solve(x, t)
    torch.testing.assert_close(batch, torch.stack([solve(x[i], t[i])[0] for i in range(3)]))
    torch.testing.assert_close(result.reg, 0.05 * SqEuclidean().pairwise(x, t).mean((-2, -1)))
    together, _ = solve(x.flatten(0, 1), t.flatten(0, 1))
    assert together > batch.mean()


# Gradients


@pytest.mark.parametrize("name", COSTS)
def test_gradient_matches_finite_differences(name: str) -> None:
    x, t = normal(6, 2), normal(6, 2, seed=1)
    if name == "geodesic":
        x, t = unit(x), unit(t) * 0.95  # away from the ends of arccos

    def value(x: Tensor, t: Tensor) -> Tensor:
        return monge_gap_from_samples(x, t, COSTS[name], epsilon=0.3, tol=1e-12, max_iter=20_000)[0]

    torch.autograd.gradcheck(value, (x.requires_grad_(), t.requires_grad_()), atol=1e-5)


def test_gradient_is_that_of_500_unrolled_iterations() -> None:
    x, t, epsilon = normal(10, 2), normal(10, 2, seed=1).requires_grad_(), 0.5
    M = (x[:, None] - t).square().sum(-1)
    g = torch.zeros(10)
    for _ in range(500):
        f = -epsilon * (math.log(10) + ((g - M) / epsilon).logsumexp(1))
        g = -epsilon * (math.log(10) + ((f[:, None] - M) / epsilon).logsumexp(0))
    (expected,) = torch.autograd.grad((x - t).square().sum(-1).mean() - f.mean() - g.mean(), t)
    value, _ = monge_gap_from_samples(x, t, epsilon=epsilon, tol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(value, t)[0], expected, rtol=0, atol=1e-8)


def test_relative_epsilon_carries_no_gradient() -> None:
    x, t = normal(10, 2), normal(10, 2, seed=1).requires_grad_()
    relative, result = monge_gap_from_samples(x, t, relative_epsilon=0.1, tol=1e-10)
    absolute, _ = monge_gap_from_samples(x, t, epsilon=result.reg.item(), tol=1e-10)
    torch.testing.assert_close(*(torch.autograd.grad(value, t)[0] for value in (relative, absolute)))


def test_gap_moves_a_network_towards_an_optimal_map() -> None:
    """A rotation is the worst map onto its image; following the gradient of the gap alone undoes most of it."""
    x = normal(32, 2)
    matrix = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([matrix], lr=0.05)
    first = gap(x, x @ matrix.detach().T)
    for _ in range(100):
        optimizer.zero_grad()
        monge_gap(lambda points: points @ matrix.T, x, relative_epsilon=0.05).backward()
        optimizer.step()
    assert gap(x, x @ matrix.detach().T) < 0.1 * first


def test_gradient_on_the_sphere_is_tangent_and_images_have_norm_one() -> None:
    x = unit(normal(12, 3))
    field = normal(12, 3, seed=1).requires_grad_()
    t = SphereMap(torch.nn.Identity())(field)
    torch.testing.assert_close(t.norm(dim=-1), torch.ones(12, dtype=torch.float64))
    value, _ = monge_gap_from_samples(x, t, SphereGeodesic(), relative_epsilon=0.05)
    (gradient,) = torch.autograd.grad(value, field)
    torch.testing.assert_close((gradient * t).sum(-1), torch.zeros(12, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("cost", [Euclidean(), SphereGeodesic(), PNormP(1.5)], ids=repr)
def test_single_precision_gradients_at_the_identity_are_finite(cost: Cost) -> None:
    x = unit(normal(30, 3)).float()
    t = x.clone().requires_grad_()
    value, _ = monge_gap_from_samples(x, t, cost)
    value.backward()
    assert t.grad is not None
    assert torch.isfinite(t.grad).all()


# The ways to choose epsilon


def test_every_rule_for_epsilon() -> None:
    x, t = normal(15, 2), normal(15, 2, seed=1)
    M, squared = Euclidean().pairwise(x, t), SqEuclidean().pairwise(x, t)
    rules: list[tuple[dict[str, Any], Tensor | float]] = [
        ({}, 0.01 * M.mean()),
        ({"epsilon": 0.3}, 0.3),
        ({"epsilon": torch.tensor(0.3)}, 0.3),
        ({"relative_epsilon": 0.2}, 0.2 * M.mean()),
        ({"relative_epsilon": "mean"}, 0.05 * M.mean()),
        ({"relative_epsilon": "std"}, 0.05 * M.std(correction=0)),
        ({"epsilon": 0.2, "relative_epsilon": "std"}, 0.2 * M.std(correction=0)),
        ({"relative_epsilon": 0.2, "epsilon_scale": "sqeuclidean"}, 0.2 * squared.mean()),
        ({"relative_epsilon": "std", "epsilon_scale": "sqeuclidean"}, 0.05 * squared.std(correction=0)),
    ]
    for rule, expected in rules:
        for method in ("auto", "streaming"):
            solver = partial(sinkhorn_points, method=method)
            _, result = monge_gap_from_samples(x, t, Euclidean(), **rule, solver=solver)
            assert result.reg.item() == pytest.approx(float(expected), rel=1e-6)


def test_epsilon_can_be_fixed_before_training() -> None:
    x, y, t = normal(15, 2), normal(12, 2, seed=1), normal(15, 2, seed=2)
    fixed = RelativeEpsilon(0.01).of_points(x, y, Euclidean())
    _, result = monge_gap_from_samples(x, t, Euclidean(), epsilon=fixed)
    torch.testing.assert_close(result.reg, 0.01 * Euclidean().pairwise(x, y).mean())


# The module


def test_loss_is_the_weighted_mean_gap_and_reports_epsilon() -> None:
    x, t = normal(3, 10, 2), normal(3, 10, 2, seed=1)
    loss = MongeGapLoss(Euclidean(), weight=2.0, relative_epsilon=0.05, tol=1e-6)
    gaps, result = monge_gap_from_samples(x, t, Euclidean(), relative_epsilon=0.05, tol=1e-6)
    torch.testing.assert_close(loss(x, t), 2 * gaps.mean())
    assert loss.value is not None
    assert loss.epsilon is not None
    assert loss.converged is not None
    torch.testing.assert_close(loss.value, gaps.mean())
    torch.testing.assert_close(loss.epsilon, result.reg)
    assert loss.converged.all()
    assert "Euclidean" in repr(loss)
    torch.testing.assert_close(copy.deepcopy(loss)(x, t), loss(x, t))


def test_weight_zero_pays_for_no_transport() -> None:
    def never(*_: object, **__: object) -> Any:
        raise AssertionError("solved a transport problem at weight 0")

    loss = MongeGapLoss(weight=Linear(0.0, 1.0, steps=1), solver=never)
    assert loss(normal(5, 2), normal(5, 2)).item() == 0
    loss.step()
    with pytest.raises(AssertionError, match="at weight 0"):
        loss(normal(5, 2), normal(5, 2))


def test_a_gap_that_did_not_converge_is_flagged() -> None:
    x, t = normal(40, 2), normal(40, 2, seed=1)
    with pytest.warns(ConvergenceWarning):
        _, result = monge_gap_from_samples(x, t, relative_epsilon=1e-4, tol=1e-9, max_iter=20)
    assert not result.converged


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single(dtype: torch.dtype) -> None:
    x, t = normal(20, 2).to(dtype), normal(20, 2, seed=1).to(dtype).requires_grad_()
    value, _ = monge_gap_from_samples(x, t, relative_epsilon=0.05)
    value.backward()
    expected = gap(x.float(), t.detach().float(), relative_epsilon=0.05)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(expected, rel=1e-3)
    assert t.grad is not None
    assert torch.isfinite(t.grad).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"t": normal(7, 2)}, r"every sample needs one image"),
        ({"t": normal(8, 3)}, r"expected x of shape"),
        ({"t": normal(8, 2) * math.nan}, "NaN or infinite"),
        ({"epsilon": 0.0}, "positive"),
        ({"epsilon": -1.0}, "positive"),
        ({"relative_epsilon": 0.0}, "positive"),
        ({"epsilon": 0.1, "relative_epsilon": 0.1}, "not both"),
        ({"epsilon": 0.1, "epsilon_scale": "sqeuclidean"}, "needs relative_epsilon"),
        ({"epsilon": torch.tensor(0.1), "relative_epsilon": "mean"}, "plain number"),
    ],
)
def test_bad_input_is_refused(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"x": normal(8, 2), "t": normal(8, 2, seed=1)}
    with pytest.raises(ValueError, match=message):
        monge_gap_from_samples(**(arguments | change))
