"""A fixed policy of the pendulum: BEER's experiment lets critics learn its values, that of PRDC logs it with noise."""

import numpy as np
import torch

from poise.rl.agents.networks import Critic

ENERGY_AT_REST_ON_TOP = 15.0


def swing_up(observation: np.ndarray) -> np.ndarray:
    """Torques (n, 1) that swing the pendulum up by pumping energy, and hold it there, for observations (n, 3)."""
    height, sine, speed = np.asarray(observation, np.float64).T
    missing = ENERGY_AT_REST_ON_TOP - (speed**2 / 2 + ENERGY_AT_REST_ON_TOP * height)
    torque = np.where(height > 0.9, -10 * sine - 3 * speed, missing * speed)
    return torque.clip(-2, 2)[:, None].astype(np.float32)


class SwingUp:
    """Acts as :func:`swing_up`. Its value is that of the critic."""

    def __init__(self, critic: Critic) -> None:
        self._critic = critic

    def act(self, observation: np.ndarray) -> np.ndarray:
        return swing_up(observation)

    @torch.no_grad()
    def value(self, observation: np.ndarray, action: np.ndarray) -> np.ndarray:
        like = self._critic.head.weight
        return self._critic(torch.from_numpy(observation).to(like), torch.from_numpy(action).to(like)).cpu().numpy()
