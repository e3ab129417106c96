r"""DrQ-v2: continuous control from pixels, by deterministic policy gradient and random shifts of the images.

Yarats, Fergus, Lazaric and Pinto, "Mastering Visual Continuous Control: Improved Data-Augmented Reinforcement Learning", ICLR 2022,
arXiv 2107.09645.

.. math:: y = R + D \min_i Q_i'\big(\bar z', a'\big), \quad \bar z' = f(\mathrm{aug}(o_{t+n})), \quad
          a' = \mathrm{clamp}\big(\pi(\bar z') + \mathrm{clip}(\sigma_t \epsilon, \pm c)\big), \qquad
          \min_{Q, f} \sum_i \mathbb E \big(Q_i(z, a_t) - y\big)^2, \qquad \max_\pi \mathbb E \min_i Q_i\big(\mathrm{sg}\, z, a\big)

with n-step reward R and discount D, an encoder f that the critic alone trains and that has no slow copy, and no entropy bonus.

>>> import gymnasium, numpy as np, torch
>>> from gymnasium.spaces import Box
>>> from poise.rl import DrQV2Agent, NStepReplayBuffer
>>> pixels, action = Box(0, 255, (9, 20, 20), np.uint8), Box(-1, 1, (2,))
>>> agent = DrQV2Agent(pixels, action, channels=8, hidden=32, pad=2)
>>> buffer, generator = NStepReplayBuffer(1_000, pixels, action, frame_stack=3), torch.Generator().manual_seed(0)
>>> stack = np.zeros((9, 20, 20), np.uint8)
>>> for time in range(20):
...     act = agent.act(stack, generator, step=time)
...     buffer.add(stack, act, 1.0, stack, terminated=False, truncated=time == 19)
>>> metrics = agent.update(buffer.sample(8, generator), step=20, generator=generator)
>>> sorted(metrics)
['actor_loss', 'critic_fau', 'critic_loss', 'penalty', 'q', 'td_loss']
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from math import prod
from typing import Any, cast

import numpy as np
import torch
from gymnasium import Space
from gymnasium.spaces import Box
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from poise.rl.agents.actor_critic import follow
from poise.rl.agents.pixel_networks import Actor, Critic, Encoder, Heads, PixelValue, orthogonal_init
from poise.rl.agents.schedules import EASY, schedule
from poise.rl.agents.truncated_normal import TruncatedNormal
from poise.rl.augment.random_shifts import RandomShiftsAug
from poise.rl.envs.spaces import action_bounds
from poise.rl.plasticity.fau import FAUMonitor
from poise.rl.plasticity.injection import Injected, plasticity_injection
from poise.rl.plasticity.reset import reset_last_layers, reset_module
from poise.rl.replay.batch import Batch

PARTS = ("encoder", "actor", "critic")


class DrQV2Agent:
    """Data-regularized Q, second version.

    The discount is that of the batches. Actions lie in [-1, 1]: wrap other environments in ``gymnasium.wrappers.RescaleAction``.

    Args:
        observation_space: a Box of bytes, (channels, height, width).
        action_space: a Box from -1 to 1.
        tau: share of the way that the critic's slow copy goes at each update.
        learning_rate: of Adam, for all three networks.
        weight_decay: of Adam, for all three networks.
        channels: of each convolution.
        feature_dim: width of the trunks.
        hidden: width of the heads.
        pad: greatest random shift of an image, in pixels; 0 shifts nothing.
        stddev: schedule of the noise σ over agent steps, see :func:`~poise.rl.schedule`.
        stddev_clip: bound c on the noise in updates; acting does not clip it.
        exploration_steps: uniform actions before.
        heads: changes the perceptrons of policy and values, for example :func:`~poise.rl.with_layer_norm`.
        penalties: terms added to the critic's loss, functions of :attr:`value_network`; for example an :class:`~poise.rl.L2Init`.
        monitor: whose fraction of active units the updates report, of ``encoder``, ``actor`` and ``critic``.
        encoder_dtype: the encoder computes in this type under autocast.
        device: where the networks are.
        dtype: their type.

    Attributes:
        encoder, actor, critic: the networks.
        critic_target: the slow copy of the critic.
        augment: the random shift; ``None`` trains on images as they are, and can be assigned at any time.
        fau: the monitor of the fraction of active units; ``None`` if nothing is monitored.
        penalties: the terms.
        updates: updates so far.

    Raises:
        TypeError, ValueError: spaces or numbers that are not as described.
    """

    def __init__(
        self,
        observation_space: Space[Any],
        action_space: Space[Any],
        *,
        tau: float = 0.01,
        learning_rate: float = 1e-4,
        weight_decay: float = 0.0,
        channels: int = 32,
        feature_dim: int = 50,
        hidden: int = 1024,
        pad: int = 4,
        stddev: str | float = EASY,
        stddev_clip: float = 0.3,
        exploration_steps: int = 2_000,
        heads: Heads | None = None,
        penalties: Sequence[Callable[[nn.Module], Tensor]] = (),
        monitor: Sequence[str] = ("critic",),
        encoder_dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if not isinstance(observation_space, Box) or len(observation_space.shape) != 3:
            raise TypeError(f"expected images in a Box of shape (channels, height, width), got {observation_space}")
        low, high = action_bounds(action_space)
        if (low != -1).any() or (high != 1).any():
            raise ValueError(f"expected actions from -1 to 1 (gymnasium.wrappers.RescaleAction), got {action_space}")
        if not (0 < tau <= 1 and learning_rate > 0 and stddev_clip >= 0 and exploration_steps >= 0):
            raise ValueError(
                "expected tau in (0, 1], learning_rate > 0, stddev_clip >= 0 and exploration_steps >= 0, got "
                f"{tau}, {learning_rate}, {stddev_clip} and {exploration_steps}"
            )
        if unknown := set(monitor) - set(PARTS):
            raise ValueError(f"monitor names {sorted(unknown)}, the networks are {PARTS}")
        schedule(stddev, 0)
        self.tau, self.learning_rate, self.weight_decay = tau, learning_rate, weight_decay
        self.stddev, self.stddev_clip, self.exploration_steps = stddev, stddev_clip, exploration_steps
        self.encoder_dtype, self.penalties = encoder_dtype, list(penalties)
        self.augment: RandomShiftsAug | None = RandomShiftsAug(pad) if pad else None
        encoder = Encoder(observation_space.shape, channels)
        sizes = encoder.size, prod(action_space.shape or ()), feature_dim, hidden, heads
        self.encoder: nn.Module = encoder.to(device, dtype)
        self.actor: nn.Module = Actor(*sizes).to(device, dtype)
        self.critic: nn.Module = Critic(*sizes).to(device, dtype)
        self.critic_target: nn.Module = copy.deepcopy(self.critic).requires_grad_(False)
        self.optimizers = {name: self._optimizer(name) for name in PARTS}
        self.injections: list[str] = []
        self._monitored = tuple(monitor)
        self.fau = self._monitor()
        self.updates = 0

    @property
    def value_network(self) -> PixelValue:
        """Encoder and critic as one network, values of pixels and actions."""
        return PixelValue(self.encoder, self.critic)

    @torch.no_grad()
    def act(self, observation: np.ndarray, generator: torch.Generator | None = None, step: int = 0) -> np.ndarray:
        """The policy's action.

        Args:
            observation: one observation (c, h, w) or a batch of them.
            generator: a CPU generator for exploration: uniform actions before ``exploration_steps``, then noise of the scheduled
                deviation. Without it the action is the policy's mean.
            step: the agent's step, for both.

        Returns:
            The action (a,), or (n, a).
        """
        weight = next(self.actor.parameters())
        pixels = torch.as_tensor(observation).to(weight.device)
        policy = self.policy(self._encode(pixels.reshape(-1, *pixels.shape[-3:])), step)
        action = policy.mean
        if generator is not None and step < self.exploration_steps:
            action = 2 * torch.rand(action.shape, generator=generator, dtype=action.dtype) - 1
        elif generator is not None:
            action = policy.sample(generator=generator)
        return action.cpu().numpy().reshape(*pixels.shape[:-3], -1)

    @torch.no_grad()
    def value(self, observation: np.ndarray, action: np.ndarray) -> np.ndarray:
        """The lesser of the two estimates of the return, for a batch of observations and actions."""
        weight = next(self.actor.parameters())
        z = self._encode(torch.as_tensor(observation).to(weight.device))
        return torch.minimum(*self.critic(z, torch.as_tensor(action).to(weight))).cpu().numpy()

    def policy(self, z: Float[Tensor, "batch size"], step: int) -> TruncatedNormal:
        """The distribution of actions given representations, at an agent step."""
        return TruncatedNormal(self.actor(z).tanh(), schedule(self.stddev, step))

    def update(self, batch: Batch, step: int = 0, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """One step of critic and encoder, one of the policy, one of the critic's slow copy.

        Args:
            batch: transitions over n steps.
            step: the agent's step, for the noise.
            generator: a CPU generator for shifts and noise; ``None`` is PyTorch's global one.

        Returns:
            Detached scalars: ``td_loss`` and ``penalty``, their sum ``critic_loss``, ``q``, ``actor_loss``, and of each monitored
            network its fraction of active units, ``critic_fau``, in the one forward pass that trains it.
        """
        observation, next_observation = batch.observation, batch.next_observation
        if self.augment is not None:  # each with shifts of its own
            observation = self.augment(observation, generator=generator)
            next_observation = self.augment(next_observation, generator=generator)
        if self.fau is not None:
            self.fau.clear()
        with self._counting("encoder"):
            z = self._encode(observation)
        with torch.no_grad():
            next_z = self._encode(next_observation)
            next_action = self.policy(next_z, step).sample(self.stddev_clip, generator=generator)
            next_q = torch.minimum(*self.critic_target(next_z, next_action))
            target = batch.reward + batch.discount * ~batch.terminated * next_q

        with self._counting("critic"):
            q1, q2 = self.critic(z, batch.action)
        td_loss = functional.mse_loss(q1, target) + functional.mse_loss(q2, target)
        penalty = sum((each(self.value_network) for each in self.penalties), torch.zeros_like(td_loss))
        critic_loss = td_loss + penalty
        self._step(critic_loss, "critic", "encoder")

        z = z.detach()
        with self._counting("actor"):
            action = self.policy(z, step).sample(self.stddev_clip, generator=generator)
        actor_loss = -torch.minimum(*self.critic(z, action)).mean()
        self._step(actor_loss, "actor")

        follow([self.critic_target], [self.critic], self.tau)
        self.updates += 1
        losses = {"td_loss": td_loss, "penalty": penalty, "critic_loss": critic_loss, "actor_loss": actor_loss}
        fractions = {f"{name}_fau": value for name, value in (self.fau.fractions() if self.fau else {}).items()}
        return {name: loss.detach() for name, loss in losses.items()} | {"q": q1.detach().mean()} | fractions

    def reset(self, name: str, generator: torch.Generator | None = None, *, last_layers: int | None = None) -> None:
        """Begin again with one network, or with the last layers of its heads, optimizer included; a critic's slow copy follows.

        Raises:
            ValueError: no such network.
        """
        part, optimizer = self._part(name), self.optimizers[name]
        if last_layers is None:
            reset_module(part, generator, optimizer=optimizer)
        else:
            fresh = _fresh(part)
            heads = {"encoder": ["body"], "actor": ["policy"], "critic": ["q1", "q2"]}[name]
            for head in heads:
                reset_last_layers(
                    fresh.get_submodule(head), last_layers, generator, initialize=orthogonal_init, optimizer=optimizer
                )
        if name == "critic":
            self.critic_target.load_state_dict(self.critic.state_dict())

    def inject(self, name: str, generator: torch.Generator | None = None) -> None:
        """Plasticity injection into one network; its outputs, and those of a critic's slow copy, stay what they are.

        Raises:
            ValueError: no such network.
        """
        injected = plasticity_injection(self._part(name), generator)
        setattr(self, name, injected)
        if name == "critic":
            fresh, anchor = copy.deepcopy((injected.fresh, injected.anchor))
            self.critic_target = Injected(self.critic_target, fresh, anchor).requires_grad_(False)
        self.optimizers[name] = self._optimizer(name)
        self.injections.append(name)
        self.fau = self._monitor()

    def state_dict(self) -> dict[str, Any]:
        """Networks, slow copy, optimizers, stateful penalties, what was injected, and the number of updates."""
        parts = {name: part.state_dict() for name, part in self._parts().items()}
        return parts | {"injections": list(self.injections), "updates": self.updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state`` was taken."""
        for name in state["injections"][len(self.injections) :]:
            self.inject(name, torch.Generator().manual_seed(0))  # its parameters come from the state
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        self.updates = state["updates"]

    def _encode(self, pixels: Tensor) -> Tensor:
        if self.encoder_dtype is None:
            return self.encoder(pixels)
        with torch.autocast(pixels.device.type, self.encoder_dtype):
            z = self.encoder(pixels)
        return z.to(next(self.critic.parameters()).dtype)

    def _step(self, loss: Tensor, *names: str) -> None:
        optimizers = [self.optimizers[name] for name in names]
        for optimizer in optimizers:
            optimizer.zero_grad()
        # none for the critic when the policy learns, which would cost as much again
        loss.backward(inputs=[each for name in names for each in self._trained(name)])
        for optimizer in optimizers:
            optimizer.step()

    def _optimizer(self, name: str) -> torch.optim.Optimizer:
        return torch.optim.Adam(self._trained(name), self.learning_rate, weight_decay=self.weight_decay, fused=True)

    def _trained(self, name: str) -> list[nn.Parameter]:
        return [parameter for parameter in self._part(name).parameters() if parameter.requires_grad]

    def _part(self, name: str) -> nn.Module:
        if name not in PARTS:
            raise ValueError(f"the networks are {PARTS}, got {name!r}")
        return cast(nn.Module, getattr(self, name))

    def _monitor(self) -> FAUMonitor | None:
        watched = {name: _fresh(self._part(name)) for name in self._monitored}
        return FAUMonitor(watched) if watched else None

    def _counting(self, name: str) -> AbstractContextManager[None]:
        return self.fau.counting(name) if self.fau and name in self._monitored else nullcontext()

    def _parts(self) -> dict[str, Any]:
        stateful = {
            f"penalty_{index}": each for index, each in enumerate(self.penalties) if isinstance(each, nn.Module)
        }
        optimizers = {f"{name}_optimizer": optimizer for name, optimizer in self.optimizers.items()}
        networks = {name: self._part(name) for name in PARTS}
        return networks | {"critic_target": self.critic_target} | optimizers | stateful


def _fresh(part: nn.Module) -> nn.Module:
    """What learns in a network, be it injected or not."""
    return part.fresh if isinstance(part, Injected) else part
