"""A line on which behaviour cloning gets stuck, and copying the neighbour does not: half of the log walks away from the goal."""

from typing import Any

import numpy as np
import torch
from gymnasium import Env
from gymnasium.spaces import Box

from poise.rl.offline.dataset import OfflineDataset

CELL = 0.05
STEPS = 50


class LineWorld(Env[np.ndarray, np.ndarray]):
    """Positions in [-1, 1], steps of at most 0.1, and the distance to the right end as cost, for 50 steps."""

    def __init__(self) -> None:
        self.observation_space = Box(-1, 1, (1,), np.float32)
        self.action_space = Box(-1, 1, (1,), np.float32)
        self.state = np.zeros(1)
        self.step_number = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin anywhere."""
        super().reset(seed=seed)
        self.state, self.step_number = self.np_random.uniform(-1, 1, 1), 0
        return self.state.astype(np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Walk. The time limit is no termination."""
        self.state = moved(self.state, np.asarray(action, np.float64))
        self.step_number += 1
        return self.state.astype(np.float32), float(-abs(self.state[0] - 1)), False, self.step_number >= STEPS, {}


class Behaviour:
    """To the right in every other cell, to the left in the cells between."""

    def act(self, observation: np.ndarray) -> np.ndarray:
        return np.where(np.floor((observation + 1) / CELL) % 2 == 0, 1, -1).astype(np.float32)


def moved(position: np.ndarray, action: np.ndarray) -> np.ndarray:
    """Where a step leads."""
    return (position + 0.1 * action).clip(-1, 1)


def line_log(count: int, generator: torch.Generator) -> OfflineDataset:
    """One step of the behaviour from each of ``count`` places anywhere on the line."""
    position = 2 * torch.rand(count, 1, generator=generator, dtype=torch.float64).numpy() - 1
    action = Behaviour().act(position)
    following = moved(position, action)
    return OfflineDataset.from_arrays(position, action, -abs(following[:, 0] - 1), following, np.zeros(count, bool))
