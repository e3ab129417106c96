"""Targets that are distributions: made from labels, and the cross-entropy with them in any layout.

>>> import torch
>>> labels, logits = torch.tensor([2, 0]), torch.randn(2, 3)
>>> targets = soft_labels(labels, 3, smoothing=0.3)
>>> [round(value, 2) for value in targets[0].tolist()]
[0.1, 0.1, 0.8]
>>> same = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.3)
>>> torch.allclose(soft_cross_entropy(logits, targets), same)
True
"""

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from poise.core.functional._numerics import widen

Reduction = Literal["mean", "sum", "none"]


def soft_labels(
    labels: Int[Tensor, "..."],
    num_classes: int,
    *,
    smoothing: float = 0.0,
    dim: int = 1,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "..."]:
    r"""One-hot rows, smoothed: :math:`(1 - \epsilon) e_y + \epsilon / K`.

    Args:
        labels: class indices; a negative one (a position to ignore) gives a row of zeros.
        num_classes: K.
        smoothing: :math:`\epsilon` in [0, 1].
        dim: where the dimension of the classes goes: 1 for images (batch, K, height, width), -1 for tokens (batch, time, K).
        dtype: of the result.

    Raises:
        ValueError: ``smoothing`` is outside [0, 1], there is no class, or ``dim`` is no place among the axes.
    """
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}")
    if not 0 <= smoothing <= 1:
        raise ValueError(f"smoothing must lie in [0, 1], got {smoothing}")
    if not -labels.ndim - 1 <= dim <= labels.ndim:
        raise ValueError(
            f"dim must lie in {-labels.ndim - 1}..{labels.ndim} for labels of {labels.ndim} axes, got {dim}"
        )
    at = labels.long().unsqueeze(dim)
    shape = list(at.shape)
    shape[dim] = num_classes
    rows = torch.full(shape, smoothing / num_classes, dtype=dtype, device=labels.device)
    top = 1 - smoothing + smoothing / num_classes
    rows.scatter_(dim, at.clamp(min=0), top)
    return rows * (at >= 0)


def soft_cross_entropy(
    logits: Float[Tensor, "..."],
    targets: Float[Tensor, "..."],
    *,
    mask: Bool[Tensor, "..."] | None = None,
    dim: int = 1,
    reduction: Reduction = "mean",
) -> Float[Tensor, "..."]:
    r"""Cross-entropy :math:`-\sum_k q_k \log softmax(z)_k` with targets q that are distributions.

    ``F.cross_entropy`` with probabilities, and in addition the classes may stand in any dimension and positions may be left out.

    Args:
        logits: z, for example (batch, K), (batch, K, height, width) or, with ``dim=-1``, (batch, time, K).
        targets: q of the same shape; not checked to sum to one.
        mask: which positions count, of the shape of ``logits`` without ``dim``; all if ``None``.
        dim: the dimension of the classes.
        reduction: ``"mean"`` over the positions that count (0 if there is none), ``"sum"``, or ``"none"``.

    Returns:
        A scalar, or a loss for each position; float32 for half types.

    Raises:
        ValueError: the shapes do not fit, or the mean of no position is asked for.
        TypeError: ``logits`` is not floating-point.
    """
    if logits.shape != targets.shape:
        raise ValueError(
            f"targets must have the shape of the logits, got {tuple(targets.shape)} and {tuple(logits.shape)}"
        )
    wide = widen(logits, "logits")
    losses = -(targets.to(wide.dtype) * wide.log_softmax(dim)).sum(dim)
    if mask is None:
        return reduced(losses, reduction)
    if mask.shape != losses.shape:
        raise ValueError(f"mask must have shape {tuple(losses.shape)}, got {tuple(mask.shape)}")
    losses = losses.masked_fill(~mask, 0)
    return losses.sum() / mask.sum().clamp(min=1) if reduction == "mean" else reduced(losses, reduction)


def reduced(losses: Float[Tensor, "..."], reduction: Reduction) -> Float[Tensor, "..."]:
    """The mean or the sum of all entries, or the entries.

    Raises:
        ValueError: the mean is asked for, and there is no entry.
    """
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    if losses.numel() == 0:
        raise ValueError(f"a mean needs at least one loss, got losses of shape {tuple(losses.shape)}")
    return losses.mean()
