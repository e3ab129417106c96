r"""Replay for agents that learn from pixels over n steps, sampled as DrQ-v2 does.

.. math:: R = \sum_{i < n} \Big( \prod_{j < i} \gamma d_j \Big) r_i, \qquad D = \prod_{i < n} \gamma d_i

with the environment's discounts d, 0 at a termination. ``Batch.reward`` is R, ``Batch.discount * ~Batch.terminated`` is D.

Only the newest frame of each stack is stored: 10^6 transitions of three 84 x 84 frames take 21 GB, not 63 GB. Above a budget the
frames are in files mapped into memory.

>>> import numpy as np, torch
>>> from gymnasium.spaces import Box
>>> pixels, action = Box(0, 255, (9, 12, 12), np.uint8), Box(-1, 1, (2,))
>>> buffer = NStepReplayBuffer(1_000, pixels, action, frame_stack=3)
>>> stack = np.zeros((9, 12, 12), np.uint8)
>>> for time in range(20):
...     buffer.add(stack, np.zeros(2, np.float32), 1.0, stack, terminated=False, truncated=time == 19)
>>> batch = buffer.sample(4, torch.Generator().manual_seed(0))
>>> batch.observation.shape, round(batch.reward[0].item(), 4)
(torch.Size([4, 9, 12, 12]), 2.9701)
"""

import math
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, SupportsFloat

import numpy as np
import torch
from gymnasium import Space
from jaxtyping import Int64
from torch import Tensor

from poise.rl.replay.batch import Batch
from poise.rl.replay.buffer import ReplayBuffer


