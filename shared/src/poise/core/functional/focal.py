r"""Cross-entropy that attends to what is still wrong.

>>> import torch
>>> logits, labels = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0])
>>> [round(value, 4) for value in focal_loss(logits, labels, gamma=5, reduction="none").tolist()]  # right, wrong
[0.0, 0.2742]
>>> torch.nn.functional.cross_entropy(logits, labels, reduction="none").tolist() == focal_loss(
...     logits, labels, gamma=0, reduction="none"
... ).tolist()
True
"""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from poise.core.functional._numerics import widen


def focal_loss(
    logits: Float[Tensor, "batch classes *positions"],
    labels: Int[Tensor, "batch *positions"],
    gamma: float = 2.0,
    alpha: Float[Tensor, " classes"] | float = 1.0,
    reduction: Literal["mean", "sum", "none"] | str = "mean",
) -> Float[Tensor, "..."]:
    r"""Focal loss of a softmax classifier, :math:`-\alpha_y (1 - p_y)^\gamma \log p_y` for the true class y.

    With :math:`\gamma = 0` it is the cross-entropy; the larger :math:`\gamma`, the less a sample counts that is classified well.
    Computed from :math:`\log p` throughout, so that nothing overflows; as p goes to 1, loss and gradient go to 0 for every
    :math:`\gamma \ge 0`.

    Args:
        logits: unnormalised log-probabilities, the classes in dimension 1.
        labels: the true class of each position.
        gamma: :math:`\gamma`.
        alpha: a weight for each class, or one number for all. The mean is over positions, not over weights.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Returns:
        A scalar, or a loss for each position; float32 for half types.

    Raises:
        ValueError: ``logits`` are empty, ``labels`` does not fit them, ``alpha`` does not have a weight per class, ``gamma`` is
            negative, or ``reduction`` is unknown.
        TypeError: ``logits`` is not floating-point.

    Source:
        Lin, Goyal, Girshick, He and Dollar, "Focal Loss for Dense Object Detection", ICCV 2017, eq. 5, with a softmax in the place
        of the sigmoid.
    """
    if logits.ndim < 2 or labels.shape != logits.shape[:1] + logits.shape[2:]:
        raise ValueError(
            "labels must have the shape of logits (batch, classes, ...) without the classes, "
            f"got {tuple(labels.shape)} for {tuple(logits.shape)}"
        )
    if logits.numel() == 0:
        raise ValueError(f"logits must not be empty, got shape {tuple(logits.shape)}")
    if not gamma >= 0:
        raise ValueError(f"gamma must not be negative, got {gamma}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    log_p = widen(logits, "logits").log_softmax(1).gather(1, labels.long().unsqueeze(1)).squeeze(1)
    wrong = -torch.expm1(log_p)  # 1 - p
    # A power below 1 has an infinite slope at 0, where the logarithm beside it is 0 as well.
    losses = -torch.where(wrong > 0, wrong, 1.0).pow(gamma) * log_p
    if isinstance(alpha, Tensor):
        if alpha.shape != logits.shape[1:2]:
            raise ValueError(f"alpha must hold {logits.shape[1]} weights, one per class, got {tuple(alpha.shape)}")
        losses = alpha.to(losses.dtype)[labels.long()] * losses
    elif alpha != 1:
        losses = alpha * losses
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.mean()
