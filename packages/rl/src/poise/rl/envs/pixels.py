"""Environments seen through a camera: the newest frames, stacked, as bytes with the channels first.

>>> import gymnasium
>>> env = PixelFrameStack(gymnasium.make("Pendulum-v1", render_mode="rgb_array"), size=(48, 48))
>>> env.observation_space.shape
(9, 48, 48)
"""

import os
from collections import deque
from typing import Any

import numpy as np
import torch
from gymnasium import Env, Wrapper
from gymnasium.spaces import Box
from torch.nn import functional

from poise.rl.envs.dm_control import DMControl


class PixelFrameStack(Wrapper[np.ndarray, Any, Any, Any]):
    """Observations are the last frames that an environment renders; at its beginning an episode has its first frame several times.

    Args:
        env: an environment made with ``render_mode="rgb_array"``.
        frame_stack: how many frames.
        size: height and width; frames of another size are reduced by averaging over areas. ``None`` keeps them as they are.
        action_repeat: steps of the environment per action, whose rewards are added. Nothing is rendered in between.

    Raises:
        ValueError: an environment that does not render arrays, or a number below 1.
    """

    def __init__(
        self,
        env: Env[Any, Any],
        frame_stack: int = 3,
        size: tuple[int, int] | None = None,
        action_repeat: int = 1,
    ) -> None:
        super().__init__(env)
        if env.render_mode != "rgb_array":
            raise ValueError(f"make the environment with render_mode='rgb_array', it has {env.render_mode!r}")
        if min(frame_stack, action_repeat, *(size or (1, 1))) < 1:
            raise ValueError(
                f"expected frame_stack, action_repeat and size from 1 on, got {frame_stack}, {action_repeat}, {size}"
            )
        self._repeat, self._size = action_repeat, size
        self._frames: deque[np.ndarray] = deque(maxlen=frame_stack)
        env.reset(seed=0)
        channels, height, width = self._frame().shape
        self.observation_space = Box(0, 255, (frame_stack * channels, height, width), np.uint8)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        _, info = self.env.reset(seed=seed, options=options)
        frame = self._frame()
        self._frames.extend([frame] * (self._frames.maxlen or 1))
        return np.concatenate(self._frames), info

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        total = 0.0
        for _ in range(self._repeat):
            _, reward, terminated, truncated, info = self.env.step(action)
            total += float(reward)
            if terminated or truncated:
                break
        self._frames.append(self._frame())
        return np.concatenate(self._frames), total, bool(terminated), bool(truncated), info

    def _frame(self) -> np.ndarray:
        """The newest frame, (channels, height, width)."""
        image = np.asarray(self.env.render()).transpose(2, 0, 1)
        if self._size is None or image.shape[1:] == self._size:
            return np.ascontiguousarray(image)
        pixels = torch.from_numpy(np.ascontiguousarray(image)).float().unsqueeze(0)
        return functional.adaptive_avg_pool2d(pixels, self._size)[0].round_().byte().numpy()


def make_dmc_pixels(
    domain: str,
    task: str,
    seed: int = 0,
    frame_stack: int = 3,
    action_repeat: int = 2,
    size: int = 84,
) -> PixelFrameStack:
    """A task of the DeepMind Control Suite from pixels, as DrQ-v2 has it: camera 2 for the quadruped, 0 for all others.

    Needs ``pip install poise-rl[dmc]`` and a renderer. Without a display EGL is chosen, unless ``MUJOCO_GL`` says otherwise.

    Args:
        domain: the body, ``"quadruped"``.
        task: what it should do, ``"run"``.
        seed: of the first episode.
        frame_stack: frames per observation.
        action_repeat: physics steps per action.
        size: height and width of a frame.

    Raises:
        ValueError: the suite has no such task.
        RuntimeError: nothing can be rendered here.

    Source:
        Yarats et al. 2022, arXiv 2107.09645, released code, for cameras and stacking.
    """
    if "DISPLAY" not in os.environ:
        os.environ.setdefault("MUJOCO_GL", "egl")  # read when dm_control is imported
    camera = 2 if domain == "quadruped" else 0
    try:
        env = DMControl(
            domain, task, action_repeat=action_repeat, render_mode="rgb_array", size=(size, size), camera=camera
        )
        stacked = PixelFrameStack(env, frame_stack)
    except ModuleNotFoundError:
        raise  # dm_control itself is missing
    except (RuntimeError, AttributeError, ImportError, OSError) as error:
        raise RuntimeError(
            "dm_control cannot render here: install EGL or OSMesa and set MUJOCO_GL=egl or MUJOCO_GL=osmesa before it is imported "
            f"({type(error).__name__}: {error})"
        ) from error
    stacked.reset(seed=seed)
    return stacked
