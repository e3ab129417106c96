"""Structured, spherical and conditional maps, their estimators, known-map pairs, and the reader of single-cell files."""

import itertools
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from poise.core.schedule import Piecewise
from poise.ot import (
    ConditionalMongeMap,
    ConditionalMongeMapEstimator,
    ConservativePenalty,
    Cosine,
    DoseContext,
    ElasticCost,
    EmbeddingContext,
    Euclidean,
    JoinedContext,
    MongeGapLoss,
    MongeMapEstimator,
    MongeMapObjective,
    OneHotContext,
    PNormP,
    RidgePotential,
    SinkhornLoss,
    SphereMap,
    SqEuclidean,
    SqPNorm,
    StructuredMap,
    gaussian_map,
    l2_uvp,
    mixture_pair,
    monge_gap_from_samples,
    potential_gradient,
    read_cells,
    read_mixture_pair,
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


# Conditional maps


def test_encoders_encode():
    torch.testing.assert_close(OneHotContext(3)(torch.tensor([2, 0])), torch.tensor([[0.0, 0, 1], [1, 0, 0]]))
    doses = DoseContext(1_000.0)(torch.tensor([0.0, 10, 100, 1_000]))
    torch.testing.assert_close(doses[[0, 3], 0], torch.tensor([0.0, 1.0]))
    steps = doses[2:, 0] - doses[1:3, 0]
    torch.testing.assert_close(steps[0], steps[1], atol=0.02, rtol=0)
    joined = JoinedContext([OneHotContext(2), DoseContext(), EmbeddingContext(4, width=5)], sizes=(1, 1, 4))
    assert joined(torch.tensor([[1.0, 1.0, 0, 0, 0, 0]])).shape == (1, 8)
    torch.testing.assert_close(joined(torch.tensor([1.0, 1.0, 0, 0, 0, 0]))[:3], torch.tensor([0.0, 1, 1]))


def test_encoders_refuse_bad_sizes():
    for make in (lambda: OneHotContext(0), lambda: DoseContext(0.0), lambda: JoinedContext([DoseContext()], sizes=())):
        with pytest.raises(ValueError, match=r"at least 1|positive|size"):
            make()
    with pytest.raises(ValueError, match="2 entries"):
        JoinedContext([DoseContext(), DoseContext()], sizes=(1, 1))(torch.zeros(3))


@pytest.mark.parametrize("residual", [False, True])
def test_conditional_map_under_one_many_and_batched_contexts_agree(residual):
    transport = ConditionalMongeMap(perceptron(2 + 3, 2), OneHotContext(3), residual=residual)
    x = points(3, 7, 2, dtype=torch.float32)
    batched = transport(x, torch.arange(3))
    for context in range(3):
        torch.testing.assert_close(batched[context], transport(x[context], torch.tensor(context)))
        torch.testing.assert_close(batched[context], transport.at(torch.tensor(context))(x[context]))
        torch.testing.assert_close(batched[context], transport(x[context], torch.full((7,), context)))
    assert not torch.allclose(batched[0], transport(x[0], torch.tensor(1)))
    with pytest.raises(ValueError, match="one context or 7"):
        transport(x[0], torch.arange(3))


def test_conditional_map_takes_descriptors():
    encoder = EmbeddingContext(4, width=6)
    transport = ConditionalMongeMap(perceptron(2 + 6, 2), encoder)
    x, descriptors = points(5, 7, 2, dtype=torch.float32), points(5, 4, seed=1, dtype=torch.float32)
    torch.testing.assert_close(transport(x, descriptors)[2], transport(x[2], descriptors[2]))
    with pytest.raises(ValueError, match="one context or 5"):
        transport(x, descriptors[:3])


def test_conditional_estimator_never_mixes_contexts_and_averages_over_them():
    seen = []

    def regularizer(x, t):
        seen.append(x)
        return t.mean() * 0 + x.mean().round()

    tasks = {
        name: (torch.tensor(index), [torch.full((4, 2), float(index))], [torch.full((4, 2), 5.0 + index)])
        for index, name in enumerate("abc")
    }
    transport = ConditionalMongeMap(perceptron(2 + 3, 2), OneHotContext(3))
    estimator = ConditionalMongeMapEstimator(transport, lambda t, y: (t - y).square().mean(), regularizer)
    estimator.fit(tasks, steps=2)
    assert len(seen) == 6
    assert all(len(x.unique()) == 1 for x in seen)
    assert estimator.history[0].regularizer == 1.0  # the mean of 0, 1 and 2


def test_conditional_estimator_learns_a_map_per_context():
    x = points(3, 200, 2, dtype=torch.float32)
    y = x.flip(1) + torch.tensor([-2.0, 0, 2])[:, None, None]
    tasks = {index: (torch.tensor(index), x[index].split(50), y[index].split(50)) for index in range(3)}
    transport = ConditionalMongeMap(perceptron(2 + 3, 2, 32), OneHotContext(3))
    estimator = ConditionalMongeMapEstimator(
        transport,
        regularizer=MongeGapLoss(SqEuclidean(), relative_epsilon=0.05),
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-2),
    )
    generator = torch.Generator().manual_seed(0)
    estimator.fit(tasks, steps=120, contexts_per_step=2, generator=generator)
    images = estimator.transform(x, torch.arange(3))
    torch.testing.assert_close(images.mean(1), y.mean(1), atol=0.25, rtol=0)
    for count in (0, 4):
        with pytest.raises(ValueError, match="contexts_per_step"):
            estimator.fit(tasks, steps=1, contexts_per_step=count)


