"""Structured, spherical and conditional maps, their estimators, known-map pairs, and the reader of single-cell files."""

import itertools
from functools import partial

import pytest
import torch
from torch import nn

from poise.core.schedule import Piecewise
from poise.ot import (
    ConservativePenalty,
    Cosine,
    ElasticCost,
    Euclidean,
    MongeGapLoss,
    MongeMapEstimator,
    MongeMapObjective,
    PNormP,
    RidgePotential,
    SinkhornLoss,
    SphereMap,
    SqEuclidean,
    SqPNorm,
    StructuredMap,
    gaussian_map,
    l2_uvp,
    monge_gap_from_samples,
    potential_gradient,
    sinkhorn_divergence,
    sinkhorn_points,
)


def points(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def perceptron(inputs, outputs, width=16):
    return nn.Sequential(nn.Linear(inputs, width), nn.GELU(), nn.Linear(width, outputs))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# Structured maps


@pytest.mark.parametrize("cost", [SqEuclidean(), PNormP(1.5), PNormP(3.0), SqPNorm(1.5), ElasticCost(lam=0.3)])
def test_structured_map_of_a_constant_field_minimises_the_cost_plus_a_linear_term(cost):
    w = points(2)
    z = points(1, 2, seed=1) - StructuredMap(cost, lambda x: w.expand_as(x))(points(1, 2, seed=1))  # grad h*(w)
    others = z + 0.1 * points(500, 2, seed=2)
    assert (cost.h(z) - z @ w <= cost.h(others) - others @ w + 1e-9).all()


@pytest.mark.parametrize("cost", [Euclidean(), Cosine()])
def test_structured_map_needs_a_strictly_convex_h(cost):
    with pytest.raises(TypeError, match=r"grad_h_star|InvertibleCost"):
        StructuredMap(cost, nn.Identity())


def test_structured_map_of_a_concave_potential_has_no_gap():
    x, cost = points(64, 2), SqEuclidean()
    rotate = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)
    optimal = StructuredMap(cost, lambda z: -0.5 * z)  # T = 1.25 x, a gradient of a convex function
    turned = StructuredMap(cost, lambda z: z @ rotate.T)
    gaps = [monge_gap_from_samples(x, transport(x), cost, relative_epsilon=1e-3)[0] for transport in (optimal, turned)]
    assert gaps[0] < 0.02 * x.square().sum(-1).mean()
    assert gaps[1] > 10 * gaps[0]


def test_maps_report_a_field_of_the_wrong_shape():
    with pytest.raises(ValueError, match="keep the shape"):
        StructuredMap(SqEuclidean(), nn.Linear(2, 3).double())(points(4, 2))
    with pytest.raises(ValueError, match="keep the shape"):
        ConservativePenalty(nn.Linear(2, 3).double())(points(4, 2))


def test_sphere_map_has_unit_norm_and_a_tangent_jacobian():
    transport = SphereMap(perceptron(3, 3).double())
    x = points(16, 3)
    t = transport(x)
    torch.testing.assert_close(t.norm(dim=-1), torch.ones(16, dtype=torch.float64))
    for sample in x[:4]:
        jacobian = torch.func.jacrev(transport)(sample)
        torch.testing.assert_close(
            transport(sample) @ jacobian, torch.zeros(3, dtype=torch.float64), atol=1e-12, rtol=0
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_sphere_map_is_finite_where_the_field_vanishes(dtype):
    x = torch.zeros(2, 3, dtype=dtype, requires_grad=True)
    t = SphereMap(nn.Identity())(x)
    t.sum().backward()
    assert torch.isfinite(t).all()
    assert torch.isfinite(x.grad).all()
    with pytest.raises(ValueError, match="eps"):
        SphereMap(nn.Identity(), eps=0.0)


# The conservative penalty


def test_conservative_penalty_over_all_signs_is_the_exact_asymmetry():
    matrix = points(3, 3)
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=3)), dtype=torch.float64)
    value = ConservativePenalty(lambda x: x @ matrix.T)(points(5, 3), probes=signs[:, None].expand(8, 5, 3))
    torch.testing.assert_close(value, (matrix - matrix.T).square().sum())


def test_conservative_penalty_of_a_network_matches_its_jacobians():
    field = perceptron(2, 2).double()
    x = points(6, 2)
    jacobians = torch.func.vmap(torch.func.jacrev(field))(x)
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=2)), dtype=torch.float64)
    value = ConservativePenalty(field)(x, probes=signs[:, None].expand(4, 6, 2))
    torch.testing.assert_close(value, (jacobians - jacobians.mT).square().sum((-2, -1)).mean())


