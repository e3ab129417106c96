"""Laws of poise.core.functional.spectral."""

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

numbers = st.floats(-10, 10).map(lambda x: x if abs(x) > 1e-2 else 0.0)
matrices = arrays(np.float64, array_shapes(min_dims=2, max_dims=2, max_side=5), elements=numbers).map(torch.from_numpy)
law = settings(deadline=None, max_examples=50)

MATRIX_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "nuclear_norm": F.nuclear_norm,
    "stable_rank": F.stable_rank,
    "effective_rank": F.effective_rank,
    "orthonormal rows": lambda matrix: F.orthonormality(matrix, "rows"),
    "orthonormal columns": lambda matrix: F.orthonormality(matrix, "columns", squared=True),
}
everywhere = pytest.mark.parametrize("function", MATRIX_FUNCTIONS.values(), ids=MATRIX_FUNCTIONS)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def orthonormal_columns(rows: int, columns: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.linalg.qr(randn(rows, columns, dtype=dtype))[0]


def gradient(function: Callable[[Tensor], Tensor], matrix: Tensor) -> Tensor:
    matrix = matrix.detach().requires_grad_()
    return torch.autograd.grad(function(matrix).sum(), matrix)[0]


@everywhere
def test_gradients_match_finite_differences(function: Callable[[Tensor], Tensor]) -> None:
    assert gradcheck(function, randn(2, 4, 3).requires_grad_())
    assert gradcheck(function, randn(3, 5).requires_grad_())


@everywhere
def test_a_batch_gives_what_its_matrices_give(function: Callable[[Tensor], Tensor]) -> None:
    batch = randn(2, 3, 4, 5)
    assert function(batch).shape == (2, 3)
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(function(batch)[i, j], function(batch[i, j]))


@everywhere
def test_the_zero_matrix_has_a_finite_value_and_gradient_zero(function: Callable[[Tensor], Tensor]) -> None:
    zero = torch.zeros(2, 3, 4, dtype=torch.float64)
    assert function(zero).isfinite().all()
    assert torch.equal(gradient(function, zero), zero)


@everywhere
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(function: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    matrix = randn(6, 4).to(dtype)
    value = function(matrix)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, function(matrix.float()))
    assert gradient(function, matrix).dtype == dtype


@everywhere
def test_vectors_and_integers_are_refused(function: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(TypeError):
        function(torch.ones(3))
    with pytest.raises(TypeError):
        function(torch.ones(3, 3, dtype=torch.int64))


def test_the_errors_say_what_is_expected() -> None:
    unchecked = inspect.unwrap(F.nuclear_norm), inspect.unwrap(F.orthonormality)
    with pytest.raises(ValueError, match=r"\(\*batch, rows, columns\), got \(3,\)"):
        unchecked[0](torch.ones(3))
    with pytest.raises(ValueError, match=r"\(\*batch, rows, columns\), got \(3,\)"):
        unchecked[1](torch.ones(3), "rows")
    with pytest.raises(ValueError, match="along must be 'rows' or 'columns', got 'diagonal'"):
        unchecked[1](torch.ones(3, 3), "diagonal")


@law
@given(matrix=matrices, scale=st.floats(0.1, 10))
def test_nuclear_norm_is_a_norm_above_frobenius_and_that_of_torch(matrix: Tensor, scale: float) -> None:
    norm = F.nuclear_norm(matrix)
    torch.testing.assert_close(norm, torch.linalg.matrix_norm(matrix, "nuc"), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(F.nuclear_norm(-scale * matrix), scale * norm, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(F.nuclear_norm(matrix.mT), norm, rtol=1e-9, atol=1e-9)
    assert matrix.norm() <= norm + 1e-9
    assert norm <= math.sqrt(min(matrix.shape)) * matrix.norm() + 1e-9


@law
@given(matrix=matrices)
def test_nuclear_norm_keeps_the_triangle_inequality(matrix: Tensor) -> None:
    other = randn(*matrix.shape)
    assert F.nuclear_norm(matrix + other) <= F.nuclear_norm(matrix) + F.nuclear_norm(other) + 1e-9


def test_nuclear_norm_of_a_diagonal_is_its_l1_norm() -> None:
    diagonal = torch.tensor([3.0, -1.0, 0.0, 2.0])
    assert F.nuclear_norm(torch.diag(diagonal)) == 6


def test_the_gradient_of_nuclear_norm_at_full_rank_is_the_polar_factor() -> None:
    matrix = randn(5, 3)
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    torch.testing.assert_close(gradient(F.nuclear_norm, matrix), u @ vh)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_gradient_of_nuclear_norm_at_low_rank_leaves_the_null_space_alone(dtype: torch.dtype) -> None:
    left, right = orthonormal_columns(8, 3, dtype), orthonormal_columns(6, 3, dtype)
    matrix = left @ torch.diag(torch.tensor([3.0, 2.0, 2.0], dtype=dtype)) @ right.mT  # a repeated value, too
    torch.testing.assert_close(gradient(F.nuclear_norm, matrix), left @ right.mT, rtol=1e-5, atol=1e-5)


def test_descent_on_the_nuclear_norm_lowers_the_rank() -> None:
    matrix = torch.diag(torch.tensor([3.0, 1.0, 0.4, 0.2], dtype=torch.float64))
    for _ in range(5):
        matrix = matrix - 0.1 * gradient(F.nuclear_norm, matrix)
    torch.testing.assert_close(F.nuclear_norm(matrix), torch.tensor(2.5 + 0.5, dtype=torch.float64), atol=0.2, rtol=0)
    assert torch.linalg.svdvals(matrix)[2] < 0.11


@law
@given(matrix=matrices, scale=st.floats(0.1, 10))
def test_ranks_are_bounded_by_the_rank_and_do_not_depend_on_scale(matrix: Tensor, scale: float) -> None:
    rank = torch.linalg.matrix_rank(matrix)
    for measure in (F.stable_rank, F.effective_rank):
        value = measure(matrix)
        assert min(rank, 1) - 1e-9 <= value <= rank + 1e-9
        torch.testing.assert_close(measure(scale * matrix.mT), value, rtol=1e-9, atol=1e-9)


def test_ranks_do_not_change_under_rotation() -> None:
    matrix, left, right = randn(5, 4), orthonormal_columns(5, 5), orthonormal_columns(4, 4)
    for measure in (F.nuclear_norm, F.stable_rank, F.effective_rank):
        torch.testing.assert_close(measure(left @ matrix @ right), measure(matrix))


def test_ranks_of_known_spectra_are_their_closed_forms() -> None:
    spectrum = torch.tensor([4.0, 2.0, 2.0, 0.0], dtype=torch.float64)
    matrix = torch.diag(spectrum)
    torch.testing.assert_close(F.stable_rank(matrix), torch.tensor(24 / 16, dtype=torch.float64))
    entropy = torch.distributions.Categorical(probs=spectrum / 8).entropy()
    torch.testing.assert_close(F.effective_rank(matrix), entropy.exp())
    for measure in (F.stable_rank, F.effective_rank):
        torch.testing.assert_close(measure(torch.eye(3, 7)), torch.tensor(3.0))
        torch.testing.assert_close(measure(torch.ones(5, 4)), torch.tensor(1.0))
        assert measure(torch.zeros(5, 4)) == 0


@pytest.mark.parametrize("measure", [F.nuclear_norm, F.stable_rank, F.effective_rank])
def test_gradients_at_deficient_rank_are_finite(measure: Callable[[Tensor], Tensor]) -> None:
    for matrix in (torch.ones(4, 4), torch.eye(4), torch.diag(torch.tensor([1.0, 1.0, 0.0, 0.0]))):
        assert gradient(measure, matrix.double()).isfinite().all()


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 4)])
def test_orthonormality_is_the_distance_of_the_gram_matrix_from_the_identity(
    shape: tuple[int, int], squared: bool
) -> None:
    matrix = randn(*shape)
    for along, gram in (("rows", matrix @ matrix.mT), ("columns", matrix.mT @ matrix)):
        expected = (gram - torch.eye(len(gram))).norm() ** (2 if squared else 1)
        torch.testing.assert_close(inspect.unwrap(F.orthonormality)(matrix, along, squared), expected)


@law
@given(factor=st.floats(-2, 2))
def test_orthonormality_of_scaled_orthonormal_vectors_is_its_closed_form(factor: float) -> None:
    expected = torch.tensor(abs(factor**2 - 1) * math.sqrt(3), dtype=torch.float64)
    vectors = orthonormal_columns(5, 3)
    torch.testing.assert_close(F.orthonormality(factor * vectors, "columns"), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(F.orthonormality(factor * vectors.mT, "rows"), expected, rtol=1e-9, atol=1e-9)


def test_orthonormality_does_not_change_under_rotation() -> None:
    matrix, rotation = randn(5, 3), orthonormal_columns(3, 3)
    torch.testing.assert_close(F.orthonormality(matrix @ rotation, "columns"), F.orthonormality(matrix, "columns"))


def test_more_vectors_than_entries_miss_orthonormality_by_the_root_of_the_excess() -> None:
    vectors = orthonormal_columns(6, 2)  # six rows in two dimensions
    torch.testing.assert_close(F.orthonormality(vectors, "rows"), torch.tensor(2.0, dtype=torch.float64))
    assert gradient(lambda matrix: F.orthonormality(matrix, "rows"), vectors).abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("rows", "columns"), [(4, 1), (16, 4), (64, 8), (256, 64), (200, 200)])
def test_the_gradient_is_exactly_zero_for_vectors_that_qr_or_svd_made(
    rows: int, columns: int, dtype: torch.dtype
) -> None:
    matrix = randn(rows, columns, dtype=dtype)
    for vectors in (torch.linalg.qr(matrix)[0], torch.linalg.svd(matrix, full_matrices=False)[0]):
        assert F.orthonormality(vectors, "columns") == 0
        assert torch.equal(gradient(lambda a: F.orthonormality(a, "columns"), vectors), torch.zeros_like(vectors))


def test_a_visible_residual_is_not_taken_for_rounding() -> None:
    vectors = orthonormal_columns(64, 8, torch.float32)
    assert F.orthonormality(vectors * (1 + 1e-4), "columns") > 5e-4


def test_autocast_does_not_narrow_the_products() -> None:
    matrix = randn(32, 8, dtype=torch.float32)
    expected = F.orthonormality(matrix, "columns")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(F.orthonormality(matrix, "columns"), expected)
