r"""Adaptive RR: does a pixel agent keep its ability to learn, and when may it be trained more often per step?

Ma et al., "Revisiting Plasticity in Visual Reinforcement Learning: Data, Modules and Training Stages", ICLR 2024, arXiv 2310.07418.

    |Phi_e - Phi_e'| <= 0.001  =>  replay ratio 0.5 -> 2        Phi: fraction of active units of the critic in one episode

Presets:

- ``quick``: Pendulum-v1, rendered. Arms ``rr_*`` and ``adaptive`` learn to act with different replay ratios, with and without random
  shifts of the images. Arms ``probe_*`` measure plasticity itself, without the noise of acting: networks are primed on few transitions,
  one module is reset or injected, and new random targets are fitted.
- ``paper``: DrQ-v2 on tasks of the DeepMind Control Suite from pixels at the published sizes, ``--set task=dmc:walker-run`` for another
  one; with the study's interventions and competitors as further arms. Needs dm-control and EGL or OSMesa.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import Env
from gymnasium.wrappers import RescaleAction, TimeLimit, TransformReward
from torch import Tensor

from poise.core.gpu import derive_generator
from poise.core.lab import ArmResult, Experiment, Run
from poise.rl.agents.drqv2 import DrQV2Agent
from poise.rl.agents.schedules import MEDIUM
from poise.rl.envs.episodes import EpisodeStream
from poise.rl.envs.pixels import PixelFrameStack, make_dmc_pixels
from poise.rl.evaluation.aggregate import interquartile_mean
from poise.rl.evaluation.rollouts import evaluate
from poise.rl.experiments import adaptive_rr_figures as figures
from poise.rl.experiments.adaptive_rr_arms import ACTING, ARMS, PROBES, QUICK, Arm
from poise.rl.experiments.adaptive_rr_claims import CLAIMS
from poise.rl.experiments.adaptive_rr_probe import injection_change, kill_and_revive, probe, summary
from poise.rl.plasticity.adaptive_rr import AdaptiveReplayRatio
from poise.rl.plasticity.l2_init import L2Init
from poise.rl.replay.nstep import NStepReplayBuffer


@dataclass(frozen=True)
class Config:
    """Settings; the defaults are those of the ``quick`` preset.

    Attributes:
        task: a gymnasium id, or ``dmc:domain-task`` for the control suite.
        size: height and width of a frame.
        frame_stack: frames per observation.
        action_repeat: steps of the environment per step of the agent.
        horizon: steps of the environment after which an episode is cut off; ``None`` leaves the task's own limit.
        reward_scale: factor on the rewards that agents see.
        channels: of each convolution.
        feature_dim: width of the trunks.
        hidden: width of the heads.
        pad: greatest shift of an image.
        low: the replay ratio before the switch.
        high: the replay ratio after it.
        check_freq: episodes between checks.
        phi_gap: greatest change of the fraction of active units between checks that counts as recovered.
        start_steps: uniform actions, without updates, before.
        steps: steps of the agent with updates.
        buffer: rows of the replay buffer.
        memory_budget: bytes of frames above which they are kept in files.
        batch: transitions per update.
        nstep: steps of a transition.
        gamma: discount.
        learning_rate: of Adam.
        tau: share of the way that the critic's slow copy goes.
        stddev: schedule of the noise, in steps of the agent.
        evaluate_every: steps of the agent between evaluations.
        episodes: episodes per evaluation.
        intervene_at: step with updates at which arms with one intervention have it.
        intervene_every: steps between repeated interventions.
        prime_after: transitions on which the primed arm is primed.
        prime: updates on them.
        probe_transitions: transitions of the probe.
        probe_early: updates before the early interventions of the probe.
        probe_late: updates before the late ones.
        probe_rate: learning rate of these updates.
        fit_targets: random targets of the probe.
        fit_steps: steps for each.
        fit_rate: their learning rate.
    """

    task: str = "Pendulum-v1"
    size: int = 48
    frame_stack: int = 3
    action_repeat: int = 2
    horizon: int | None = None
    reward_scale: float = 0.1
    channels: int = 16
    feature_dim: int = 50
    hidden: int = 128
    pad: int = 3
    low: float = 0.5
    high: float = 2.0
    check_freq: int = 2
    phi_gap: float = 0.01
    start_steps: int = 300
    steps: int = 800
    buffer: int = 2_000
    memory_budget: int = 8 * 2**30
    batch: int = 32
    nstep: int = 3
    gamma: float = 0.99
    learning_rate: float = 5e-4
    tau: float = 0.01
    stddev: str = "linear(1.0,0.1,800)"
    evaluate_every: int = 400
    episodes: int = 5
    intervene_at: int = 400
    intervene_every: int = 200
    prime_after: int = 400
    prime: int = 1_000
    probe_transitions: int = 500
    probe_early: int = 400
    probe_late: int = 1_200
    probe_rate: float = 1e-3
    fit_targets: int = 2
    fit_steps: int = 60
    fit_rate: float = 1e-3


def make_env(config: Config, *, scaled: bool = True) -> Env[Any, Any]:
    """The environment from pixels, actions from -1 to 1; with rewards as the agent sees them, or as they are."""
    kind, _, name = config.task.rpartition(":")
    if kind == "dmc":
        domain, _, task = name.partition("-")
        env: Env[Any, Any] = make_dmc_pixels(
            domain,
            task.replace("-", "_"),
            frame_stack=config.frame_stack,
            action_repeat=config.action_repeat,
            size=config.size,
        )
        if config.horizon is not None:
            env = TimeLimit(env, config.horizon // config.action_repeat)
    else:
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # pygame draws into memory, no display is asked for
        os.environ.setdefault("SDL_NO_SIGNAL_HANDLERS", "1")  # else a run could not be stopped
        plain = gymnasium.make(
            name, render_mode="rgb_array", max_episode_steps=config.horizon, disable_env_checker=True
        )
        inner: Any = plain.unwrapped
        inner.screen_dim = 2 * config.size  # pygame draws the picture that small, not 500 x 500
        ranged = RescaleAction(plain, np.float32(-1), np.float32(1))
        env = PixelFrameStack(ranged, config.frame_stack, (config.size, config.size), config.action_repeat)
    return TransformReward(env, lambda reward: config.reward_scale * float(reward)) if scaled else env


def make_agent(config: Config, env: Env[Any, Any], run: Run, arm: Arm, rate: float) -> DrQV2Agent:
    """The agent, initialised by the run's seed alone."""
    agent = DrQV2Agent(
        env.observation_space,
        env.action_space,
        tau=config.tau,
        learning_rate=rate,
        weight_decay=arm.weight_decay,
        channels=config.channels,
        feature_dim=config.feature_dim,
        hidden=config.hidden,
        pad=config.pad,
        stddev=config.stddev,
        exploration_steps=config.start_steps,
        heads=arm.heads,
        monitor=("encoder", "actor", "critic"),
        device=run.device,
    )
    if arm.l2_init:
        agent.penalties.append(L2Init(agent.value_network, arm.l2_init).to(run.device))
    return agent


