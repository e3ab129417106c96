r"""InFeR: keep a representation able to predict what random heads read from the network as it was at the beginning.

Lyle, Rowland and Dabney, "Understanding and Preventing Capacity Loss in Reinforcement Learning", ICLR 2022, arXiv 2204.09560.

.. math:: R = \mathbb E\, \frac1k \sum_{i \le k} \big(g_i(\phi_\theta(s, a)) - c\, g^0_i(\phi_{\theta_0}(s, a))\big)^2

The k linear heads g start at g⁰ and are trained with the critic; network θ₀ and heads g⁰ are frozen.

>>> import gymnasium
>>> from poise.rl import DPGAgent
>>> env = gymnasium.make("Pendulum-v1")
>>> agent = DPGAgent(env.observation_space, env.action_space)
>>> infer = InFeRRegularizer(agent.critics[0], 256)
>>> agent.regularize(infer)
"""

import copy
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from poise.core.penalty import Penalty
from poise.core.schedule import Schedule
from poise.rl.representation.critic_step import CriticStep


@runtime_checkable
class HasFeatures(Protocol):
    """A value network that shows its representation."""

    def features(self, *inputs: Tensor) -> Tensor:
        """φ of observation and action, or of the observation alone."""


class InFeRRegularizer(Penalty):
    """``weight`` times the squared error of the heads.

    Args:
        network: the value network at its beginning, with a method ``features``; a frozen copy of it is kept.
        width: size of the representation.
        weight: the weight, or a schedule of it.
        heads: number k of linear heads.
        scale: factor c on the targets.

    Raises:
        TypeError: the network does not show its features.
    """

    def __init__(
        self,
        network: nn.Module,
        width: int,
        weight: float | Schedule = 0.1,
        *,
        heads: int = 10,
        scale: float = 100.0,
    ) -> None:
        super().__init__(weight)
        if not isinstance(network, HasFeatures):
            raise TypeError(f"network must have a method features(), got {type(network).__name__}")
        self.initial = copy.deepcopy(network).requires_grad_(False)
        self.heads = nn.Linear(width, heads, bias=False).to(next(network.parameters()))
        self.initial_heads = copy.deepcopy(self.heads).requires_grad_(False)
        self.scale = scale

    def penalty(self, features: Float[Tensor, "batch d"], *inputs: Float[Tensor, "batch _"]) -> Tensor:
        """The mean squared error of the heads on ``features`` of the network at ``inputs``.

        Raises:
            ValueError: there is no transition.
        """
        if len(features) == 0:
            raise ValueError(f"features must hold at least one transition, got shape {tuple(features.shape)}")
        assert isinstance(self.initial, HasFeatures)
        with torch.no_grad():
            target = self.scale * self.initial_heads(self.initial.features(*inputs))
        wide = torch.promote_types(features.dtype, torch.float32)
        return (self.heads(features).to(wide) - target.to(wide)).square().mean()

    def critic_loss(self, step: CriticStep) -> Tensor:
        """The term for a critic that an agent is updating."""
        return self(step.features, *step.inputs)
