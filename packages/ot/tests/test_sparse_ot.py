"""Laws of sparsity-constrained transport."""

import itertools

import numpy as np
import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.ot import (
    NegEntropy,
    SparsityConstrained,
    SquaredL2,
    color_transfer,
    recover_plan,
    solve_dual,
    solve_semi_dual,
    sparse_simplex_projection,
    sparsity_constrained_ot,
)

REGULARIZERS = [NegEntropy(0.3), SquaredL2(0.7), SparsityConstrained(1, 0.7), SparsityConstrained(3, 0.7)]


def make(seed, m=10, n=7, batch=None, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    lead = () if batch is None else (batch,)
    a, b = (0.2 + torch.rand(*lead, size, generator=generator, dtype=torch.float64) for size in (m, n))
    cost = torch.rand(*lead, m, n, generator=generator, dtype=torch.float64)
    return tuple(each.to(dtype) for each in (a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True), cost))


def exact_cost(a, b, cost):
    return ot.emd2(*(each.numpy() for each in (a, b, cost)))


# Projection


@given(st.integers(0, 10_000), st.integers(1, 8), st.integers(1, 8))
@settings(max_examples=40, deadline=None)
def test_projection_is_the_nearest_of_all_supports(seed, size, k):
    v = 2 * torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    ours = sparse_simplex_projection(v, k)
    assert ours.sum().item() == pytest.approx(1)
    assert (ours >= 0).all()
    assert ours.count_nonzero() <= k
    least = min(
        (
            v
            - torch.zeros_like(v).index_put((torch.tensor(support),), sparse_simplex_projection(v[list(support)], size))
        ).norm()
        for support in itertools.combinations(range(size), min(k, size))
    )
    assert (v - ours).norm().item() <= least.item() + 1e-12


def test_projection_is_idempotent_and_full_for_a_large_cap():
    v = torch.randn(50, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for k in (1, 4, 9):
        once = sparse_simplex_projection(v, k)
        torch.testing.assert_close(sparse_simplex_projection(once, k), once)
    torch.testing.assert_close(sparse_simplex_projection(v, 100), sparse_simplex_projection(v, 9))


# Conjugates


@pytest.mark.parametrize("reg", REGULARIZERS, ids=str)
def test_gradients_of_the_conjugates_are_finite_differences(reg):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8, 5, generator=generator, dtype=torch.float64)
    b = 0.2 + torch.rand(5, generator=generator, dtype=torch.float64)
    step = 1e-6
    for function in (reg.conjugate, lambda x: reg.max_op(x, b)):
        gradient = function(x)[1]
        numeric = torch.zeros_like(x)
        for i in range(len(x)):
            shift = torch.zeros_like(x)
            shift[i] = step
            numeric[i] = (function(x + shift)[0] - function(x - shift)[0]) / (2 * step)
        torch.testing.assert_close(gradient, numeric, atol=1e-6, rtol=1e-6)


# Solvers


@given(st.integers(0, 10_000), st.integers(1, 12))
@settings(max_examples=15, deadline=None)
def test_the_cap_is_kept_and_columns_are_exact(seed, k):
    a, b, cost = make(seed)
    result = sparsity_constrained_ot(a, b, cost, k, 0.5)
    assert int((result.plan > 0).sum(0).max()) <= k
    torch.testing.assert_close(result.plan.sum(0), b)
    assert float(result.row_error) == pytest.approx(float((result.plan.sum(1) - a).abs().sum()))


@pytest.mark.parametrize("seed", range(3))
def test_the_value_falls_from_the_linear_program_to_the_quadratic_one(seed):
    a, b, cost = make(seed)
    values = [float(sparsity_constrained_ot(a, b, cost, k, 0.5).value) for k in range(1, 11)]
    quadratic = float(solve_semi_dual(a, b, cost, SquaredL2(0.5)).value)
    least = exact_cost(a, b, cost)
    assert values[0] == pytest.approx(least + 0.25 * float(b.square().sum()), abs=1e-6)
    assert all(later <= earlier + 1e-9 for earlier, later in itertools.pairwise(values))
    assert values[-1] == pytest.approx(quadratic, abs=1e-8)
    assert quadratic >= least


def test_a_cap_at_the_support_of_the_quadratic_plan_changes_nothing():
    a, b, cost = make(3)
    quadratic = solve_semi_dual(a, b, cost, SquaredL2(0.5))
    support = int((quadratic.plan > 0).sum(0).max())
    for k in (support, 10, 1000):
        capped = sparsity_constrained_ot(a, b, cost, k, 0.5)
        torch.testing.assert_close(capped.plan, quadratic.plan, atol=1e-5, rtol=0)
        assert capped.converged


