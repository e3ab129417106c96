"""Replay: the last transitions, each observation stored once, sampled over n steps without copies.

A row holds an observation, and the action and reward that followed. The observation after a transition is the row after it, so
that nothing is stored twice; the last observation of an episode has a row of its own. With stacked frames only the newest frame
of each stack is stored, which is a third of the memory of three frames (and a sixth of what storing the next stack too would take).

>>> import torch
>>> from gymnasium.spaces import Box
>>> buffer = ReplayBuffer(1_000, Box(-1, 1, (3,)), Box(-1, 1, (2,)), steps=3, gamma=0.9)
>>> state, action = torch.zeros(3).numpy(), torch.zeros(2).numpy()
>>> for time in range(10):
...     buffer.add(state, action, 1.0, state + 1, terminated=False, truncated=time == 9)
...     state = state + 1
>>> batch = buffer.sample(4, torch.Generator().manual_seed(0))
>>> (batch.next_observation - batch.observation)[:, 0].max().item()
3.0
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, SupportsFloat

import numpy as np
import torch
from gymnasium import Space
from gymnasium.spaces import Box, Discrete
from jaxtyping import Int64
from torch import Tensor

from poise.rl.replay.batch import Batch


class ReplayBuffer:
    """A ring of observations, actions and rewards of one stream of episodes.

    With ``directory`` the arrays are files mapped into memory, for buffers larger than it. Its checkpoints then hold no rows, only
    where the ring stood; rows that a killed run had overwritten since its last checkpoint are in a reserve of
    ``reserve`` rows beside the ring, so that the resumed run still finds what it would have sampled.

    Args:
        capacity: rows that can be sampled: transitions, and one more per episode.
        observation_space: a Box. ``uint8`` stays ``uint8``; other types are stored in ``dtype``.
        action_space: a Box, or Discrete.
        steps: transitions span this many steps, or fewer where the episode ends before.
        gamma: discount per step.
        frame_stack: how many frames are stacked along the first axis of an observation; only the newest is stored, and an
            episode is taken to begin with copies of its first frame.
        dtype: of observations that are not ``uint8``, of continuous actions and of rewards.
        directory: where to keep the arrays as files; ``None`` keeps them in memory.
        reserve: rows beside the ring when there is a ``directory``.

    Attributes:
        written: rows written since the buffer was made.

    Raises:
        TypeError: a space of another kind.
        ValueError: a number out of range, or frames that do not divide the first axis of an observation.
    """

    def __init__(
        self,
        capacity: int,
        observation_space: Space[Any],
        action_space: Space[Any],
        *,
        steps: int = 1,
        gamma: float = 0.99,
        frame_stack: int = 1,
        dtype: torch.dtype = torch.float32,
        directory: Path | None = None,
        reserve: int = 65_536,
    ) -> None:
        if not isinstance(observation_space, Box):
            raise TypeError(f"observations must be a Box, got {observation_space}: flatten them (FlattenObservation)")
        if not isinstance(action_space, Box | Discrete):
            raise TypeError(f"actions must be a Box or Discrete, got {action_space}")
        if min(steps, frame_stack) < 1 or capacity < 2 * (steps + frame_stack) or not 0 <= gamma <= 1:
            raise ValueError(
                f"expected steps and frame_stack >= 1, capacity >= 2 (steps + frame_stack) and gamma in [0, 1], got steps={steps}, "
                f"frame_stack={frame_stack}, capacity={capacity}, gamma={gamma}"
            )
        if frame_stack > 1 and observation_space.shape[0] % frame_stack:
            raise ValueError(f"{frame_stack} frames do not divide the first axis of {observation_space.shape}")
        self.steps, self.gamma, self.frame_stack, self.capacity = steps, gamma, frame_stack, capacity
        self._shape, self._action_shape = observation_space.shape, action_space.shape or ()
        frame = (self._shape[0] // frame_stack, *self._shape[1:]) if frame_stack > 1 else self._shape
        self._newest = slice(-frame[0], None) if frame_stack > 1 else ...
        number = torch.empty(0, dtype=dtype).numpy().dtype
        columns: dict[str, tuple[tuple[int, ...], Any]] = {
            "observation": (frame, np.uint8 if observation_space.dtype == np.uint8 else number),
            "action": (self._action_shape, np.int64 if isinstance(action_space, Discrete) else number),
            "reward": ((), number),
            "discount": ((), number),  # gamma times the environment's own discount
            "terminated": ((), np.bool_),
            "last": ((), np.bool_),  # the episode ends with this action
            "age": ((), np.int64),  # steps since the episode began
        }
        self._rows = capacity + (reserve if directory is not None else 0)
        self._directory = directory
        self._arrays = {name: self._make(name, *shape_and_type) for name, shape_and_type in columns.items()}
        self._columns = {name: torch.from_numpy(array) for name, array in self._arrays.items()}
        self._mark = self._make("mark", (), np.int64, rows=1)  # rows ever written to the files
        # Where the transitions that can be sampled begin, oldest first: a ring of its own, since not every row begins one.
        self._starts = torch.zeros(self._rows, dtype=torch.int64)
        self._start_rows = self._starts.numpy()
        self._first, self._end = 0, 0
        self.written = 0
        self._age = 0

    def __len__(self) -> int:
        """Transitions that can be sampled."""
        return self._end - self._first

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
        """Store a step. Steps of an episode follow each other; ``observation`` is read only at its beginning.

        ``discount`` is the environment's own, by which γ is multiplied for this step; most have none.

        Raises:
            ValueError: the reward is not finite, the discount is not in [0, 1], or an array has the wrong shape.
        """
        if not 0 <= discount <= 1:
            raise ValueError(f"a discount must lie in [0, 1], got {discount} at row {self.written}")
        if not math.isfinite(float(reward)):
            raise ValueError(f"rewards must be finite, got {reward} at row {self.written}")
        if np.shape(action) != self._action_shape:
            raise ValueError(f"action must have shape {self._action_shape}, got {np.shape(action)}")
        ended = bool(terminated or truncated)
        if self._age == 0:
            self._write_observation(observation)
        arrays, row = self._arrays, self.written % self._rows
        arrays["action"][row] = action
        arrays["reward"][row] = float(reward)
        arrays["discount"][row] = self.gamma * discount
        arrays["terminated"][row] = terminated
        arrays["last"][row] = ended
        arrays["age"][row] = self._age
        self.written += 1
        self._age += 1
        self._write_observation(next_observation)
        if self._age >= self.steps:
            self._push(self.written - self.steps)
        if ended:
            for shorter in range(self.written - min(self.steps - 1, self._age), self.written):
                self._push(shorter)
            self.written += 1  # the last observation keeps its row
            self._age = 0
        self._mark[0] = self.written
        # A transition leaves before any row that it reads is overwritten, those of older frames of its stack included.
        oldest = self.written + 1 - self.capacity + self.frame_stack - 1
        while self._first < self._end and self._start_rows[self._first % self._rows] < oldest:
            self._first += 1

    def sample(self, size: int, generator: torch.Generator | None = None) -> Batch:
        """Transitions drawn uniformly with replacement.

        Args:
            size: how many.
            generator: a CPU generator; ``None`` is PyTorch's global one.

        Raises:
            ValueError: nothing to sample yet.
        """
        if not len(self):
            raise ValueError("the buffer holds no transition to sample")
        drawn = torch.randint(self._first, self._end, (size,), generator=generator)
        return self.gather(self._starts[drawn.remainder_(self._rows)])

    def gather(self, start: Int64[Tensor, "batch"]) -> Batch:
        """The transitions that begin at given rows (``Batch.row`` of a sampled one)."""
        row = start % self._rows
        first = ("reward", "discount", "terminated", "age")
        reward, discount, terminated, age = (self._columns[name].index_select(0, row) for name in first)
        taken = torch.ones_like(row)
        if self.steps > 1:
            running = ~self._columns["last"].index_select(0, row)
            for _ in range(1, self.steps):
                here = (row + taken).remainder_(self._rows)  # past the end of an episode it is masked
                reward = reward + torch.where(running, discount * self._columns["reward"].index_select(0, here), 0.0)
                discount = torch.where(running, discount * self._columns["discount"].index_select(0, here), discount)
                terminated = torch.where(running, self._columns["terminated"].index_select(0, here), terminated)
                taken = taken + running
                running = running & ~self._columns["last"].index_select(0, here)
        return Batch(
            self._observation(row, age),
            self._columns["action"].index_select(0, row),
            reward,
            discount,
            self._observation(row + taken, age + taken),
            terminated,
            start,
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything that sampling depends on; the rows themselves unless they are in files."""
        used = min(self.written + 1, self._rows)
        state: dict[str, Any] = {
            "written": self.written,
            "age": self._age,
            "first": self._first,
            "end": self._end,
            "rows": self._rows,
            "starts": self._starts[: min(self._end, self._rows)].clone(),
        }
        if self._directory is None:
            state["columns"] = {name: column[:used].clone() for name, column in self._columns.items()}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state`` was taken.

        Raises:
            ValueError: it is of a buffer of another size, or the files have run too far ahead of it.
        """
        if state["rows"] != self._rows:
            raise ValueError(f"the state is of a buffer of {state['rows']} rows, this one has {self._rows}")
        ahead = int(self._mark[0]) - state["written"]
        if self._directory is not None and ahead > self._rows - self.capacity:
            raise ValueError(
                f"the files in {self._directory} are {ahead} rows ahead of the state, more than the reserve of "
                f"{self._rows - self.capacity}: rows that it samples are gone"
            )
        self.written, self._age = state["written"], state["age"]
        self._first, self._end = state["first"], state["end"]
        self._starts[: len(state["starts"])] = state["starts"]
        for name, column in state.get("columns", {}).items():
            self._columns[name][: len(column)] = column

    def _push(self, row: int) -> None:
        """Let the transition that begins at ``row`` be sampled."""
        self._start_rows[self._end % self._rows] = row
        self._end += 1

    def _write_observation(self, observation: np.ndarray) -> None:
        if observation.shape != self._shape:
            raise ValueError(f"observation must have shape {self._shape}, got {observation.shape}")
        self._arrays["observation"][self.written % self._rows] = observation[self._newest]

    def _observation(self, row: Int64[Tensor, "batch"], age: Int64[Tensor, "batch"]) -> Tensor:
        """Observations at rows that are ``age`` steps into their episode."""
        frames = [
            self._columns["observation"].index_select(0, (row - age.clamp(max=back)) % self._rows)
            for back in reversed(range(self.frame_stack))
        ]
        return frames[0] if len(frames) == 1 else torch.cat(frames, dim=1)

    def _make(self, name: str, shape: tuple[int, ...], dtype: Any, rows: int | None = None) -> np.ndarray:
        shape = (rows or self._rows, *shape)
        if self._directory is None:
            return np.zeros(shape, dtype)
        self._directory.mkdir(parents=True, exist_ok=True)
        path = self._directory / f"{name}.bin"
        exists = path.is_file() and path.stat().st_size == math.prod(shape) * np.dtype(dtype).itemsize
        return np.memmap(path, dtype, "r+" if exists else "w+", shape=shape)
