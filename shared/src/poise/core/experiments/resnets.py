"""Residual networks as published, for small and for large images, with any boundaries.

He, Zhang, Ren and Sun, "Deep Residual Learning for Image Recognition", CVPR 2016. For small images the first convolution has 3 x 3
taps and stride 1, and there is no pooling after it, as is usual for CIFAR.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

Boundary = Literal["zeros", "circular", "reflect", "replicate"]

LAYOUTS: dict[int, tuple[tuple[int, ...], bool]] = {
    18: ((2, 2, 2, 2), False),
    34: ((3, 4, 6, 3), False),
    50: ((3, 4, 6, 3), True),
}
"""Blocks of the four stages, and whether they are bottlenecks, by depth."""


class Channels(NamedTuple):
    """Mean and standard deviation of the channels of a data set's images in [0, 1]."""

    mean: Sequence[float]
    deviation: Sequence[float]


AS_THEY_ARE = Channels((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
CIFAR = Channels((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
IMAGENET = Channels((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class Standardize(nn.Module):
    """Subtract the mean of each channel and divide by its standard deviation, so that a network takes images in [0, 1]."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, channels: Channels) -> None:
        super().__init__()
        for name, values in channels._asdict().items():
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1), persistent=False)

    def forward(self, images: Float[Tensor, "batch c h w"]) -> Float[Tensor, "batch c h w"]:
        return (images - self.mean) / self.deviation


class Block(nn.Module):
    """``relu(x + f(x))``, f two convolutions or a bottleneck of three."""

    def __init__(self, inputs: int, width: int, stride: int, bottleneck: bool, padding_mode: Boundary) -> None:
        super().__init__()
        outputs = 4 * width if bottleneck else width
        sizes = (
            [(inputs, width, 1, 1), (width, width, 3, stride), (width, outputs, 1, 1)]
            if bottleneck
            else [(inputs, width, 3, stride), (width, outputs, 3, 1)]
        )
        layers: list[nn.Module] = []
        for size in sizes:
            layers += [convolution(*size, padding_mode), nn.BatchNorm2d(size[1]), nn.ReLU()]
        self.residual = nn.Sequential(*layers[:-1])
        changes = stride > 1 or inputs != outputs
        self.shortcut = (
            nn.Sequential(convolution(inputs, outputs, 1, stride, padding_mode), nn.BatchNorm2d(outputs))
            if changes
            else nn.Identity()
        )

    def forward(self, x: Float[Tensor, "batch c h w"]) -> Float[Tensor, "batch d i j"]:
        return torch.relu(self.shortcut(x) + self.residual(x))


def resnet(
    depth: int,
    classes: int,
    images: Literal["small", "large"],
    channels: Channels = AS_THEY_ARE,
    *,
    padding_mode: Boundary = "zeros",
) -> nn.Sequential:
    """A residual network with the parts ``stem``, ``stages`` and ``head``.

    Args:
        depth: 18, 34 or 50.
        classes: outputs.
        images: up to about 64 x 64, or larger.
        channels: mean and standard deviation of each channel of the images in [0, 1].
        padding_mode: boundaries of the convolutions, as PyTorch names them.

    Raises:
        ValueError: another depth.
    """
    if depth not in LAYOUTS:
        raise ValueError(f"depth must be one of {sorted(LAYOUTS)}, got {depth}")
    counts, bottleneck = LAYOUTS[depth]
    small = images == "small"
    stem: list[nn.Module] = [
        convolution(len(channels.mean), 64, *((3, 1) if small else (7, 2)), padding_mode),
        nn.BatchNorm2d(64),
    ]
    stem += [nn.ReLU()] if small else [nn.ReLU(), nn.MaxPool2d(3, stride=2, padding=1)]
    stages, inputs = [], 64
    for stage, count in enumerate(counts):
        width = 64 * 2**stage
        blocks = []
        for number in range(count):
            stride = 2 if stage and number == 0 else 1
            blocks.append(Block(inputs, width, stride, bottleneck, padding_mode))
            inputs = 4 * width if bottleneck else width
        stages.append(nn.Sequential(*blocks))
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))
    network = nn.Sequential()
    network.add_module("standardize", Standardize(channels))
    network.add_module("stem", nn.Sequential(*stem))
    network.add_module("stages", nn.Sequential(*stages))
    network.add_module("head", head)
    return network


def convolution(inputs: int, outputs: int, taps: int, stride: int, padding_mode: Boundary = "zeros") -> nn.Conv2d:
    """A convolution without bias whose output is the input divided by the stride, initialised for ReLU after it."""
    layer = nn.Conv2d(inputs, outputs, taps, stride=stride, padding=taps // 2, bias=False, padding_mode=padding_mode)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return layer
