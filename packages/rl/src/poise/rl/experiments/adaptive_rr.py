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

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from poise.core.gpu import derive_generator
from poise.core.lab import ArmResult, Experiment, Run
from poise.rl.agents.schedules import MEDIUM
from poise.rl.envs.episodes import EpisodeStream
from poise.rl.evaluation.aggregate import interquartile_mean
from poise.rl.evaluation.rollouts import evaluate
from poise.rl.experiments import adaptive_rr_figures as figures
from poise.rl.experiments.adaptive_rr_arms import ACTING, ARMS, PROBES, QUICK, Arm
from poise.rl.experiments.adaptive_rr_claims import CLAIMS
from poise.rl.experiments.adaptive_rr_probe import injection_change, kill_and_revive, probe, summary
from poise.rl.experiments.adaptive_rr_setup import Config, make_agent, make_buffer, make_env, remember
from poise.rl.plasticity.adaptive_rr import AdaptiveReplayRatio

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
        remember(buffer, taken, config)
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
            log["return"][step] = stream.finished_return
            controller.on_episode_end()
            if done:
                run.log(
                    step,
                    loss=log["td_loss"][done - 1],
                    critic_fau=log["fau"][done - 1, 2],
                    replay_ratio=controller.replay_ratio,
                )
        if learnt > 0 and (learnt % config.evaluate_every == 0 or step + 1 == total):
            returns = evaluate(agent, partial(make_env, config), episodes=config.episodes, seed=run.seed)
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
    figures.film(run, agent, make_env(config))
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
        remember(buffer, taken, config, cut=step + 1 == config.probe_transitions)
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
            action_repeat=2,
            reward_scale=1.0,
            reward_offset=0.0,
            channels=32,
            hidden=1024,
            pad=4,
            check_freq=50,
            phi_gap=1e-3,
            start_steps=2_000,
            steps=1_498_500,
            buffer=100_000,
            batch=256,
            gamma=0.99,
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
