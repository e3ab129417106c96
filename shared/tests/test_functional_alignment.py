"""Laws of poise.core.functional.alignment."""

import inspect
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor
from torch.autograd import gradcheck

from poise.core.functional import cosine_alignment, cross_correlation, decorrelation

numbers = st.floats(-10, 10).map(lambda x: x if abs(x) > 1e-2 else 0.0)
law = settings(deadline=None, max_examples=50)
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype).requires_grad_()


def off_diagonal(matrix: Tensor) -> Tensor:
    return matrix - torch.diag_embed(matrix.diagonal())


@law
@given(
    pair=arrays(np.float64, st.tuples(st.just(2), st.integers(1, 6)), elements=numbers).map(torch.from_numpy),
    scale=st.floats(0.01, 100),
)
def test_cosine_is_bounded_symmetric_and_blind_to_length(pair: Tensor, scale: float) -> None:
    x, y = pair
    value = cosine_alignment(x, y)
    assert -1 - 1e-12 <= value <= 1 + 1e-12
    torch.testing.assert_close(cosine_alignment(y, scale * x), value, **CLOSE)
    torch.testing.assert_close(cosine_alignment(-x, y), -value, **CLOSE)
    torch.testing.assert_close(value, -torch.cosine_similarity(x, y, dim=0), **CLOSE)


def test_cosine_is_minus_one_for_aligned_and_one_for_opposed_vectors() -> None:
    x = randn(3, 4, 5)
    minus_one = torch.full((3, 4), -1.0, dtype=torch.float64)
    torch.testing.assert_close(cosine_alignment(x, 7 * x), minus_one)
    torch.testing.assert_close(cosine_alignment(x, -x), -minus_one)
    assert cosine_alignment(x, x, dim=1).shape == (3, 5)


def test_a_zero_vector_gives_zero_and_no_gradient() -> None:
    x = torch.zeros(2, 4, requires_grad=True)
    y = torch.ones(2, 4, requires_grad=True)
    value = cosine_alignment(x, y)
    assert torch.equal(value, torch.zeros(2))
    for gradient in torch.autograd.grad(value.sum(), (x, y)):
        assert torch.equal(gradient, torch.zeros(2, 4))


def test_the_gradient_of_the_cosine_is_orthogonal_to_the_vector() -> None:
    x, y = randn(6, 5), randn(6, 5, seed=1)
    (gradient,) = torch.autograd.grad(cosine_alignment(x, y).sum(), x)
    torch.testing.assert_close((gradient * x).sum(1), torch.zeros(6, dtype=torch.float64), **CLOSE)


def test_gradients_match_finite_differences() -> None:
    x, y = randn(5, 3), randn(5, 3, seed=1)
    assert gradcheck(cosine_alignment, (x, y))
    assert gradcheck(cross_correlation, (x, y))
    assert gradcheck(decorrelation, (x, y))
    assert gradcheck(decorrelation, x)
    assert gradcheck(decorrelation, (randn(3, 7), randn(3, 7, seed=1)))


def test_cross_correlation_is_that_of_numpy() -> None:
    x, y = randn(9, 3).detach(), randn(9, 4, seed=1).detach()
    expected = np.corrcoef(x.numpy().T, y.numpy().T)[:3, 3:]
    torch.testing.assert_close(cross_correlation(x, y), torch.from_numpy(expected))


