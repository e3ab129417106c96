r"""Deep Q-learning with a slow target network, for discrete actions.

Mnih et al., Human-Level Control through Deep Reinforcement Learning, Nature 2015.

.. math:: y = r + \gamma \max_{a'} Q'(s', a'), \qquad \min_\theta\, \mathbb E\, (Q_\theta(s, a) - y)^2 + R(\theta)

The representation φ(s) is the last hidden layer, and each action has a row :math:`w_a` of the head.

>>> import gymnasium, torch
>>> from poise.rl import DQNAgent, ReplayBuffer
>>> env = gymnasium.make("CartPole-v1")
>>> agent = DQNAgent(env.observation_space, env.action_space)
>>> buffer, generator = ReplayBuffer(10_000, env.observation_space, env.action_space), torch.Generator().manual_seed(0)
>>> state, _ = env.reset(seed=0)
>>> for _ in range(5):
...     action = agent.act(state, generator, epsilon=0.1)
...     following, reward, terminated, truncated, _ = env.step(action)
...     buffer.add(state, action, reward, following, terminated=terminated, truncated=truncated)
...     state = following
>>> sorted(agent.update(buffer.sample(16, generator)))
['critic_loss', 'q', 'regularizer', 'td_loss']
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from gymnasium import Space
from torch import Tensor, nn
from torch.nn import functional

from poise.rl.agents.actor_critic import follow, train_with
from poise.rl.agents.networks import QNetwork
from poise.rl.replay.batch import Batch
from poise.rl.representation.critic_step import CriticRegularizer, CriticStep


class DQNAgent:
    """Deep Q-learning.

    The discount is that of the batches.

    Args:
        observation_space: a Box of one axis.
        action_space: Discrete.
        tau: share of the way that the slow copy goes at each update.
        learning_rate: of Adam.
        hidden: widths of the hidden layers.
        regularizers: terms added to the loss; their parameters, if any, are trained with it.
        device: where the networks are.
        dtype: their type.

    Attributes:
        network: the value network.
        target: its slow copy.
        updates: updates so far.

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
        regularizers: Sequence[CriticRegularizer] = (),
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if not (0 < tau <= 1 and learning_rate > 0 and hidden):
            raise ValueError(
                f"expected tau in (0, 1], learning_rate > 0 and hidden layers, got {tau}, {learning_rate} and {hidden}"
            )
        self.tau, self.updates = tau, 0
        self.network = QNetwork(observation_space, action_space, hidden).to(device, dtype)
        self.target = copy.deepcopy(self.network).requires_grad_(False)
        self.optimizer = torch.optim.Adam(self.network.parameters(), learning_rate, fused=True)
        self.regularizers: list[CriticRegularizer] = []
        self.regularize(*regularizers)

    def regularize(self, *regularizers: CriticRegularizer) -> None:
        """Add terms to the loss; their parameters, if any, are trained with it."""
        self.regularizers += regularizers
        train_with(self.optimizer, regularizers)

    @torch.no_grad()
    def act(
        self, observation: np.ndarray, generator: torch.Generator | None = None, epsilon: float = 0.05
    ) -> np.ndarray:
        """The action of greatest value; with a CPU generator, a uniform one instead with probability ``epsilon``.

        Args:
            observation: one observation (s,) or a batch of them (n, s).
            generator: for exploration.
            epsilon: share of uniform actions, if there is a generator.

        Returns:
            The action, an integer array of shape () or (n,).
        """
        values = self.network(torch.as_tensor(observation).to(self.network.head.weight)).cpu()
        action = values.argmax(-1)
        if generator is not None:
            uniform = torch.randint(values.shape[-1], action.shape, generator=generator)
            action = torch.where(torch.rand(action.shape, generator=generator) < epsilon, uniform, action)
        return action.numpy()

    @torch.no_grad()
    def value(self, observation: np.ndarray, action: np.ndarray) -> np.ndarray:
        """The estimate of the return, for a batch of observations and actions."""
        values = self.network(torch.as_tensor(observation).to(self.network.head.weight)).cpu()
        return values.gather(-1, torch.as_tensor(action).unsqueeze(-1)).squeeze(-1).numpy()

    def update(self, batch: Batch) -> dict[str, Tensor]:
        """One step of the network and one of its slow copy.

        Returns:
            Detached scalars: ``td_loss``, ``regularizer``, their sum ``critic_loss``, and ``q``.
        """
        with torch.no_grad():
            next_features = self.target.features(batch.next_observation)
            target = batch.reward + batch.discount * ~batch.terminated * self.target.head(next_features).amax(-1)

        features = self.network.features(batch.observation)
        q = self.network.head(features).gather(-1, batch.action.unsqueeze(-1)).squeeze(-1)
        td_loss = functional.mse_loss(q, target)
        step = CriticStep(
            batch=batch,
            inputs=(batch.observation,),
            features=features,
            next_features=next_features,
            head_weight=self.network.head.weight[batch.action],
            online_next_features=lambda: self._online_next_features(batch.next_observation),
        )
        regularizer = sum((each.critic_loss(step) for each in self.regularizers), torch.zeros_like(td_loss))
        critic_loss = td_loss + regularizer
        self.optimizer.zero_grad()
        critic_loss.backward()
        self.optimizer.step()

        follow([self.target], [self.network], self.tau)
        self.updates += 1
        losses = {"td_loss": td_loss, "regularizer": regularizer, "critic_loss": critic_loss}
        return {name: loss.detach() for name, loss in losses.items()} | {"q": q.detach().mean()}

    def state_dict(self) -> dict[str, Any]:
        """Network, slow copy, optimizer, regularizers and the number of updates."""
        return {name: part.state_dict() for name, part in self._parts().items()} | {"updates": self.updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state`` was taken."""
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        self.updates = state["updates"]

    def _parts(self) -> dict[str, Any]:
        stateful = {
            f"regularizer_{index}": each for index, each in enumerate(self.regularizers) if isinstance(each, nn.Module)
        }
        return {"network": self.network, "target": self.target, "optimizer": self.optimizer} | stateful

    @torch.no_grad()
    def _online_next_features(self, next_observation: Tensor) -> Tensor:
        return self.network.features(next_observation)
