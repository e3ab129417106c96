"""Figures of the adaptive-replay-ratio experiment, and a film of its policies."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from poise.core.lab import Run
from poise.core.lab.atomic import replacing
from poise.rl.agents.drqv2 import DrQV2Agent
from poise.rl.experiments.adaptive_rr_arms import ARMS
from poise.rl.experiments.adaptive_rr_probe import INTERVENTIONS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAIN = {
    "baseline": "#4361ee",
    "rr_high": "#e5626b",
    "rr_high_no_shift": "#222222",
    "adaptive": "#2a9d5c",
    "probe_fresh": "#999999",
    "probe_shift": "#e5626b",
    "probe_no_shift": "#222222",
}


WORDS = {
    "baseline": "replay ratio 0.5",
    "rr_high": "replay ratio 2",
    "rr_high_no_shift": "replay ratio 2, no shifts",
    "adaptive": "adaptive",
    "probe_fresh": "untrained",
    "probe_shift": "primed, images shifted",
    "probe_no_shift": "primed, no shifts",
}


def words(arm: str) -> str:
    return WORDS.get(arm, arm.replace("_", " "))


def colour(arm: str) -> str:
    return MAIN.get(arm, f"C{list(ARMS).index(arm) % 10}")


def curves(logs: Mapping[str, Mapping[str, Tensor]], config: Any) -> "Figure":
    """Fractions of active units, returns and the replay ratio over the steps of the agent."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 7), layout="constrained")
    panels = [figure.add_subplot(2, 3, index + 1) for index in range(6)]
    for arm, log in logs.items():
        taken = log["taken"].numpy()
        step = np.repeat(np.arange(len(taken)), taken)  # of each update
        fau = log["fau"][: len(step)]
        for panel, column in zip(panels, (2, 0, 1), strict=False):
            panel.plot(*_smooth(step, fau[:, column].numpy()), color=colour(arm), label=words(arm))
        ended = ~log["return"].isnan().numpy()
        panels[3].plot(np.flatnonzero(ended), log["return"].numpy()[ended], color=colour(arm), alpha=0.35)
        points = log["evaluation"][~log["evaluation"][:, 0].isnan()].numpy()
        panels[3].plot(points[:, 0], points[:, 1], "o-", color=colour(arm))
        panels[4].plot(*_smooth(np.arange(len(taken)), taken.astype(float), 50), color=colour(arm))
        panels[5].plot(*_smooth(step, log["td_loss"][: len(step)].numpy()), color=colour(arm))
    titles = (
        "critic: active units (fraction)",
        "encoder: active units (fraction)",
        "policy: active units (fraction)",
        "return (points: evaluation)",
        "updates per step",
        "temporal-difference loss",
    )
    for panel, title in zip(panels, titles, strict=True):
        panel.set_title(title, fontsize=12)
        panel.set_xlabel("steps of the agent", fontsize=11)
        panel.axvline(config.start_steps, color="0.85", linewidth=1)
    panels[0].legend(fontsize=10)
    panels[5].set_yscale("log")
    return figure


def probes(measured: Mapping[str, Mapping[str, float]], logs: Mapping[str, Mapping[str, Tensor]]) -> "Figure":
    """The error on new targets after each intervention, and the critic's fraction of active units while priming."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.4), layout="constrained")
    for index, stage in enumerate(("early", "late")):
        axes = figure.add_subplot(1, 3, index + 1)
        names = INTERVENTIONS[stage]
        for place, (arm, values) in enumerate(measured.items()):
            left = np.arange(len(names)) + (place - (len(measured) - 1) / 2) * 0.26
            heights = [values[f"fit_{name}_{stage}"] for name in names]
            axes.bar(left, heights, 0.24, color=colour(arm), label=words(arm))
        axes.set_xticks(np.arange(len(names)), [name.replace("_", "\n") for name in names], fontsize=10)
        axes.set_title(f"error on new targets, {stage} intervention", fontsize=12)
    figure.axes[1].legend(fontsize=10, loc="upper left")
    axes = figure.add_subplot(1, 3, 3)
    for arm, log in logs.items():
        if len(log["fau"]):
            axes.plot(
                *_smooth(np.arange(len(log["fau"])), log["fau"][:, 2].numpy(), 25), color=colour(arm), label=words(arm)
            )
    axes.set_title("critic: active units while priming", fontsize=12)
    axes.set_xlabel("updates", fontsize=11)
    axes.legend(fontsize=10)
    return figure


@torch.no_grad()
def film(run: Run, agent: DrQV2Agent, env: Any, steps: int = 200) -> None:
    """One episode of the deterministic policy as ``figures/policy.gif``."""
    import imageio.v3 as imageio  # comes with gymnasium[mujoco]

    observation, _ = env.reset(seed=run.seed)
    frames = [np.asarray(env.render())]
    ended = False
    while not ended and len(frames) < steps:
        observation, _, terminated, truncated, _ = env.step(agent.act(observation))
        frames.append(np.asarray(env.render()))
        ended = bool(terminated or truncated)
    if run.is_main:
        with replacing(run.dir / "figures" / "policy.gif") as temporary:
            imageio.imwrite(temporary, np.stack(frames), extension=".gif", duration=40, loop=0)


def _smooth(x: np.ndarray, y: np.ndarray, window: int = 20) -> tuple[np.ndarray, np.ndarray]:
    """A moving average, at the middle of each window."""
    if len(y) < 2 * window:
        return x, y
    return x[window // 2 : window // 2 + len(y) - window + 1], np.convolve(y, np.full(window, 1 / window), "valid")
