"""Exact states of simulators: save one, and go back to it.

MuJoCo environments of gymnasium, dm_control tasks, and environments that keep their state in an attribute ``state`` (gymnasium's
classic control). What is saved is the state of the physics, all that later steps depend on as long as dynamics and
reward are deterministic.

>>> import gymnasium
>>> env = gymnasium.make("Pendulum-v1")
>>> _ = env.reset(seed=0)
>>> saved = save_state(env)
>>> first, *_ = env.step(env.action_space.high)
>>> restore_state(env, saved)
>>> again, *_ = env.step(env.action_space.high)
>>> (first == again).all().item()
True
"""

from typing import Any

import numpy as np
from gymnasium import Env


def save_state(env: Env[Any, Any]) -> np.ndarray:
    """The state of the physics, as an array of its own.

    Raises:
        TypeError: an environment whose state cannot be read.
    """
    model_and_data = _mujoco(env)
    if model_and_data is None:
        return np.array(_plain(env).state)
    import mujoco

    model, data = model_and_data
    # The whole state of the integrator: with positions and velocities alone the solver would start elsewhere.
    state = np.empty(mujoco.mj_stateSize(model, mujoco.mjtState.mjSTATE_INTEGRATION))
    mujoco.mj_getState(model, data, state, mujoco.mjtState.mjSTATE_INTEGRATION)
    return state


def restore_state(env: Env[Any, Any], state: np.ndarray) -> None:
    """Go back to a saved state. The environment must have been reset before, which also restarts its time limit.

    Raises:
        TypeError: an environment whose state cannot be set.
    """
    model_and_data = _mujoco(env)
    if model_and_data is None:
        plain = _plain(env)
        kept = plain.state
        plain.state = type(kept)(state.tolist()) if isinstance(kept, tuple | list) else state.copy()[()]
        return
    import mujoco

    model, data = model_and_data
    mujoco.mj_setState(model, data, state, mujoco.mjtState.mjSTATE_INTEGRATION)
    mujoco.mj_forward(model, data)  # what is computed from the state
    mujoco.mj_setState(model, data, state, mujoco.mjtState.mjSTATE_INTEGRATION)  # the solver's warm start among it


def _mujoco(env: Env[Any, Any]) -> tuple[Any, Any] | None:
    """Model and data of MuJoCo, if the environment has them."""
    inner: Any = env.unwrapped
    physics = getattr(inner, "physics", None)
    if physics is not None:  # dm_control
        return physics.model.ptr, physics.data.ptr
    if hasattr(inner, "model") and hasattr(inner, "data"):
        return inner.model, inner.data
    return None


def _plain(env: Env[Any, Any]) -> Any:
    inner: Any = env.unwrapped
    if getattr(inner, "state", None) is None:
        raise TypeError(
            f"the state of {type(inner).__name__} cannot be saved: it is no MuJoCo environment, and has no attribute `state` "
            "or was not reset yet"
        )
    return inner
