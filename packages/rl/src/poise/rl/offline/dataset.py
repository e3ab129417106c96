"""A fixed log of transitions, and where it comes from: arrays, D4RL files, Minari data sets, a rollout.

>>> import gymnasium
>>> env = gymnasium.make("Pendulum-v1")
>>> data = OfflineDataset.from_env_rollout(env, lambda observation: env.action_space.high, 500)
>>> len(data), data.observations.shape, data.sample(32, torch.Generator().manual_seed(0)).action.shape
(500, torch.Size([500, 3]), torch.Size([32, 1]))
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium import Env, Space
from gymnasium.spaces import Box
from jaxtyping import Bool, Float
from torch import Tensor

from poise.rl.envs.episodes import EpisodeStream
from poise.rl.envs.spaces import action_bounds, observation_size
from poise.rl.offline import files
from poise.rl.replay.batch import Batch

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class OfflineDataset:
    """Transitions, checked once when they are put together.

    Attributes:
        observations: (n, s).
        actions: (n, a), within the bounds of ``action_space``.
        rewards: (n,).
        next_observations: (n, s).
        terminated: (n,), whether the episode came to its true end; a time limit is none, and the value after it counts.
        action_space: the bounds of the actions.

    Raises:
        TypeError: actions are integers, or ``action_space`` is no Box of one axis.
        ValueError: no transition, shapes that do not fit, entries that are not finite, infinite bounds, or actions outside them.
    """

    observations: Float[Tensor, "..."]
    actions: Tensor
    rewards: Float[Tensor, "..."]
    next_observations: Float[Tensor, "..."]
    terminated: Bool[Tensor, "..."]
    action_space: Space[Any]

    def __post_init__(self) -> None:
        low, high = action_bounds(self.action_space)
        if not self.actions.is_floating_point():
            raise TypeError(f"actions must be continuous, got {self.actions.dtype}: constraints measure their distance")
        count = len(self.actions) if self.actions.ndim else 0
        if not count:
            raise ValueError("the data set holds no transition")
        if self.observations.ndim != 2:
            raise ValueError(f"observations must be flat, (n, s), got shape {tuple(self.observations.shape)}")
        columns = self.observations.shape[-1]
        shapes = {
            "observations": (count, columns),
            "actions": (count, len(low)),
            "rewards": (count,),
            "next_observations": (count, columns),
            "terminated": (count,),
        }
        for name, shape in shapes.items():
            column: Tensor = getattr(self, name)
            if tuple(column.shape) != shape:
                raise ValueError(f"{name} must have shape {shape}, got {tuple(column.shape)}")
            if column.is_floating_point() and not (finite := column.isfinite()).all():
                row = int((~finite).nonzero()[0, 0])
                raise ValueError(f"{name} must be finite, got {column[row].tolist()} at row {row}")
        bounds = torch.as_tensor(np.stack([low, high])).to(self.actions)
        outside = ((self.actions < bounds[0] - 1e-5) | (self.actions > bounds[1] + 1e-5)).any(-1)
        if outside.any():
            row = int(outside.nonzero()[0, 0])
            raise ValueError(
                f"actions must lie in [{low}, {high}], got {self.actions[row].tolist()} at row {row}: give the action_space "
                "that they were taken in"
            )

    # Where it comes from

    @classmethod
    def from_arrays(
        cls,
        observations: np.ndarray,
        actions: np.ndarray,
        rewards: np.ndarray,
        next_observations: np.ndarray,
        terminated: np.ndarray,
        *,
        action_space: Space[Any] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> "OfflineDataset":
        """Copies of arrays.

        Args:
            observations: (n, s).
            actions: (n, a).
            rewards: (n,).
            next_observations: (n, s).
            terminated: (n,), booleans or zeros and ones. Not those transitions that a time limit ended.
            action_space: the bounds of the actions; ``None`` is [-1, 1] in each dimension.
            dtype: of all that are not booleans.

        Raises:
            TypeError, ValueError: see the class.
        """
        given = {
            "observations": observations,
            "actions": actions,
            "rewards": rewards,
            "next_observations": next_observations,
        }
        columns = {name: torch.as_tensor(np.array(column)) for name, column in given.items()}
        flags = np.asarray(terminated)
        if not np.isin(flags, (0, 1)).all():
            raise ValueError(f"terminated must hold booleans or zeros and ones, got {np.unique(flags)[:5]}")
        width = columns["actions"].shape[1] if columns["actions"].ndim == 2 else 1
        return cls(
            **{
                name: column if name == "actions" and not column.is_floating_point() else column.to(dtype)
                for name, column in columns.items()
            },
            terminated=torch.as_tensor(flags.astype(bool)),
            action_space=Box(-1, 1, (width,)) if action_space is None else action_space,
        )

    @classmethod
    def from_d4rl_hdf5(
        cls, path: Path | str, *, action_space: Space[Any] | None = None, dtype: torch.dtype = torch.float32
    ) -> "OfflineDataset":
        """A data set of D4RL, with the meaning of its ``qlearning_dataset``.

        The next observation is that of the following row. The last step of an episode that a time limit ended is left out, since
        the observation after it was not logged; only true terminations count as such. Needs h5py.

        Args:
            path: the HDF5 file: ``observations``, ``actions``, ``rewards``, ``terminals``, ``timeouts``.
            action_space: the bounds of the actions; ``None`` is D4RL's [-1, 1].
            dtype: see :meth:`from_arrays`.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file lacks an array, or see the class.

        Source:
            Fu et al., D4RL, arXiv 2004.07219, and the format that its loader defines.
        """
        return cls.from_arrays(**files.d4rl_transitions(Path(path)), action_space=action_space, dtype=dtype)

    @classmethod
    def from_minari(
        cls, dataset: Any, *, action_space: Space[Any] | None = None, dtype: torch.dtype = torch.float32
    ) -> "OfflineDataset":
        """A data set of Minari. The observation after the last step of an episode is logged there, so no step is left out.

        Args:
            dataset: a ``minari.MinariDataset``, or the path of one on disk: the folder with ``data/main_data.hdf5``, or that
                file (needs h5py, but not Minari).
            action_space: the bounds of the actions; ``None`` takes the data set's own, or [-1, 1] where it states none.
            dtype: see :meth:`from_arrays`.

        Raises:
            FileNotFoundError: there is no such file.
            TypeError: observations or actions are nested, or discrete.
            ValueError: an episode lacks an array or its lengths do not fit, or see the class.
        """
        episodes: Iterable[tuple[str, Arrays]]
        if isinstance(dataset, str | Path):
            episodes = files.minari_episodes(Path(dataset))
        else:
            episodes = files.loaded_episodes(dataset)
            action_space = action_space or dataset.action_space
        return cls.from_arrays(**files.minari_transitions(episodes), action_space=action_space, dtype=dtype)

    @classmethod
    def from_env_rollout(
        cls,
        env: Env[Any, Any],
        policy: Callable[[np.ndarray], np.ndarray],
        count: int,
        *,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> "OfflineDataset":
        """The steps that a policy takes in an environment.

        Args:
            env: a gymnasium environment with flat observations and bounded continuous actions.
            policy: the action for one observation.
            count: steps.
            seed: of the episodes' initial states.
            dtype: see :meth:`from_arrays`.

        Raises:
            TypeError, ValueError: spaces that do not fit, or see the class.
        """
        observation_size(env.observation_space)
        action_bounds(env.action_space)
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        stream = EpisodeStream(env, seed)
        steps = [stream.step(policy(stream.observation)) for _ in range(count)]
        observations, actions, rewards, following, terminated, _ = (
            np.stack([np.asarray(value) for value in column]) for column in zip(*steps, strict=True)
        )
        return cls.from_arrays(
            observations, actions, rewards, following, terminated, action_space=env.action_space, dtype=dtype
        )

    # What is done with it

    @property
    def observation_space(self) -> Box:
        """A Box without bounds."""
        return Box(-np.inf, np.inf, (self.observations.shape[1],))

    def __len__(self) -> int:
        return len(self.actions)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "OfflineDataset":
        """The data on a device."""
        kept = "observations", "actions", "rewards", "next_observations"
        moved = {name: getattr(self, name).to(device, dtype) for name in kept}
        return replace(self, terminated=self.terminated.to(device), **moved)

    def prepared(
        self, normalizer: Callable[[Tensor], Tensor], reward_scale: float = 1.0, reward_shift: float = 0.0
    ) -> "OfflineDataset":
        """With normalised states, and rewards ``reward_scale * r + reward_shift``, in this order."""
        return replace(
            self,
            observations=normalizer(self.observations),
            next_observations=normalizer(self.next_observations),
            rewards=reward_scale * self.rewards + reward_shift,
        )

    def sample(self, size: int, generator: torch.Generator | None = None, *, gamma: float = 0.99) -> Batch:
        """Transitions drawn uniformly with replacement; ``Batch.row`` says which.

        Args:
            size: how many.
            generator: a CPU generator; ``None`` is PyTorch's global one.
            gamma: the discount that the batch carries.
        """
        drawn = torch.randint(len(self), (size,), generator=generator).to(self.actions.device)
        return self.gather(drawn, gamma=gamma)

    def gather(self, rows: Tensor, *, gamma: float = 0.99) -> Batch:
        """The transitions of given rows."""
        reward = self.rewards[rows]
        return Batch(
            self.observations[rows],
            self.actions[rows],
            reward,
            torch.full_like(reward, gamma),
            self.next_observations[rows],
            self.terminated[rows],
            rows,
        )
