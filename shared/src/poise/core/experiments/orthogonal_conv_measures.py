"""How orthogonal the layers of a network are: spectra, residuals, and how these grow with the size of the input."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from poise.core.taps import Taps
from poise.core.weights.conv_geometry import ConvGeometry
from poise.core.weights.conv_spectrum import conv_singular_values
from poise.core.weights.orthogonal_conv import OrthogonalRegularizer, conv_orth_loss


@dataclass(frozen=True)
class Trained:
    """A network, its penalty, and the input size of every regularized layer."""

    net: nn.Sequential
    penalty: OrthogonalRegularizer
    sizes: Mapping[str, tuple[int, ...]]


def orthogonality(penalty: OrthogonalRegularizer) -> dict[str, float]:
    """L_orth of each layer and their sum, whatever is trained for."""
    losses = {name: layer.loss for name, layer in penalty.report().items()}
    return {"total_orthogonality": sum(losses.values())} | {
        f"orthogonality/{name}": loss for name, loss in losses.items()
    }


def input_sizes(net: nn.Module, penalty: OrthogonalRegularizer, images: Tensor) -> dict[str, tuple[int, ...]]:
    """Height and width of each regularized layer's input, cut to a multiple of its stride."""
    net.eval()
    with torch.no_grad(), Taps(net, *penalty.layers, at="input", detach=True) as taps:
        net(images)
        shapes = {name: taps[name].shape[2:] for name in penalty.layers}
    strides = {name: convolutional(layer).stride for name, layer in penalty.layers.items()}
    return {name: tuple(n - n % s for n, s in zip(shapes[name], strides[name], strict=True)) for name in shapes}


@torch.no_grad()
def spectra(trained: Trained) -> dict[str, Tensor]:
    """The singular values of each regularized layer at its training size, without those that its shape fixes at 0."""
    found = {}
    for name, layer in trained.penalty.layers.items():
        conv = convolutional(layer)
        values = singular_values(conv, trained.sizes[name])
        sizes = geometry(conv)
        places = len(values) // (conv.groups * min(sizes.out_channels, sizes.columns))
        found[name] = values[: places * conv.groups * min(sizes.out_channels, sizes.reached)]
    return found


def extremes(values: Mapping[str, Tensor]) -> dict[str, float]:
    """Largest and smallest singular value of each layer."""
    largest = {f"largest_singular_value/{name}": float(of_layer[0]) for name, of_layer in values.items()}
    return largest | {f"smallest_singular_value/{name}": float(of_layer[-1]) for name, of_layer in values.items()}


def spread_metrics(values: Mapping[str, Tensor]) -> dict[str, float]:
    """Largest minus smallest singular value, over the layers."""
    spreads = torch.stack([of_layer[0] - of_layer[-1] for of_layer in values.values()])
    return {"singular_value_spread": float(spreads.mean()), "largest_spread": float(spreads.max())}


@torch.no_grad()
def residuals(trained: Trained, factors: tuple[int, ...]) -> dict[str, Tensor]:
    """Per layer ``[err_F, err_s, err_s / its bound]`` at its training size times each factor."""
    found = {}
    for name, layer in trained.penalty.layers.items():
        conv = convolutional(layer)
        loss = conv_orth_loss(conv.weight.double(), conv.stride, dilation=conv.dilation, groups=conv.groups)
        bound = (geometry(conv).alpha * loss).sqrt()
        rows = []
        for factor in factors:
            errors = (singular_values(conv, tuple(factor * size for size in trained.sizes[name])).square() - 1).abs()
            rows.append(torch.stack([errors.norm(), errors.max(), errors.max() / bound]))
        found[name] = torch.stack(rows)
    return found


def growth_metrics(errors: Tensor) -> dict[str, float]:
    """How the residuals ``(layers, factors 1, 2, 4, 3)`` grow with the input, at worst over the layers."""
    return {
        "spectral_growth": float((errors[:, 2, 1] / errors[:, 1, 1]).max()),
        "frobenius_not_doubled": float((errors[:, 1:, 0] / errors[:, :-1, 0] - 2).abs().max()),
    }


def singular_values(conv: nn.Conv2d, size: tuple[int, ...]) -> Tensor:
    return conv_singular_values(conv.weight.double(), size, conv.stride, dilation=conv.dilation, groups=conv.groups)


def geometry(conv: nn.Conv2d) -> ConvGeometry:
    return ConvGeometry.of(conv.weight, conv.stride, conv.dilation, conv.groups)


def convolutional(layer: nn.Module) -> nn.Conv2d:
    assert isinstance(layer, nn.Conv2d)
    return layer
