"""Tasks of the DeepMind Control Suite as gymnasium environments: flat states, actions in [-1, 1], 1,000 steps.

Tassa et al., "DeepMind Control Suite", arXiv 1801.00690. An episode ends by its time limit only, which is a truncation; where a task
itself ends an episode, its last discount says whether that is a termination.
"""

from importlib import import_module
from typing import Any

import numpy as np
from gymnasium import Env
from gymnasium.spaces import Box


class DMControl(Env[np.ndarray, np.ndarray]):
    """A task by its names, ``DMControl("cheetah", "run")``. Needs dm_control: ``pip install poise-rl[dmc]``.

    Observations are the entries of the task's dictionary in its order, flattened, in float32. Actions are rescaled from [-1, 1]
    to the task's bounds.

    Args:
        domain: the body.
        task: what it should do.
        action_repeat: physics steps per action, whose rewards are added, each times the task's discounts before it.
        render_mode: ``None`` or ``"rgb_array"``, which needs EGL or OSMesa where there is no display.
        size: height and width of rendered frames.
        camera: number of the camera.

    Raises:
        ValueError: the suite has no such task, or ``action_repeat`` is below 1.
    """

    def __init__(
        self,
        domain: str,
        task: str,
        *,
        action_repeat: int = 1,
        render_mode: str | None = None,
        size: tuple[int, int] = (84, 84),
        camera: int = 0,
    ) -> None:
        if render_mode is not None:
            # Mesa and PyTorch's compiler each bring an LLVM. Loaded in the other order, by the first optimizer, the process crashes.
            import_module("torch._dynamo")
        from dm_control import suite

        if (domain, task) not in suite.ALL_TASKS:
            near = sorted(other for body, other in suite.ALL_TASKS if body == domain)
            known = f"its tasks are {near}" if near else f"its bodies are {sorted(suite.TASKS_BY_DOMAIN)}"
            raise ValueError(f"the control suite has no task {domain}-{task}: {known}")
        if action_repeat < 1 or render_mode not in (None, "rgb_array"):
            raise ValueError(
                f"expected action_repeat >= 1 and render_mode None or 'rgb_array', got {action_repeat}, {render_mode!r}"
            )
        self.metadata = {"render_modes": ["rgb_array"]}
        self._task = suite.load(domain, task)
        self._repeat, self.render_mode, self._size, self._camera = action_repeat, render_mode, size, camera
        specification = self._task.action_spec()
        self._low, self._high = specification.minimum.astype(np.float64), specification.maximum.astype(np.float64)
        self.action_space = Box(-1, 1, specification.shape, np.float32)
        length = sum(int(np.prod(each.shape)) for each in self._task.observation_spec().values())
        self.observation_space = Box(-np.inf, np.inf, (length,), np.float32)

    @property
    def physics(self) -> Any:
        """dm_control's physics."""
        return self._task.physics

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin an episode; with a seed, one that depends on nothing but it."""
        super().reset(seed=seed)
        if seed is not None:
            self._task.task.random.seed(seed)
        return self._flat(self._task.reset()), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Act for ``action_repeat`` steps of the task.

        Raises:
            ValueError: an action of another shape, or one outside [-1, 1] by more than rounding.
        """
        given = np.asarray(action, np.float64)
        if given.shape != self.action_space.shape or np.abs(given).max() > 1 + 1e-5:
            raise ValueError(f"action must have shape {self.action_space.shape} and lie in [-1, 1], got {action}")
        scaled = self._low + (given.clip(-1, 1) + 1) / 2 * (self._high - self._low)
        reward, discount = 0.0, 1.0
        for _ in range(self._repeat):
            outcome = self._task.step(scaled)
            reward += discount * (outcome.reward or 0.0)
            discount *= outcome.discount
            if outcome.last():
                break
        terminated = outcome.last() and outcome.discount == 0
        return self._flat(outcome), reward, terminated, outcome.last() and not terminated, {}

    def render(self) -> Any:
        """An image (height, width, 3), if the environment was made to render."""
        if self.render_mode is None:
            return None
        return self.physics.render(*self._size, camera_id=self._camera)

    def _flat(self, outcome: Any) -> np.ndarray:
        return np.concatenate([np.ravel(value) for value in outcome.observation.values()]).astype(np.float32)
