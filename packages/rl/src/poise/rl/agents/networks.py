"""The perceptrons of the agents; a value network is a representation and one linear head on it."""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from gymnasium import Space
from jaxtyping import Float
from torch import Tensor, nn

from poise.rl.envs.spaces import action_bounds, action_count, observation_size


def perceptron(inputs: int, widths: Sequence[int]) -> nn.Sequential:
    """Linear layers, each followed by a ReLU."""
    layers: list[nn.Module] = []
    for width in widths:
        layers += [nn.Linear(inputs, width), nn.ReLU()]
        inputs = width
    return nn.Sequential(*layers)


class Actor(nn.Module):
    """A deterministic policy: a perceptron whose tanh covers the range of the actions.

    Attributes:
        scale: half the range of each action.
        center: the middle of it.
    """

    scale: Tensor
    center: Tensor

    def __init__(self, observation_space: Space[Any], action_space: Space[Any], hidden: Sequence[int]) -> None:
        super().__init__()
        low, high = action_bounds(action_space)
        self.body = perceptron(observation_size(observation_space), hidden)
        self.head = nn.Linear(hidden[-1], len(low))
        number = self.head.weight.dtype
        self.register_buffer("scale", torch.as_tensor((high - low) / 2, dtype=number))
        self.register_buffer("center", torch.as_tensor((high + low) / 2, dtype=number))

    def forward(self, observation: Float[Tensor, "*batch s"]) -> Float[Tensor, "*batch a"]:
        return self.center + self.scale * self.head(self.body(observation)).tanh()

    def clip(self, action: Float[Tensor, "*batch a"]) -> Float[Tensor, "*batch a"]:
        """``action`` moved to the nearest allowed one."""
        return action.clamp(self.center - self.scale, self.center + self.scale)


class Critic(nn.Module):
    """``Q(s, a)``: ``features`` are its representation φ(s, a), ``head`` the linear layer on it."""

    def __init__(self, observation_space: Space[Any], action_space: Space[Any], hidden: Sequence[int]) -> None:
        super().__init__()
        assert action_space.shape is not None
        self.body = perceptron(observation_size(observation_space) + prod(action_space.shape), hidden)
        self.head = nn.Linear(hidden[-1], 1)

    def features(
        self, observation: Float[Tensor, "*batch s"], action: Float[Tensor, "*batch a"]
    ) -> Float[Tensor, "*batch d"]:
        return self.body(torch.cat([observation, action], dim=-1))

    def forward(
        self, observation: Float[Tensor, "*batch s"], action: Float[Tensor, "*batch a"]
    ) -> Float[Tensor, "*batch"]:
        return self.head(self.features(observation, action)).squeeze(-1)


class QNetwork(nn.Module):
    """``Q(s, ·)`` for discrete actions: ``features`` are φ(s), each action has a row of ``head``."""

    def __init__(self, observation_space: Space[Any], action_space: Space[Any], hidden: Sequence[int]) -> None:
        super().__init__()
        self.body = perceptron(observation_size(observation_space), hidden)
        self.head = nn.Linear(hidden[-1], action_count(action_space))

    def features(self, observation: Float[Tensor, "*batch s"]) -> Float[Tensor, "*batch d"]:
        return self.body(observation)

    def forward(self, observation: Float[Tensor, "*batch s"]) -> Float[Tensor, "*batch actions"]:
        return self.head(self.features(observation))
