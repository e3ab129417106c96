"""What agents with a deterministic policy have in common: networks, targets, optimizers, acting and checkpoints."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from gymnasium import Space
from torch import Tensor, nn

from poise.rl.agents.networks import Actor, Critic
from poise.rl.representation.critic_step import CriticRegularizer


class ActorCritic:
    """A deterministic policy and its critics, with a slow copy of each.

    Attributes:
        actor: the policy.
        critics: one or several value networks.
        actor_target: the slow copy of the policy.
        critic_targets: the slow copies of the critics.
        updates: updates so far.
    """

    def __init__(
        self,
        observation_space: Space[Any],
        action_space: Space[Any],
        *,
        critics: int,
        hidden: Sequence[int],
        learning_rate: float,
        tau: float,
        exploration_noise: float,
        regularizers: Sequence[CriticRegularizer],
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> None:
        if not (0 < tau <= 1 and exploration_noise >= 0 and learning_rate > 0 and hidden):
            raise ValueError(
                "expected tau in (0, 1], exploration_noise >= 0, learning_rate > 0 and hidden layers, got "
                f"{tau}, {exploration_noise}, {learning_rate} and {hidden}"
            )
        self.tau, self.exploration_noise = tau, exploration_noise
        spaces = observation_space, action_space
        self.actor = Actor(*spaces, hidden).to(device, dtype)
        self.critics = [Critic(*spaces, hidden).to(device, dtype) for _ in range(critics)]
        self.actor_target = copy.deepcopy(self.actor).requires_grad_(False)
        self.critic_targets = [copy.deepcopy(critic).requires_grad_(False) for critic in self.critics]
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), learning_rate, fused=True)
        self.critic_optimizer = torch.optim.Adam(nn.ModuleList(self.critics).parameters(), learning_rate, fused=True)
        self.regularizers: list[CriticRegularizer] = []
        self.regularize(*regularizers)
        self.updates = 0

    def regularize(self, *regularizers: CriticRegularizer) -> None:
        """Add terms to the loss of the critics; their parameters, if any, are trained with it."""
        self.regularizers += regularizers
        train_with(self.critic_optimizer, regularizers)

    @torch.no_grad()
    def act(self, observation: np.ndarray, generator: torch.Generator | None = None) -> np.ndarray:
        """The policy's action.

        Args:
            observation: one observation (s,) or a batch of them (n, s).
            generator: a CPU generator for exploration: normal noise of ``exploration_noise`` times half the range of the actions
                is added, and the sum clipped to the range. Without it the action is that of the deterministic policy.

        Returns:
            The action (a,), or (n, a).
        """
        action = self.actor(self.seen(observation))
        if generator is not None:
            noise = torch.randn(action.shape, generator=generator, dtype=action.dtype).to(action.device)
            action = action + self.exploration_noise * self.actor.scale * noise
        return self.actor.clip(action).cpu().numpy()

    def value(self, observation: np.ndarray, action: np.ndarray) -> np.ndarray:
        """The first critic's estimate of the return, for a batch of observations and actions."""
        with torch.no_grad():
            given = torch.as_tensor(action).to(self.actor.scale)
            return self.critics[0](self.seen(observation), given).cpu().numpy()

    def seen(self, observation: np.ndarray) -> Tensor:
        """What the networks see of observations of the environment; an agent that normalises states does it here."""
        return torch.as_tensor(observation).to(self.actor.scale)

    def state_dict(self) -> dict[str, Any]:
        """Networks, their slow copies, optimizers, regularizers and the number of updates."""
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
        return {
            "actor": self.actor,
            "critics": nn.ModuleList(self.critics),
            "actor_target": self.actor_target,
            "critic_targets": nn.ModuleList(self.critic_targets),
            "actor_optimizer": self.actor_optimizer,
            "critic_optimizer": self.critic_optimizer,
        } | stateful


def train_with(optimizer: torch.optim.Optimizer, regularizers: Iterable[CriticRegularizer]) -> None:
    """Let ``optimizer`` train the parameters that regularizers have."""
    for each in regularizers:
        trained = [parameter for parameter in parameters_of(each) if parameter.requires_grad]
        if trained:
            optimizer.add_param_group({"params": trained})


def parameters_of(regularizer: CriticRegularizer) -> Iterable[nn.Parameter]:
    return regularizer.parameters() if isinstance(regularizer, nn.Module) else ()


@torch.no_grad()
def follow(targets: Iterable[nn.Module], sources: Iterable[nn.Module], tau: float) -> None:
    """Move the parameters of ``targets`` by a share ``tau`` of the way to those of ``sources`` (Polyak averaging)."""
    moving, towards = (
        tuple(parameter for each in group for parameter in each.parameters()) for group in (targets, sources)
    )
    torch._foreach_lerp_(moving, towards, tau)
