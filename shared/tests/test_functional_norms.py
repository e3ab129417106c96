"""Laws of poise.core.functional.norms."""

import inspect
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from torch import Tensor
from torch.autograd import gradcheck

from poise.core import functional as F

numbers = st.floats(-100, 100).map(lambda x: x if abs(x) > 1e-3 else 0.0)
tensors = arrays(np.float64, array_shapes(min_dims=1, max_dims=3, max_side=5), elements=numbers).map(torch.from_numpy)
vectors = arrays(np.float64, st.integers(2, 8), elements=numbers).map(torch.from_numpy)
scales = st.floats(0.01, 100)

law = settings(deadline=None, max_examples=50)

NORMS = {"l1": (F.l1, 1), "l2": (F.l2, 1), "squared_l2": (F.squared_l2, 2)}
AT_ZERO: list[Callable[[Tensor], Tensor]] = [
    F.l1,
    F.squared_l2,
    F.l2,
    F.hoyer_sparsity,
    F.hoyer_square,
    F.polarization,
    lambda x: F.group_lasso([x]),
]


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("name", NORMS)
@law
@given(x=tensors, scale=scales)
def test_norms_are_homogeneous(name: str, x: Tensor, scale: float) -> None:
    norm, degree = NORMS[name]
    torch.testing.assert_close(norm(-scale * x), scale**degree * norm(x), rtol=1e-9, atol=1e-9)


@law
@given(x=tensors)
def test_norms_are_those_of_torch_along_any_dimension(x: Tensor) -> None:
    for dim in (None, *range(x.ndim), tuple(range(x.ndim))):
        torch.testing.assert_close(F.l1(x, dim), torch.linalg.vector_norm(x, 1, dim))
        torch.testing.assert_close(F.l2(x, dim), torch.linalg.vector_norm(x, 2, dim))
        torch.testing.assert_close(F.squared_l2(x, dim), torch.linalg.vector_norm(x, 2, dim).square())


@law
@given(x=vectors)
def test_l2_is_between_l1_over_root_n_and_l1(x: Tensor) -> None:
    assert F.l1(x) / math.sqrt(len(x)) <= F.l2(x) * (1 + 1e-12) + 1e-12
    assert F.l2(x) <= F.l1(x) * (1 + 1e-12) + 1e-12


@pytest.mark.parametrize("function", [F.l1, F.squared_l2, F.l2, F.hoyer_sparsity, F.hoyer_square, F.polarization])
def test_gradients_match_finite_differences(function: Callable[[Tensor], Tensor]) -> None:
    assert gradcheck(function, randn(3, 4))


@pytest.mark.parametrize("function", [F.l2, F.hoyer_sparsity, F.hoyer_square])
def test_gradients_match_finite_differences_along_a_dimension(function: Callable[..., Tensor]) -> None:
    assert gradcheck(lambda x: function(x, 1), randn(3, 4))


@pytest.mark.parametrize("function", AT_ZERO)
def test_the_gradient_at_zero_is_zero(function: Callable[[Tensor], Tensor]) -> None:
    x = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    value = function(x)
    (gradient,) = torch.autograd.grad(value, x)
    assert value == 0
    assert torch.equal(gradient, torch.zeros_like(x))


def test_the_second_derivative_of_l2_at_zero_is_finite() -> None:
    x = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(F.l2(x), x, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), x)
    assert second.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype: torch.dtype) -> None:
    ones = torch.ones(100_000, dtype=dtype, requires_grad=True)  # beyond the largest float16, 65504
    for function in (F.l1, F.squared_l2):
        value = function(ones)
        assert value.dtype == torch.float32
        assert value == 100_000
    (gradient,) = torch.autograd.grad(F.l2(ones), ones)
    assert gradient.dtype == dtype


def test_integers_are_refused() -> None:
    for function in (F.l1, F.squared_l2, F.l2, F.hoyer_sparsity, F.hoyer_square, F.polarization):
        with pytest.raises(TypeError):
            function(torch.arange(4))
    with pytest.raises(TypeError, match=r"x must be floating-point, got torch\.int64"):
        inspect.unwrap(F.l1)(torch.arange(4))


def test_group_lasso_of_single_entries_is_l1_and_of_one_group_is_l2() -> None:
    x = randn(6)
    torch.testing.assert_close(F.group_lasso(list(x.split(1))), F.l1(x))
    torch.testing.assert_close(F.group_lasso([x]), F.l2(x))


def test_a_group_of_several_tensors_has_one_norm() -> None:
    a, b, c = randn(2, 3), randn(4), randn(5)
    expected = torch.cat([a.flatten(), b]).norm() + 0.5 * c.norm()
    torch.testing.assert_close(F.group_lasso([[a, b], c], weights=[1.0, 0.5]), expected)
    torch.testing.assert_close(F.group_norms([(a, b), c]), torch.stack([torch.cat([a.flatten(), b]).norm(), c.norm()]))


def test_group_lasso_has_the_gradient_of_finite_differences_and_leaves_zero_groups_alone() -> None:
    assert gradcheck(lambda a, b: F.group_lasso([[a, b], a], [2.0, 0.5]), (randn(2, 3), randn(4)))
    zero, other = torch.zeros(3, requires_grad=True), torch.ones(4, requires_grad=True)
    F.group_lasso([zero, other]).backward()
    assert torch.equal(zero.grad, torch.zeros(3))
    torch.testing.assert_close(other.grad, torch.full((4,), 0.5))


