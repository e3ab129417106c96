r"""BEER: does the Bellman bound keep a critic's representation as diverse as the values need, and the values closer to the truth?

He, Zhou, Fang and Maghsudi, "Adaptive Regularization of Representation Rank as an Implicit Constraint of Bellman Equation", ICLR
2024, arXiv 2404.12754.

    L = (Q - (r + gamma Q'))^2 + beta E [cos(phi, phi') - bound]_+

Presets:

- ``quick``, policy evaluation: a fixed swing-up of the pendulum is logged, and critics learn its value from the log. Nothing but the
  regularizer differs between arms, not even the data, and the values are compared with exact Monte-Carlo returns.
- ``control``: deterministic policy gradient learns the pendulum from scratch.
- ``lunar-lander``: the illustrative experiment of the paper, deep Q-learning on LunarLander-v3. Needs ``gymnasium[box2d]``.
- ``paper``: the published settings on a task of the DeepMind Control Suite, ``--set task=dmc:walker-run`` for another one. Needs
  dm-control.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import gymnasium
import numpy as np
import torch
from gymnasium import Env
from gymnasium.wrappers import TransformReward
from torch import Tensor, nn

from poise.core.gpu import derive_generator
from poise.core.lab import ArmResult, Experiment, Run
from poise.rl.agents.actor_critic import follow
from poise.rl.agents.dpg import DPGAgent
from poise.rl.agents.dqn import DQNAgent
from poise.rl.agents.networks import Critic
from poise.rl.envs.dm_control import DMControl
from poise.rl.envs.episodes import EpisodeStream
from poise.rl.evaluation.rollouts import evaluate, q_value_bias
from poise.rl.experiments import beer_figures as figures
from poise.rl.experiments.beer_claims import CLAIMS
from poise.rl.experiments.beer_measures import MEASURES, representation, representation_of
from poise.rl.experiments.beer_policy import SwingUp
from poise.rl.replay.batch import Batch
from poise.rl.replay.buffer import ReplayBuffer
from poise.rl.representation.beer import BEERRegularizer
from poise.rl.representation.critic_step import CriticRegularizer, CriticStep
from poise.rl.representation.dissimilarity import DissimilarityRegularizer
from poise.rl.representation.dr3 import DR3Regularizer
from poise.rl.representation.infer import InFeRRegularizer

ARMS = {
    "baseline": "no regularizer (beta = 0)",
    "beer": "BEER, beta = 1e-3, the published weight",
    "beer_x100": "BEER, beta = 0.1",
    "strong_beer": "BEER, beta = 1000",
    "infer": "InFeR: random heads of the initial network are predicted",
    "dr3": "DR3: the inner product of successive representations is penalised",
    "unbounded": "their cosine is penalised whatever the Bellman equation allows, with the weight of strong_beer",
}


@dataclass(frozen=True)
class Config:
    """Settings; the defaults are those of the ``quick`` preset.

    Attributes:
        study: whether critics learn the value of a fixed policy from a log, or agents learn to act.
        task: a gymnasium id, or ``dmc:domain-task`` for the control suite.
        beta: weight of BEER; another arm has 100 times that.
        strong: the weight of the arms that show the mechanism. It has the unit of a squared reward.
        dr3: weight of DR3.
        infer: weight of InFeR.
        reward_scale: factor on the rewards that agents and critics see.
        gamma: discount.
        steps: updates of the critic; when acting, as many steps of the environment follow the first ``start_steps``.
        start_steps: uniform actions before; for discrete actions the steps in which exploration falls from 1 to 0.05.
        logged: transitions in the log of a fixed policy.
        noise: standard deviation of the noise on its actions, in half ranges.
        buffer: transitions that are kept when acting.
        batch: transitions per update.
        hidden: widths of the hidden layers.
        learning_rate: of Adam.
        tau: share of the way that the slow copies go at each update.
        evaluate_every: updates between points of the curves.
        episodes: episodes per evaluation of the return.
        bias_states: states on which values are compared with Monte-Carlo returns at the end.
        horizon: steps of such a return.
        sample: transitions on which the representation is measured.
    """

    study: Literal["evaluation", "control"] = "evaluation"
    task: str = "Pendulum-v1"
    beta: float = 1e-3
    strong: float = 1_000.0
    dr3: float = 1e-3
    infer: float = 0.1
    reward_scale: float = 1.0
    gamma: float = 0.99
    steps: int = 3_000
    start_steps: int = 1_000
    logged: int = 10_000
    noise: float = 0.3
    buffer: int = 100_000
    batch: int = 128
    hidden: tuple[int, ...] = (256, 256)
    learning_rate: float = 3e-4
    tau: float = 0.005
    evaluate_every: int = 200
    episodes: int = 10
    bias_states: int = 200
    horizon: int = 400
    sample: int = 1_024


# Environments and regularizers


def make_env(config: Config, *, scaled: bool = True, horizon: int | None = None) -> Env[Any, Any]:
    """The environment, with rewards as an agent sees them; with a time limit of its own if a horizon is given."""
    kind, _, name = config.task.rpartition(":")
    if kind == "dmc":
        domain, _, task = name.partition("-")
        env: Env[Any, Any] = DMControl(domain, task.replace("-", "_"))
    else:
        env = gymnasium.make(name, max_episode_steps=horizon, disable_env_checker=True)
    return TransformReward(env, lambda reward: config.reward_scale * float(reward)) if scaled else env


def regularizer(config: Config, arm: str, network: nn.Module) -> CriticRegularizer:
    """The arm's term of the critic's loss."""
    if arm == "infer":
        return InFeRRegularizer(network, config.hidden[-1], config.infer)
    if arm == "dr3":
        return DR3Regularizer(config.dr3)
    if arm == "unbounded":
        return DissimilarityRegularizer(config.strong)
    weights = {"baseline": 0.0, "beer": config.beta, "beer_x100": 100 * config.beta, "strong_beer": config.strong}
    return BEERRegularizer(weights[arm])


# A critic of a fixed policy


def log_policy(config: Config, policy: SwingUp, seed: int) -> ReplayBuffer:
    """Transitions of the policy with noise on its actions."""
    env, generator = make_env(config), derive_generator(seed, "log")
    buffer = ReplayBuffer(2 * config.logged, env.observation_space, env.action_space, gamma=config.gamma)
    stream = EpisodeStream(env, seed)
    for _ in range(config.logged):
        noise = config.noise * torch.randn(1, generator=generator).numpy()
        action = (policy.act(stream.observation[None])[0] + 2 * noise).clip(-2, 2)
        taken = stream.step(action)
        buffer.add(*taken[:4], terminated=taken.terminated, truncated=taken.truncated)
    return buffer


def evaluate_policy(config: Config, arm: str, run: Run, curves: dict[str, Tensor]) -> dict[str, float]:
    """Learn the values of a fixed policy from its log, by temporal differences with a slow target."""
    env = make_env(config)
    critic, target = (Critic(env.observation_space, env.action_space, config.hidden).to(run.device) for _ in range(2))
    target.requires_grad_(False).load_state_dict(critic.state_dict())
    policy = SwingUp(critic)
    buffer = log_policy(config, policy, run.seed)
    term = regularizer(config, arm, critic)
    trained = nn.ModuleList([critic, term] if isinstance(term, nn.Module) else [critic])
    optimizer = torch.optim.Adam([each for each in trained.parameters() if each.requires_grad], config.learning_rate)

    def next_action(batch: Batch) -> Tensor:
        return torch.from_numpy(policy.act(batch.next_observation.cpu().numpy())).to(run.device)

    fixed = buffer.sample(config.sample, derive_generator(run.seed, "sample")).to(run.device)
    fixed_next = next_action(fixed)
    measure = partial(q_value_bias, policy, partial(make_env, config, horizon=config.horizon))
    bias = partial(measure, gamma=config.gamma, horizon=config.horizon, seed=run.seed)

    state: dict[str, Any] = {"critic": trained, "target": target, "optimizer": optimizer, "curves": curves}
    for step in run.steps(config.steps, **state):
        batch = buffer.sample(config.batch, run.generator).to(run.device)
        following = next_action(batch)
        with torch.no_grad():
            next_features = target.features(batch.next_observation, following)
            goal = batch.reward + batch.discount * target.head(next_features).squeeze(-1)
        features = critic.features(batch.observation, batch.action)
        td_loss = (critic.head(features).squeeze(-1) - goal).square().mean()
        loss = td_loss + term.critic_loss(
            CriticStep(
                batch=batch,
                inputs=(batch.observation, batch.action),
                features=features,
                next_features=next_features,
                head_weight=critic.head.weight,
                online_next_features=partial(critic.features, batch.next_observation, following),
            )
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        follow([target], [critic], config.tau)
        if (step + 1) % config.evaluate_every == 0:
            with torch.no_grad():
                begin = critic.features(fixed.observation, fixed.action)
                end, target_end = (each.features(fixed.next_observation, fixed_next) for each in (critic, target))
                known = representation(begin, end, target_end, fixed, critic.head.weight)
            note(run, curves, step, config, loss=loss, td_loss=td_loss, **known)

    errors = bias(states=config.bias_states)
    run.save("values", values=torch.from_numpy(errors.values), returns=torch.from_numpy(errors.returns))
    return {"q_bias": errors.bias, "q_error": errors.absolute, **last(curves)}


# An agent that learns to act


def learn_to_act(config: Config, arm: str, run: Run, curves: dict[str, Tensor]) -> dict[str, float]:
    """Deterministic policy gradient, or deep Q-learning where actions are discrete: one update per step."""
    env = make_env(config)
    discrete = isinstance(env.action_space, gymnasium.spaces.Discrete)
    agent = (DQNAgent if discrete else DPGAgent)(
        env.observation_space,
        env.action_space,
        tau=config.tau,
        learning_rate=config.learning_rate,
        hidden=config.hidden,
        device=run.device,
    )
    agent.regularize(regularizer(config, arm, agent.network if isinstance(agent, DQNAgent) else agent.critics[0]))
    large = config.buffer > 100_000
    buffer = ReplayBuffer(
        config.buffer,
        env.observation_space,
        env.action_space,
        gamma=config.gamma,
        directory=run.dir / "replay" if large else None,
    )
    stream = EpisodeStream(env, run.seed)

    def act(step: int) -> np.ndarray:
        if isinstance(agent, DQNAgent):
            share = min(step / config.start_steps, 1.0)
            return agent.act(stream.observation, run.generator, epsilon=1 - 0.95 * share)
        if step < config.start_steps:
            uniform = 2 * torch.rand(agent.actor.scale.shape, generator=run.generator) - 1
            return (agent.actor.center.cpu() + agent.actor.scale.cpu() * uniform).numpy()
        return agent.act(stream.observation, run.generator)

    first = config.batch if discrete else config.start_steps
    for step in run.steps(config.start_steps + config.steps, agent=agent, buffer=buffer, stream=stream, curves=curves):
        taken = stream.step(act(step))
        buffer.add(*taken[:4], terminated=taken.terminated, truncated=taken.truncated)
        if step < first:
            continue
        metrics = agent.update(buffer.sample(config.batch, run.generator).to(run.device))
        done = step + 1 - config.start_steps
        if done > 0 and done % config.evaluate_every == 0:
            known = representation_of(agent, buffer.sample(config.sample, derive_generator(run.seed, "sample", step)))
            returns = evaluate(agent, partial(make_env, config, scaled=False), episodes=config.episodes, seed=run.seed)
            loss = metrics["critic_loss"]
            note(run, curves, done - 1, config, loss=loss, **known, **{"return": float(returns.mean())})

    results = last(curves)
    if not discrete:  # Box2D cannot go back to a state
        horizon = min(config.horizon, 1_000) if config.task.startswith("dmc:") else config.horizon
        errors = q_value_bias(
            agent,
            partial(make_env, config, horizon=horizon),
            gamma=config.gamma,
            states=config.bias_states,
            horizon=horizon,
            seed=run.seed,
        )
        run.save("values", values=torch.from_numpy(errors.values), returns=torch.from_numpy(errors.returns))
        results |= {"q_bias": errors.bias, "q_error": errors.absolute}
    return results


# Measuring


def note(run: Run, curves: dict[str, Tensor], step: int, config: Config, **metrics: float | Tensor) -> None:
    """Log a point, and keep it in the curves."""
    point = (step + 1) // config.evaluate_every - 1
    curves["step"][point] = step + 1
    for name, curve in curves.items():
        if name in metrics:
            curve[point] = float(metrics[name])
    run.log(step, **metrics)


def last(curves: Mapping[str, Tensor]) -> dict[str, float]:
    """The last point of each curve, and what was above the bound on average over the whole training."""
    final = {name: float(curve[-1]) for name, curve in curves.items() if name != "step"}
    return final | {f"mean_{name}": float(curves[name].mean()) for name in ("excess", "above_bound")}


def run(config: Config, arm: str, run: Run) -> dict[str, float]:
    """Train and measure one arm."""
    points = max(1, config.steps // config.evaluate_every)
    names = ("step", *MEASURES, *(("return",) if config.study == "control" else ()))
    curves = {name: torch.zeros(points, dtype=torch.float64) for name in names}
    study = evaluate_policy if config.study == "evaluation" else learn_to_act
    metrics = study(config, arm, run, curves)
    run.save("curves", **curves)
    run.figure("curves", figures.curves({arm: curves}))
    return metrics


def compare(config: Config, results: Mapping[str, ArmResult], run: Run) -> None:
    """The curves of all arms, first those that tell the story, and their values against Monte-Carlo returns."""
    curves = {arm: result.load("curves") for arm, result in results.items()}
    run.figure("story", figures.story(curves))
    run.figure("arms", figures.curves(curves))
    values = {arm: result.load("values") for arm, result in results.items() if result.has("values")}
    if values:
        run.figure("values", figures.values(values))


CONTROL = replace(
    Config(),
    study="control",
    reward_scale=0.1,
    strong=10.0,
    steps=6_000,
    learning_rate=1e-3,
    evaluate_every=600,
)

EXPERIMENT = Experiment(
    method="rl/beer",
    presets={
        "quick": Config(),
        "control": CONTROL,
        "lunar-lander": replace(
            CONTROL,
            task="LunarLander-v3",
            reward_scale=1.0,
            strong=1_000.0,
            steps=30_000,
            start_steps=5_000,
            learning_rate=5e-4,
            evaluate_every=1_000,
        ),
        "paper": replace(
            CONTROL,
            task="dmc:cheetah-run",
            reward_scale=1.0,
            strong=10.0,
            steps=975_000,
            start_steps=25_000,
            buffer=1_000_000,
            batch=256,
            learning_rate=3e-4,
            evaluate_every=10_000,
            horizon=1_000,
        ),
    },
    arms=ARMS,
    run=run,
    compare=compare,
    claims=CLAIMS,
)
