r"""PRDC: does a constraint to the nearest logged pair keep values honest, and still let the policy do better than the log?

Ran, Li, Zhang, Zhang and Yu, "Policy Regularization with Dataset Constraint for Offline Reinforcement Learning", ICML 2023,
arXiv 2306.06569.

    min  -lambda Q_1(s, pi(s)) + |pi(s) - a_i|^2,      i the logged pair nearest to [beta s ; pi(s)]

Presets:

- ``quick``: a pendulum's log of a scripted swing-up with little, much and very much noise, which covers all actions; a narrow one with
  little noise, which leaves most of them untried; Hopper's log of smooth actions, three of them at once, where there is more room to
  leave the data; and a line on which half of the log walks away from the goal, where the limits of beta are arms of their own.
- ``paper``: the published settings on a data set of D4RL, hopper-medium unless ``--set task=...`` and ``--data`` say otherwise. It
  reads D4RL's HDF5 files and Minari's data sets.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import Env
from gymnasium.wrappers import RescaleAction, TransformReward
from torch import Tensor

from poise.core.gpu import derive_generator
from poise.core.lab import ArmResult, Experiment, Run
from poise.rl.envs.snapshot import save_state
from poise.rl.evaluation.rollouts import Visited, evaluate, q_value_bias
from poise.rl.experiments import prdc_figures as figures
from poise.rl.experiments.beer_policy import swing_up
from poise.rl.experiments.prdc_claims import CLAIMS
from poise.rl.experiments.prdc_line import Behaviour, LineWorld, line_log
from poise.rl.offline.dataset import OfflineDataset
from poise.rl.offline.prdc import PRDC, DatasetConstraint
from poise.rl.offline.scores import REFERENCE, d4rl_normalized_score
from poise.rl.offline.td3 import TD3, TD3BC, TD3BackboneConfig

ARMS = {
    "baseline": "TD3, without a constraint",
    "td3bc": "TD3+BC: held to the action logged in the same state",
    "prdc": "PRDC: held to the nearest logged pair",
    "support": "PRDC at beta = 0: any logged action will do (line only)",
    "beta_100": "PRDC at beta = 100 (line only)",
    "nearest_state": "PRDC at beta = 1e6: the nearest state alone (line only)",
}
TASK_ARMS = "baseline", "td3bc", "prdc"
LINE_BETA = {"support": 0.0, "beta_100": 100.0, "nearest_state": 1e6}


@dataclass(frozen=True)
class Config:
    """Settings; the defaults are those of the ``quick`` preset.

    Attributes:
        task: a gymnasium id. ``Pendulum-v1`` is logged in the run, for others ``--data`` is read.
        alpha: weight of the value against the constraint.
        beta: weight of the states in the distance.
        steps: updates of the critics.
        batch: transitions per update.
        hidden: widths of the hidden layers.
        learning_rate: of Adam.
        gamma: discount.
        reward_scale: factor on the rewards that critics see.
        logged: transitions in the log of the pendulum.
        noises: standard deviations of the noise on its torques, for one episode after the other.
        narrow_noises: the same in the narrow log.
        narrow_steps: updates on the narrow log.
        hopper_logged: transitions in Hopper's log.
        hopper_steps: updates on it.
        evaluate_every: updates between points of the curves.
        episodes: episodes per evaluation of the return.
        sample: logged states on which the distance to the data is measured.
        starts: initial states on which values are compared with Monte-Carlo returns.
        horizon: steps of such a return.
        line_steps: updates on the line; 0 leaves it out.
        line_logged: transitions in its log.
        line_beta: weight of the states there, for PRDC.
        line_hidden: widths of the hidden layers there.
        line_learning_rate: of Adam there.
        line_batch: transitions per update there.
        line_episodes: episodes of its evaluation.
    """

    task: str = "Pendulum-v1"
    alpha: float = 2.5
    beta: float = 2.0
    steps: int = 5_000
    batch: int = 128
    hidden: tuple[int, ...] = (128, 128)
    learning_rate: float = 3e-4
    gamma: float = 0.99
    reward_scale: float = 0.1
    logged: int = 10_000
    noises: tuple[float, ...] = (0.3, 1.5, 3.0)
    narrow_noises: tuple[float, ...] = (0.3,)
    narrow_steps: int = 3_000
    hopper_logged: int = 5_000
    hopper_steps: int = 1_500
    evaluate_every: int = 500
    episodes: int = 10
    sample: int = 1_000
    starts: int = 50
    horizon: int = 400
    line_steps: int = 2_000
    line_logged: int = 5_000
    line_beta: float = 1.0
    line_hidden: tuple[int, ...] = (64, 64)
    line_learning_rate: float = 1e-3
    line_batch: int = 128
    line_episodes: int = 40


# Environments and logs


def make_env(config: Config, *, scaled: bool = False, horizon: int | None = None) -> Env[Any, Any]:
    """The environment with actions in [-1, 1]; with rewards as critics see them, or a time limit of its own, if asked for."""
    env: Env[Any, Any] = gymnasium.make(config.task, max_episode_steps=horizon, disable_env_checker=True)
    env = RescaleAction(env, np.float32(-1), np.float32(1))
    return TransformReward(env, lambda reward: config.reward_scale * float(reward)) if scaled else env


def log_pendulum(config: Config, noises: tuple[float, ...], seed: int) -> tuple[OfflineDataset, float]:
    """The swing-up with noise that changes from episode to episode, and its mean return."""
    env, generator = make_env(config), derive_generator(seed, "log")
    length = env.spec.max_episode_steps if env.spec is not None else None
    assert length is not None
    taken = 0

    def act(observation: np.ndarray) -> np.ndarray:
        nonlocal taken
        noise = noises[taken // length % len(noises)] * torch.randn(1, generator=generator).numpy()
        taken += 1
        return ((swing_up(observation[None])[0] + noise) / 2).clip(-1, 1)

    data = OfflineDataset.from_env_rollout(env, act, config.logged, seed=seed)
    whole = data.rewards[: len(data) // length * length].view(-1, length)
    return data, float(whole.sum(1).mean())


def log_hopper(config: Config, seed: int) -> OfflineDataset:
    """Smooth random actions of a small range."""
    generator = derive_generator(seed, "hopper")
    action: np.ndarray = np.zeros(3, np.float32)

    def act(_: np.ndarray) -> np.ndarray:
        nonlocal action
        action = 0.9 * action + 0.15 * torch.randn(3, generator=generator).numpy()
        return action.clip(-1, 1)

    return OfflineDataset.from_env_rollout(make_env(config), act, config.hopper_logged, seed=seed)


def read_log(path: Path) -> OfflineDataset:
    """An HDF5 file of D4RL, or the folder of a Minari data set."""
    return OfflineDataset.from_minari(path) if path.is_dir() else OfflineDataset.from_d4rl_hdf5(path)


def make_agent(arm: str, data: OfflineDataset, config: TD3BackboneConfig, beta: float, run: Run) -> TD3:
    """The arm's agent. All arms begin a log with the same networks and draw the same batches, whatever they learned before."""
    torch.manual_seed(run.seed)
    run.generator.manual_seed(run.seed)
    if arm == "baseline":
        return TD3(data, config, device=run.device)
    if arm == "td3bc":
        return TD3BC(data, config, device=run.device)
    return PRDC(data, config, beta=beta, device=run.device)


