"""Figures of the PELA experiment."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from poise.core.lab import ArmResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {
    "baseline": "#222222",
    "svd": "#8a817c",
    "scratch": "#edae49",
    "distill": "#00798c",
    "pela": "#d1495b",
}

PANELS = {
    "accuracy": "accuracy",
    "transfer": "accuracy after fine-tuning elsewhere",
    "agreement": "same nearest neighbour as the original",
    "probe": "accuracy of a linear probe",
    "feature_gap": "distance of block outputs, unseen inputs",
    "largest_change": "largest change of a weight, mean of layers",
}
"""What is shown, where it was measured."""


def compression(results: Mapping[str, ArmResult], names: Mapping[float, str]) -> "Figure":
    """Every measure against the parameters that are left.

    Args:
        results: the finished arms.
        names: how the metrics call each ratio.
    """
    from matplotlib.figure import Figure

    first = next(iter(results.values())).metrics
    panels = [panel for panel in PANELS if all(f"{panel}_{name}" in first for name in names.values())]
    figure = Figure(figsize=(4 * len(panels), 3.6), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for arm, result in results.items():
            shares = [result.metrics[f"parameters_{name}"] for name in names.values()]
            values = [result.metrics[f"{panel}_{name}"] for name in names.values()]
            axes.plot(shares, values, "o-", color=COLOURS[arm], label=arm)
        if f"teacher_{panel}" in first:
            axes.axhline(first[f"teacher_{panel}"], color="#bbbbbb", linestyle="--", label="original")
        axes.set(xlabel="share of the parameters", title=PANELS[panel])
        if panel in ("feature_gap", "largest_change"):
            axes.set_yscale("log")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=len(results))
    return figure