def test_conservative_penalty_vanishes_for_a_gradient_field():
    potential = RidgePotential(3, generator=torch.Generator().manual_seed(0)).double()
    value = ConservativePenalty(lambda x: potential_gradient(potential, x), probes=4)(points(8, 3))
    assert value < 1e-20


def test_conservative_penalty_is_unbiased_and_repeats_under_a_seed():
    matrix = points(4, 4)
    penalty = ConservativePenalty(lambda x: x @ matrix.T, probes=2_000)
    draws = [penalty(points(4, 4), generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    exact = (matrix - matrix.T).square().sum()
    assert abs(draws[2] - exact) < 0.05 * exact


def test_training_on_the_conservative_penalty_symmetrises_the_jacobian():
    field = nn.Linear(3, 3).double()
    penalty = ConservativePenalty(field, probes=8)
    before = (field.weight - field.weight.T).norm().item()
    optimizer = torch.optim.SGD(field.parameters(), lr=0.02)
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        optimizer.zero_grad()
        penalty(points(4, 3), generator=generator).backward()
        optimizer.step()
    assert (field.weight - field.weight.T).norm() < 1e-2 * before


def test_conservative_penalty_is_the_same_without_gradients_and_zero_for_a_constant_field():
    x, signs = points(5, 3), points(2, 5, 3).sign()
    penalty = ConservativePenalty(perceptron(3, 3).double())
    with torch.no_grad():
        quiet = penalty(x, signs)
    assert not quiet.requires_grad
    assert not x.requires_grad
    torch.testing.assert_close(quiet, penalty(x, signs).detach())
    assert ConservativePenalty(lambda z: torch.ones_like(z))(x, signs) == 0


def test_conservative_penalty_refuses_probes_of_another_shape():
    penalty = ConservativePenalty(nn.Identity())
    with pytest.raises(ValueError, match=r"\(k, 4, 2\)"):
        penalty(points(4, 2), probes=points(4, 2))
    with pytest.raises(ValueError, match="probes"):
        ConservativePenalty(nn.Identity(), probes=0)


# The objective and its estimator


EXACT = partial(sinkhorn_points, tol=1e-9)


def test_sinkhorn_loss_is_the_divergence_at_a_tenth_of_the_mean_squared_distance():
    t, y = points(20, 2), points(24, 2, seed=1) + 1
    epsilon = 0.1 * torch.cdist(y, y).square().mean()
    expected = sinkhorn_divergence(t, y, epsilon, SqEuclidean(), solver=EXACT)
    torch.testing.assert_close(SinkhornLoss(solver=EXACT)(t, y), expected, atol=1e-7, rtol=1e-6)
    torch.testing.assert_close(SinkhornLoss(float(epsilon), solver=EXACT)(t, y), expected, atol=1e-7, rtol=1e-6)


def test_static_b_shifts_the_value_and_keeps_the_gradient():
    y = points(24, 2, seed=1) + 1
    values, gradients = [], []
    for static_b in (False, True):
        for seed in (0, 2):
            t = points(20, 2, seed=seed).requires_grad_()
            value = SinkhornLoss(static_b=static_b, solver=EXACT)(t, y)
            (gradient,) = torch.autograd.grad(value, t)
            values.append(value.detach())
            gradients.append(gradient)
    torch.testing.assert_close(values[0] - values[2], values[1] - values[3], atol=1e-7, rtol=0)
    assert (values[0] - values[2]).abs() > 1e-3
    torch.testing.assert_close(gradients[:2], gradients[2:], atol=1e-9, rtol=1e-7)


def test_sinkhorn_loss_over_batches_is_their_mean():
    t, y = points(3, 12, 2), points(3, 14, 2, seed=1)
    loss = SinkhornLoss(solver=EXACT)
    torch.testing.assert_close(loss(t, y), torch.stack([loss(*pair) for pair in zip(t, y, strict=True)]).mean())


def refuse(*_):
    raise AssertionError("the regularizer was computed")


def test_zero_strength_computes_no_regularizer():
    x, y = points(16, 2), points(16, 2, seed=1)
    schedule = Piecewise((2,), (0.0, 1.0))
    for strength in (0.0, schedule):
        terms = MongeMapObjective(regularizer=refuse, strength=strength)(
            nn.Identity(), x, y, reference=points(4, 2), step=1
        )
        assert terms.regularizer is None
        torch.testing.assert_close(terms.total, terms.fitting)
    with pytest.raises(AssertionError, match="was computed"):
        MongeMapObjective(regularizer=refuse, strength=schedule)(nn.Identity(), x, y, step=2)


def test_objective_adds_the_weighted_terms():
    x, y = points(16, 2), points(16, 2, seed=1)
    field = perceptron(2, 2).double()
    gap, conservative = MongeGapLoss(SqEuclidean()), ConservativePenalty(field, weight=0.5)
    terms = MongeMapObjective(regularizer=gap, strength=3.0, conservative=conservative)(field, x, y)
    assert terms.regularizer is not None
    assert terms.conservative is not None
    torch.testing.assert_close(terms.total.detach(), terms.fitting + 3 * terms.regularizer + terms.conservative)


def test_gap_is_measured_on_the_reference():
    x, y, reference = points(16, 2), points(16, 2, seed=1), points(10, 2, seed=2)
    seen = []

    def regularizer(a, b):
        seen.append((a, b))
        return b.sum() * 0

    transport = perceptron(2, 2).double()
    objective = MongeMapObjective(regularizer=regularizer)
    objective(transport, x, y)
    objective(transport, x, y, reference)
    assert torch.equal(seen[0][0], x)
    assert torch.equal(seen[1][0], reference)
    torch.testing.assert_close(seen[1][1], transport(reference))


def test_negative_strength_is_refused():
    with pytest.raises(ValueError, match="strength"):
        MongeMapObjective(strength=-1.0)
    with pytest.raises(ValueError, match="step 1"):
        MongeMapObjective(regularizer=refuse, strength=Piecewise((1,), (0.0, -1.0)))(
            nn.Identity(), points(4, 2), points(4, 2), step=1
        )


def test_estimator_fits_a_map_and_the_gap_makes_it_optimal():
    x, y = points(1_000, 2, dtype=torch.float32), points(1_000, 2, seed=1, dtype=torch.float32)
    y = y * torch.tensor([1.5, 0.5]) + 2
    matrix, offset = gaussian_map(x, y)
    optimal = x @ matrix + offset
    errors = {}
    for strength in (0.0, 1.0):
        torch.manual_seed(0)
        net = perceptron(2, 2, 32)
        with torch.no_grad():  # start turned by 120 degrees: fitting alone has no reason to turn back
            turn = torch.tensor([[-0.5, -0.866], [0.866, -0.5]])
            net[0].weight.copy_(torch.cat([turn, -turn] * 8) * 0.5)
            net[2].weight.copy_((torch.eye(2).repeat(1, 16) * torch.tensor([1.0, 1, -1, -1]).repeat(8)) / 8)
        estimator = MongeMapEstimator(
            net,
            regularizer=MongeGapLoss(SqEuclidean(), relative_epsilon=0.02),
            strength=strength,
            optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-2),
        )
        estimator.fit(x.split(100), y.split(100), steps=200)
        errors[strength] = l2_uvp(estimator.transform(x), optimal).item()
        assert estimator.history[-1].fitting < 0.05 * estimator.history[0].fitting
        assert len(estimator.history) == 200
    assert errors[1.0] < 10
    assert errors[0.0] > 5 * errors[1.0]


def test_estimator_advances_schedules_and_takes_tuples_and_a_reference():
    x, y = points(32, 2, dtype=torch.float32), points(32, 2, seed=1, dtype=torch.float32)
    gap = MongeGapLoss(SqEuclidean(), Piecewise((1,), (0.0, 1.0)))
    estimator = MongeMapEstimator(perceptron(2, 2), regularizer=gap, strength=Piecewise((3,), (1.0, 0.0)))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=16)
    estimator.fit(loader, y.split(16), reference=[points(8, 2, dtype=torch.float64)], steps=4)
    assert [float(terms.regularizer or 0) > 0 for terms in estimator.history] == [False, True, True, False]
    assert not estimator.transform(x).requires_grad


def test_transform_uses_evaluation_mode_and_leaves_the_mode_as_it_was():
    net = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.9))
    estimator = MongeMapEstimator(net)
    x = points(8, 2, dtype=torch.float32)
    torch.testing.assert_close(estimator.transform(x), net[0](x).detach())
    assert net.training
