"""A stream of episodes of one environment that a resumed run continues exactly where a killed one was.

No simulator needs to know how to save itself: each episode is reset with a seed of its own, so the state is that seed and the
actions since, and to resume is to take them again.

>>> import gymnasium
>>> def stream():
...     return EpisodeStream(gymnasium.make("Pendulum-v1"), seed=0)
>>> one = stream()
>>> for _ in range(250):
...     _ = one.step(one.env.action_space.high)
>>> other = stream()
>>> other.load_state_dict(one.state_dict())
>>> (one.observation == other.observation).all().item(), other.episode
(True, 1)
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium import Env

from poise.core.gpu import derive_generator


class Step(NamedTuple):
    """What a step gave, in the order in which a replay buffer takes it."""

    observation: np.ndarray
    action: np.ndarray
    reward: float
    next_observation: np.ndarray
    terminated: bool
    truncated: bool

    @property
    def ended(self) -> bool:
        """Whether the episode is over."""
        return self.terminated or self.truncated


class EpisodeStream:
    """Steps an environment and resets it when an episode ends.

    Args:
        env: the environment; deterministic up to the seed of its reset.
        seed: the seed of the first episode follows from it, and that of every other.

    Attributes:
        observation: what the agent sees now.
        episode: episodes finished so far.
        episode_return: sum of the rewards of the current episode so far.
        finished_return: that of the last finished episode; NaN before.
    """

    observation: np.ndarray
    episode_return: float

    def __init__(self, env: Env[Any, Any], seed: int) -> None:
        self.env, self.seed = env, seed
        self.episode = 0
        self.finished_return = float("nan")
        self._reset()

    def step(self, action: np.ndarray) -> Step:
        """Act once. If the episode ends, :attr:`observation` is already the first one of the next."""
        before = self.observation
        after, reward, terminated, truncated, _ = self.env.step(action)
        self._actions.append(np.array(action))
        self.episode_return += float(reward)
        self.observation = after
        step = Step(before, action, float(reward), after, bool(terminated), bool(truncated))
        if step.ended:
            self.finished_return = self.episode_return
            self.episode += 1
            self._reset()
        return step

    def state_dict(self) -> dict[str, Any]:
        """Which episode, and the actions since it began."""
        actions = torch.from_numpy(np.stack(self._actions)) if self._actions else None
        return {"episode": self.episode, "actions": actions, "finished_return": self.finished_return}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the actions of ``state`` again."""
        self.episode, self.finished_return = state["episode"], state["finished_return"]
        self._reset()
        if state["actions"] is not None:
            for action in state["actions"].numpy():
                self.step(np.asarray(action))

    def _reset(self) -> None:
        generator = derive_generator(self.seed, "episode", self.episode)
        drawn = int(torch.randint(2**31 - 1, (), generator=generator))
        self.observation, _ = self.env.reset(seed=drawn)
        self.episode_return = 0.0
        self._actions: list[np.ndarray] = []
