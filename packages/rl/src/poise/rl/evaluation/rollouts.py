"""Returns of a deterministic policy, and the error of its critic against Monte-Carlo returns from exactly the same states.

Several copies of the environment run at once, so that the policy is called for all of them together.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from gymnasium import Env
from jaxtyping import Float64

from poise.core.gpu import derive_generator
from poise.rl.envs.snapshot import restore_state, save_state

MakeEnv = Callable[[], Env[Any, Any]]


@runtime_checkable
class Policy(Protocol):
    """Something that acts."""

    def act(self, observation: np.ndarray) -> np.ndarray:
        """The actions of a deterministic policy for a batch of observations."""


@runtime_checkable
class ValuedPolicy(Policy, Protocol):
    """Something that acts, and estimates the return of an action."""

    def value(self, observation: np.ndarray, action: np.ndarray) -> np.ndarray:
        """The estimates for a batch."""


def evaluate(
    policy: Policy, make_env: MakeEnv, *, episodes: int = 10, seed: int = 0
) -> Float64[np.ndarray, "episodes"]:
    """Undiscounted returns of whole episodes under the deterministic policy.

    Args:
        policy: acts without exploration noise.
        make_env: makes the environment; it is called once per episode, and all episodes run at once.
        episodes: how many.
        seed: of the episodes' initial states.

    Returns:
        The return of each episode.

    Raises:
        ValueError: ``episodes`` is below 1.
    """
    if episodes < 1:
        raise ValueError(f"episodes must be at least 1, got {episodes}")
    envs = [make_env() for _ in range(episodes)]
    drawn = torch.randint(2**31 - 1, (episodes,), generator=derive_generator(seed, "evaluate")).tolist()
    observations = [env.reset(seed=one)[0] for env, one in zip(envs, drawn, strict=True)]
    return _returns(policy, envs, observations, gamma=1.0, horizon=None)


class QBias(NamedTuple):
    """Errors of the values of a policy.

    Attributes:
        bias: mean of ``Q - G``; positive where values are overestimated.
        absolute: mean of ``|Q - G|``.
        normalized: ``bias`` over the mean absolute return.
        values: Q of each state.
        returns: the Monte-Carlo return G of each state.
    """

    bias: float
    absolute: float
    normalized: float
    values: Float64[np.ndarray, "states"]
    returns: Float64[np.ndarray, "states"]


class Visited(NamedTuple):
    """States to start from: the exact state of the simulator, and what the policy sees there."""

    states: Sequence[np.ndarray]
    observations: Sequence[np.ndarray]


def q_value_bias(
    policy: ValuedPolicy,
    make_env: MakeEnv,
    *,
    gamma: float,
    states: int | Visited = 100,
    horizon: int = 1_000,
    seed: int = 0,
    parallel: int = 64,
) -> QBias:
    r"""Mean of :math:`Q(s, \pi(s)) - G(s)` over states that the policy visits.

    :math:`G(s) = \sum_{t < h} \gamma^t r_t` is the return of the deterministic policy from exactly the state s, to which the simulator
    is set back. It never comes from a replay buffer, whose actions are those of older policies.

    Args:
        policy: acts and estimates, as the agents here do.
        make_env: makes the environment; its dynamics and reward must be deterministic, and its time limit no shorter than
            ``horizon``, or the returns are cut off there.
        gamma: discount per step.
        states: how many visited states to draw, or the states themselves.
        horizon: steps h of each return. What lies beyond them is missing from it: at most :math:`\gamma^h / (1 - \gamma)`
            times the greatest reward.
        seed: of the visited states.
        parallel: copies of the environment that run at once.

    Returns:
        Bias, absolute error, and what they were computed from.

    Raises:
        ValueError: numbers out of range.
        TypeError: an environment whose state cannot be set.

    Source:
        He et al. 2024, value approximation; Fujimoto et al. 2018, figure 1.
    """
    if not 0 <= gamma <= 1 or horizon < 1 or parallel < 1 or (isinstance(states, int) and states < 1):
        raise ValueError(
            "expected gamma in [0, 1] and at least 1 state, step and copy, got "
            f"gamma={gamma}, states={states}, horizon={horizon}, parallel={parallel}"
        )
    visited = visited_states(policy, make_env, count=states, seed=seed) if isinstance(states, int) else states
    envs = [make_env() for _ in range(min(parallel, len(visited.states)))]
    returns = []
    for first in range(0, len(visited.states), len(envs)):
        chunk = visited.states[first : first + len(envs)]
        for env, state in zip(envs, chunk, strict=False):
            env.reset(seed=0)  # restarts the time limit
            restore_state(env, state)
        seen = list(visited.observations[first : first + len(envs)])
        returns.append(_returns(policy, envs[: len(chunk)], seen, gamma=gamma, horizon=horizon))
    observations = np.stack(visited.observations)
    exact = np.concatenate(returns)
    values = np.asarray(policy.value(observations, policy.act(observations)), np.float64)
    error = values - exact
    return QBias(
        float(error.mean()),
        float(np.abs(error).mean()),
        float(error.mean() / max(np.abs(exact).mean(), 1e-12)),
        values,
        exact,
    )


def visited_states(policy: Policy, make_env: MakeEnv, *, count: int, seed: int = 0) -> Visited:
    """States that the policy visits, drawn without replacement from the first whole episodes that have enough of them.

    Args:
        policy: acts without exploration noise.
        make_env: makes the environment.
        count: how many.
        seed: of the initial states and of the draw.
    """
    env, generator = make_env(), derive_generator(seed, "visited")
    states: list[np.ndarray] = []
    observations: list[np.ndarray] = []
    episodes = 0
    while len(states) < count or episodes < 5:  # not all from one or two episodes
        observation, _ = env.reset(seed=int(torch.randint(2**31 - 1, (), generator=generator)))
        ended = False
        while not ended:
            states.append(save_state(env))
            observations.append(observation)
            observation, _, terminated, truncated, _ = env.step(policy.act(observation[None])[0])
            ended = bool(terminated or truncated)
        episodes += 1
    chosen = torch.randperm(len(states), generator=generator)[:count].tolist()
    return Visited([states[index] for index in chosen], [observations[index] for index in chosen])


def _returns(
    policy: Policy, envs: Sequence[Env[Any, Any]], observations: list[np.ndarray], *, gamma: float, horizon: int | None
) -> np.ndarray:
    """Discounted returns from where each environment is, to the end of its episode or to the horizon."""
    total = np.zeros(len(envs))
    running = list(range(len(envs)))
    step = 0
    while running and (horizon is None or step < horizon):
        actions = policy.act(np.stack([observations[index] for index in running]))
        still = []
        for index, action in zip(running, actions, strict=True):
            observations[index], reward, terminated, truncated, _ = envs[index].step(action)
            total[index] += gamma**step * float(reward)
            if not (terminated or truncated):
                still.append(index)
        running, step = still, step + 1
    return total
