"""What a regularizer of a critic is given at each update, and how an agent asks for its term of the loss."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from poise.rl.replay.batch import Batch


@dataclass(frozen=True)
class CriticStep:
    """One critic in the middle of its update.

    Attributes:
        batch: the transitions.
        inputs: what the critic was called with: observation and action, or the observation alone for discrete actions.
        features: φ(s, a), with its gradient.
        next_features: φ'(s', a') of the target critic at the target policy's action, without gradient.
        head_weight: weight of the linear head on φ: one row, or the row of each sample's action.
        online_next_features: computes φ(s', π(s')) of the critic that is being trained and the current policy, without gradient.
    """

    batch: Batch
    inputs: tuple[Tensor, ...]
    features: Float[Tensor, "batch d"]
    next_features: Float[Tensor, "batch d"]
    head_weight: Float[Tensor, "rows d"]
    online_next_features: Callable[[], Tensor]


@runtime_checkable
class CriticRegularizer(Protocol):
    """A term of a critic's loss. If it is a module with parameters, the agent trains them with the critic."""

    def critic_loss(self, step: CriticStep) -> Tensor:
        """The weighted scalar to add to the loss of the critic."""
