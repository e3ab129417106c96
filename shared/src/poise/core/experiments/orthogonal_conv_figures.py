"""Figures of the orthogonal convolution experiment."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from poise.core.lab import ArmResult
from poise.core.lab.report import PALETTE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#222222", "#0072b2", "#e69f00", "#009e73")
"""One for each curve, apart for the colour-blind as well."""


def effect(results: Mapping[str, ArmResult], strengths: Mapping[str, float], radii: Sequence[float]) -> "Figure":
    """What lambda buys and costs: distance from orthogonal, accuracy, accuracy under attack."""
    left, right, figure = _pair(height=4.8)
    ordered = sorted((arm for arm in results if arm != "kernel"), key=lambda arm: strengths[arm])
    accuracies = {"accuracy": "no attack"} | {
        f"robust_accuracy_{size}": f"attack of norm {radius:g}"
        for size, radius in zip(("small", "middle", "large"), radii, strict=True)
    }
    distances = {"total_orthogonality": "total $L_{orth}$", "singular_value_spread": "spread of singular values"}
    for axes, names in ((left, accuracies), (right, distances)):
        for colour, mark, (metric, label) in zip(COLOURS, "osD^", names.items(), strict=False):
            scale = 100 if axes is left else 1
            values = [scale * results[arm].metrics[metric] for arm in ordered]
            axes.plot(range(len(ordered)), values, marker=mark, color=colour, label=label, linewidth=2)
            if "kernel" in results:
                value = scale * results["kernel"].metrics[metric]
                axes.plot(len(ordered), value, marker=mark, color=colour, markerfacecolor="white", markersize=8)
        labels = [f"{strengths[arm]:g}" for arm in ordered] + ["reshaped\nkernel"] * ("kernel" in results)
        axes.set_xticks(range(len(labels)), labels)
        axes.set_xlabel(r"weight $\lambda$ of the penalty", fontsize=12)
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.08), frameon=False, fontsize=12)
    left.set_ylim(0, 100)
    left.set_title("test accuracy, %", fontsize=12)
    right.set_yscale("log")
    right.set_title("distance from orthogonal", fontsize=12)
    return figure


def spectra(title: str, values: Mapping[str, Tensor]) -> "Figure":
    """All singular values of each layer, in descending order."""
    figure, axes = _single()
    for colour, (name, of_layer) in zip(PALETTE * 8, values.items(), strict=False):
        share = torch.linspace(0, 1, len(of_layer))
        axes.plot(share, of_layer, color=colour, label=name if len(values) <= 9 else None)
    axes.axhline(1.0, color="black", linewidth=0.8, linestyle=":")
    axes.set(title=f"singular values of the layers\n{title}", xlabel="share of the singular values", ylim=(0, None))
    if len(values) <= 9:
        axes.legend(title="layer", frameon=False, fontsize=11)
    return figure


def scalability(results: Mapping[str, ArmResult], factors: Sequence[int]) -> "Figure":
    """Residuals at the training size and above, averaged over layers: the spectral one does not grow."""
    left, right, figure = _pair()
    for colour, (arm, result) in zip(PALETTE, results.items(), strict=False):
        errors = torch.stack(list(result.load("residuals").values())).log().mean(0).exp()  # size, [err_F, err_s, share]
        left.plot(factors, errors[:, 0], marker="o", color=colour, label=arm)
        right.plot(factors, errors[:, 1], marker="o", color=colour)
    for axes, norm in ((left, "Frobenius"), (right, "spectral")):
        axes.set(title=f"{norm} residual", xlabel="size of the input / training size", xscale="log", yscale="log")
        axes.minorticks_off()
        axes.set_xticks(factors, [str(factor) for factor in factors])
    left.legend(frameon=False, fontsize=11)
    return figure


def landscape(ends: Mapping[str, Tensor], least: Mapping[str, int]) -> "Figure":
    """Where each start of each size ended, above the least possible value."""
    figure, axes = _single(width=6.4)
    for place, (name, losses) in enumerate(ends.items()):
        above = (losses - least[name]).clamp_min(1e-12)
        colour = PALETTE[2] if least[name] else PALETTE[1]
        axes.scatter([place] * len(above), above, color=colour, alpha=0.6, edgecolors="none")
    axes.axhline(1e-3, color="black", linewidth=0.8, linestyle=":")
    labels = [name.replace("_", "\n") + (f"\n(least {least[name]})" if least[name] else "") for name in ends]
    axes.set_xticks(range(len(ends)), labels, fontsize=11)
    axes.set(title="L_orth minimized alone, from random kernels", ylabel="above the least value", yscale="log")
    return figure


def _single(width: float = 4.8) -> "tuple[Figure, Axes]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 3.2), layout="constrained")
    axes = figure.subplots()
    _plain(axes)
    return figure, axes


def _pair(width: float = 8.0, height: float = 3.8) -> "tuple[Axes, Axes, Figure]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes in (left, right):
        _plain(axes)
    return left, right, figure


def _plain(axes: "Axes") -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.tick_params(labelsize=11)
