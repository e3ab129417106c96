"""The networks of agents that see: an encoder of images, and policy and values over trunks that squeeze its representation.

Yarats, Fergus, Lazaric and Pinto, "Mastering Visual Continuous Control: Improved Data-Augmented Reinforcement Learning", ICLR 2022,
arXiv 2107.09645, appendix B.
"""

from collections.abc import Callable, Sequence
from typing import cast

import torch
from jaxtyping import Float, Num
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

Heads = Callable[[nn.Sequential], nn.Sequential]
"""Changes the perceptrons of policy and values."""


def orthogonal_init(layer: nn.Module) -> None:
    """Orthogonal weights (times √2 in convolutions), zero biases; LayerNorm as PyTorch has it, other modules as they are."""
    if isinstance(layer, nn.Linear | nn.Conv2d):
        changed = is_parametrized(layer, "weight")
        weight = layer.get_parameter("parametrizations.weight.original") if changed else layer.weight
        nn.init.orthogonal_(weight, nn.init.calculate_gain("relu") if isinstance(layer, nn.Conv2d) else 1.0)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    elif isinstance(layer, nn.LayerNorm):
        layer.reset_parameters()


class _Orthogonal(nn.Module):
    """A network of such layers."""

    def reset_parameters(self) -> None:
        for layer in self.modules():
            orthogonal_init(layer)


class Encoder(_Orthogonal):
    """Four convolutions of 3 x 3, the first with stride 2; pixels from 0 to 255 become -0.5 to 0.5.

    Attributes:
        size: numbers in a representation.
    """

    def __init__(self, shape: Sequence[int], channels: int = 32) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(shape[0], channels, 3, stride=2), nn.ReLU(inplace=True)]
        for _ in range(3):
            layers += [nn.Conv2d(channels, channels, 3), nn.ReLU(inplace=True)]
        self.body = nn.Sequential(*layers)
        height, width = ((side - 3) // 2 + 1 - 6 for side in shape[1:])
        if min(height, width) < 1:
            raise ValueError(f"images must be at least 15 x 15, got {tuple(shape[1:])}")
        self.size = channels * height * width
        self.reset_parameters()

    def forward(self, pixels: Num[Tensor, "batch channels height width"]) -> Float[Tensor, "batch size"]:
        number = cast(nn.Conv2d, self.body[0]).weight.dtype
        return self.body(pixels.to(number, copy=True).div_(255).sub_(0.5)).flatten(1)


class Actor(_Orthogonal):
    """A policy over a trunk that squeezes the representation; its trunk ends in tanh and has no dead side."""

    def __init__(self, size: int, actions: int, feature_dim: int = 50, hidden: int = 1024, heads: Heads | None = None):
        super().__init__()
        self.trunk = _trunk(size, feature_dim)
        self.policy = _head(feature_dim, hidden, actions, heads)
        self.reset_parameters()

    def forward(self, z: Float[Tensor, "batch size"]) -> Float[Tensor, "batch a"]:
        """The mean of the action before the tanh that brings it into its range."""
        return self.policy(self.trunk(z))


class Critic(_Orthogonal):
    """Two values over one trunk."""

    def __init__(self, size: int, actions: int, feature_dim: int = 50, hidden: int = 1024, heads: Heads | None = None):
        super().__init__()
        self.trunk = _trunk(size, feature_dim)
        self.q1, self.q2 = (_head(feature_dim + actions, hidden, 1, heads) for _ in range(2))
        self.reset_parameters()

    def forward(
        self, z: Float[Tensor, "batch size"], action: Float[Tensor, "batch a"]
    ) -> tuple[Float[Tensor, "batch"], Float[Tensor, "batch"]]:
        features = torch.cat([self.trunk(z), action], dim=-1)
        return self.q1(features).squeeze(-1), self.q2(features).squeeze(-1)


class PixelValue(nn.Module):
    """Encoder and critic as one network, whose plasticity can be probed."""

    def __init__(self, encoder: nn.Module, critic: nn.Module) -> None:
        super().__init__()
        self.encoder, self.critic = encoder, critic

    def forward(self, pixels: Num[Tensor, "batch c h w"], action: Float[Tensor, "batch a"]) -> tuple[Tensor, Tensor]:
        return self.critic(self.encoder(pixels), action)


def _trunk(size: int, feature_dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(size, feature_dim), nn.LayerNorm(feature_dim), nn.Tanh())


def _head(inputs: int, hidden: int, outputs: int, change: Heads | None) -> nn.Sequential:
    head = nn.Sequential(
        nn.Linear(inputs, hidden),
        nn.ReLU(inplace=True),
        nn.Linear(hidden, hidden),
        nn.ReLU(inplace=True),
        nn.Linear(hidden, outputs),
    )
    return head if change is None else change(head)
