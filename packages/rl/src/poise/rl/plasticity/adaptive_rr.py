r"""Adaptive RR: train little while the critic may lose its plasticity, and often once it has recovered.

Ma et al., "Revisiting Plasticity in Visual Reinforcement Learning: Data, Modules and Training Stages", ICLR 2024, arXiv 2310.07418.

The replay ratio (RR) is the number of gradient updates per step of the environment. With :math:`\bar\Phi_e` the mean fraction of
active units of the critic over the updates of one episode, every 50 episodes

.. math:: |\bar\Phi_e - \bar\Phi_{e'}| \le 0.001 \;\Rightarrow\; \mathrm{RR}: 0.5 \to 2,

where e' is the episode of the check before (at first, the very first update). The switch is for good.

>>> import torch
>>> from torch import nn
>>> from poise.rl import AdaptiveReplayRatio, FAUMonitor
>>> critic = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 1))
>>> monitor, controller = FAUMonitor({"critic": critic}), AdaptiveReplayRatio(check_freq=2)
>>> for step in range(60):
...     for _ in range(controller.updates_for_step(step)):
...         with monitor.counting():
...             value = critic(torch.ones(8, 4))  # ... and a gradient step
...         controller.on_update(monitor.fractions()["critic"])
...         monitor.clear()
...     if step % 10 == 9:
...         controller.on_episode_end()
>>> controller.replay_ratio  # nothing moved, so the second check switched
2.0
"""

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any, Literal

import torch
from torch import Tensor


class AdaptiveReplayRatio:
    """Says how many updates follow a step of the environment, and switches once from a low to a high replay ratio.

    Call :meth:`updates_for_step` at every step of the agent, :meth:`on_update` after every update, and :meth:`on_episode_end` after the
    last step of every episode, before the number of updates of the step after it is asked for.

    Values stay tensors until a check reads them: on a GPU nothing waits for them.

    Args:
        low: updates per step before the switch; 0.5 is one update at every second step.
        high: updates per step after it.
        check_freq: units between checks.
        phi_gap: the greatest change of the fraction of active units that counts as recovered.
        window: units before a check over whose updates the fraction is averaged.
        unit: what is counted. The published numbers, 50 episodes and a window of one, are those of the DeepMind Control Suite, where an
            episode has 500 agent steps; for episodes of other lengths ``unit="step", check_freq=25_000, window=500`` means the same.

    Attributes:
        replay_ratio: updates per step now.
        previous: the fraction at the last check, or at the first update; ``None`` before that.
        checks: the checks so far: at which unit, the fraction, and the replay ratio from there on.

    Raises:
        ValueError: ratios not in ``0 < low <= high``, a negative gap, or no ``0 < window < check_freq``.

    Source:
        Ma et al. 2024, Adaptive RR; order of clearing and checking as in the released code.
    """

    def __init__(
        self,
        low: float = 0.5,
        high: float = 2.0,
        check_freq: int = 50,
        phi_gap: float = 1e-3,
        *,
        window: int = 1,
        unit: Literal["episode", "step"] | str = "episode",
    ) -> None:
        if not (0 < low <= high < math.inf):
            raise ValueError(f"expected replay ratios 0 < low <= high, got low={low}, high={high}")
        if not phi_gap >= 0:
            raise ValueError(f"phi_gap must not be negative, got {phi_gap}")
        if not 0 < window < check_freq:
            raise ValueError(f"expected 0 < window < check_freq, got window={window}, check_freq={check_freq}")
        if unit not in ("episode", "step"):
            raise ValueError(f"unit must be 'episode' or 'step', got {unit!r}")
        self.low, self.high, self.check_freq, self.phi_gap = low, high, check_freq, phi_gap
        self.window, self.unit = window, unit
        self.replay_ratio = low
        self.previous: Tensor | None = None
        self.checks: list[tuple[int, float, float]] = []
        self._sum: Tensor | None = None
        self._updates = 0
        self._units = 0

    @property
    def switched(self) -> bool:
        """Whether the high ratio holds."""
        return self.replay_ratio == self.high

    def on_update(self, fau: Tensor | float) -> None:
        """Take in the critic's fraction of active units in one update (not in a step without one).

        Raises:
            ValueError: ``fau`` is no scalar.
        """
        value = torch.as_tensor(fau, dtype=None if isinstance(fau, Tensor) else torch.float64).detach()
        if value.numel() != 1:
            raise ValueError(f"expected the fraction of active units as a scalar, got shape {tuple(value.shape)}")
        value = value.reshape(())
        if self.previous is None:
            self.previous = value
        self._sum = value if self._sum is None else self._sum + value
        self._updates += 1

    def on_episode_end(self) -> None:
        """An episode is over."""
        if self.unit == "episode":
            self._count()

    def updates_for_step(self, step: int) -> int:
        """How many updates follow agent step ``step``, counted from 0: at a ratio of 0.5 one after every even step."""
        if self.unit == "step" and step > 0:
            self._count()
        return updates_at(self.replay_ratio, step)

    def state_dict(self) -> dict[str, Any]:
        """Everything that later answers depend on."""
        return {
            "replay_ratio": self.replay_ratio,
            "previous": self.previous,
            "sum": self._sum,
            "updates": self._updates,
            "units": self._units,
            "checks": [list(check) for check in self.checks],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state`` was taken."""
        self.replay_ratio, self.previous = state["replay_ratio"], state["previous"]
        self._sum, self._updates, self._units = state["sum"], state["updates"], state["units"]
        self.checks = [(int(unit), float(value), float(ratio)) for unit, value, ratio in state["checks"]]

    def _count(self) -> None:
        self._units += 1
        if self._units % self.check_freq == self.check_freq - self.window:
            self._clear()  # the average covers the last units before the check alone
        if self._units % self.check_freq == 0 and self._sum is not None:
            self._check(self._sum / self._updates)
            self._clear()

    def _check(self, mean: Tensor) -> None:
        assert self.previous is not None
        if self.replay_ratio == self.low and abs(float(mean - self.previous)) <= self.phi_gap:
            self.replay_ratio = self.high
        self.previous = mean
        self.checks.append((self._units, float(mean), self.replay_ratio))

    def _clear(self) -> None:
        self._sum, self._updates = None, 0


def updates_at(replay_ratio: float, step: int) -> int:
    """Updates after agent step ``step`` at a constant replay ratio: over any n steps from 0, ``ceil(n * replay_ratio)``.

    >>> [updates_at(0.5, step) for step in range(6)], [updates_at(2.0, step) for step in range(3)]
    ([1, 0, 1, 0, 1, 0], [2, 2, 2])

    Args:
        replay_ratio: updates per step.
        step: counted from 0.
    """
    ratio = Fraction(replay_ratio).limit_denominator(1_000_000)
    return math.ceil((step + 1) * ratio) - math.ceil(step * ratio)
