"""Laws of poise.core.functional.variation."""

import inspect
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from torch import Tensor
from torch.autograd import gradcheck

from poise.core.functional import total_variation

numbers = st.floats(-10, 10).map(lambda x: x if abs(x) > 1e-3 else 0.0)
grids = arrays(np.float64, array_shapes(min_dims=3, max_dims=5, max_side=4), elements=numbers).map(torch.from_numpy)
kinds = st.sampled_from(["isotropic", "anisotropic", "vectorial"])
law = settings(deadline=None, max_examples=50)
every_kind = pytest.mark.parametrize("kind", ["isotropic", "anisotropic", "vectorial"])


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def by_loops(x: Tensor, kind: str, steps: tuple[float, ...]) -> Tensor:
    """The definition, point by point, for one sample of shape (channels, *spatial)."""
    channels, *sizes = x.shape
    total = torch.zeros((), dtype=x.dtype)
    for index in np.ndindex(*sizes):
        differences = torch.zeros(channels, len(sizes), dtype=x.dtype)
        for dim, size in enumerate(sizes):
            if index[dim] + 1 < size:
                following = tuple(place + (axis == dim) for axis, place in enumerate(index))
                differences[:, dim] = (x[(slice(None), *following)] - x[(slice(None), *index)]) / steps[dim]
        if kind == "isotropic":
            total += differences.norm(dim=1).sum()
        elif kind == "anisotropic":
            total += differences.abs().sum()
        else:
            total += differences.norm()
    return math.prod(steps) * total


@every_kind
@pytest.mark.parametrize(
    ("shape", "steps"), [((2, 2, 6), (0.5,)), ((2, 3, 4, 5), (0.5, 2.0)), ((2, 2, 3, 2, 4), (1.0, 0.3, 2.0))]
)
def test_it_is_its_definition_in_one_to_three_dimensions(
    kind: Any, shape: tuple[int, ...], steps: tuple[float, ...]
) -> None:
    x = randn(*shape)
    expected = torch.stack([by_loops(sample, kind, steps) for sample in x])
    torch.testing.assert_close(total_variation(x, kind, steps, "none"), expected)
    torch.testing.assert_close(total_variation(x, kind, steps, "sum"), expected.sum())
    torch.testing.assert_close(total_variation(x, kind, steps), expected.mean())


@every_kind
@pytest.mark.parametrize("shape", [(2, 2, 5), (2, 2, 4, 3), (1, 2, 3, 2, 3)])
def test_gradients_match_finite_differences(kind: Any, shape: tuple[int, ...]) -> None:
    assert gradcheck(lambda x: total_variation(x, kind, spacing=0.7), randn(*shape).requires_grad_())


@every_kind
def test_a_constant_has_no_variation_and_no_gradient(kind: Any) -> None:
    x = torch.full((2, 3, 4, 5), 0.3, requires_grad=True)
    value = total_variation(x, kind)
    (gradient,) = torch.autograd.grad(value, x)
    assert value == 0
    assert torch.equal(gradient, torch.zeros_like(x))


@law
@given(x=grids, kind=kinds, scale=st.floats(0.1, 10), shift=st.floats(-10, 10))
def test_it_is_homogeneous_and_ignores_constants(x: Tensor, kind: Any, scale: float, shift: float) -> None:
    torch.testing.assert_close(
        total_variation(shift - scale * x, kind), scale * total_variation(x, kind), rtol=1e-9, atol=1e-9
    )


@law
@given(x=grids)
def test_the_kinds_are_ordered_as_their_norms(x: Tensor) -> None:
    vectorial, isotropic, anisotropic = (total_variation(x, k) for k in ("vectorial", "isotropic", "anisotropic"))
    dims, channels = x.ndim - 2, x.shape[1]
    assert vectorial <= isotropic * (1 + 1e-12)
    assert isotropic <= anisotropic * (1 + 1e-12)
    assert anisotropic <= math.sqrt(dims) * isotropic * (1 + 1e-12)
    assert isotropic <= math.sqrt(channels) * vectorial * (1 + 1e-12)


