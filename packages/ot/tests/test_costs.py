"""Ground costs: values against definitions and stored OTT results, gradients of conjugates, proximal operators by brute force."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from poise.ot import (
    L1,
    STVS,
    Cosine,
    Cost,
    ElasticCost,
    Euclidean,
    EuclideanP,
    KOverlap,
    PNormP,
    SphereGeodesic,
    SqEuclidean,
    SqPNorm,
    TranslationCost,
)
from poise.ot.costs import cost as cost_module

GOLDEN = Path(__file__).parent / "golden" / "monge-gap"
OTT_COSTS: dict[str, Cost] = {
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
TRANSLATION: list[TranslationCost] = [
    SqEuclidean(),
    Euclidean(),
    EuclideanP(1.5),
    EuclideanP(3.0),
    PNormP(1.0),
    PNormP(1.5),
    PNormP(4.0),
    SqPNorm(1.5),
    SqPNorm(3.0),
    ElasticCost(L1(), lam=0.7, rho=1.3),
    ElasticCost(STVS(0.5), lam=0.7, rho=1.3),
    ElasticCost(KOverlap(2), lam=0.7, rho=1.3),
]
CONJUGATE = [cost for cost in TRANSLATION if cost not in (Euclidean(), PNormP(1.0))]
ANGULAR: list[Cost] = [Cosine(), SphereGeodesic()]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unit(points: Tensor) -> Tensor:
    return points / points.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize("case", ["case_a", "case_b"])
@pytest.mark.parametrize("name", OTT_COSTS)
def test_cost_matrix_is_that_of_ott(case: str, name: str) -> None:
    golden = np.load(GOLDEN / f"{case}.npz")
    suffix = "_sphere" if name == "geodesic" else ""
    x, t = torch.from_numpy(golden["x" + suffix]), torch.from_numpy(golden["t" + suffix])
    matrix = OTT_COSTS[name].pairwise(x, t)
    torch.testing.assert_close(matrix, torch.from_numpy(golden[f"{name}_cost_matrix"]), rtol=0, atol=1e-12)
    assert OTT_COSTS[name].elementwise(x, t).mean().item() == pytest.approx(golden[f"{name}_displacement"], abs=1e-12)


@pytest.mark.parametrize("cost", TRANSLATION + ANGULAR, ids=repr)
@pytest.mark.parametrize("batch", [(), (3,)], ids=["single", "batch"])
def test_pairwise_and_elementwise_are_the_same_function(cost: Cost, batch: tuple[int, ...]) -> None:
    x, y = unit(normal(*batch, 5, 4)), unit(normal(*batch, 6, 4, seed=1))
    expected = torch.stack([cost.elementwise(x, y[..., j : j + 1, :].expand_as(x)) for j in range(6)], dim=-1)
    torch.testing.assert_close(cost.pairwise(x, y), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("cost", TRANSLATION, ids=repr)
def test_translation_costs_are_h_of_the_difference(cost: TranslationCost) -> None:
    x, y = normal(7, 3), normal(7, 3, seed=1)
    torch.testing.assert_close(cost.elementwise(x, y), cost.h(x - y))
    torch.testing.assert_close(cost.pairwise(x + 5, y + 5), cost.pairwise(x, y), rtol=1e-9, atol=1e-9)


def test_squared_distances_far_from_the_origin_keep_their_digits() -> None:
    x, y = normal(50, 3).float() + 1000, normal(40, 3, seed=1).float() + 1000
    exact = torch.cdist(x.double(), y.double()).square()
    torch.testing.assert_close(SqEuclidean().pairwise(x, y).double(), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cost", TRANSLATION + ANGULAR, ids=repr)
def test_gradients_are_finite_where_points_meet(cost: Cost) -> None:
    x = unit(normal(4, 3)).float()
    y = x.clone().requires_grad_()
    (cost.pairwise(x, y).sum() + cost.elementwise(x, y).sum()).backward()
    assert y.grad is not None
    assert torch.isfinite(y.grad).all()


def test_euclidean_distance_has_gradient_zero_where_points_meet() -> None:
    y = torch.zeros(1, 3, requires_grad=True)
    for distance in (Euclidean().pairwise(torch.zeros(1, 3), y), Euclidean().elementwise(torch.zeros(1, 3), y)):
        assert torch.autograd.grad(distance.sum(), y)[0].abs().max() == 0


@pytest.mark.parametrize("cost", TRANSLATION + ANGULAR, ids=repr)
def test_pairwise_gradients_match_finite_differences(cost: Cost) -> None:
    x, y = unit(normal(3, 4)).requires_grad_(), unit(normal(2, 4, seed=1)).requires_grad_()
    torch.autograd.gradcheck(cost.pairwise, (x, y))


@pytest.mark.parametrize("cost", CONJUGATE, ids=repr)
def test_gradient_of_the_conjugate_inverts_the_gradient(cost: SqEuclidean) -> None:
    """grad h*(grad h(z)) = z, the property from which optimal maps get their form."""
    z = (normal(64, 4) * 2).requires_grad_()
    (w,) = torch.autograd.grad(cost.h(z).sum(), z)
    torch.testing.assert_close(cost.grad_h_star(w), z.detach(), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("cost", CONJUGATE, ids=repr)
def test_gradient_of_the_conjugate_maximises(cost: SqEuclidean) -> None:
    """grad h*(w) = argmax_z <w, z> - h(z): no point nearby or far away does better."""
    w = normal(32, 4, seed=3) * 2
    best = cost.grad_h_star(w)
    others = torch.cat([best + scale * normal(200, 32, 4, seed=4) for scale in (1e-3, 0.1, 1.0, 5.0)])

    def objective(z: Tensor) -> Tensor:
        return (w * z).sum(-1) - cost.h(z)

    assert (objective(others) <= objective(best) + 1e-12).all()


@pytest.mark.parametrize("cost", CONJUGATE, ids=repr)
def test_gradient_of_the_conjugate_is_differentiable_at_zero(cost: SqEuclidean) -> None:
    w = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, -3.0]], dtype=torch.float64, requires_grad=True)
    value = cost.grad_h_star(w)
    value.sum().backward()
    assert torch.equal(value[0], torch.zeros(3, dtype=torch.float64))
    assert w.grad is not None
    assert torch.isfinite(w.grad).all()


def test_euclidean_distance_and_exponent_one_have_no_conjugate_gradient() -> None:
    assert not hasattr(Euclidean(), "grad_h_star")
    for cost in (PNormP(1.0), SqPNorm(1.0), EuclideanP(1.0)):
        with pytest.raises(ValueError, match="not strictly convex"):
            cost.grad_h_star(torch.ones(1, 2))


# Proximal operators of the elastic costs


def brute_force_prox(reg: STVS | KOverlap | L1, z: float, tau: float) -> float:
    grid = torch.linspace(-abs(z) - 0.1, abs(z) + 0.1, 400_001, dtype=torch.float64).unsqueeze(-1)
    objective = (grid.squeeze(-1) - z).square() / 2 + tau * reg(grid)
    return grid[objective.argmin()].item()


@pytest.mark.parametrize("reg", [L1(), STVS(0.7), STVS(1.5)], ids=repr)
@given(z=st.floats(-6, 6), tau=st.sampled_from([0.3, 1.0, 1.7, 2.0, 3.5]))
@settings(max_examples=15, deadline=None)
def test_scalar_prox_is_the_global_minimiser(reg: L1 | STVS, z: float, tau: float) -> None:
    exact = reg.prox(torch.tensor([z], dtype=torch.float64), tau)
    objective = [
        (w - z) ** 2 / 2 + tau * reg(torch.tensor([w], dtype=torch.float64)).item()
        for w in (exact.item(), brute_force_prox(reg, z, tau))
    ]
    assert objective[0] <= objective[1] + 1e-6


def test_exact_and_ott_prox_of_stvs_agree_at_tau_one_only() -> None:
    z = torch.linspace(-4, 4, 81, dtype=torch.float64)
    torch.testing.assert_close(STVS(0.8).prox(z, 1.0), STVS(0.8, prox_form="ott").prox(z, 1.0))
    assert (STVS(0.8).prox(z, 0.5) - STVS(0.8, prox_form="ott").prox(z, 0.5)).abs().max() > 0.01


@pytest.mark.parametrize("tau", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_k_overlap_prox_is_the_minimiser(k: int, tau: float) -> None:
    reg, z = KOverlap(k), normal(20, 5, seed=5) * 2
    best = reg.prox(z, tau)

    def objective(w: Tensor) -> Tensor:
        return (w - z).square().sum(-1) / 2 + tau * reg(w)

    nearby = torch.cat([best + scale * normal(500, 20, 5, seed=6) for scale in (1e-4, 1e-2, 0.3)])
    assert (objective(nearby) >= objective(best) - 1e-12).all()


@pytest.mark.parametrize("k", [1, 2, 4])
def test_k_overlap_gradients_match_finite_differences(k: int) -> None:
    z = normal(12, 5, seed=9)
    z[:, 0] *= 1e-3  # small entries next to large ones, where the sums in the algorithm cancel
    z.requires_grad_()
    torch.autograd.gradcheck(lambda points: KOverlap(k).prox(points, 0.7), z)
    torch.autograd.gradcheck(KOverlap(k), z)


@pytest.mark.parametrize("k", [1, 2, 4, 6])
def test_k_overlap_norm_is_its_variational_definition(k: int) -> None:
    """min over theta in (0, 1]^d with sum k of sum z^2 / theta, the minimiser being clip(alpha |z|, 0, 1)."""
    z = normal(10, 6, seed=7)
    low, high = torch.zeros(10, 1), torch.full((10, 1), 1e6, dtype=torch.float64)
    for _ in range(200):
        middle = (low + high) / 2
        small = (middle * z.abs()).clamp(0, 1).sum(-1, keepdim=True) < k
        low, high = torch.where(small, middle, low), torch.where(small, high, middle)
    theta = (high * z.abs()).clamp(0, 1)
    torch.testing.assert_close(KOverlap(k)(z), (z.square() / theta).sum(-1) / 2, rtol=1e-6, atol=1e-9)


def test_k_overlap_is_l1_squared_for_one_and_l2_squared_for_all() -> None:
    z = normal(10, 6, seed=8)
    torch.testing.assert_close(KOverlap(1)(z), z.abs().sum(-1).square() / 2)
    torch.testing.assert_close(KOverlap(6)(z), z.square().sum(-1) / 2)
    torch.testing.assert_close(KOverlap(6).prox(z, 0.5), z / 1.5)


def test_k_overlap_of_a_k_sparse_vector_is_half_its_square() -> None:
    for support in itertools.combinations(range(5), 2):
        z = torch.zeros(5, dtype=torch.float64)
        z[list(support)] = torch.tensor([2.0, -1.0], dtype=torch.float64)
        torch.testing.assert_close(KOverlap(2)(z), torch.tensor(2.5, dtype=torch.float64))
        torch.testing.assert_close(KOverlap(2).prox(z, 1.0), z / 2)


def test_k_overlap_prox_survives_equal_and_zero_entries() -> None:
    for z in (torch.zeros(4), torch.ones(4), torch.tensor([1.0, 1.0, 0.0, 0.0])):
        assert torch.isfinite(KOverlap(2).prox(z, 1.0)).all()
    torch.testing.assert_close(KOverlap(2).prox(torch.ones(4), 1.0), torch.full((4,), 1 / 3))


@pytest.mark.parametrize("reg", [STVS(), KOverlap(3)], ids=repr)
def test_blocks_do_not_change_value_or_gradient(reg: STVS | KOverlap, monkeypatch: pytest.MonkeyPatch) -> None:
    cost = ElasticCost(reg)
    x, y = normal(9, 4).requires_grad_(), normal(5, 4, seed=1).requires_grad_()
    weights = normal(9, 5, seed=2)
    whole = cost.pairwise(x, y)
    gradients = torch.autograd.grad((whole * weights).sum(), (x, y))
    monkeypatch.setattr(cost_module, "BLOCK", 2 * y.numel())
    parts = cost.pairwise(x, y)
    torch.testing.assert_close(parts, whole)
    for one, other in zip(torch.autograd.grad((parts * weights).sum(), (x, y)), gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("cost", TRANSLATION + ANGULAR, ids=repr)
def test_half_precision_and_autocast_are_computed_in_single(cost: Cost) -> None:
    x, y = unit(normal(6, 4)).bfloat16(), unit(normal(5, 4, seed=1)).bfloat16()
    matrix = cost.pairwise(x, y)
    assert matrix.dtype == cost.elementwise(x, x).dtype == torch.float32
    torch.testing.assert_close(matrix.double(), cost.pairwise(x.double(), y.double()), rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(cost.pairwise(x, y), matrix)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PNormP(0.5), "p must lie"),
        (lambda: SqPNorm(float("inf")), "p must lie"),
        (lambda: STVS(0.0), "gamma must be positive"),
        (lambda: STVS(prox_form="approximate"), "prox_form"),
        (lambda: KOverlap(0), "k must be at least 1"),
        (lambda: KOverlap(3)(torch.ones(2)), "at most the dimension 2"),
        (lambda: ElasticCost(L1(), rho=0.0), "rho > 0"),
        (lambda: ElasticCost(L1(), lam=-1.0), "lam >= 0"),
    ],
)
def test_bad_parameters_are_named(make: object, message: str) -> None:
    assert callable(make)
    with pytest.raises(ValueError, match=message):
        make()
