r"""DR3: penalise the inner product of the representations of a state-action pair and its successor.

Kumar et al., "DR3: Value-Based Deep Reinforcement Learning Requires Explicit Regularization", ICLR 2022, arXiv 2112.04716.

.. math:: R = \mathbb E\, \phi(s, a)^\top \phi(s', a')

Here φ' is that of the target critic and constant, as in BEER, so that the two differ in nothing but the formula.

>>> import torch
>>> DR3Regularizer(weight=0.5)(torch.ones(2, 4), torch.ones(2, 4)).item()
2.0
"""

import torch
from jaxtyping import Float
from torch import Tensor

from poise.core.penalty import Penalty
from poise.core.schedule import Schedule
from poise.rl.representation.critic_step import CriticStep


class DR3Regularizer(Penalty):
    """``weight`` times the mean inner product; the authors of BEER compare with it.

    Args:
        weight: the weight, or a schedule of it.
    """

    def __init__(self, weight: float | Schedule = 1e-3) -> None:
        super().__init__(weight)

    def penalty(self, features: Float[Tensor, "batch d"], next_features: Float[Tensor, "batch d"]) -> Tensor:
        """The mean inner product; ``next_features`` are constant.

        Raises:
            ValueError: there is no transition.
        """
        if len(features) == 0:
            raise ValueError(f"features must hold at least one transition, got shape {tuple(features.shape)}")
        wide = torch.promote_types(features.dtype, torch.float32)
        return (features.to(wide) * next_features.detach().to(wide)).sum(-1).mean()

    def critic_loss(self, step: CriticStep) -> Tensor:
        """The term for a critic that an agent is updating."""
        return self(step.features, step.next_features)