class NStepReplayBuffer(ReplayBuffer):
    """A :class:`ReplayBuffer` with the sampling of DrQ-v2 and a budget of memory.

    Args:
        capacity: rows: transitions, and one more per episode.
        observation_space: see :class:`ReplayBuffer`.
        action_space: see there.
        steps: n.
        gamma: discount per step.
        frame_stack: frames stacked along the first axis of an observation.
        sampling: ``"episode"`` draws a finished episode, then a start from which n steps fit, as the released code of DrQ-v2 does, so
            that transitions of short episodes come more often. Until an episode has finished there is nothing to sample. ``"uniform"``
            draws among all transitions, those cut short by the end of their episode and those of the running one included.
        memory_budget: bytes up to which the rows are kept in memory.
        directory: where the rows are kept as files when they need more.
        dtype: see :class:`ReplayBuffer`.
        reserve: see there.

    Attributes:
        nbytes: what the rows need.

    Raises:
        TypeError: a space of another kind.
        ValueError: a number out of range; or more than ``memory_budget`` bytes, and no ``directory``.

    Source:
        Yarats et al. 2022, arXiv 2107.09645, released code, for the sampling and the form of the target.
    """

    def __init__(
        self,
        capacity: int,
        observation_space: Space[Any],
        action_space: Space[Any],
        *,
        steps: int = 3,
        gamma: float = 0.99,
        frame_stack: int = 1,
        sampling: Literal["episode", "uniform"] | str = "episode",
        memory_budget: int = 8 * 2**30,
        directory: Path | None = None,
        dtype: torch.dtype = torch.float32,
        reserve: int = 65_536,
    ) -> None:
        if sampling not in ("episode", "uniform"):
            raise ValueError(f"sampling must be 'episode' or 'uniform', got {sampling!r}")
        self.nbytes = capacity * math.prod(observation_space.shape or ()) // frame_stack
        self.nbytes *= observation_space.dtype.itemsize if observation_space.dtype == np.uint8 else dtype.itemsize
        in_files = self.nbytes > memory_budget
        if in_files and directory is None:
            raise ValueError(
                f"{capacity} observations need {self.nbytes / 1e9:.1f} GB, above the budget of {memory_budget / 1e9:.1f} GB: give a "
                "directory for their files, a larger memory_budget or a smaller capacity"
            )
        super().__init__(
            capacity,
            observation_space,
            action_space,
            steps=steps,
            gamma=gamma,
            frame_stack=frame_stack,
            dtype=dtype,
            directory=directory if in_files else None,
            reserve=reserve,
        )
        self.sampling = sampling
        self._episodes: deque[tuple[int, int]] = deque()  # first row and number of steps of each finished one
        self._begin, self._starts_of_episode = torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.float64)

    def add(
        self,
        observation: np.ndarray,
        action: np.ndarray | int | np.integer[Any],
        reward: SupportsFloat,
        next_observation: np.ndarray,
        *,
        terminated: bool,
        truncated: bool,
        discount: float = 1.0,
    ) -> None:
        """Store a step; see :meth:`ReplayBuffer.add`."""
        super().add(
            observation,
            action,
            reward,
            next_observation,
            terminated=terminated,
            truncated=truncated,
            discount=discount,
        )
        if terminated or truncated:
            length = int(self._arrays["age"][(self.written - 2) % self._rows]) + 1
            self._episodes.append((self.written - 1 - length, length))
        oldest = self.written + 1 - self.capacity
        stale = bool(self._episodes) and self._episodes[0][0] < oldest
        while self._episodes and self._episodes[0][0] < oldest:
            self._episodes.popleft()
        if terminated or truncated or stale:
            self._index_episodes()

    def add_episode(self, episode: Mapping[str, np.ndarray]) -> None:
        """Store a whole episode in the form of DrQ-v2's files (see :func:`read_episode`).

        Raises:
            ValueError: an array is missing, or their lengths differ.
        """
        episode = _checked(episode, "the episode")
        rewards, discounts = episode["reward"].reshape(-1), episode["discount"].reshape(-1)
        last = len(rewards) - 1
        for time in range(1, last + 1):  # the first entry only holds the first observation
            self.add(
                episode["observation"][time - 1],
                episode["action"][time],
                float(rewards[time]),
                episode["observation"][time],
                terminated=bool(discounts[time] == 0),
                truncated=time == last,
                discount=float(discounts[time]),
            )

    def sample(self, size: int, generator: torch.Generator | None = None) -> Batch:
        """Transitions drawn with replacement, see ``sampling``.

        Args:
            size: how many.
            generator: a CPU generator; ``None`` is PyTorch's global one.

        Raises:
            ValueError: nothing to sample yet.
        """
        if self.sampling == "uniform":
            return super().sample(size, generator)
        if not len(self._begin):
            raise ValueError("no episode has finished yet, so that there is nothing to sample")
        return self.gather(self._draw(size, generator))

    def state_dict(self) -> dict[str, Any]:
        """Everything that sampling depends on; see :meth:`ReplayBuffer.state_dict`."""
        episodes = torch.tensor(list(self._episodes), dtype=torch.int64).reshape(-1, 2)
        return super().state_dict() | {"episodes": episodes}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state`` was taken; see :meth:`ReplayBuffer.load_state_dict`."""
        super().load_state_dict(state)
        self._episodes = deque((begin, length) for begin, length in state["episodes"].tolist())
        self._index_episodes()

    def _draw(self, size: int, generator: torch.Generator | None) -> Int64[Tensor, "batch"]:
        episode = torch.randint(len(self._begin), (size,), generator=generator)
        share = torch.rand(size, generator=generator, dtype=torch.float64)
        return self._begin[episode] + (share * self._starts_of_episode[episode]).long()

    def _index_episodes(self) -> None:
        """Tables to draw from; an episode shorter than n steps has one start."""
        rows = torch.tensor(list(self._episodes), dtype=torch.int64).reshape(-1, 2)
        self._begin = rows[:, 0].clone()
        self._starts_of_episode = (rows[:, 1] - self.steps + 1).clamp(min=1).double()


def read_episode(path: Path) -> dict[str, np.ndarray]:
    """An episode as DrQ-v2 and its successors save it: one ``npz`` file.

    Args:
        path: the file, with the arrays ``observation`` (T + 1, ...), ``action`` (T + 1, a), ``reward`` and ``discount`` (T + 1, 1);
            entry t holds the action that led to observation t, and what it gave. Entry 0 holds the first observation, and zeros.

    Raises:
        ValueError: an array is missing, or their lengths differ.
    """
    with np.load(path, allow_pickle=False) as file:
        return _checked({name: file[name] for name in file.files}, str(path))


def _checked(episode: Mapping[str, np.ndarray], what: str) -> dict[str, np.ndarray]:
    names = ("observation", "action", "reward", "discount")
    if missing := [name for name in names if name not in episode]:
        raise ValueError(f"{what} has no {', '.join(missing)}; it has {sorted(episode)}")
    lengths = {name: len(episode[name]) for name in names}
    if len(set(lengths.values())) != 1 or lengths["reward"] < 2:
        raise ValueError(f"{what} must have arrays of one length from 2 on, got {lengths}")
    return {name: episode[name] for name in names}
