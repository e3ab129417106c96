"""Laws of poise.core.functional.contrastive."""

import inspect
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor
from torch.autograd import gradcheck

from poise.core.functional import nt_xent

law = settings(deadline=None, max_examples=50)
numbers = st.floats(-10, 10).map(lambda x: x if abs(x) > 1e-2 else 0.0)
views = st.tuples(st.just(2), st.integers(1, 6), st.integers(1, 5))
pairs = arrays(np.float64, views, elements=numbers).map(torch.from_numpy)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


def by_the_formula(z1: Tensor, z2: Tensor, temperature: float) -> float:
    """Sums of exponentials over all other views, one view at a time."""
    rows = [row.tolist() for row in torch.cat([z1, z2])]

    def cosine(a: list[float], b: list[float]) -> float:
        lengths = math.hypot(*a) * math.hypot(*b)
        return sum(x * y for x, y in zip(a, b, strict=True)) / lengths if lengths else 0.0

    total = 0.0
    for i, row in enumerate(rows):
        partner = rows[(i + len(z1)) % len(rows)]
        others = [math.exp(cosine(row, other) / temperature) for j, other in enumerate(rows) if j != i]
        total += math.log(sum(others)) - cosine(row, partner) / temperature
    return total / len(rows)


@law
@given(pair=pairs, temperature=st.floats(0.1, 5))
def test_it_is_the_formula(pair: Tensor, temperature: float) -> None:
    value = nt_xent(*pair, temperature)
    assert value.item() == pytest.approx(by_the_formula(*pair, temperature), rel=1e-9, abs=1e-9)


def test_two_samples_by_hand() -> None:
    z1, z2 = torch.eye(2, dtype=torch.float64), torch.tensor([[0.6, 0.8], [0.8, 0.6]], dtype=torch.float64)
    # Cosines: (1, 2) 0, (1, 1') .6, (1, 2') .8, (2, 1') .8, (2, 2') .6, (1', 2') .96.
    first = math.log(math.exp(0) + math.exp(0.3) + math.exp(0.4)) - 0.3
    second = math.log(math.exp(0.3) + math.exp(0.4) + math.exp(0.48)) - 0.3
    assert nt_xent(z1, z2, temperature=2).item() == pytest.approx((first + second) / 2, abs=1e-12)


@law
@given(pair=pairs, scale=st.floats(0.01, 100))
def test_it_is_symmetric_and_blind_to_length_and_order(pair: Tensor, scale: float) -> None:
    z1, z2 = pair
    value = nt_xent(z1, z2)
    torch.testing.assert_close(nt_xent(z2, z1), value)
    torch.testing.assert_close(nt_xent(scale * z1.flip(0), z2.flip(0)), value)


@law
@given(pair=pairs)
def test_it_lies_between_zero_and_the_worst_choice(pair: Tensor) -> None:
    value, count = nt_xent(*pair, temperature=2.0).item(), pair[0].shape[0]
    assert -1e-12 <= value <= math.log(1 + (2 * count - 2) * math.exp(1.0)) + 1e-12


def test_identical_views_cost_nothing_as_the_temperature_goes_to_zero() -> None:
    z = randn(5, 3).detach()
    values = [nt_xent(z, z, temperature).item() for temperature in (1.0, 0.1, 0.01, 1e-4)]
    assert values == sorted(values, reverse=True)
    assert values[-1] == pytest.approx(0, abs=1e-12)


def test_a_single_sample_costs_nothing_and_pulls_at_nothing() -> None:
    z1, z2 = randn(1, 4), randn(1, 4, seed=1)
    value = nt_xent(z1, z2)
    assert value.item() == 0
    assert all(not gradient.any() for gradient in torch.autograd.grad(value, (z1, z2)))


def test_gradients_match_finite_differences_to_second_order() -> None:
    inputs = (randn(4, 3), randn(4, 3, seed=1))
    assert gradcheck(lambda a, b: nt_xent(a, b, 0.7), inputs)
    assert torch.autograd.gradgradcheck(lambda a, b: nt_xent(a, b, 0.7), inputs)


def test_a_zero_vector_has_no_direction_and_gets_no_gradient() -> None:
    z1, z2 = torch.zeros(3, 4, requires_grad=True), randn(3, 4, seed=1).detach().float()
    value = nt_xent(z1, z2)
    value.backward()
    assert value.isfinite()
    assert z1.grad is not None
    assert torch.equal(z1.grad, torch.zeros(3, 4))


def test_descent_brings_partners_together_and_parts_the_others() -> None:
    z1, z2 = randn(6, 3).detach(), randn(6, 3, seed=1).detach()
    for _ in range(200):
        z1.requires_grad_()
        z2.requires_grad_()
        slopes = torch.autograd.grad(nt_xent(z1, z2), (z1, z2))
        z1, z2 = ((z - 2 * slope).detach() for z, slope in zip((z1, z2), slopes, strict=True))
    cosines = torch.nn.functional.normalize(z1, dim=1) @ torch.nn.functional.normalize(z2, dim=1).T
    partners = cosines.diagonal()
    others = cosines[~torch.eye(6, dtype=torch.bool)]
    assert partners.min() > 0.9
    assert partners.min() > others.max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    z1, z2 = randn(6, 4).detach().to(dtype), randn(6, 4, seed=1).detach().to(dtype)
    value = nt_xent(z1, z2)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, nt_xent(z1.float(), z2.float()))


def test_autocast_does_not_narrow_the_cosines() -> None:
    z1, z2 = randn(8, 4).detach().float(), randn(8, 4, seed=1).detach().float()
    expected = nt_xent(z1, z2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(nt_xent(z1, z2), expected)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: inspect.unwrap(nt_xent)(torch.ones(2, 3), torch.ones(3, 3)),
            ValueError,
            r"got \(2, 3\) and \(3, 3\)",
        ),
        (lambda: inspect.unwrap(nt_xent)(torch.ones(3), torch.ones(3)), ValueError, r"must be \(samples, features\)"),
        (lambda: nt_xent(torch.ones(0, 3), torch.ones(0, 3)), ValueError, r"must be \(samples, features\)"),
        (
            lambda: nt_xent(torch.ones(2, 3), torch.ones(2, 3), 0.0),
            ValueError,
            r"temperature must be positive, got 0\.0",
        ),
        (lambda: inspect.unwrap(nt_xent)(*[torch.ones(2, 3).long()] * 2), TypeError, "z1 must be floating-point"),
    ],
)
def test_bad_input_is_refused(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