# The task


def learn_task(
    config: Config, arm: str, run: Run, data: OfflineDataset, behaviour: float, *, steps: int, log: str
) -> dict[str, float]:
    """Learn from a log, and measure return, distance to the data and errors of the values."""
    settings = TD3BackboneConfig(
        alpha=config.alpha,
        discount=config.gamma,
        learning_rate=config.learning_rate,
        hidden=config.hidden,
        batch_size=config.batch,
        reward_scale=config.reward_scale,
    )
    agent = make_agent(arm, data, settings, config.beta, run)
    # every arm is measured by the same distance
    constraint = DatasetConstraint(agent.data.observations, agent.data.actions, config.beta)
    drawn = torch.randperm(len(data), generator=derive_generator(run.seed, "sample"))[: config.sample].to(run.device)
    points = max(1, steps // config.evaluate_every)
    curves = {name: torch.zeros(points, dtype=torch.float64) for name in ("step", *figures.LABELS)}
    curves["behaviour"] = torch.full((points,), behaviour, dtype=torch.float64)

    for step in run.steps(steps, name=log, agent=agent, curves=curves):
        metrics = agent.learn(run.generator)
        if (step + 1) % config.evaluate_every == 0:
            returns = evaluate(agent, partial(make_env, config), episodes=config.episodes, seed=run.seed)
            measured = {"q": float(metrics["q"]), "return": float(returns.mean()), **near(agent, constraint, drawn)}
            point = (step + 1) // config.evaluate_every - 1
            curves["step"][point] = step + 1
            for name, value in measured.items():
                curves[name][point] = value
            run.log(step, loss=metrics["critic_loss"], **measured)

    errors = overestimation(config, agent, run.seed)
    run.save(f"{log}_values", values=torch.from_numpy(errors.values), returns=torch.from_numpy(errors.returns))
    run.save(f"{log}_curves", **curves)
    run.figure(f"{log}_curves", figures.curves({arm: curves}))
    return {name: float(curves[name][-1]) for name in figures.LABELS} | {"overestimation": errors.bias}


def learn_pendulum(config: Config, arm: str, run: Run) -> dict[str, float]:
    """Learn from the log of many noises, from the narrow one, and from Hopper's."""
    data, behaviour = log_pendulum(config, config.noises, run.seed)
    mixed = learn_task(config, arm, run, data, behaviour, steps=config.steps, log="mixed")
    data, expert = log_pendulum(config, config.narrow_noises, run.seed)
    narrow = learn_task(config, arm, run, data, expert, steps=config.narrow_steps, log="narrow")
    gains = {"behaviour": behaviour, "gain": mixed["return"] - behaviour, "narrow_behaviour": expert}
    elsewhere = replace(config, task="Hopper-v5", reward_scale=1.0)
    data = log_hopper(elsewhere, run.seed)
    hopper = learn_task(elsewhere, arm, run, data, float("nan"), steps=config.hopper_steps, log="hopper")
    prefixed = {
        f"{log}_{metric}": value
        for log, metrics in (("narrow", narrow), ("hopper", hopper))
        for metric, value in metrics.items()
    }
    return mixed | gains | prefixed


def learn_published(config: Config, arm: str, run: Run) -> dict[str, float]:
    """Learn from the log that the user gave, whose own returns are not known."""
    data = run.load(read_log)
    metrics = learn_task(config, arm, run, data, float("nan"), steps=config.steps, log="published")
    if config.task.lower().partition("-")[0] in REFERENCE:
        metrics["score"] = float(d4rl_normalized_score(config.task, metrics["return"]))
    return metrics


@torch.no_grad()
def near(agent: TD3, constraint: DatasetConstraint, rows: Tensor) -> dict[str, float]:
    """Mean distance of the policy to the data, and how often its nearest pair was logged in another state."""
    states = agent.data.observations[rows]
    found = constraint.query(states, agent.actor(states), rows)
    return {"distance": float(found.distance.mean()), "neighbour_share": float((found.row != rows).float().mean())}


def overestimation(config: Config, agent: TD3, seed: int) -> Any:
    """Values of initial states against the discounted returns from there."""
    env, generator = make_env(config), derive_generator(seed, "starts")
    observations, states = [], []
    for drawn in torch.randint(2**31 - 1, (config.starts,), generator=generator).tolist():
        observations.append(env.reset(seed=drawn)[0])
        states.append(save_state(env))
    return q_value_bias(
        agent,
        partial(make_env, config, scaled=True, horizon=config.horizon),
        gamma=config.gamma,
        states=Visited(states, observations),
        horizon=config.horizon,
    )


# The line


def learn_line(config: Config, arm: str, run: Run) -> dict[str, float]:
    """Learn from the log of the line."""
    data = line_log(config.line_logged, derive_generator(run.seed, "line"))
    settings = TD3BackboneConfig(
        alpha=config.alpha,
        discount=config.gamma,
        learning_rate=config.line_learning_rate,
        hidden=config.line_hidden,
        batch_size=config.line_batch,
    )
    agent = make_agent(arm, data, settings, LINE_BETA.get(arm, config.line_beta), run)
    for step in run.steps(config.line_steps, name="line", agent=agent):
        metrics = agent.learn(run.generator)
        if (step + 1) % config.evaluate_every == 0:
            run.log(step, loss=metrics["critic_loss"], q=metrics["q"])
    arguments: dict[str, Any] = {"make_env": LineWorld, "episodes": config.line_episodes, "seed": run.seed}
    returns, behaviour = evaluate(agent, **arguments).mean(), evaluate(Behaviour(), **arguments).mean()
    position = np.linspace(-1, 1, 801, dtype=np.float32)[:, None]
    shown = {"position": position, "action": agent.act(position), "logged": Behaviour().act(position)}
    run.save("line", **{name: torch.from_numpy(column[:, 0].copy()) for name, column in shown.items()})
    return {"line_return": float(returns), "line_gain": float(returns - behaviour)}


def run(config: Config, arm: str, run: Run) -> dict[str, float]:
    """Train and measure one arm."""
    metrics: dict[str, float] = {}
    if arm in TASK_ARMS:
        metrics |= (learn_pendulum if config.task == "Pendulum-v1" else learn_published)(config, arm, run)
    if config.line_steps:
        metrics |= learn_line(config, arm, run)
    return metrics


def compare(config: Config, results: Mapping[str, ArmResult], run: Run) -> None:
    """The arms' curves, their values against Monte-Carlo returns, and their policies on the line."""
    for log in ("mixed", "narrow", "hopper", "published", ""):
        for kind, draw in (
            (("curves", figures.curves), ("values", figures.values)) if log else (("line", figures.line),)
        ):
            name = f"{log}_{kind}" if log else kind
            known = {arm: result.load(name) for arm, result in results.items() if result.has(name)}
            if known:
                run.figure(name, draw(known))


EXPERIMENT = Experiment(
    method="rl/prdc",
    presets={
        "quick": Config(),
        "paper": Config(
            task="Hopper-v5",
            steps=1_000_000,
            batch=256,
            hidden=(256, 256),
            reward_scale=1.0,
            evaluate_every=5_000,
            horizon=1_000,
            line_steps=0,
        ),
    },
    arms=ARMS,
    only={"paper": TASK_ARMS},
    run=run,
    compare=compare,
    claims=CLAIMS,
)