@pytest.mark.parametrize("reg", REGULARIZERS, ids=str)
def test_dual_and_semi_dual_have_one_optimum(reg):
    a, b, cost = make(4)
    assert float(solve_dual(a, b, cost, reg).value) == pytest.approx(
        float(solve_semi_dual(a, b, cost, reg).value), abs=1e-6
    )


@pytest.mark.parametrize("k", [1, 2, 4])
def test_no_feasible_capped_plan_costs_less_than_the_dual_value(k):
    """Brute force over tiny problems: columns that are each served by at most k rows."""
    a, b = torch.full((4,), 0.25, dtype=torch.float64), torch.full((2,), 0.5, dtype=torch.float64)
    cost = make(5, 4, 2)[2]
    value = float(sparsity_constrained_ot(a, b, cost, k, 1.0).value)
    for columns in itertools.product(range(2), repeat=4):
        plan = torch.zeros(4, 2, dtype=torch.float64)
        plan[torch.arange(4), list(columns)] = 0.25
        if torch.equal(plan.sum(0), b) and int((plan > 0).sum(0).max()) <= k:
            assert value <= float((plan * cost).sum() + plan.square().sum() / 2) + 1e-9


@pytest.mark.parametrize("reg", REGULARIZERS, ids=str)
def test_a_batch_is_its_problems_one_by_one(reg):
    a, b, cost = make(6, batch=5)
    together = solve_semi_dual(a, b, cost, reg)
    for index in range(5):
        alone = solve_semi_dual(a[index], b[index], cost[index], reg)
        assert float(together.value[index]) == pytest.approx(float(alone.value), abs=1e-8)
        assert together.plan[index].shape == alone.plan.shape


@pytest.mark.parametrize("reg", REGULARIZERS, ids=str)
def test_float32_agrees_with_float64(reg):
    problem = make(7)
    exact = solve_semi_dual(*problem, reg)
    single = solve_semi_dual(*(each.float() for each in problem), reg)
    assert single.plan.dtype == torch.float32
    assert float(single.value) == pytest.approx(float(exact.value), abs=1e-4)


def test_permuting_rows_permutes_the_plan():
    a, b, cost = make(8)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    plain = solve_semi_dual(a, b, cost, SquaredL2(0.5))
    permuted = solve_semi_dual(a[order], b, cost[order], SquaredL2(0.5))
    torch.testing.assert_close(permuted.plan, plain.plan[order], atol=1e-6, rtol=0)


def test_a_constant_per_row_moves_the_value_and_not_the_plan():
    a, b, cost = make(9)
    u = torch.arange(10, dtype=torch.float64) / 10
    plain = solve_semi_dual(a, b, cost, SquaredL2(0.5))
    moved = solve_semi_dual(a, b, cost + u[:, None], SquaredL2(0.5))
    torch.testing.assert_close(moved.plan, plain.plan, atol=1e-6, rtol=0)
    assert float(moved.value) == pytest.approx(float(plain.value) + float(u @ a), abs=1e-8)


def test_the_cap_can_be_on_rows():
    a, b, cost = make(10)
    by_row = sparsity_constrained_ot(a, b, cost, 2, 0.5, axis="row")
    by_column = sparsity_constrained_ot(b, a, cost.T, 2, 0.5)
    torch.testing.assert_close(by_row.plan, by_column.plan.T)
    assert int((by_row.plan > 0).sum(1).max()) <= 2
    recovered = recover_plan(by_row)
    torch.testing.assert_close(recovered.sum(0), b, atol=1e-6, rtol=0)
    torch.testing.assert_close(recovered.sum(1), a, atol=1e-6, rtol=0)


@pytest.mark.parametrize("reg", [SquaredL2(0.7), SparsityConstrained(3, 0.7), SparsityConstrained(9, 0.7)], ids=str)
def test_the_gradient_is_that_of_the_optimal_value(reg):
    a, b, cost = make(11)
    a.requires_grad_()
    b.requires_grad_()
    cost.requires_grad_()
    solve_semi_dual(a, b, cost, reg).value.backward()
    generator = torch.Generator().manual_seed(2)
    da, db, dc = (torch.randn(each.shape, generator=generator, dtype=torch.float64) for each in (a, b, cost))
    da, db = da - da.mean(), db - db.mean()  # equal totals

    def value(t):
        with torch.no_grad():
            return float(solve_semi_dual(a + t * da, b + t * db, cost + t * dc, reg).value)

    step = 1e-5
    slope = float((a.grad * da).sum() + (b.grad * db).sum() + (cost.grad * dc).sum())
    assert slope == pytest.approx((value(step) - value(-step)) / (2 * step), abs=1e-4)


