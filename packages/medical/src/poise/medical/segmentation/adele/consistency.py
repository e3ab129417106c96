r"""Consistency of predictions at several scales, and ADELE's loss.

>>> import torch
>>> small, base, large = (torch.randn(2, 3, 8, 8, requires_grad=True) for _ in range(3))
>>> labels = torch.randint(0, 3, (2, 8, 8))
>>> criterion = AdeleLoss(weight=1.0)
>>> criterion([small, base, large], labels).backward()
>>> criterion.cross_entropy.item() > 0, criterion.consistency.value.item() >= 0
(True, True)
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from poise.core.penalty import Penalty
from poise.core.schedule import Schedule
from poise.medical.segmentation.adele.checks import check_labels, check_spatial

CLAMP = 1e-3
"""The mixture stays this far from 0 and 1, which bounds its logarithm."""


def multiscale_consistency(
    logits_list: Sequence[Float[Tensor, "..."]],
    weights: Float[Tensor, "..."] | None = None,
    ignore_mask: Bool[Tensor, "..."] | None = None,
    gate: float = 0.8,
) -> tuple[Float[Tensor, ""], Float[Tensor, "..."], Float[Tensor, "..."]]:
    r"""Divergence of the predictions at all scales from their mixture.

    .. math:: q = \mathrm{clamp}\Big(\sum_i w_i p_i,\ 10^{-3},\ 1 - 10^{-3}\Big), \qquad d = \sum_i KL(p_i \| q)

    for :math:`p_i = \mathrm{softmax}(z_i)`: m times the Jensen-Shannon divergence where the clamp does nothing. It counts in images
    that have a confident pixel, one whose largest q is at least ``gate``; a gate for each image. q is neither renormalised nor
    cut from the gradient.

    Args:
        logits_list: z, for each of m scales logits (B, C, *S) of one shape.
        weights: (m,) numbers of which w is the softmax; equal by default.
        ignore_mask: (B, *S) True where a pixel is ignored by the gate.
        gate: rho, from 0 (all images count).

    Returns:
        The mean over all pixels of the batch, the map d (B, *S), and the mixture q (B, C, *S).

    Raises:
        ValueError: no logits, or empty ones, their shapes differ or are not those of pictures or volumes, or ``weights`` or
            ``ignore_mask`` does not fit.

    Source:
        Liu et al. 2022, section 3 (multiscale consistency); the clamp and the missing 1/m from the authors' code.
    """
    _check_logits(logits_list)
    if logits_list[0].numel() == 0:
        raise ValueError(f"logits must not be empty, got shape {tuple(logits_list[0].shape)}")
    wide = torch.promote_types(logits_list[0].dtype, torch.float32)
    log_p = torch.stack([logits.to(wide).log_softmax(1) for logits in logits_list])  # (m, B, C, *S)
    p = log_p.exp()
    w = mixture_weights(weights, logits_list)
    mixture = torch.tensordot(w, p, dims=1).clamp(CLAMP, 1 - CLAMP)
    confident = mixture
    if ignore_mask is not None:
        if ignore_mask.shape != mixture[:, 0].shape:
            raise ValueError(
                f"ignore_mask must have shape {tuple(mixture[:, 0].shape)} (B, *S), got {tuple(ignore_mask.shape)}"
            )
        confident = mixture.masked_fill(ignore_mask.unsqueeze(1), 0)
    counts = confident.detach().flatten(1).amax(1) >= gate
    divergence = (p * (log_p - mixture.log())).sum((0, 2))
    divergence = divergence * counts.view(-1, *[1] * (divergence.ndim - 1))
    return divergence.mean(), divergence, mixture


class MultiscaleConsistency(Penalty):
    """``weight`` times :func:`multiscale_consistency`, for a loss of your own.

    Args:
        weight: lambda, a number or a schedule.
        gate: rho, the confidence that an image needs somewhere.

    Raises:
        ValueError: the weight is negative or not finite, or ``gate`` is not in [0, 1].
    """

    def __init__(self, weight: float | Schedule = 1.0, gate: float = 0.8) -> None:
        super().__init__(weight)
        if not 0 <= gate <= 1:
            raise ValueError(f"gate must lie in [0, 1], got {gate}")
        self.gate = gate

    def penalty(
        self,
        logits_list: Sequence[Float[Tensor, "..."]],
        weights: Float[Tensor, "..."] | None = None,
        ignore_mask: Bool[Tensor, "..."] | None = None,
    ) -> Float[Tensor, ""]:
        """Mean divergence; arguments and errors as :func:`multiscale_consistency`."""
        return multiscale_consistency(logits_list, weights, ignore_mask, self.gate)[0]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, gate={self.gate}"


class AdeleLoss(nn.Module):
    r"""Cross-entropy of every scale and the consistency between them.

    .. math:: L = \frac1m \Big( \sum_i CE(w_i z_i, y) + \lambda\, d \Big)

    The cross-entropy sees logits times w, a temperature of 3 for three equal weights. So does the authors' code; the paper does not
    say so, and ``tempered=False`` leaves it out (:math:`CE(z_i, y)`).

    Args:
        weight: lambda, a number or a schedule (advance it with ``criterion.consistency.step()``). 0 leaves the cross-entropies.
        gate: rho, the confidence that an image needs somewhere for its consistency to count.
        scales: m, how many logits come.
        learn_weights: whether the m numbers whose softmax is w are parameters (PASCAL VOC) or equal (medical).
        tempered: whether the cross-entropy sees logits times w.
        average: whether the sum is divided by m (medical) or not (PASCAL VOC).
        ignore_index: label of pixels that the cross-entropy leaves out. Means are over all pixels, these included.

    Attributes:
        consistency: the :class:`MultiscaleConsistency`; ``consistency.value`` is d of the last call.
        cross_entropy: the sum of the cross-entropies of the last call, detached.

    Raises:
        ValueError: a setting is out of range.
    """

    cross_entropy: Tensor | None
    weights: Tensor | None

    def __init__(
        self,
        weight: float | Schedule = 1.0,
        gate: float = 0.8,
        *,
        scales: int = 3,
        learn_weights: bool = False,
        tempered: bool = True,
        average: bool = True,
        ignore_index: int = 255,
    ) -> None:
        super().__init__()
        if scales < 1:
            raise ValueError(f"scales must be at least 1, got {scales}")
        self.consistency = MultiscaleConsistency(weight, gate)
        self.scales, self.tempered, self.average, self.ignore_index = scales, tempered, average, ignore_index
        self.register_parameter("weights", nn.Parameter(torch.ones(scales)) if learn_weights else None)
        self.cross_entropy = None

    def forward(self, logits_list: Sequence[Float[Tensor, "..."]], labels: Shaped[Tensor, "..."]) -> Float[Tensor, ""]:
        """The loss of a batch.

        Args:
            logits_list: for each scale logits (B, C, *S), as :func:`multiscale_forward` gives them.
            labels: (B, *S) classes 0..C-1, or ``ignore_index``. A label out of range is an error on the CPU; on an accelerator the
                device itself reports it.

        Raises:
            TypeError: labels are not integers.
            ValueError: there are not as many logits as scales, shapes do not fit, or a label is out of range.
        """
        _check_logits(logits_list)
        if len(logits_list) != self.scales:
            raise ValueError(f"logits_list must hold logits of {self.scales} scales, got {len(logits_list)}")
        check_spatial(labels, logits_list[0])
        if labels.device.type == "cpu" and not torch.compiler.is_compiling():
            check_labels(labels, logits_list[0].shape[1], self.ignore_index)
        labels = labels.long()
        w = mixture_weights(self.weights, logits_list)
        parts = []
        for share, logits in zip(w, logits_list, strict=True):
            wide = logits.to(w.dtype)
            tempered = share * wide if self.tempered else wide
            losses = F.cross_entropy(tempered, labels, ignore_index=self.ignore_index, reduction="none")
            parts.append(losses.mean())
        cross_entropy = torch.stack(parts).sum()
        self.cross_entropy = cross_entropy.detach()
        loss = cross_entropy + self.consistency(logits_list, self.weights, labels == self.ignore_index)
        return loss / self.scales if self.average else loss

    def extra_repr(self) -> str:
        return (
            f"scales={self.scales}, tempered={self.tempered}, average={self.average}, ignore_index={self.ignore_index}"
        )


def mixture_weights(weights: Tensor | None, logits_list: Sequence[Tensor]) -> Tensor:
    """w (m,), in the precision of the logits, float32 for half types."""
    first, count = logits_list[0], len(logits_list)
    dtype = torch.promote_types(first.dtype, torch.float32)
    if weights is None:
        return torch.full((count,), 1 / count, dtype=dtype, device=first.device)
    if weights.shape != (count,):
        raise ValueError(f"weights must have one entry for each of {count} scales, got shape {tuple(weights.shape)}")
    return weights.to(dtype).softmax(0)


def _check_logits(logits_list: Sequence[Tensor]) -> None:
    shapes = {tuple(logits.shape) for logits in logits_list}
    if len(shapes) != 1:
        raise ValueError(f"logits_list must hold logits of one shape for each scale, got {sorted(shapes)}")
    (shape,) = shapes
    if len(shape) not in (4, 5):
        raise ValueError(
            f"logits must be (batch, classes, height, width) or (batch, classes, depth, height, width), got {shape}"
        )
