"""What an environment sees and does, checked before an agent is built for it."""

from math import prod
from typing import Any

import numpy as np
from gymnasium import Space
from gymnasium.spaces import Box, Discrete


def observation_size(space: Space[Any]) -> int:
    """Numbers in an observation.

    Raises:
        TypeError: observations are no Box of one axis.
    """
    if not isinstance(space, Box) or len(space.shape) != 1:
        raise TypeError(
            f"expected observations in a Box of one axis, got {space}: flatten them (gymnasium.wrappers.FlattenObservation)"
        )
    return prod(space.shape)


def action_bounds(space: Space[Any]) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest action of a continuous space, in float64.

    Raises:
        TypeError: actions are discrete, or no Box of one axis.
        ValueError: a bound is infinite, or a lower bound is not below its upper one.
    """
    if not isinstance(space, Box) or len(space.shape) != 1:
        raise TypeError(
            f"expected continuous actions in a Box of one axis, got {space}; for Discrete there is DQNAgent"
        )
    low, high = space.low.astype(np.float64), space.high.astype(np.float64)
    if not (np.isfinite(low).all() and np.isfinite(high).all() and (low < high).all()):
        raise ValueError(
            f"actions must have finite bounds, the lower below the upper, got {space.low} and {space.high}: rescale them "
            "(gymnasium.wrappers.RescaleAction)"
        )
    return low, high


def action_count(space: Space[Any]) -> int:
    """Number of discrete actions.

    Raises:
        TypeError: actions are not Discrete, or not counted from 0.
    """
    if not isinstance(space, Discrete) or space.start != 0:
        raise TypeError(
            f"expected Discrete actions counted from 0, got {space}; for Box there are TD3Agent and DPGAgent"
        )
    return int(space.n)
