r"""StableMax: training past perfect accuracy drives softmax cross-entropy to an exact zero, where nothing is learned any more.

Prieto, Barsbey, Mediano and Birdal, "Grokking at the Edge of Numerical Stability", ICLR 2025, arXiv 2501.04697.

    s(x) = x + 1 for x >= 0, 1 / (1 - x) for x < 0,    p_k = s(z_k) / sum_j s(z_j),    L = -log p_y

s replaces the exponential of the softmax. It grows linearly, so that logits have to grow by a factor, not by a constant, before the
wrong classes vanish from the sum. Since log s(x) = sign(x) log(1 + |x|), StableMax is the softmax of a squashed logit, and a logit
of 1e30 is nothing special.

>>> import torch
>>> logits = 30 * torch.eye(3)
>>> labels = torch.arange(3)
>>> torch.nn.functional.cross_entropy(logits, labels).item()
0.0
>>> round(stablemax_cross_entropy(logits, labels).item(), 4)
0.0625
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from poise.core.functional._numerics import widen


class _LogS(torch.autograd.Function):
    """log s in two passes over memory forwards and three backwards; the derivative of the slope comes from autograd."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.abs().log1p_().copysign_(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] / ctx.saved_tensors[0].abs().add_(1)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        return tangents[0] / ctx.saved_tensors[0].abs().add_(1)


def log_s(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    r"""The squashed logit :math:`\log s(x) = \mathrm{sign}(x) \log(1 + |x|)`, whose slope is :math:`1 / (1 + |x|)` everywhere.

    Args:
        x: logits.

    Source:
        Section 3, the definition of StableMax.
    """
    if torch.compiler.is_compiling():
        # A compiler fuses the plain formula, and does not trace a Function with a jvp. abs() and sign() have no slope at 0.
        positive = x >= 0
        size = torch.where(positive, x, -x).log1p()
        return torch.where(positive, size, -size)
    return _LogS.apply(x)


def log_stablemax(z: Float[Tensor, "*shape"], dim: int = -1) -> Float[Tensor, "*shape"]:
    r"""Log-probabilities :math:`\log s(z_k) - \log \sum_j s(z_j)`.

    Args:
        z: logits.
        dim: the dimension that sums to one.

    Returns:
        Log-probabilities in the dtype of ``z``, float32 for half types.

    Raises:
        TypeError: ``z`` is not floating-point.

    Source:
        Section 3, the definition of StableMax.
    """
    return log_s(widen(z, "logits")).log_softmax(dim)


def stablemax(z: Float[Tensor, "*shape"], dim: int = -1) -> Float[Tensor, "*shape"]:
    r"""Probabilities :math:`s(z_k) / \sum_j s(z_j)`.

    Args:
        z: logits.
        dim: the dimension that sums to one.

    Returns:
        Probabilities in the dtype of ``z``, float32 for half types.

    Raises:
        TypeError: ``z`` is not floating-point.

    Source:
        Section 3, the definition of StableMax.
    """
    return log_s(widen(z, "logits")).softmax(dim)


def stablemax_cross_entropy(
    z: Float[Tensor, "..."],
    y: Tensor,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
) -> Float[Tensor, "..."]:
    r"""Cross-entropy of StableMax, a drop-in replacement of :func:`torch.nn.functional.cross_entropy`.

    .. math:: L = \log \sum_j s(z_j) - \log s(z_y), \qquad
        \frac{\partial L}{\partial z_k} = \frac{p_k - [k = y]}{1 + |z_k|}

    The authors compute it in float64, which halts later still: pass ``z.double()`` for that.

    Args:
        z: logits, ``(classes,)``, ``(batch, classes)`` or ``(batch, classes, ...)``.
        y: class indices, or class probabilities of the shape of ``z``.
        reduction: ``mean``, ``sum`` or ``none``.
        label_smoothing: share of the uniform distribution in the target.
        ignore_index: class index of the samples that do not count.

    Returns:
        The loss in the dtype of ``z``, float32 for half types.

    Raises:
        TypeError: ``z`` is not floating-point.
        ValueError: ``reduction`` is unknown, ``label_smoothing`` is outside [0, 1], ``z`` and ``y`` do not fit, or the mean of no
            sample is asked for.

    Source:
        Section 3, the definition of StableMax.
    """
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must lie in [0, 1], got {label_smoothing}")
    squashed = log_s(widen(z, "logits"))
    _check_target(z, y)
    if reduction == "mean" and z.numel() == 0:
        raise ValueError(f"a mean needs at least one sample, got logits of shape {tuple(z.shape)}")
    target = y.to(squashed.dtype) if y.is_floating_point() else y
    return F.cross_entropy(
        squashed, target, reduction=reduction, label_smoothing=label_smoothing, ignore_index=ignore_index
    )


def _check_target(z: Tensor, y: Tensor) -> None:
    """Whether ``y`` holds a class, or one probability per class, for every position of ``z``."""
    expected = z.shape if y.is_floating_point() else z.shape[1:] if z.ndim == 1 else z.shape[:1] + z.shape[2:]
    if z.ndim == 0 or z.shape[min(z.ndim - 1, 1)] == 0 or y.shape != expected:
        raise ValueError(
            "y must hold class indices, of the shape of z without the classes, or probabilities, of the shape of z: "
            f"got {y.dtype} of shape {tuple(y.shape)} for {tuple(z.shape)}"
        )


class StableMaxCrossEntropy(nn.Module):
    """:func:`stablemax_cross_entropy` as a module, in place of :class:`torch.nn.CrossEntropyLoss`.

    Args:
        reduction: ``mean``, ``sum`` or ``none``.
        label_smoothing: share of the uniform distribution in the target.
        ignore_index: class index of the samples that do not count.

    Raises:
        ValueError: ``reduction`` is unknown or ``label_smoothing`` is outside [0, 1].
    """

    def __init__(self, reduction: str = "mean", label_smoothing: float = 0.0, ignore_index: int = -100) -> None:
        super().__init__()
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"label_smoothing must lie in [0, 1], got {label_smoothing}")
        self.reduction, self.label_smoothing, self.ignore_index = reduction, label_smoothing, ignore_index

    def forward(self, z: Float[Tensor, "..."], y: Tensor) -> Float[Tensor, "..."]:
        return stablemax_cross_entropy(z, y, self.reduction, self.label_smoothing, self.ignore_index)

    def extra_repr(self) -> str:
        return f"reduction={self.reduction!r}, label_smoothing={self.label_smoothing}, ignore_index={self.ignore_index}"
