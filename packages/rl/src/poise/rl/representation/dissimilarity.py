r"""Rank maximisation: penalise the cosine of successive representations without asking how much of it is allowed.

.. math:: R = \mathbb E\, \cos(\phi(s, a), \phi(s', a')) + 1

This is BEER with the constant -1 for the bound, what :class:`~poise.rl.BEERRegularizer` is compared with to see what the bound does.

>>> import torch
>>> DissimilarityRegularizer(weight=0.5)(torch.ones(2, 4), torch.ones(2, 4)).item()
1.0
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from poise.core.penalty import Penalty
from poise.core.schedule import Schedule
from poise.rl.representation.critic_step import CriticStep


class DissimilarityRegularizer(Penalty):
    """``weight`` times the mean of the cosine plus one.

    Args:
        weight: the weight, or a schedule of it.
        eps: least norm in the cosine.
    """

    def __init__(self, weight: float | Schedule = 1e-3, *, eps: float = 1e-6) -> None:
        super().__init__(weight)
        self.eps = eps

    def penalty(self, features: Float[Tensor, "batch d"], next_features: Float[Tensor, "batch d"]) -> Tensor:
        """The mean cosine, plus one; ``next_features`` are constant.

        Raises:
            ValueError: there is no transition.
        """
        if len(features) == 0:
            raise ValueError(f"features must hold at least one transition, got shape {tuple(features.shape)}")
        wide = torch.promote_types(features.dtype, torch.float32)
        pair = features.to(wide), next_features.detach().to(wide)
        return functional.cosine_similarity(*pair, dim=-1, eps=self.eps).mean() + 1

    def critic_loss(self, step: CriticStep) -> Tensor:
        """The term for a critic that an agent is updating."""
        return self(step.features, step.next_features)
