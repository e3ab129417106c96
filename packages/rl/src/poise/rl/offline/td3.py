r"""TD3 from a fixed log, with a regularizer of the policy: the update that TD3+BC and PRDC share.

Fujimoto and Gu, "A Minimalist Approach to Offline Reinforcement Learning", NeurIPS 2021, arXiv 2106.06860.

.. math:: \min_\phi\; -\lambda\, \mathbb E\, Q_1(s, \pi_\phi(s)) + R(\pi_\phi), \qquad
          \lambda = \frac{\alpha}{\mathbb E\, |Q_1(s, \pi_\phi(s))|} \text{ (constant)}, \qquad
          R_\text{BC} = \mathbb E\, (\pi_\phi(s) - a)^2

>>> import gymnasium, torch
>>> from poise.rl import TD3BC, OfflineDataset, TD3BackboneConfig
>>> env = gymnasium.make("Pendulum-v1")
>>> data = OfflineDataset.from_env_rollout(env, lambda observation: env.action_space.high, 500)
>>> agent = TD3BC(data, TD3BackboneConfig(hidden=(32, 32), batch_size=64))
>>> generator = torch.Generator().manual_seed(0)
>>> for _ in range(2):
...     metrics = agent.learn(generator)
>>> sorted(metrics)
['actor_loss', 'critic_loss', 'q', 'regularizer', 'td_loss']
"""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from poise.rl.agents.td3 import TD3Agent
from poise.rl.offline.dataset import OfflineDataset
from poise.rl.offline.normalizer import StateNormalizer
from poise.rl.replay.batch import Batch


@runtime_checkable
class PolicyRegularizer(Protocol):
    """A term of the policy's loss. If it is a module, it is saved with the agent."""

    def policy_loss(self, batch: Batch, action: Tensor) -> Tensor:
        """The scalar to add, for the policy's ``action`` (batch, a), with its gradient, in the states of ``batch``."""


class BehaviorCloning:
    """Mean squared difference between the policy's action and the one that was logged in the same state."""

    def policy_loss(self, batch: Batch, action: Tensor) -> Tensor:
        """The mean over batch and dimensions of the action."""
        return functional.mse_loss(action, batch.action)


@dataclass(frozen=True, kw_only=True)
class TD3BackboneConfig:
    """Settings of the update; the defaults are those of the released code of TD3+BC and PRDC.

    Attributes:
        alpha: weight α of the value against the regularizer of the policy. PRDC's paper: 2.5 for hopper and walker2d, 40 for
            halfcheetah, 7.5 for antmaze.
        discount: γ.
        tau: share of the way that the slow copies go when they move.
        learning_rate: of Adam, for policy and critics.
        hidden: widths of the hidden layers.
        batch_size: transitions per update.
        target_noise: standard deviation of the noise on the target's action, in half ranges of the action.
        noise_clip: bound of that noise, in half ranges.
        policy_delay: updates of the critics per update of the policy and of the slow copies.
        reward_scale: factor on the rewards; PRDC takes 10,000 for antmaze.
        reward_shift: what is added to the scaled rewards; -1 for antmaze.
        state_eps: see :class:`~poise.rl.StateNormalizer`.
        value_eps: least mean ``|Q|`` in λ, so that a critic that is zero everywhere gives no infinity.
    """

    alpha: float = 2.5
    discount: float = 0.99
    tau: float = 0.005
    learning_rate: float = 3e-4
    hidden: tuple[int, ...] = (256, 256)
    batch_size: int = 256
    target_noise: float = 0.2
    noise_clip: float = 0.5
    policy_delay: int = 2
    reward_scale: float = 1.0
    reward_shift: float = 0.0
    state_eps: float = 1e-3
    value_eps: float = 1e-8

    def __post_init__(self) -> None:
        if not (self.alpha > 0 and 0 <= self.discount <= 1 and self.batch_size >= 1 and self.value_eps > 0):
            raise ValueError(
                "expected alpha and value_eps > 0, discount in [0, 1] and batch_size >= 1, got "
                f"{self.alpha}, {self.value_eps}, {self.discount} and {self.batch_size}"
            )


class TD3(TD3Agent):
    """TD3 that learns from a data set, with or without a regularizer of its policy.

    States are normalised by the statistics of the data set, for learning, for acting and for evaluating alike: :meth:`act` and
    :meth:`value` take observations as the environment gives them, one or a batch.

    Args:
        data: the log.
        config: settings of the update.
        policy_regularizer: a term that holds the policy near the data; ``None`` is plain TD3, which maximises Q alone.
        device: where networks and data are.
        dtype: their type.

    Attributes:
        data: the log with normalised states and scaled rewards, on the device; the batches of :meth:`learn` come from it.
        normalizer: the map of the states.
        policy_regularizer: see above; it may be assigned.
        value_weight: λ of the last update of the policy, detached; ``None`` before, and without a regularizer.

    Raises:
        ValueError: numbers out of range.
    """

    value_weight: Tensor | None

    def __init__(
        self,
        data: OfflineDataset,
        config: TD3BackboneConfig | None = None,
        *,
        policy_regularizer: PolicyRegularizer | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.config = config or TD3BackboneConfig()
        super().__init__(
            data.observation_space,
            data.action_space,
            tau=self.config.tau,
            learning_rate=self.config.learning_rate,
            hidden=self.config.hidden,
            target_noise=self.config.target_noise,
            noise_clip=self.config.noise_clip,
            policy_delay=self.config.policy_delay,
            device=device,
            dtype=dtype,
        )
        raw = data.to(device, dtype)
        self.normalizer = StateNormalizer(raw.observations, self.config.state_eps)
        self.data = raw.prepared(self.normalizer, self.config.reward_scale, self.config.reward_shift)
        self.policy_regularizer = policy_regularizer
        self.value_weight = None

    def learn(self, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """One update from a batch of the data set.

        Args:
            generator: a CPU generator of the batch and of the target's noise; ``None`` is PyTorch's global one.

        Returns:
            As :meth:`update`, which takes a batch of :attr:`data` instead.
        """
        batch = self.data.sample(self.config.batch_size, generator, gamma=self.config.discount)
        return self.update(batch, generator)

    def actor_loss(self, batch: Batch) -> Tensor:
        """``-λ mean Q_1(s, π(s)) + R``; plain TD3 without a regularizer."""
        action = self.actor(batch.observation)
        value = self.critics[0](batch.observation, action)
        if self.policy_regularizer is None:
            return -value.mean()
        magnitude = value.detach().abs().mean().clamp_min(self.config.value_eps)
        self.value_weight = self.config.alpha / magnitude
        return self.policy_regularizer.policy_loss(batch, action) - self.value_weight * value.mean()

    def seen(self, observation: np.ndarray) -> Float[Tensor, "*batch s"]:
        """What the networks see of observations of the environment."""
        return self.normalizer(super().seen(observation))

    def _parts(self) -> dict[str, Any]:
        parts = super()._parts() | {"normalizer": self.normalizer}
        if isinstance(self.policy_regularizer, torch.nn.Module):
            parts["policy_regularizer"] = self.policy_regularizer
        return parts


class TD3BC(TD3):
    """TD3 with behaviour cloning: the policy is held to the action that was logged in the same state.

    Args:
        data: the log.
        config: settings of the update.
        device: where networks and data are.
        dtype: their type.

    Source:
        Fujimoto and Gu 2021, the objective of the policy.
    """

    def __init__(
        self,
        data: OfflineDataset,
        config: TD3BackboneConfig | None = None,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(data, config, policy_regularizer=BehaviorCloning(), device=device, dtype=dtype)
