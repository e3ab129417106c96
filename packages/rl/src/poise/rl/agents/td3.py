r"""TD3: twin critics, smoothed targets, delayed policy updates.

Fujimoto, van Hoof and Meger, "Addressing Function Approximation Error in Actor-Critic Methods", ICML 2018, arXiv 1802.09477.

.. math:: a' = \mathrm{clip}\big(\pi'(s') + \mathrm{clip}(\epsilon, \pm c)\big), \quad \epsilon \sim N(0, \sigma^2), \qquad
          y = r + \gamma \min_i Q_i'(s', a'), \qquad
          \min_\theta \sum_i \mathbb E\, (Q_i(s, a) - y)^2, \qquad \max_\phi\, \mathbb E\, Q_1(s, \pi_\phi(s))

The policy and the slow copies move at every second update.

>>> import gymnasium, torch
>>> from poise.rl import ReplayBuffer, TD3Agent
>>> env = gymnasium.make("Pendulum-v1")
>>> agent = TD3Agent(env.observation_space, env.action_space)
>>> buffer, generator = ReplayBuffer(10_000, env.observation_space, env.action_space), torch.Generator().manual_seed(0)
>>> state, _ = env.reset(seed=0)
>>> for _ in range(20):
...     action = agent.act(state, generator)
...     following, reward, terminated, truncated, _ = env.step(action)
...     buffer.add(state, action, reward, following, terminated=terminated, truncated=truncated)
...     state = following
>>> sorted(agent.update(buffer.sample(16, generator), generator))
['critic_loss', 'q', 'regularizer', 'td_loss']
>>> sorted(agent.update(buffer.sample(16, generator), generator))
['actor_loss', 'critic_loss', 'q', 'regularizer', 'td_loss']
"""

from collections.abc import Sequence
from typing import Any

import torch
from gymnasium import Space
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from poise.rl.agents.actor_critic import ActorCritic, follow
from poise.rl.replay.batch import Batch
from poise.rl.representation.critic_step import CriticRegularizer, CriticStep


class TD3Agent(ActorCritic):
    """Twin delayed deterministic policy gradient.

    The discount is that of the batches.

    Args:
        observation_space: a Box of one axis.
        action_space: a bounded Box of one axis.
        tau: share of the way that the slow copies go when they move.
        learning_rate: of Adam, for policy and critics.
        hidden: widths of the hidden layers.
        exploration_noise: standard deviation of the noise when exploring, in half ranges of the action.
        target_noise: standard deviation σ of the noise on the target's action, in half ranges.
        noise_clip: bound c of that noise, in half ranges.
        policy_delay: updates of the critics per update of the policy and of the slow copies.
        regularizers: terms added to the loss of each critic; their parameters, if any, are trained with it.
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
        target_noise: float = 0.2,
        noise_clip: float = 0.5,
        policy_delay: int = 2,
        regularizers: Sequence[CriticRegularizer] = (),
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if target_noise < 0 or noise_clip < 0 or policy_delay < 1:
            raise ValueError(
                "expected target_noise and noise_clip >= 0 and policy_delay >= 1, got "
                f"{target_noise}, {noise_clip} and {policy_delay}"
            )
        super().__init__(
            observation_space,
            action_space,
            critics=2,
            hidden=hidden,
            learning_rate=learning_rate,
            tau=tau,
            exploration_noise=exploration_noise,
            regularizers=regularizers,
            device=device,
            dtype=dtype,
        )
        self.target_noise, self.noise_clip, self.policy_delay = target_noise, noise_clip, policy_delay

    def update(self, batch: Batch, noise: torch.Generator | Tensor | None = None) -> dict[str, Tensor]:
        """One step of the critics and, every ``policy_delay`` updates, one of the policy and of the slow copies.

        Args:
            batch: transitions.
            noise: of the target's action: a CPU generator to draw it from (``None``: PyTorch's global one), or the standard
                normal draws themselves, shaped as the actions.

        Returns:
            Detached scalars: ``td_loss`` and ``regularizer``, summed over the critics, their sum ``critic_loss``, ``q``, and
            ``actor_loss`` when the policy moved.
        """
        with torch.no_grad():
            next_action = self._target_action(batch, noise)
            next_features = [each.features(batch.next_observation, next_action) for each in self.critic_targets]
            next_q = [
                each.head(known).squeeze(-1) for each, known in zip(self.critic_targets, next_features, strict=True)
            ]
            target = batch.reward + batch.discount * ~batch.terminated * torch.minimum(*next_q)

        td_loss, regularizer = target.new_zeros(()), target.new_zeros(())
        for index, critic in enumerate(self.critics):
            features = critic.features(batch.observation, batch.action)
            q = critic.head(features).squeeze(-1)
            td_loss = td_loss + functional.mse_loss(q, target)
            step = CriticStep(
                batch=batch,
                inputs=(batch.observation, batch.action),
                features=features,
                next_features=next_features[index],
                head_weight=critic.head.weight,
                online_next_features=lambda index=index: self._online_next_features(index, batch.next_observation),
            )
            for each in self.regularizers:
                regularizer = regularizer + each.critic_loss(step)
        critic_loss = td_loss + regularizer
        self.critic_optimizer.zero_grad()
        critic_loss.backward()
        self.critic_optimizer.step()
        losses = {"td_loss": td_loss, "regularizer": regularizer, "critic_loss": critic_loss}

        self.updates += 1
        if self.updates % self.policy_delay == 0:
            losses["actor_loss"] = self.actor_loss(batch)
            self.actor_optimizer.zero_grad()
            # none for the critics, which would cost as much again
            losses["actor_loss"].backward(inputs=list(self.actor.parameters()))
            self.actor_optimizer.step()
            follow([*self.critic_targets, self.actor_target], [*self.critics, self.actor], self.tau)
        return {name: loss.detach() for name, loss in losses.items()} | {"q": q.detach().mean()}

    def actor_loss(self, batch: Batch) -> Tensor:
        """What the policy minimises; a variant of the algorithm that constrains the policy overrides it."""
        return -self.critics[0](batch.observation, self.actor(batch.observation)).mean()

    def _target_action(self, batch: Batch, noise: torch.Generator | Tensor | None) -> Float[Tensor, "batch a"]:
        action = self.actor_target(batch.next_observation)
        if not isinstance(noise, Tensor):
            noise = torch.randn(action.shape, generator=noise, dtype=action.dtype).to(action.device)
        disturbance = (self.target_noise * noise).clamp(-self.noise_clip, self.noise_clip)
        return self.actor_target.clip(action + self.actor_target.scale * disturbance)

    @torch.no_grad()
    def _online_next_features(self, index: int, next_observation: Tensor) -> Tensor:
        return self.critics[index].features(next_observation, self.actor(next_observation))
