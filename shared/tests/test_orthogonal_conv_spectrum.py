"""Which sizes allow an orthogonal convolution, and the exact spectrum of a convolution."""

import inspect
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from poise.core.weights.conv_geometry import ConvGeometry, orthogonal_exists, orthogonal_obstacle
from poise.core.weights.conv_spectrum import angles, conv_as_matrix, conv_singular_values, orth_residuals, symbol
from poise.core.weights.orthogonal_conv import conv_orth_loss, orthogonal_conv_init_

GOLDEN = Path(__file__).parent / "golden" / "orthogonal-conv"


def kernel(*shape: int, seed: int = 0) -> Tensor:
    return 0.3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def stored(index: int) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "ro_co.npz") as file:
        return {key.removesuffix(str(index)): file[key] for key in file if key.endswith(str(index))}


def circular(weight: Tensor, stride: int, dilation: int = 1, groups: int = 1) -> nn.Module:
    """The layer with this kernel, as PyTorch builds it."""
    channels, axes = weight.shape[1] * groups, weight.dim() - 2
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
    padding = [dilation * (k - 1) // 2 for k in weight.shape[2:]]
    layer = kind(
        channels,
        len(weight),
        tuple(weight.shape[2:]),
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        padding_mode="circular",
        dtype=weight.dtype,
    )
    layer.weight.data = weight
    return layer


@pytest.mark.parametrize("index", range(5))
def test_spectrum_and_residuals_agree_with_the_stored_ones(index: int) -> None:
    expected = stored(index)
    _, _, _, stride, places = map(int, expected["spec"])
    weight = torch.tensor(expected["K"])
    values = conv_singular_values(weight, stride * places, stride)
    torch.testing.assert_close(values, torch.tensor(expected["sv"]), rtol=1e-10, atol=1e-12)
    frobenius, spectral = orth_residuals(weight, stride * places, stride)
    torch.testing.assert_close(frobenius.item(), expected["errF"].item(), rtol=1e-10, atol=0)
    torch.testing.assert_close(spectral.item(), expected["errS"].item(), rtol=1e-10, atol=0)


@pytest.mark.parametrize(
    ("shape", "size", "stride", "dilation", "groups"),
    [
        ((4, 3, 3, 3), (6, 6), 1, 1, 1),
        ((4, 3, 3, 3), (7, 5), 1, 1, 1),
        ((16, 3, 3, 3), (8, 8), 2, 1, 1),
        ((5, 2, 4, 4), (10, 10), 2, 1, 1),
        ((9, 2, 1, 1), (6, 6), 2, 1, 1),
        ((3, 2, 3, 5), (6, 9), 3, 1, 1),
        ((6, 2, 3, 3), (8, 6), 2, 1, 3),
        ((5, 2, 3, 3), (8, 8), 2, 3, 1),
        ((4, 2, 3, 3), (12, 12), 2, 2, 2),
        ((3, 4, 5), (9,), 1, 2, 1),
        ((3, 2, 3, 2, 1), (4, 6, 2), 2, 1, 1),
    ],
)
def test_spectrum_is_that_of_the_matrix(
    shape: tuple[int, ...], size: tuple[int, ...], stride: int, dilation: int, groups: int
) -> None:
    weight = kernel(*shape)
    matrix = conv_as_matrix(circular(weight, stride, dilation, groups), size)
    assert matrix.shape[0] * shape[1] * groups * stride ** len(size) == matrix.shape[1] * shape[0]
    values = conv_singular_values(weight, size, stride, dilation=dilation, groups=groups)
    torch.testing.assert_close(values, torch.linalg.svdvals(matrix), rtol=1e-10, atol=1e-10)


def test_matrix_is_the_jacobian_of_the_layer() -> None:
    layer = nn.Conv2d(2, 3, 3, stride=2, padding=1, padding_mode="circular").double()
    signal = kernel(1, 2, 4, 4)
    jacobian = torch.autograd.functional.jacobian(layer, signal).reshape(3 * 2 * 2, 2 * 4 * 4)
    torch.testing.assert_close(conv_as_matrix(layer, 4), jacobian)


def test_symbol_of_stride_one_is_the_fourier_transform_of_the_kernel() -> None:
    weight = kernel(3, 2, 3, 3)
    frequencies = [torch.arange(5, dtype=torch.float64) / 5, torch.arange(6, dtype=torch.float64) / 6]
    found = symbol(weight.unsqueeze(0), angles(frequencies, (3, 3)))
    expected = torch.fft.fft2(weight, s=(5, 6)).flatten(2).permute(2, 0, 1)
    torch.testing.assert_close(found.squeeze(1), expected)


def test_spectrum_is_differentiable() -> None:
    weight = kernel(3, 2, 3, 3).requires_grad_()
    torch.autograd.gradcheck(lambda w: conv_singular_values(w, 5).square().sum(), weight)


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 5),
    st.integers(1, 3),
    st.lists(st.integers(1, 4), min_size=1, max_size=2),
    st.integers(1, 3),
    st.integers(1, 2),
    st.integers(1, 2),
)
def test_frobenius_residual_is_the_loss_times_the_number_of_places(
    rows: int, channels: int, taps: list[int], stride: int, dilation: int, groups: int
) -> None:
    weight = kernel(groups * rows, channels, *taps)
    options = {"stride": stride, "dilation": dilation, "groups": groups}
    loss = conv_orth_loss(weight, **options)
    geometry = ConvGeometry.of(weight, **options)
    for more in (0, 1, 3):
        size = tuple((-(-least // stride) + more) * stride for least in geometry.least_input)
        places = math.prod(one // stride for one in size)
        frobenius, spectral = orth_residuals(weight, size, **options)
        torch.testing.assert_close(frobenius.square() / places, loss, rtol=1e-9, atol=1e-9)
        assert spectral.square() <= geometry.alpha * loss * (1 + 1e-9) + 1e-12


def test_theorem_may_fail_on_inputs_where_a_kernel_meets_itself() -> None:
    expected = stored(3)
    weight = torch.tensor(expected["K"])
    assert ConvGeometry.of(weight).least_input == (9, 9)
    ratios = [(orth_residuals(weight, size)[0] / size).square().item() for size in (6, 9, 12)]
    loss = conv_orth_loss(weight).item()
    assert ratios[0] == pytest.approx(9.3142, abs=1e-4)
    assert loss == pytest.approx(9.3162, abs=1e-4)
    assert ratios[1] == pytest.approx(loss, rel=1e-10)
    assert ratios[2] == pytest.approx(loss, rel=1e-10)


@pytest.mark.parametrize("shape", [(3, 3, 3, 3), (16, 3, 3, 3)])
def test_isometry_within_the_spectral_residual(shape: tuple[int, ...]) -> None:
    weight = orthogonal_conv_init_(torch.empty(*shape, dtype=torch.float64)) + 0.02 * kernel(*shape)
    layer = circular(weight, 1)
    _, residual = orth_residuals(weight, 8)
    signals = kernel(20, 3, 8, 8, seed=1)
    squares = (layer(signals) - layer(torch.zeros(1, 3, 8, 8).double())).square().sum((1, 2, 3))
    ratio = squares / signals.square().sum((1, 2, 3))
    assert 0.01 < residual < 0.5
    assert ((1 - residual <= ratio) & (ratio <= 1 + residual)).all()


@pytest.mark.parametrize(
    ("size", "exists"),
    [
        ((4, 3, 3, 1), True),
        ((64, 3, 7, 2), True),  # the stem of a ResNet
        ((512, 256, 1, 2), False),  # its shortcuts
        ((27, 3, 3, 4), True),
        ((28, 3, 3, 4), False),
        ((48, 3, 3, 4), False),
        ((48, 3, 4, 4), True),
        ((200, 3, 4, 4), True),
    ],
)
def test_existence_on_circular_signals(size: tuple[int, int, int, int], exists: bool) -> None:
    rows, channels, taps, stride = size
    assert orthogonal_exists(*size) is exists
    assert (orthogonal_obstacle(*size) is None) is exists
    paper = rows <= channels * taps**2 if rows <= channels * stride**2 else stride <= taps
    assert exists is paper


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 8), st.integers(1, 2), st.integers(1, 3), st.integers(1, 3), st.integers(1, 2))
def test_no_kernel_has_a_smaller_residual_than_the_rank_allows(
    rows: int, channels: int, taps: int, stride: int, dilation: int
) -> None:
    geometry = ConvGeometry(rows, channels, (taps,), (stride,), (dilation,))
    weight = kernel(rows, channels, taps)
    size = (-(-geometry.least_input[0] // stride) + 1) * stride
    values = conv_singular_values(weight, size, stride, dilation=dilation)
    structural = int((values < 1e-10).sum()) // (size // stride)
    assert structural == geometry.least_loss
    assert (geometry.obstacle() is None) is (geometry.least_loss == 0)


def test_existence_at_other_boundaries() -> None:
    assert orthogonal_exists(3, 3, 3, 1, "valid")
    assert not orthogonal_exists(4, 3, 3, 1, "valid")
    assert orthogonal_exists(12, 3, 2, 2, "valid")
    assert orthogonal_exists(13, 3, 2, 2, "valid")
    assert not orthogonal_exists(13, 3, 3, 2, "valid")
    assert not orthogonal_exists(3, 3, 3, 1, "same")
    assert orthogonal_exists(3, 3, 1, 1, "same")
    assert orthogonal_exists(2, 3, (1, 1, 1), 1, "same")


def test_without_padding_rows_are_rows_of_the_circular_layer() -> None:
    layer = nn.Conv2d(3, 4, 3, stride=2, bias=False).double()
    orthogonal_conv_init_(layer.weight, 2)
    matrix = conv_as_matrix(layer, 7)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(len(matrix), dtype=torch.float64))


def test_with_zeros_around_an_orthogonal_kernel_is_not_an_orthogonal_layer() -> None:
    matrix = torch.linalg.qr(kernel(8, 8))[0].reshape(8, 2, 2, 2)
    layer = nn.Conv2d(2, 8, 2, stride=2, padding=1, bias=False).double()
    layer.weight.data = matrix
    assert conv_orth_loss(matrix, 2).item() < 1e-24
    found = conv_as_matrix(layer, 4)
    assert (found @ found.T - torch.eye(len(found)).double()).abs().max() > 0.1


def test_bad_sizes_are_refused() -> None:
    weight = kernel(4, 2, 3, 3)
    for call, words in (
        (lambda: conv_singular_values(weight, 9, 2), "multiple of the stride"),
        (lambda: conv_singular_values(weight, 2), "kernel's extent, 3"),
        (lambda: conv_singular_values(weight, (5, 5, 5)), "each of the 2 axes"),
        (lambda: orthogonal_exists(0, 1, 1), "out_channels must be at least 1"),
        (lambda: orthogonal_exists(1, 1, (3, 3), (1,)), "each of the 2 axes"),
        (lambda: inspect.unwrap(ConvGeometry.obstacle)(ConvGeometry.of(weight), "reflect"), "padding_mode must be"),
        (lambda: orthogonal_exists(1, 1, 3, 2, "same"), "stride 1"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    with pytest.raises(TypeError, match="floating-point"):
        conv_singular_values(weight.long(), 5)
    with pytest.raises(TypeError, match="convolution"):
        conv_as_matrix(nn.Linear(2, 2), 3)
