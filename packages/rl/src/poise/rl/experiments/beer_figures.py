"""Figures of the BEER experiment."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LABELS = {
    "return": "return",
    "rank": "rank of the representation (δ = 0.01)",
    "cosine": "cosine of successive representations",
    "target_cosine": "cosine with the slow copy's next one",
    "bound": "Bellman bound on the cosine",
    "excess": "mean excess over the bound, as in the loss",
    "own_excess": "mean excess, one network at both ends",
    "above_bound": "share of samples above the bound",
    "head_norm": "norm of the head's weight",
}

COLOURS = {
    "baseline": "#222222",
    "beer": "#f4a6a0",
    "beer_x100": "#e5626b",
    "strong_beer": "#a1123a",
    "infer": "#00798c",
    "dr3": "#edae49",
    "unbounded": "#4361ee",
}


def curves(arms: Mapping[str, Mapping[str, Tensor]]) -> "Figure":
    """Every measure over the updates."""
    from matplotlib.figure import Figure

    names = [name for name in LABELS if any(name in measured for measured in arms.values())]
    figure = Figure(figsize=(12, 3.1 * -(-len(names) // 3)), layout="constrained")
    for index, name in enumerate(names):
        axes = figure.add_subplot(-(-len(names) // 3), 3, index + 1)
        for arm, measured in arms.items():
            axes.plot(measured["step"].numpy(), measured[name].numpy(), color=COLOURS[arm], label=arm)
        axes.set_title(LABELS[name], fontsize=9)
        axes.set_xlabel("updates", fontsize=8)
        if name in ("excess", "own_excess"):
            axes.set_yscale("symlog", linthresh=1e-5)
        if index == 0:
            axes.legend(fontsize=7)
    return figure


def values(arms: Mapping[str, Mapping[str, Tensor]]) -> "Figure":
    """The critic's values against the Monte-Carlo returns from the same states."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3 * min(4, len(arms)), 3 * -(-len(arms) // 4)), layout="constrained")
    for index, (arm, measured) in enumerate(arms.items()):
        axes = figure.add_subplot(-(-len(arms) // 4), min(4, len(arms)), index + 1)
        exact, estimated = measured["returns"].numpy(), measured["values"].numpy()
        axes.plot(exact, exact, color="0.7", linewidth=1)
        axes.scatter(exact, estimated, s=5, color=COLOURS[arm])
        axes.set_title(f"{arm}: mean |error| {abs(estimated - exact).mean():.2f}", fontsize=9)
        axes.set_xlabel("Monte-Carlo return", fontsize=8)
        axes.set_ylabel("value", fontsize=8)
    return figure