@law
@given(x=grids, kind=kinds, steps=st.tuples(*[st.floats(0.1, 10)] * 3))
def test_swapping_dimensions_and_their_spacing_changes_nothing(x: Tensor, kind: Any, steps: tuple[float, ...]) -> None:
    spacing = steps[: x.ndim - 2]
    swapped = x.transpose(2, -1)
    torch.testing.assert_close(
        total_variation(swapped, kind, (spacing[-1], *spacing[1:-1], spacing[0])[: x.ndim - 2]),
        total_variation(x, kind, spacing),
    )


@law
@given(signal=arrays(np.float64, st.integers(1, 8), elements=numbers).map(np.sort))
def test_the_variation_of_a_monotone_signal_is_its_rise(signal: np.ndarray) -> None:
    x = torch.from_numpy(signal).view(1, 1, -1)
    rise = torch.tensor(signal[-1] - signal[0])
    torch.testing.assert_close(total_variation(x, spacing=0.3), rise, rtol=1e-9, atol=1e-9)


def test_an_edge_costs_its_height_times_its_length_at_any_resolution() -> None:
    for size in (8, 16, 64):
        x = torch.zeros(1, 1, size, size)
        x[..., size // 2 :] = 3.0
        torch.testing.assert_close(total_variation(x, spacing=1 / size), torch.tensor(3.0))


def test_a_tilted_plane_costs_its_slope_times_its_area_in_the_limit() -> None:
    size = 400
    ticks = torch.arange(size, dtype=torch.float64) / size
    plane = (3 * ticks[:, None] + 4 * ticks[None, :]).view(1, 1, size, size)
    assert total_variation(plane, spacing=1 / size) == pytest.approx(5.0, rel=5e-3)
    assert total_variation(plane, "anisotropic", spacing=1 / size) == pytest.approx(7.0, rel=5e-3)


def test_the_vectorial_kind_prefers_edges_that_coincide() -> None:
    apart = torch.zeros(1, 2, 8)
    apart[0, 0, 3:], apart[0, 1, 5:] = 1.0, 1.0
    together = torch.zeros(1, 2, 8)
    together[0, :, 4:] = 1.0
    assert total_variation(together, "isotropic") == total_variation(apart, "isotropic") == 2
    assert total_variation(apart, "vectorial") == 2
    torch.testing.assert_close(total_variation(together, "vectorial"), torch.tensor(2.0).sqrt())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype: torch.dtype) -> None:
    x = torch.tensor([0.0, 1.0], dtype=dtype).repeat(1, 1, 50_000).requires_grad_()
    value = total_variation(x, "anisotropic")
    assert value.dtype == torch.float32
    assert value == 99_999
    (gradient,) = torch.autograd.grad(value, x)
    assert gradient.dtype == dtype


@pytest.mark.parametrize(
    ("shape", "arguments", "message"),
    [
        ((2, 3), {}, r"1 to 3 spatial dimensions, got \(2, 3\)"),
        ((1, 1, 2, 2, 2, 2), {}, "1 to 3 spatial dimensions"),
        ((0, 1, 4), {}, "must not be empty"),
        ((1, 1, 4), {"kind": "smooth"}, "kind must be .* got 'smooth'"),
        ((1, 1, 4), {"reduction": "max"}, "reduction must be .* got 'max'"),
        ((1, 1, 4, 4), {"spacing": (1.0,)}, "one entry per spatial dimension, got 1 for 2"),
        ((1, 1, 4), {"spacing": 0.0}, "spacing must be positive"),
        ((1, 1, 4), {"spacing": math.inf}, "spacing must be positive"),
    ],
)
def test_bad_input_is_refused(shape: tuple[int, ...], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(total_variation)(torch.ones(shape), **arguments)


def test_integers_are_refused() -> None:
    with pytest.raises(TypeError, match="floating-point"):
        inspect.unwrap(total_variation)(torch.ones(1, 1, 4, dtype=torch.uint8))
