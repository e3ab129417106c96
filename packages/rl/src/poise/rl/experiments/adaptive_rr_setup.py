"""What every arm of the adaptive-replay-ratio experiment starts from: settings, environment, agent and replay buffer."""

import os
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
from gymnasium import Env
from gymnasium.wrappers import RescaleAction, TimeLimit

from poise.core.lab import Run
from poise.rl.agents.drqv2 import DrQV2Agent
from poise.rl.envs.episodes import Step
from poise.rl.envs.pixels import PixelFrameStack, make_dmc_pixels
from poise.rl.experiments.adaptive_rr_arms import Arm
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
        reward_scale: factor on the rewards that agents learn from.
        reward_offset: what is added to them afterwards; where only a time limit ends episodes, the best policy stays the same.
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
    size: int = 32
    frame_stack: int = 3
    action_repeat: int = 4
    horizon: int | None = None
    reward_scale: float = 0.03
    reward_offset: float = 1.0
    channels: int = 8
    feature_dim: int = 50
    hidden: int = 128
    pad: int = 2
    low: float = 0.5
    high: float = 2.0
    check_freq: int = 4
    phi_gap: float = 0.005
    start_steps: int = 600
    steps: int = 1_500
    buffer: int = 3_000
    memory_budget: int = 8 * 2**30
    batch: int = 32
    nstep: int = 3
    gamma: float = 0.9
    learning_rate: float = 5e-4
    tau: float = 0.01
    stddev: str = "linear(1.0,0.1,1600)"
    evaluate_every: int = 500
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


def make_env(config: Config) -> Env[Any, Any]:
    """The environment from pixels, actions from -1 to 1."""
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
    return env


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
    """The replay buffer, empty."""
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


def remember(buffer: NStepReplayBuffer, taken: Step, config: Config, *, cut: bool = False) -> None:
    """Store a step, with the reward that the agent learns from; ``cut`` ends the episode here."""
    reward = config.reward_scale * taken.reward + config.reward_offset
    truncated = taken.truncated or cut
    buffer.add(
        taken.observation,
        taken.action,
        reward,
        taken.next_observation,
        terminated=taken.terminated,
        truncated=truncated,
    )
