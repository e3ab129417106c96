"""What an agent learns from: a batch of transitions."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor


class Batch(NamedTuple):
    r"""Transitions over one or several steps.

    The target of a value is ``reward + discount * ~terminated * Q'(next_observation, ...)``. A time limit is no termination: it
    ends the episode, and the value after it counts.

    Attributes:
        observation: what was seen, (batch, ...).
        action: what was done; integers for discrete actions.
        reward: :math:`\sum_{j<m} \gamma^j r_j` over the m steps of the transition.
        discount: :math:`\gamma^m`, whether or not the episode terminated; times the discounts of an environment that has its own.
        next_observation: what was seen after the last of these steps.
        terminated: whether the episode came to its true end there.
        row: where each transition begins in its store.
    """

    observation: Tensor
    action: Tensor
    reward: Float[Tensor, "batch"]
    discount: Float[Tensor, "batch"]
    next_observation: Tensor
    terminated: Bool[Tensor, "batch"]
    row: Int64[Tensor, "batch"]

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on ``device``, copied without blocking where memory is pinned."""
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in self))