def make_buffer(config: Config, env: Env[Any, Any], run: Run) -> NStepReplayBuffer:
    return NStepReplayBuffer(
        config.buffer,
        env.observation_space,
        env.action_space,
        steps=config.nstep,
        gamma=config.gamma,
        frame_stack=config.frame_stack,
        memory_budget=config.memory_budget,
        directory=run.dir / "replay",
    )


# Learning to act


def learn_to_act(config: Config, name: str, run: Run) -> dict[str, float]:
    """DrQ-v2, whose number of updates per step is the arm's."""
    arm, env = ACTING[name], make_env(config)
    agent, buffer = make_agent(config, env, run, arm, config.learning_rate), make_buffer(config, env, run)
    stream = EpisodeStream(env, run.seed)
    low, high = {"low": (config.low,) * 2, "high": (config.high,) * 2, "adaptive": (config.low, config.high)}[arm.ratio]
    controller = AdaptiveReplayRatio(low, high, config.check_freq, config.phi_gap)
    shift, total = agent.augment, config.start_steps + config.steps
    log = {
        "taken": torch.zeros(total, dtype=torch.int64),  # updates after each step
        "ended": torch.zeros(total, dtype=torch.bool),
        "return": torch.full((total,), torch.nan, dtype=torch.float64),  # of episodes, where they end
        "fau": torch.zeros(int(total * high) + 1, 3, dtype=torch.float64),  # encoder, actor, critic at each update
        "td_loss": torch.zeros(int(total * high) + 1, dtype=torch.float64),
        "evaluation": torch.full((total // config.evaluate_every + 1, 2), torch.nan, dtype=torch.float64),
    }
    state: dict[str, Any] = {"agent": agent, "buffer": buffer, "stream": stream, "controller": controller, "log": log}

    def interact(step: int, primed: int = 0) -> None:
        done = agent.updates - primed
        taken = stream.step(agent.act(stream.observation, run.generator, step))
        buffer.add(*taken[:4], terminated=taken.terminated, truncated=taken.truncated)
        learnt = step + 1 - config.start_steps
        agent.augment = shift if shifts(arm, learnt, config) else None
        updates = controller.updates_for_step(step) if learnt > 0 else 0
        for _ in range(updates):
            batch = buffer.sample(config.batch, run.generator).to(run.device)
            metrics = agent.update(batch, step, run.generator)
            controller.on_update(metrics["critic_fau"])
            log["fau"][done] = torch.stack([metrics[f"{each}_fau"] for each in ("encoder", "actor", "critic")])
            log["td_loss"][done] = metrics["td_loss"]
            done += 1
        if arm.intervene and learnt > 0 and due(arm, learnt, config):
            batch = buffer.sample(config.batch, run.generator).to(run.device)
            arm.intervene(agent, batch, run.generator)
        log["taken"][step], log["ended"][step] = updates, taken.ended
        if taken.ended:
            log["return"][step] = stream.finished_return / config.reward_scale
            controller.on_episode_end()
            if done:
                run.log(
                    step,
                    loss=log["td_loss"][done - 1],
                    critic_fau=log["fau"][done - 1, 2],
                    replay_ratio=controller.replay_ratio,
                )
        if learnt > 0 and (learnt % config.evaluate_every == 0 or step + 1 == total):
            returns = evaluate(agent, partial(make_env, config, scaled=False), episodes=config.episodes, seed=run.seed)
            log["evaluation"][learnt // config.evaluate_every] = torch.tensor([step + 1, interquartile_mean(returns)])
            run.log(step, evaluation=interquartile_mean(returns))

    begin = 0
    if arm.primed:
        begin = config.prime_after
        for step in run.steps(begin, name="collect", **state):
            interact(step)
        for step in run.steps(config.prime, name="prime", **state):
            metrics = agent.update(buffer.sample(config.batch, run.generator).to(run.device), begin, run.generator)
            if (step + 1) % 100 == 0:
                run.log(step, loss=metrics["td_loss"], critic_fau=metrics["critic_fau"])
    for step in run.steps(total - begin, **state):
        interact(begin + step, config.prime if arm.primed else 0)

    run.save("log", **{each: value.contiguous() for each, value in log.items()})
    run.figure("curves", figures.curves({name: log}, config))
    figures.film(run, agent, make_env(config, scaled=False))
    return measures(config, log, controller)


def shifts(arm: Arm, learnt: int, config: Config) -> bool:
    """Whether images are shifted after so many steps with updates."""
    return {"on": True, "off": False, "until": learnt < config.intervene_at, "from": learnt >= config.intervene_at}[
        arm.shift
    ]


def due(arm: Arm, learnt: int, config: Config) -> bool:
    """Whether the arm's intervention comes after this step."""
    return learnt % config.intervene_every == 0 if arm.periodic else learnt == config.intervene_at


def measures(config: Config, log: Mapping[str, Tensor], controller: AdaptiveReplayRatio) -> dict[str, float]:
    """The numbers that are compared."""
    done = int(log["taken"].sum())
    fau = log["fau"][:done, 2]
    window = max(1, min(50, done // 4))
    smooth = fau.unfold(0, window, 1).mean(1)
    evaluated = log["evaluation"][~log["evaluation"][:, 0].isnan(), 1]
    last = slice(-window, None)
    return {
        "return": float(evaluated[-1]),
        "mean_return": float(evaluated.mean()),
        "critic_fau": float(fau[last].mean()),
        "least_critic_fau": float(smooth.min()),
        "critic_fau_dip": float(smooth[0] - smooth.min()),
        "encoder_fau": float(log["fau"][:done][last, 0].mean()),
        "actor_fau": float(log["fau"][:done][last, 1].mean()),
        "updates": float(done),
        "rule_mismatches": float(rule_mismatches(config, log, controller)),
        "switched": float(controller.high > controller.low and controller.switched),
    }


def rule_mismatches(config: Config, log: Mapping[str, Tensor], controller: AdaptiveReplayRatio) -> int:
    """Steps whose number of updates is not what the published rule gives for the logged fractions of active units."""
    fau, ended = log["fau"][:, 2].tolist(), log["ended"].tolist()
    every = {config.low: lambda step: int(step % 2 == 0), config.high: lambda step: 2}  # 0.5 and 2 updates per step
    ratio, previous, wrong, done, begin, episode = controller.low, 0.0, 0, 0, 0, 0
    for step, taken in enumerate(log["taken"].tolist()):
        if step and ended[step - 1]:
            episode += 1
            if episode % config.check_freq == 0 and done:
                mean = sum(fau[begin:done]) / (done - begin)
                if abs(mean - previous) <= config.phi_gap:
                    ratio = controller.high
                previous = mean
            begin = done
        wrong += taken != (every[ratio](step) if step >= config.start_steps else 0)
        previous = fau[0] if done == 0 else previous
        done += taken
    return wrong


# The probe


def probe_plasticity(config: Config, name: str, run: Run) -> dict[str, float]:
    """Prime on few transitions, and fit new targets after an early and a late intervention."""
    env = make_env(config)
    agent, buffer = make_agent(config, env, run, ACTING["baseline"], config.probe_rate), make_buffer(config, env, run)
    shift, agent.augment = agent.augment, None
    stream, generator = EpisodeStream(env, run.seed), derive_generator(run.seed, "collect")
    for step in range(config.probe_transitions):
        taken = stream.step(agent.act(stream.observation, generator))
        last = step + 1 == config.probe_transitions
        buffer.add(*taken[:4], terminated=taken.terminated, truncated=taken.truncated or last)
    data = buffer.gather(torch.arange(config.probe_transitions - config.nstep)).to(run.device)
    settings = {
        "targets": config.fit_targets,
        "steps": config.fit_steps,
        "batch": config.batch,
        "learning_rate": config.fit_rate,
    }
    agent.augment = shift if name == "probe_shift" else None
    primed = {"probe_fresh": (0, 0)}.get(name, (config.probe_early, config.probe_late))
    log = {
        "fau": torch.zeros(primed[1], 3, dtype=torch.float64),
        "td_loss": torch.zeros(primed[1], dtype=torch.float64),
    }
    state: dict[str, Any] = {"agent": agent, "log": log}
    measured: dict[str, float] = {}
    begin = 0
    for stage, end in zip(("early", "late"), primed, strict=True):
        for step in run.steps(end - begin, name=f"prime_{stage}", **state):
            batch = buffer.sample(config.batch, run.generator).to(run.device)
            metrics = agent.update(batch, config.start_steps, run.generator)
            log["fau"][begin + step] = torch.stack([metrics[f"{each}_fau"] for each in ("encoder", "actor", "critic")])
            log["td_loss"][begin + step] = metrics["td_loss"]
            if (step + 1) % 100 == 0:
                run.log(step, loss=metrics["td_loss"], critic_fau=metrics["critic_fau"])
        begin = end
        measured |= probe(agent, data, run, stage, **settings)
    run.save("log", **log)
    results = measured | summary(measured) | kill_and_revive(agent, data, run.seed)
    return results | {"injection_change": injection_change(agent, data, run.seed)}


def run(config: Config, arm: str, run: Run) -> dict[str, float]:
    """Train and measure one arm."""
    return (probe_plasticity if arm in PROBES else learn_to_act)(config, arm, run)


def compare(config: Config, results: Mapping[str, ArmResult], run: Run) -> None:
    """The curves of all arms, and the bars of the probe."""
    logs = {arm: result.load("log") for arm, result in results.items() if result.has("log")}
    acting = {arm: log for arm, log in logs.items() if arm in ACTING}
    probes = {arm: dict(results[arm].metrics) for arm in results if arm in PROBES}
    if acting:
        run.figure("arms", figures.curves(acting, config))
    if probes:
        run.figure("probe", figures.probes(probes, {arm: logs[arm] for arm in probes}))


EXPERIMENT = Experiment(
    method="rl/adaptive-rr",
    presets={
        "quick": Config(),
        "paper": replace(
            Config(),
            task="dmc:quadruped-run",
            size=84,
            reward_scale=1.0,
            channels=32,
            hidden=1024,
            pad=4,
            check_freq=50,
            phi_gap=1e-3,
            start_steps=2_000,
            steps=1_498_500,
            buffer=100_000,
            batch=256,
            learning_rate=1e-4,
            stddev=MEDIUM,
            evaluate_every=5_000,
            episodes=10,
            intervene_at=500_000,
            intervene_every=100_000,
            prime_after=2_000,
            prime=100_000,
        ),
    },
    arms=ARMS,
    run=run,
    compare=compare,
    claims=CLAIMS,
    only={"quick": QUICK, "paper": tuple(ACTING)},
)