def test_convergence_is_reported_honestly():
    a, b, cost = make(12)
    capped = sparsity_constrained_ot(a, b, cost, 1, 0.5)
    assert float(capped.row_error) > 0.01
    assert not capped.converged
    assert not solve_semi_dual(a, b, cost, SquaredL2(0.5), solver="adam", max_iter=3).converged


@pytest.mark.parametrize("reg", REGULARIZERS, ids=str)
def test_the_gap_bounds_the_distance_to_the_optimum_and_closes(reg):
    problem = make(16)
    solved = solve_semi_dual(*problem, reg)
    assert -1e-12 <= float(solved.gap) < 1e-7
    early = solve_semi_dual(*problem, reg, solver="adam", max_iter=10)
    assert 0 < float(solved.value) - float(early.value) <= float(early.gap) + 1e-12


def test_the_relaxed_value_is_the_cheapest_way_to_share_k_places():
    """gamma/2 min sum t^2 / theta over theta in [0, 1] with sum k, by bisection on the multiplier."""
    generator = torch.Generator().manual_seed(3)
    plan = torch.rand(9, 40, generator=generator, dtype=torch.float64) * (torch.rand(9, 40, generator=generator) > 0.4)
    for k in (1, 2, 5):
        low, high = torch.zeros(40, dtype=torch.float64), plan.sum(0) + 1
        for _ in range(100):
            middle = (low + high) / 2
            over = (plan / middle).clamp_max(1).sum(0) > k
            low, high = torch.where(over, middle, low), torch.where(over, high, middle)
        share = (plan / high).clamp_max(1)
        expected = 0.7 / 2 * torch.where(plan > 0, plan.square() / share, 0.0).sum(0)
        torch.testing.assert_close(SparsityConstrained(k, 0.7).relaxed_value(plan), expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("solver", ["auto", "lbfgs", "subgradient"])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_recovered_plans_have_both_marginals(k, solver):
    a, b, cost = make(13)
    result = sparsity_constrained_ot(a, b, cost, k, 0.5, solver=solver)
    recovered = recover_plan(result)
    assert (recovered >= 0).all()
    assert float((recovered.sum(1) - a).abs().sum()) < 1e-3
    assert float((recovered.sum(0) - b).abs().sum()) < 1e-3


def test_numpy_in_numpy_out():
    problem = tuple(each.numpy() for each in make(14))
    result = sparsity_constrained_ot(*problem, k=2)
    assert isinstance(result.plan, np.ndarray)
    assert isinstance(recover_plan(result), np.ndarray)


# Errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, "k must be at least 1, got 0"),
        ({"gamma": 0.0}, "gamma must be positive"),
        ({"axis": "columns"}, "axis must be"),
        ({"form": "primal"}, "form must be"),
        ({"solver": "newton"}, "solver must be"),
        ({"max_iter": 0}, "max_iter must be at least 1"),
        ({"tol": 0.0}, "tol must be positive"),
        ({"a": torch.zeros(10, dtype=torch.float64)}, "a must hold positive masses"),
        ({"b": -torch.ones(7, dtype=torch.float64)}, "b must hold positive masses"),
        ({"b": torch.ones(7, dtype=torch.float64)}, "same total mass"),
        ({"M": torch.full((10, 7), torch.nan, dtype=torch.float64)}, "NaN"),
        ({"M": torch.ones(7, 10, dtype=torch.float64)}, "needs a of shape"),
    ],
)
def test_bad_input_is_named(change, message):
    a, b, cost = make(15)
    with pytest.raises(ValueError, match=message):
        sparsity_constrained_ot(**({"a": a, "b": b, "M": cost, "k": 2} | change))


def test_a_cap_that_is_no_integer_is_a_type_error():
    with pytest.raises(TypeError, match="k"):
        SparsityConstrained(2.5)


# Colour transfer


def test_colours_move_to_the_target_palette():
    generator = torch.Generator().manual_seed(0)
    dark = 0.3 * torch.rand(3, 40, 30, generator=generator)
    bright = 0.7 + 0.3 * torch.rand(3, 25, 35, generator=generator)
    moved = color_transfer(dark, bright, n_colors=16, k=2)
    assert moved.shape == dark.shape
    torch.testing.assert_close(moved.mean((1, 2)), bright.mean((1, 2)), atol=0.03, rtol=0)


def test_an_image_in_its_own_colours_stays_as_it_is():
    image = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0))
    moved = color_transfer(image, image, n_colors=256, k=1, sample=256, gamma=1e-3)
    torch.testing.assert_close(moved, image, atol=1e-3, rtol=0)


def test_images_outside_the_unit_range_are_refused():
    with pytest.raises(ValueError, match=r"image1 must lie in \[0, 1\]"):
        color_transfer(255 * torch.rand(3, 8, 8), torch.rand(3, 8, 8), n_colors=4)
