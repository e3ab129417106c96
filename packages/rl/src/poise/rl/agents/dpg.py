r"""Deterministic policy gradient with target networks: one critic, one update per step, no smoothing, no delay.

Silver et al., "Deterministic Policy Gradient Algorithms", ICML 2014; Lillicrap et al., "Continuous Control with Deep Reinforcement
Learning", ICLR 2016, arXiv 1509.02971. Sizes and rates are those of TD3's authors, whose code the methods here were built on.

.. math:: y = r + \gamma\, Q'(s', \pi'(s')), \qquad
          \min_\theta\, \mathbb E\, (Q_\theta(s, a) - y)^2 + R(\theta), \qquad
          \max_\phi\, \mathbb E\, Q_\theta(s, \pi_\phi(s))

>>> import gymnasium, torch
>>> from poise.rl import BEERRegularizer, DPGAgent, ReplayBuffer
>>> env = gymnasium.make("Pendulum-v1")
>>> agent = DPGAgent(env.observation_space, env.action_space, regularizers=[BEERRegularizer(weight=1e-3)])
>>> buffer, generator = ReplayBuffer(10_000, env.observation_space, env.action_space), torch.Generator().manual_seed(0)
>>> state, _ = env.reset(seed=0)
>>> for _ in range(20):
...     action = agent.act(state, generator)
...     following, reward, terminated, truncated, _ = env.step(action)
...     buffer.add(state, action, reward, following, terminated=terminated, truncated=truncated)
...     state = following
>>> sorted(agent.update(buffer.sample(16, generator)))
['actor_loss', 'critic_loss', 'q', 'regularizer', 'td_loss']
"""

from collections.abc import Sequence
from typing import Any

import torch
from gymnasium import Space
from torch import Tensor
from torch.nn import functional

from poise.rl.agents.actor_critic import ActorCritic, follow
from poise.rl.replay.batch import Batch
from poise.rl.representation.critic_step import CriticRegularizer, CriticStep


class DPGAgent(ActorCritic):
    """Deterministic policy gradient.

    The discount is that of the batches.

    Args:
        observation_space: a Box of one axis.
        action_space: a bounded Box of one axis.
        tau: share of the way that the slow copies go at each update.
        learning_rate: of Adam, for policy and critic.
        hidden: widths of the hidden layers.
        exploration_noise: standard deviation of the noise when exploring, in half ranges of the action.
        regularizers: terms added to the critic's loss; their parameters, if any, are trained with it.
        device: where the networks are.
        dtype: their type.

    Raises:
        TypeError, ValueError: spaces or numbers that are not as described.
    """

    def __init__(
        self,
        observation_space: Space[Any],
        action_space: Space[Any],
        *,
        tau: float = 0.005,
        learning_rate: float = 3e-4,
        hidden: Sequence[int] = (256, 256),
        exploration_noise: float = 0.1,
        regularizers: Sequence[CriticRegularizer] = (),
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(
            observation_space,
            action_space,
            critics=1,
            hidden=hidden,
            learning_rate=learning_rate,
            tau=tau,
            exploration_noise=exploration_noise,
            regularizers=regularizers,
            device=device,
            dtype=dtype,
        )

    def update(self, batch: Batch) -> dict[str, Tensor]:
        """One step of the critic, one of the policy, one of the slow copies.

        Returns:
            Detached scalars: ``td_loss``, ``regularizer``, their sum ``critic_loss``, ``q``, ``actor_loss``.
        """
        critic, critic_target = self.critics[0], self.critic_targets[0]
        with torch.no_grad():
            next_action = self.actor_target(batch.next_observation)
            next_features = critic_target.features(batch.next_observation, next_action)
            next_q = critic_target.head(next_features).squeeze(-1)
            target = batch.reward + batch.discount * ~batch.terminated * next_q

        features = critic.features(batch.observation, batch.action)
        q = critic.head(features).squeeze(-1)
        td_loss = functional.mse_loss(q, target)
        step = CriticStep(
            batch=batch,
            inputs=(batch.observation, batch.action),
            features=features,
            next_features=next_features,
            head_weight=critic.head.weight,
            online_next_features=lambda: self._online_next_features(batch.next_observation),
        )
        regularizer = sum((each.critic_loss(step) for each in self.regularizers), torch.zeros_like(td_loss))
        critic_loss = td_loss + regularizer
        self.critic_optimizer.zero_grad()
        critic_loss.backward()
        self.critic_optimizer.step()

        actor_loss = -critic(batch.observation, self.actor(batch.observation)).mean()
        self.actor_optimizer.zero_grad()
        actor_loss.backward(inputs=list(self.actor.parameters()))  # none for the critic, which would cost as much again
        self.actor_optimizer.step()

        follow([*self.critic_targets, self.actor_target], [*self.critics, self.actor], self.tau)
        self.updates += 1
        losses = {"td_loss": td_loss, "regularizer": regularizer, "critic_loss": critic_loss, "actor_loss": actor_loss}
        return {name: loss.detach() for name, loss in losses.items()} | {"q": q.detach().mean()}

    @torch.no_grad()
    def _online_next_features(self, next_observation: Tensor) -> Tensor:
        return self.critics[0].features(next_observation, self.actor(next_observation))
