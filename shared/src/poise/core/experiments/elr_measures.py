"""What the ELR experiment measures after every epoch, and its figures."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from poise.core.experiments.line_ends import name_line_ends
from poise.core.experiments.noisy_labels import all_logits, percent
from poise.core.experiments.published_images import ImageSplit
from poise.core.lab import Run
from poise.core.labels.elr import elr_regularizer
from poise.core.memory.samples import SampleBank

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class Progress:
    """What is measured after every epoch.

    Attributes:
        history: per quantity its values, one per epoch: test accuracy, share of the wrong labels that are predicted (memorized) and
            share whose true class is remembered, both in percent, and the mean inner product of the two parts of ELR's logit gradient
            over wrong labels, over right labels, and of the latter the part of those that are remembered.
    """

    NAMES = ("accuracy", "memorized", "recalled", "on_wrong", "on_right", "on_remembered")

    def __init__(self, epochs: int) -> None:
        self.history = {name: torch.zeros(epochs, dtype=torch.float64) for name in self.NAMES}

    @torch.no_grad()
    def measure(
        self,
        epoch: int,
        predict: Callable[[Tensor], Tensor],
        memory: SampleBank,
        split: ImageSplit,
        labels: Tensor,
        lam: float,
        run: Run,
    ) -> None:
        wrong = labels != split.train.labels
        logits = all_logits(predict, split.train, run.device)
        target = memory.read(torch.arange(len(labels))).float().cpu()
        products = gradient_products(logits, labels, target, lam)
        found = {
            "accuracy": percent(all_logits(predict, split.test, run.device).argmax(1) == split.test.labels),
            "memorized": percent((logits.argmax(1) == labels)[wrong]),
            "recalled": percent((target.argmax(1) == split.train.labels)[wrong]),
            "on_wrong": products[wrong].mean().item(),
            "on_right": products[~wrong].mean().item(),
            "on_remembered": products[~wrong & (target.argmax(1) == labels)].sum().item() / (~wrong).sum().item(),
        }
        for name, value in found.items():
            self.history[name][epoch] = value

    def at(self, epoch: int) -> dict[str, float]:
        return {name: float(values[epoch]) for name, values in self.history.items()}


@torch.enable_grad()
def gradient_products(logits: Tensor, labels: Tensor, target: Tensor, lam: float) -> Tensor:
    """For each example the inner product of the gradients, with respect to its logits, of the cross-entropy and of lambda R."""
    logits = logits.detach().requires_grad_()
    probs = logits.softmax(1).clamp(1e-4, 1 - 1e-4)
    losses = F.cross_entropy(logits, labels, reduction="sum"), lam * elr_regularizer(probs, target, "sum")
    ours, theirs = (torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in losses)
    return (ours * theirs).sum(1)


NAMES = {
    "baseline": "plain training",
    "dropout": "dropout",
    "target_loss": "target loss",
    "elr": "ELR",
    "elr_plus": "ELR+",
}
"""What the figures call the arms."""

COLOURS = {
    "baseline": "#1f2937",
    "dropout": "#9ca3af",
    "target_loss": "#9ca3af",
    "elr": "#2563eb",
    "elr_plus": "#d97706",
}
STORY = ("baseline", "elr", "elr_plus")
"""The arms that stand out."""


def story_figure(histories: Mapping[str, Mapping[str, Tensor]]) -> "Figure":
    """Memorized wrong labels above test accuracy, over the epochs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.2, 6.2), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    _draw(above, histories, "memorized", "wrong training labels learnt by heart, %")
    _draw(below, histories, "accuracy", "accuracy on test images, %")
    below.set_xlabel("epoch", fontsize=13)
    return figure


def _draw(axes: "Axes", histories: Mapping[str, Mapping[str, Tensor]], quantity: str, title: str) -> None:
    """One quantity of all arms; the arms of the story last, so that they lie on top."""
    for arm in sorted(histories, key=STORY.__contains__):
        values = histories[arm][quantity]
        width = 3.0 if arm in STORY else 1.4
        axes.plot(range(1, len(values) + 1), values, label=arm, color=COLOURS[arm], linewidth=width)
    axes.set_ylim(-3, 103)
    axes.set_yticks((0, 25, 50, 75, 100))
    axes.margins(x=0)
    axes.set_title(title, fontsize=14, loc="left")
    axes.tick_params(labelsize=12)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    name_line_ends(axes, NAMES, fontsize=13)


def epochs_figure(histories: Mapping[str, Mapping[str, Tensor]]) -> "Figure":
    """Test accuracy, memorized wrong labels, and cancelling of gradients over the epochs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.8), layout="constrained")
    panels = {
        "accuracy": "test accuracy, %",
        "memorized": "wrong labels memorized, %",
        "on_wrong": "gradients on wrong labels,\ninner product",
    }
    for axes, (name, title) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for arm, history in histories.items():
            axes.plot(range(1, len(history[name]) + 1), history[name], label=NAMES[arm])
        axes.set_xlabel("epoch", fontsize=11)
        axes.set_title(title, fontsize=12)
    figure.axes[0].legend(frameon=False, fontsize=11)
    figure.axes[2].axhline(0, color="0.7", linewidth=0.8)
    return figure
