"""What the grokking stability experiment measures of losses and curves."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from poise.core.dynamics.grokking_stability.diagnostics import nlm_cosine

Loss = Callable[..., Tensor]


def squared_error(logits: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
    """Per sample and class, as torch averages it."""
    error = (logits - F.one_hot(labels, logits.shape[-1])).square().mean(-1)
    return error if reduction == "none" else error.mean()


def fidelity(loss_of: Loss, logits: Tensor, y: Tensor, precision: torch.dtype, weights: Sequence[Tensor]) -> Tensor:
    """The cosine of the gradient with the one that the same loss has in float64."""
    computed, exact = (
        torch.autograd.grad(loss_of(logits.to(dtype), y), weights, retain_graph=True)
        for dtype in (precision, torch.float64)
    )
    return -nlm_cosine(exact, computed)


def first(hits: Tensor) -> float:
    """Index of the first hit; the last index if there is none."""
    return float(hits.double().argmax()) if hits.any() else len(hits) - 1.0