# Pairs with a known map


@settings(max_examples=15, deadline=None)
@given(dim=st.integers(1, 12), seed=st.integers(0, 2**16))
def test_maps_of_generated_pairs_are_monotone_and_standardised(dim, seed):
    generator = torch.Generator().manual_seed(seed)
    pair = mixture_pair(dim, generator=generator)
    x, other = pair.sample_source(512, generator), pair.sample_source(512, generator)
    assert (((pair(x) - pair(other)) * (x - other)).sum(-1) > 0).all(), "a gradient of a strictly convex function"
    y = pair.sample_target(4_096, generator)
    assert y.mean(0).abs().max() < 0.15
    assert abs(y.var(0).mean() - 1) < 0.1


def test_generated_pair_has_no_monge_gap_and_is_not_affine():
    generator = torch.Generator().manual_seed(0)
    pair = mixture_pair(8, generator=generator)
    x = pair.sample_source(1_000, generator)
    cost = torch.cdist(x.double(), pair(x).double()).square().numpy()
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(cost)
    assert cost.diagonal().mean() == pytest.approx(cost[rows, columns].mean(), rel=1e-9)
    matrix, offset = gaussian_map(x, pair(x))
    assert 5 < l2_uvp(x @ matrix + offset, pair(x)) < 60


def test_pairs_repeat_under_a_seed_and_refuse_bad_sizes():
    first, second = (mixture_pair(4, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    x = points(8, 4, dtype=torch.float32)
    assert torch.equal(first(x), second(x))
    for arguments in ({"dim": 0}, {"dim": 2, "modes": 0}, {"dim": 2, "temperature": 0.0}):
        with pytest.raises(ValueError, match="expected dim"):
            mixture_pair(**arguments, generator=torch.Generator())


def test_uvp_is_a_hundred_for_the_best_constant_and_zero_for_the_map():
    optimal = points(100, 3)
    torch.testing.assert_close(
        l2_uvp(optimal.mean(0).expand_as(optimal), optimal), torch.tensor(100.0, dtype=torch.float64)
    )
    assert l2_uvp(optimal, optimal) == 0
    with pytest.raises(ValueError, match="same points"):
        l2_uvp(optimal[:5], optimal)


@pytest.mark.parametrize("place", [".", "benchmarks", "benchmarks/Mix3toMix10"])
def test_published_pair_is_read_and_its_map_is_monotone(tmp_path, place, write_published_pair):
    pair = read_mixture_pair(write_published_pair(tmp_path, 4) / place, 4)
    generator = torch.Generator().manual_seed(0)
    x, other = pair.sample_source(512, generator), pair.sample_source(512, generator)
    assert (((pair(x) - pair(other)) * (x - other)).sum(-1) > 0).all()
    assert pair.dim == 4


def test_published_source_is_numpys_at_seed_zero(tmp_path, write_published_pair):
    pair = read_mixture_pair(write_published_pair(tmp_path, 2), 2)
    random = np.random.RandomState(0)
    centers = np.stack([random.choice([0, 1, 2], 3, replace=False) for _ in range(2)], axis=1) - 1.0
    scale = np.sqrt((centers**2).sum(1).mean() + 2 * 0.4**2) / np.sqrt(2)
    np.testing.assert_allclose(pair.source.centers.numpy(), centers / scale, rtol=1e-6)
    sample = pair.sample_source(20_000, torch.Generator().manual_seed(0))
    assert abs(sample.square().sum(-1).mean() - 2) < 0.1


def test_published_potential_is_the_formula(published_potential):
    from poise.ot.benchmark_pairs import QuadraticICNN

    state = {key: value.double() for key, value in published_potential(3, 0).items()}
    x = points(5, 3)

    def quadratic(layer):
        factors = state[f"quadratic_layers.{layer}.quadratic_decomposed"][:, 0]
        return (
            (x @ factors) ** 2
            + x @ state[f"quadratic_layers.{layer}.weight"].T
            + state[f"quadratic_layers.{layer}.bias"]
        )

    z = quadratic(0)
    for layer in (0, 1):
        z = torch.celu(z @ state[f"convex_layers.{layer}.weight"].T + quadratic(layer + 1))
    expected = (z @ state["final_layer.weight"].T)[:, 0] + 0.005 * x.square().sum(-1)
    torch.testing.assert_close(QuadraticICNN(state)(x), expected)


def test_published_pair_refuses_other_files(tmp_path, published_potential, write_published_pair):
    with pytest.raises(FileNotFoundError, match=r"2_v1\.pt"):
        read_mixture_pair(tmp_path, 2)
    write_published_pair(tmp_path, 2)
    file = tmp_path / "benchmarks" / "Mix3toMix10" / "2_v2.pt"
    state = published_potential(2, 2)
    torch.save(state | {"final_layer.weight": -state["final_layer.weight"]}, file)
    with pytest.raises(ValueError, match="not convex"):
        read_mixture_pair(tmp_path, 2)
    torch.save({"weight": torch.zeros(2)}, file)
    with pytest.raises(ValueError, match="missing"):
        read_mixture_pair(tmp_path, 2)


# Single cells

DRUGS = ["control", "givinostat", "givinostat", "trametinib", "control", "trametinib"]
DOSES = [0.0, 10.0, 1_000.0, 10.0, 0.0, 10.0]


@pytest.mark.parametrize("layout", ["dense", "csr", "csc", "csr_legacy"])
@pytest.mark.parametrize("legacy", [False, True])
def test_cells_are_read_from_every_layout(tmp_path, layout, legacy, write_h5ad):
    matrix = write_h5ad(tmp_path / "cells.h5ad", DRUGS, DOSES, layout, legacy=legacy)
    cells = read_cells(tmp_path)  # the folder: run.load passes what --data says
    np.testing.assert_array_equal(cells.features.numpy(), matrix)
    assert cells.names == tuple(f"gene{i}" for i in range(5))
    assert cells.contexts() == [("givinostat", 10.0), ("givinostat", 1000.0), ("trametinib", 10.0)]
    np.testing.assert_array_equal(cells.controls().numpy(), matrix[[0, 4]])
    np.testing.assert_array_equal(cells.treated("trametinib", 10.0).numpy(), matrix[[3, 5]])


def boolean(obs):
    obs.create_dataset("control", data=np.array(DRUGS) == "control")


def integer(obs):
    obs.create_dataset("control", data=(np.array(DRUGS) == "control").astype(np.int64))


def words(obs):
    import h5py

    obs.create_dataset("control", data=[str(drug == "control") for drug in DRUGS], dtype=h5py.string_dtype())


def nullable(obs):
    group = obs.create_group("control")
    group.attrs["encoding-type"] = "nullable-boolean"
    group.create_dataset("values", data=np.array(DRUGS) == "control")
    group.create_dataset("mask", data=np.zeros(len(DRUGS), dtype=bool))


@pytest.mark.parametrize("control", [None, boolean, integer, words, nullable])
def test_controls_are_known_by_column_or_by_name(tmp_path, control, write_h5ad):
    write_h5ad(tmp_path / "cells.h5ad", DRUGS, DOSES, control=control)
    np.testing.assert_array_equal(read_cells(tmp_path / "cells.h5ad").control, np.array(DRUGS) == "control")


def test_cells_can_be_read_as_components_and_without_doses(tmp_path, write_h5ad):
    matrix = write_h5ad(tmp_path / "cells.h5ad", DRUGS, DOSES)
    cells = read_cells(tmp_path, features="obsm/X_pca", dose=None)
    np.testing.assert_array_equal(cells.features.numpy(), matrix[:, :2])
    assert cells.names == ("X_pca_0", "X_pca_1")
    assert cells.contexts() == [("givinostat", 0.0), ("trametinib", 0.0)]


def test_bad_cell_files_are_explained(tmp_path, write_h5ad):
    import h5py

    with pytest.raises(FileNotFoundError, match=r"one \.h5ad file"):
        read_cells(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_cells(tmp_path / "none.h5ad")
    text = tmp_path / "text.h5ad"
    text.write_text("not HDF5")
    with pytest.raises(ValueError, match="not an HDF5 file"):
        read_cells(text)
    with h5py.File(text, "w") as file:
        file.create_dataset("X", data=np.zeros((2, 2)))
    with pytest.raises(ValueError, match="not an AnnData file"):
        read_cells(text)
    write_h5ad(text, DRUGS, DOSES)
    for arguments, message in (
        ({"drug": "perturbation"}, "no column 'perturbation'; it has dose, drug"),
        ({"features": "layers/counts"}, "no matrix 'layers/counts'; it has X, obsm/X_pca"),
        ({"dose": "drug"}, "must hold numbers"),
        ({"control": "DMSO"}, "0 of 6 cells are controls"),
        ({"control": "dose"}, "which cells are controls"),
    ):
        with pytest.raises(ValueError, match=message):
            read_cells(text, **arguments)
    with pytest.raises(ValueError, match="no cell got 'aspirin'"):
        read_cells(text).treated("aspirin", 1.0)


def test_missing_h5py_names_the_extra(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ImportError, match=r"poise-ot\[cells\]"):
        read_cells(tmp_path)