@law
@given(
    x=arrays(np.float64, st.tuples(st.integers(2, 6), st.integers(1, 4)), elements=numbers).map(torch.from_numpy),
    scale=st.floats(0.1, 10),
    shift=st.floats(-10, 10),
)
def test_correlations_are_bounded_and_blind_to_scale_shift_and_order(x: Tensor, scale: float, shift: float) -> None:
    y = randn(*x.shape).detach()
    matrix = cross_correlation(x, y)
    assert (matrix.abs() <= 1 + 1e-9).all()
    torch.testing.assert_close(cross_correlation(scale * x.flip(0) + shift, y.flip(0)), matrix, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(decorrelation(scale * x + shift, y), decorrelation(x, y), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("samples", [3, 4, 5, 8, 9, 40])
def test_decorrelation_is_the_sum_of_squares_off_the_diagonal_however_it_is_computed(samples: int) -> None:
    x, y = randn(samples, 8), randn(samples, 8, seed=1)
    torch.testing.assert_close(decorrelation(x, y), off_diagonal(cross_correlation(x, y)).square().sum())
    torch.testing.assert_close(decorrelation(x), off_diagonal(cross_correlation(x, x)).square().sum())


def test_decorrelation_does_not_build_a_matrix_of_features_for_few_samples() -> None:
    x = torch.randn(4, 200_000, generator=torch.Generator().manual_seed(0))  # 160 GB if it did
    assert decorrelation(x).isfinite()


def test_orthogonal_features_are_decorrelated_and_copies_are_not() -> None:
    features = torch.linalg.qr(randn(8, 4) - randn(8, 4).mean(0))[0]
    features = torch.linalg.qr(features - features.mean(0))[0]
    torch.testing.assert_close(decorrelation(features), torch.zeros((), dtype=torch.float64), rtol=0, atol=1e-20)
    copies = features[:, :1].expand(8, 3)
    torch.testing.assert_close(decorrelation(copies), torch.tensor(6.0, dtype=torch.float64))


def test_descent_on_decorrelation_removes_correlations() -> None:
    x = randn(32, 4).detach() + 2 * randn(32, 1, seed=1).detach()
    before = decorrelation(x)
    for _ in range(100):
        x.requires_grad_()
        (gradient,) = torch.autograd.grad(decorrelation(x), x)
        x = (x - 5 * gradient).detach()
    assert decorrelation(x) < 0.01 * before


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("samples", [3, 7, 100])
def test_constant_features_correlate_with_nothing_and_get_no_gradient(samples: int, dtype: torch.dtype) -> None:
    # 0.1 and 0.3 are not equal to the rounded mean of their copies.
    x = torch.cat([torch.full((samples, 1), 0.1), torch.full((samples, 1), 0.3), torch.randn(samples, 2)], 1).to(dtype)
    x.requires_grad_()
    matrix = cross_correlation(x, x)
    assert torch.equal(matrix[:2], torch.zeros(2, 4, dtype=dtype))
    (gradient,) = torch.autograd.grad(decorrelation(x), x)
    assert torch.equal(gradient[:, :2], torch.zeros(samples, 2, dtype=dtype))
    assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    x, y = randn(6, 4).detach().to(dtype), randn(6, 4, seed=1).detach().to(dtype)
    for function in (cosine_alignment, cross_correlation, decorrelation):
        value = function(x, y)
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, function(x.float(), y.float()))


def test_autocast_does_not_narrow_the_products() -> None:
    x, y = randn(16, 8, dtype=torch.float32), randn(16, 8, seed=1, dtype=torch.float32)
    few = randn(3, 8, dtype=torch.float32)
    expected = decorrelation(x, y), decorrelation(few), cross_correlation(x, y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = decorrelation(x, y), decorrelation(few), cross_correlation(x, y)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: cosine_alignment(torch.ones(2, 3), torch.ones(3)), ValueError, r"same shape, got \(2, 3\) and \(3,\)"),
        (
            lambda: inspect.unwrap(cosine_alignment)(*[torch.ones(3).long()] * 2),
            TypeError,
            "x must be floating-point",
        ),
        (lambda: cross_correlation(torch.ones(1, 3), torch.ones(1, 3)), ValueError, "two or more samples"),
        (
            lambda: inspect.unwrap(cross_correlation)(torch.ones(2, 3), torch.ones(4, 3)),
            ValueError,
            r"got \(2, 3\) and \(4, 3\)",
        ),
        (lambda: inspect.unwrap(decorrelation)(torch.ones(3)), ValueError, r"must be \(samples, features\)"),
        (lambda: inspect.unwrap(decorrelation)(torch.ones(3, 2), torch.ones(3, 4)), ValueError, "same shape"),
    ],
)
def test_bad_input_is_refused(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
