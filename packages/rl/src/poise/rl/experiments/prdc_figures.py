"""Figures of the PRDC experiment."""

from collections.abc import Mapping
from math import isfinite
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LABELS = {
    "return": "mean return of 10 episodes",
    "distance": "distance to the data, mean of d_β(s, π(s))",
    "q": "mean Q of the batch",
    "neighbour_share": "share of states whose nearest pair was logged elsewhere",
}

COLOURS = {
    "baseline": "#222222",
    "td3bc": "#00798c",
    "prdc": "#d1495b",
    "support": "#edae49",
    "beta_100": "#66a182",
    "nearest_state": "#4361ee",
}


def curves(arms: Mapping[str, Mapping[str, Tensor]]) -> "Figure":
    """Every measure over the updates."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6.4), layout="constrained")
    for index, (name, label) in enumerate(LABELS.items()):
        axes = figure.add_subplot(2, 2, index + 1)
        for arm, measured in arms.items():
            axes.plot(measured["step"].numpy(), measured[name].numpy(), color=COLOURS[arm], label=arm)
        behaviour = float(next(iter(arms.values()))["behaviour"][0])
        if name == "return" and isfinite(behaviour):
            axes.axhline(behaviour, color="0.6", linestyle="--", label="behaviour")
        axes.set_title(label, fontsize=10)
        axes.set_xlabel("updates", fontsize=9)
        if index == 0:
            axes.legend(fontsize=8)
    return figure


def values(arms: Mapping[str, Mapping[str, Tensor]]) -> "Figure":
    """Values of initial states against the Monte-Carlo returns from there: above the line they are overestimated."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.4 * len(arms), 3.2), layout="constrained")
    for index, (arm, measured) in enumerate(arms.items()):
        axes = figure.add_subplot(1, len(arms), index + 1)
        exact, estimated = measured["returns"].numpy(), measured["values"].numpy()
        ends = [min(exact.min(), estimated.min()), max(exact.max(), estimated.max())]
        axes.plot(ends, ends, color="0.7", linewidth=1)
        axes.scatter(exact, estimated, s=10, color=COLOURS[arm])
        axes.set_title(f"{arm}: overestimated by {(estimated - exact).mean():.1f}", fontsize=9)
        axes.set_xlabel("Monte-Carlo return", fontsize=8)
        axes.set_ylabel("value", fontsize=8)
    return figure


def line(arms: Mapping[str, Mapping[str, Tensor]]) -> "Figure":
    """The policies on the line, over the actions that were logged."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * min(3, len(arms)), 2.4 * -(-len(arms) // 3)), layout="constrained")
    for index, (arm, measured) in enumerate(arms.items()):
        axes = figure.add_subplot(-(-len(arms) // 3), min(3, len(arms)), index + 1)
        position = measured["position"].numpy()
        axes.plot(position, measured["logged"].numpy(), color="0.8", linewidth=0.8)
        axes.plot(position, measured["action"].numpy(), color=COLOURS[arm])
        axes.set_title(arm, fontsize=9)
        axes.set_xlabel("position (the goal is at 1)", fontsize=8)
        axes.set_ylabel("action", fontsize=8)
    return figure
