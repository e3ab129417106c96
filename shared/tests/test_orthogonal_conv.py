"""The orthogonality loss of convolutions against the authors' code, and its laws."""

import copy
import inspect
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from poise.core.weights.conv_geometry import ConvGeometry, orthogonal_exists
from poise.core.weights.conv_spectrum import conv_as_matrix, orth_residuals
from poise.core.weights.orthogonal_conv import (
    OrthogonalityWarning,
    OrthogonalRegularizer,
    conv_orth_loss,
    kernel_orth_loss,
    orthogonal_conv_init_,
)

GOLDEN = Path(__file__).parent / "golden" / "orthogonal-conv"
LAYERS = range(5)


def golden(index: int) -> tuple[Tensor, int, dict[str, Any]]:
    """Kernel, stride and what the authors' code gives for them."""
    with np.load(GOLDEN / "ro_co.npz") as file:
        stored = {key.removesuffix(str(index)): file[key] for key in file if key.endswith(str(index))}
    return torch.tensor(stored["K"]), int(stored["spec"][3]), stored


def kernel(*shape: int, seed: int = 0, scale: float = 0.3) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def in_space(weight: Tensor, stride: int) -> Tensor:
    """The definition, literally: the correlation of the kernel with itself in space, minus the identity."""
    taps = weight.shape[2:]
    padding = [(k - 1) // stride * stride for k in taps]
    convolve = (F.conv1d, F.conv2d, F.conv3d)[len(taps) - 1]
    correlation = convolve(weight, weight, stride=stride, padding=padding)
    target = torch.zeros_like(correlation)
    target[(slice(None), slice(None), *(p // stride for p in padding))] = torch.eye(len(weight), dtype=weight.dtype)
    rows, columns = len(weight), weight.shape[1] * stride ** len(taps)
    return (correlation - target).square().sum() - max(0, rows - columns)


sizes = st.tuples(
    st.integers(1, 6),  # M
    st.integers(1, 3),  # C
    st.lists(st.integers(1, 4), min_size=1, max_size=3),  # kernel
    st.integers(1, 3),  # stride
)


@pytest.mark.parametrize("index", LAYERS)
def test_agrees_with_the_authors_code(index: int) -> None:
    weight, stride, stored = golden(index)
    weight.requires_grad_()
    loss = conv_orth_loss(weight, stride)
    (gradient,) = torch.autograd.grad(loss, weight)
    torch.testing.assert_close(loss.item(), stored["Lorth"].item(), rtol=1e-10, atol=0)
    torch.testing.assert_close(gradient, torch.tensor(stored["grad"]), rtol=1e-10, atol=1e-12)
    distance = conv_orth_loss(weight, stride, regime="rows", squared=False)
    torch.testing.assert_close(distance.item(), stored["deconv_orth_dist_P"].item(), rtol=1e-10, atol=0)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_released_default_padding_is_another_number(index: int) -> None:
    weight, stride, stored = golden(index)
    correlation = F.conv2d(weight, weight, stride=stride, padding=1)
    target = torch.zeros_like(correlation)
    middle = correlation.shape[-1] // 2
    target[:, :, middle, middle] = torch.eye(len(weight), dtype=weight.dtype)
    released = (correlation - target).norm().item()
    torch.testing.assert_close(released, stored["deconv_orth_dist_pad1_"].item(), rtol=1e-10, atol=0)
    assert abs(released - conv_orth_loss(weight, stride, regime="rows", squared=False).item()) > 0.1


def test_kernel_form_agrees_with_the_authors_code() -> None:
    with np.load(GOLDEN / "kernel_orth.npz") as file:
        for index in (1, 2):
            distance = kernel_orth_loss(torch.tensor(file[f"m{index}"]), squared=False)
            torch.testing.assert_close(distance.item(), file[f"orth_dist{index}"].item(), rtol=1e-5, atol=0)


@settings(deadline=None, max_examples=60)
@given(sizes)
def test_equals_the_definition_in_space(size: tuple[int, int, list[int], int]) -> None:
    rows, channels, taps, stride = size
    weight = kernel(rows, channels, *taps)
    torch.testing.assert_close(conv_orth_loss(weight, stride), in_space(weight, stride), rtol=1e-10, atol=1e-10)


@settings(deadline=None, max_examples=30)
@given(sizes, st.integers(1, 3))
def test_dilation_is_a_kernel_with_zeros_between(size: tuple[int, int, list[int], int], dilation: int) -> None:
    rows, channels, taps, stride = size
    weight = kernel(rows, channels, *taps)
    stuffed = weight.new_zeros(rows, channels, *(dilation * (k - 1) + 1 for k in taps))
    stuffed[(slice(None), slice(None), *[slice(None, None, dilation)] * len(taps))] = weight
    torch.testing.assert_close(
        conv_orth_loss(weight, stride, dilation=dilation), in_space(stuffed, stride), rtol=1e-10, atol=1e-10
    )


@settings(deadline=None, max_examples=60)
@given(sizes)
def test_never_below_its_least_value(size: tuple[int, int, list[int], int]) -> None:
    rows, channels, taps, stride = size
    weight = kernel(rows, channels, *taps, scale=rows**-0.5)
    least = ConvGeometry.of(weight, stride).least_loss
    assert least >= 0
    assert conv_orth_loss(weight, stride).item() >= least * (1 - 1e-12)


@settings(deadline=None, max_examples=40)
@given(sizes, st.integers(1, 2))
def test_constructed_kernels_have_no_loss_and_no_gradient(size: tuple[int, int, list[int], int], groups: int) -> None:
    rows, channels, taps, stride = size
    if not orthogonal_exists(rows, channels, tuple(taps), stride=(stride,) * len(taps)):
        return
    weight = torch.empty(groups * rows, channels, *taps, dtype=torch.float64)
    orthogonal_conv_init_(weight, stride, groups=groups, generator=torch.Generator().manual_seed(0))
    weight.requires_grad_()
    loss = conv_orth_loss(weight, stride, groups=groups)
    (gradient,) = torch.autograd.grad(loss, weight)
    assert 0 <= loss.item() < 1e-24
    assert gradient.abs().max().item() < 1e-13


def test_construction_with_dilation_is_orthogonal_too() -> None:
    weight = orthogonal_conv_init_(torch.empty(4, 2, 3, 3, dtype=torch.float64), stride=2, dilation=3)
    assert conv_orth_loss(weight, stride=2, dilation=3).item() < 1e-24
    assert orth_residuals(weight, 14, stride=2, dilation=3)[0].item() < 1e-12


def test_unsquared_has_no_gradient_at_its_minimum() -> None:
    weight = orthogonal_conv_init_(torch.empty(4, 3, 3, 3, dtype=torch.float64)).requires_grad_()
    loss = conv_orth_loss(weight, squared=False)
    (gradient,) = torch.autograd.grad(loss, weight)
    assert loss.item() == 0
    assert not gradient.any()


def test_groups_add_up() -> None:
    weight = kernel(6, 2, 3, 3)
    blocks = sum(conv_orth_loss(part, 2) for part in weight.chunk(3))
    torch.testing.assert_close(conv_orth_loss(weight, 2, groups=3), blocks)


def test_loss_of_rows_and_of_columns_differ_by_the_numbers_of_them() -> None:
    for weight, stride in ((kernel(12, 2, 3, 3), 2), (kernel(3, 2, 3, 3), 2), (kernel(7, 2, 2, 2), 3)):
        geometry = ConvGeometry.of(weight, stride)
        rows, columns = (conv_orth_loss(weight, stride, regime=regime) for regime in ("rows", "columns"))
        torch.testing.assert_close(
            rows - columns, torch.tensor(float(geometry.out_channels - geometry.columns)).double()
        )
        torch.testing.assert_close(conv_orth_loss(weight, stride), {"rows": rows, "columns": columns}[geometry.regime])


@settings(deadline=None, max_examples=30)
@given(sizes, st.integers(0, 2**16))
def test_invariances(size: tuple[int, int, list[int], int], seed: int) -> None:
    rows, channels, taps, stride = size
    weight = kernel(rows, channels, *taps, seed=seed)
    loss = conv_orth_loss(weight, stride)
    turn = torch.linalg.qr(kernel(rows, rows, seed=seed + 1))[0]
    signs = torch.where(kernel(channels, seed=seed + 2) > 0, 1.0, -1.0).double()
    for same in (
        torch.einsum("nm,m...->n...", turn, weight),
        weight.flip(*range(2, weight.dim())),
        weight * signs.view(-1, *[1] * len(taps)),
    ):
        torch.testing.assert_close(conv_orth_loss(same, stride), loss, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 4)])
def test_single_taps_are_matrices(shape: tuple[int, int]) -> None:
    matrix = kernel(*shape)
    expected = kernel_orth_loss(matrix)
    for axes in (1, 2, 3):
        torch.testing.assert_close(conv_orth_loss(matrix.view(*shape, *[1] * axes)), expected)


def test_orthogonality_of_the_reshaped_kernel_is_neither_necessary_nor_sufficient() -> None:
    reshaped = torch.linalg.qr(kernel(27, 4))[0].T.reshape(4, 3, 3, 3)
    assert kernel_orth_loss(reshaped).item() < 1e-24
    assert conv_orth_loss(reshaped).item() > 0.1
    layer = orthogonal_conv_init_(torch.empty(32, 3, 3, 3, dtype=torch.float64))
    assert conv_orth_loss(layer).item() < 1e-24
    assert kernel_orth_loss(layer).item() > 1


def test_transposed_convolution_is_the_adjoint() -> None:
    transposed = nn.ConvTranspose2d(4, 3, 2, stride=2, bias=False).double()
    orthogonal_conv_init_(transposed.weight, 2)
    matrix = conv_as_matrix(transposed, 3)
    torch.testing.assert_close(matrix.T @ matrix, torch.eye(36, dtype=torch.float64))


@pytest.mark.parametrize(
    ("size", "reached"),
    [((4, 3, 3, 1), True), ((12, 2, 3, 2), True), ((20, 2, 2, 3), False), ((6, 1, 2, 3), False)],
)
def test_minimizing_reaches_zero_or_the_bound(size: tuple[int, int, int, int], reached: bool) -> None:
    rows, channels, taps, stride = size
    assert orthogonal_exists(*size) is reached
    weight = kernel(rows, channels, taps, taps, scale=0.2).requires_grad_()
    least = ConvGeometry.of(weight, stride).least_loss
    optimizer = torch.optim.Adam([weight], lr=1e-2)
    for step in range(900):
        if step == 500:
            optimizer.param_groups[0]["lr"] = 1e-3
        optimizer.zero_grad()
        conv_orth_loss(weight, stride).backward()
        optimizer.step()
    assert conv_orth_loss(weight, stride).item() == pytest.approx(least, abs=1e-3)
    if rows == 20:
        assert least == 2 * (3**2 - 2**2) == 10


def test_second_derivatives_and_transforms() -> None:
    weight = kernel(3, 2, 2, 2).requires_grad_()
    torch.autograd.gradcheck(lambda w: conv_orth_loss(w, 2), weight)
    torch.autograd.gradgradcheck(lambda w: conv_orth_loss(w, 1), weight)
    many = kernel(5, 3, 2, 3, 3)
    each = torch.func.vmap(torch.func.grad(conv_orth_loss))(many)
    torch.testing.assert_close(each[2], torch.func.grad(conv_orth_loss)(many[2]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_summed_in_float32(dtype: torch.dtype) -> None:
    weight = kernel(8, 4, 3, 3).to(dtype)
    loss = conv_orth_loss(weight)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, conv_orth_loss(weight.float()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(conv_orth_loss(weight.float()), loss)


def test_bad_input_is_refused() -> None:
    weight = kernel(4, 2, 3, 3)
    for call, words in (
        (lambda: conv_orth_loss(weight, 0), "stride must be at least 1"),
        (lambda: conv_orth_loss(weight, (1, 1, 1)), "one entry for each of the 2 axes"),
        (lambda: conv_orth_loss(weight, groups=3), "groups must divide the 4 output channels"),
        (lambda: conv_orth_loss(weight[0, 0]), "shape"),
        (lambda: inspect.unwrap(conv_orth_loss)(weight, regime="both"), "regime must be"),
        (lambda: kernel_orth_loss(weight[0, 0, 0]), "outputs"),
        (lambda: orthogonal_conv_init_(torch.empty(5, 2, 1, 1), 2), "no orthogonal convolution"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    for loss in (conv_orth_loss, kernel_orth_loss):
        with pytest.raises(TypeError, match=r"weight must be floating-point, got torch\.int64"):
            loss(weight.long())


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding_mode="circular", padding=1),
        nn.Conv2d(8, 8, 3, groups=2, stride=2),
        nn.Sequential(nn.Conv2d(8, 4, 1), nn.Flatten(), nn.Linear(4, 2)),
    ).double()


def test_regularizer_sums_or_averages_the_layers() -> None:
    model = network()
    first, second, third = model[0].weight, model[1].weight, model[2][0].weight
    losses = torch.stack([conv_orth_loss(first), conv_orth_loss(second, 2, groups=2), conv_orth_loss(third)])
    torch.testing.assert_close(OrthogonalRegularizer(model, 0.5)(), 0.5 * losses.sum())
    torch.testing.assert_close(OrthogonalRegularizer(model, reduction="mean")(), losses.mean())
    torch.testing.assert_close(OrthogonalRegularizer(model, skip=["0", "2.*"])(), losses[1])
    torch.testing.assert_close(OrthogonalRegularizer(model, padding_modes=["circular"])(), losses[0])
    torch.testing.assert_close(OrthogonalRegularizer(model, types=[nn.Linear])(), kernel_orth_loss(model[2][2].weight))
    torch.testing.assert_close(OrthogonalRegularizer(model, squared=False)(), losses.sqrt().sum())
    factors = {"**": 3.0, "2.*": 0.5}
    expected = 3 * losses[0] + 3 * losses[1] + losses[2] / 2
    torch.testing.assert_close(OrthogonalRegularizer(model, factors=factors)(), expected)


def test_regularizer_counts_a_shared_layer_once() -> None:
    layer = nn.Conv1d(2, 2, 3)
    assert list(OrthogonalRegularizer(nn.Sequential(layer, nn.ReLU(), layer)).layers) == ["0"]


def test_regularizer_looks_into_wrapped_layers() -> None:
    model = nn.Sequential(torch.compile(nn.Conv2d(2, 2, 3)), nn.ReLU(), nn.Conv2d(2, 2, 3))
    assert list(OrthogonalRegularizer(model).layers) == ["0", "2"]
    assert list(OrthogonalRegularizer(model, skip=["0"]).layers) == ["2"]
    assert list(OrthogonalRegularizer(model[0]).layers) == [""]


def test_regularizer_reads_parametrized_weights() -> None:
    layer = torch.nn.utils.parametrizations.orthogonal(nn.Linear(4, 6))
    assert OrthogonalRegularizer(layer, types=[nn.Linear])().item() < 1e-10


def test_regularizer_leaves_the_model_to_its_owner() -> None:
    model = network()
    penalty = OrthogonalRegularizer(model)
    assert not list(penalty.parameters())
    assert all("weight" not in name for name in penalty.state_dict())
    model_copy, penalty_copy = copy.deepcopy((model, penalty))
    assert penalty_copy.layers["0"] is model_copy[0]


def test_regularizer_warns_of_layers_that_cannot_be_orthogonal() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 1, stride=2), nn.Conv2d(8, 8, 3))
    with pytest.warns(OrthogonalityWarning, match=r"^0: no orthogonal convolution: 8 orthonormal rows"):
        report = OrthogonalRegularizer(model).report()
    assert report["0"].obstacle
    assert report["1"].obstacle is None
    assert report["0"].loss >= 4
    assert not report["1"].circular


def test_regularizer_refuses_what_it_cannot_do() -> None:
    model = network()
    penalty = OrthogonalRegularizer(model)
    with pytest.raises(ValueError, match="no layer to regularize"):
        OrthogonalRegularizer(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="no module matches"):
        OrthogonalRegularizer(model, skip=["stem"])
    with pytest.raises(ValueError, match=r"factors: '2\.2' matches none of the regularized layers"):
        OrthogonalRegularizer(model, factors={"2.2": 2.0})
    with pytest.raises(ValueError, match="factors must be positive"):
        OrthogonalRegularizer(model, factors={"0": 0.0})
    with pytest.raises(ValueError, match="reduction must be"):
        inspect.unwrap(OrthogonalRegularizer.__init__)(penalty, model, reduction="max")
    with pytest.raises(TypeError, match=r"types must name convolutions or nn\.Linear"):
        OrthogonalRegularizer(model, types=[nn.BatchNorm2d])


def test_training_with_the_penalty_makes_layers_isometric() -> None:
    model = network()
    penalty = OrthogonalRegularizer(model, weight=1.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    before = penalty().item()
    for _ in range(300):
        optimizer.zero_grad()
        penalty().backward()
        optimizer.step()
    assert penalty().item() < 1e-3 * before
    signal = torch.randn(1, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    response = F.conv2d(F.pad(signal, (1, 1, 1, 1), mode="circular"), model[0].weight)
    assert math.isclose(response.norm().item(), signal.norm().item(), rel_tol=1e-2)