@pytest.mark.parametrize(
    ("groups", "weights", "message"),
    [
        ([], None, "at least one group"),
        ([torch.ones(2), []], None, "group 1 holds no tensor"),
        ([torch.ones(2)], [1.0, 2.0], "one entry per group, got 2 for 1"),
        ([torch.ones(2)], [-1.0], "not negative"),
        ([torch.ones(2)], [math.nan], "finite"),
    ],
)
def test_groups_that_make_no_sense_are_refused(groups: list, weights: list[float] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        F.group_lasso(groups, weights)


@law
@given(x=vectors, scale=scales)
def test_hoyer_measures_do_not_depend_on_scale_sign_and_order(x: Tensor, scale: float) -> None:
    for measure in (F.hoyer_sparsity, F.hoyer_square):
        torch.testing.assert_close(measure(-scale * x.flip(0)), measure(x), rtol=1e-9, atol=1e-9)


@law
@given(x=vectors)
def test_hoyer_measures_keep_their_bounds(x: Tensor) -> None:
    nonzero = int((x != 0).sum())
    assert -1e-9 <= F.hoyer_sparsity(x) <= 1 + 1e-9
    assert min(nonzero, 1) - 1e-9 <= F.hoyer_square(x) <= nonzero + 1e-9


def test_hoyer_measures_of_the_extremes() -> None:
    one_hot, equal = torch.tensor([0.0, -3.0, 0.0, 0.0]), torch.tensor([2.0, -2.0, 2.0, 2.0])
    rows = torch.stack([one_hot, equal, torch.zeros(4)])
    torch.testing.assert_close(F.hoyer_sparsity(rows, dim=1), torch.tensor([1.0, 0.0, 0.0]))
    torch.testing.assert_close(F.hoyer_square(rows, dim=1), torch.tensor([1.0, 4.0, 0.0]))
    torch.testing.assert_close(F.hoyer_sparsity(rows), F.hoyer_sparsity(rows.flatten()))


def test_sparsity_of_single_numbers_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 entries, got 1"):
        F.hoyer_sparsity(torch.ones(3, 1), dim=1)


def test_polarization_of_two_poles_is_its_closed_form() -> None:
    # n entries, a share q of them at 1 and the rest at 0: t n q - 2 n q (1 - q).
    for ones, zeros in [(1, 3), (2, 2), (5, 3)]:
        scales, n = torch.cat([torch.ones(ones), torch.zeros(zeros)]), ones + zeros
        q = ones / n
        torch.testing.assert_close(F.polarization(scales, t=1.2), torch.tensor(1.2 * n * q - 2 * n * q * (1 - q)))
        torch.testing.assert_close(F.polarization(scales, t=1.2, order=2), torch.tensor(1.2 * n * q - n * q * (1 - q)))


@law
@given(x=vectors, scale=scales)
def test_polarization_is_homogeneous_and_without_spread_it_is_l1(x: Tensor, scale: float) -> None:
    torch.testing.assert_close(F.polarization(scale * x), scale * F.polarization(x), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        F.polarization(torch.full_like(x, scale), t=0.7), 0.7 * scale * torch.tensor(len(x)).double()
    )


def test_polarization_prefers_two_poles_to_the_same_mass_in_the_middle() -> None:
    assert F.polarization(torch.tensor([1.0, 1.0, 0.0, 0.0])) < F.polarization(torch.full((4,), 0.5))


def test_the_gradient_of_polarization_flows_through_the_mean() -> None:
    scales = torch.tensor([0.9, 0.1, 0.2], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(F.polarization(scales, t=1.0), scales)
    # sign(x) - sign(x - mean) + mean(sign(x - mean)), and here one of three is above the mean.
    torch.testing.assert_close(gradient, torch.tensor([-1 / 3, 5 / 3, 5 / 3], dtype=torch.float64))


def test_polarization_refuses_unknown_orders_and_nothing() -> None:
    with pytest.raises(ValueError, match="order must be 1 or 2, got 3"):
        inspect.unwrap(F.polarization)(torch.ones(2), order=3)
    with pytest.raises(ValueError, match="empty"):
        F.polarization(torch.ones(0))


@law
@given(gates=arrays(np.float64, st.tuples(st.integers(1, 6), st.integers(1, 5)), elements=st.floats(0, 1)))
def test_consensus_lies_between_zero_and_a_quarter_and_ignores_order(gates: np.ndarray) -> None:
    value = F.consensus(torch.from_numpy(gates))
    assert -1e-12 <= value <= 0.25
    torch.testing.assert_close(F.consensus(torch.from_numpy(gates[::-1].copy())), value)


def test_consensus_is_zero_for_agreement_and_a_quarter_for_a_draw() -> None:
    agreed = torch.tensor([[1.0, 0.0, 1.0]]).expand(8, 3)
    divided = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert F.consensus(agreed) == 0
    assert F.consensus(divided) == 0.25


def test_the_gradient_of_consensus_pushes_to_the_nearer_side() -> None:
    gates = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]], requires_grad=True)
    F.consensus(gates).backward()
    # d/dm = (1 - 2 m) / units, shared by the batch.
    torch.testing.assert_close(gates.grad, torch.tensor([[-1 / 18, 1 / 18]]).expand(3, 2))
    assert gradcheck(F.consensus, randn(5, 3).detach().sigmoid().requires_grad_())


def test_consensus_needs_a_batch_of_units() -> None:
    for gates in (torch.ones(3), torch.ones(0, 3)):
        with pytest.raises(ValueError, match="batch, units"):
            inspect.unwrap(F.consensus)(gates)


@pytest.mark.parametrize("measure", [F.l2, F.hoyer_sparsity, F.hoyer_square, lambda x: F.group_lasso([x, x[:1]])])
def test_what_is_not_a_number_shows(measure: Callable[[Tensor], Tensor]) -> None:
    assert measure(torch.tensor([1.0, torch.nan, 2.0])).isnan()
