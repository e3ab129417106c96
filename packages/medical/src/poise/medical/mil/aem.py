r"""Attention entropy maximization: keep attention over a bag of instances from collapsing onto a few of them.

Zhang, Shui, Sun, Li, Li, Zhu and Yang, "AEM: Attention Entropy Maximization for Multiple Instance Learning based Whole Slide
Image Classification", 2024, arXiv 2406.15303.

A slide is a bag of thousands of patches with a single label. Attention pooling, trained on few slides, soon puts all its weight
on a handful of patches and learns those by heart. AEM adds one term to the loss, the negative entropy of the attention:

.. math:: L = L_{bag} + \lambda \, \frac1K \sum_{k=1}^K \sum_n a_{kn} \log a_{kn}, \qquad a_k = \mathrm{softmax}(e_k)

for the raw scores e of one bag, with a row for every head, branch or class of the model (K rows). The term lies between
:math:`-\log N` (attention spread evenly over N instances) and 0 (all of it on one), and pulls at a score with
:math:`a_n (\log a_n + H(a))`. It needs the scores and nothing else: no second network, no second stage, one number λ.

>>> import torch
>>> from poise.medical import ABMIL, AttentionEntropyLoss
>>> model, aem = ABMIL(in_dim=384, hidden=128, num_classes=2), AttentionEntropyLoss(weight=0.1)
>>> bags, labels = torch.randn(4, 50, 384), torch.tensor([0, 1, 1, 0])
>>> logits, scores = model(bags, return_attention=True)  # (4, 2) and (4, 1, 50)
>>> loss = torch.nn.functional.cross_entropy(logits, labels) + aem(scores)
>>> loss.backward()
>>> 0 < aem.normalized_entropy.item() <= 1  # worth logging: 1 is even attention
True

Bags of different size go into one padded batch (:func:`collate_bags`): ``model(bags, mask, return_attention=True)`` and
``aem(scores, mask)`` give what one bag at a time would. Every model here returns its scores in this form, DSMIL, TransMIL, and with
:class:`FromMONAI` and :class:`FromTorchmil` those of other libraries.
"""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from poise.core.functional import entropy
from poise.core.penalty import Penalty
from poise.core.schedule import Cosine, Schedule


def attention_entropy(
    scores: Float[Tensor, "..."],
    mask: Bool[Tensor, "..."] | None = None,
    dim: int = -1,
    normalize: bool = False,
) -> Float[Tensor, "..."]:
    r"""Entropy :math:`H(a) = -\sum_n a_n \log a_n` in nats of the attention ``a = softmax(scores)`` over the instances of a bag.

    Args:
        scores: raw attention scores, before the softmax; instances along ``dim``.
        mask: True where an instance is real. Either of the shape of ``scores``, or ``(bags, instances)`` for scores with more
            dimensions in between (heads, branches, classes), which then share it.
        dim: the dimension of the instances.
        normalize: divide by its maximum, the logarithm of the number of real instances, so that 1 is even attention and bags of
            different size compare. The attention of a single instance is as even as can be: 1.

    Returns:
        One entropy per row: the shape of ``scores`` without ``dim``.

    Raises:
        ValueError: a row has no (real) instance, or ``mask`` does not fit ``scores``.
        TypeError: ``scores`` is not floating-point, or ``mask`` is not boolean.

    Source:
        Zhang et al. 2024, section 3: the loss is the negative of it.
    """
    scores = scores.movedim(dim, -1)
    real = None if mask is None else _for_every_row(mask, scores, dim)
    value = entropy(scores, real)  # through log_softmax: log(softmax) is NaN where a weight underflows
    return _relative(value, real, scores.shape[-1]) if normalize else value


class AttentionEntropyLoss(Penalty):
    r"""``weight`` times the negative entropy of the attention, the mean over its rows.

    >>> scores = torch.zeros(1, 8, 50)  # eight heads, each of them even
    >>> aem = AttentionEntropyLoss(weight=0.1)
    >>> round(aem(scores).item(), 4), round(aem.entropy.item(), 4)  # -0.1 log 50, log 50
    (-0.3912, 3.912)

    Args:
        weight: λ, a number or a schedule. The paper tunes it per data set; 0.1 is what the authors' example uses.
        annealing: ``"cosine"`` lowers the weight to 0 on half a cosine, advanced by :meth:`step` (a later version of the paper).
        total_steps: steps after which it is 0.
        reduction: over the bags of a batch, ``"mean"`` or ``"sum"``. The rows of a bag are averaged always, so that λ means
            the same for one head and for eight.

    Attributes:
        entropy: mean entropy of the last call in nats, detached.
        normalized_entropy: the same relative to even attention, in [0, 1].

    Raises:
        ValueError: the weight is negative or not finite, or annealing is asked for without a plain weight and ``total_steps``.
    """

    entropy: Tensor | None
    normalized_entropy: Tensor | None

    def __init__(
        self,
        weight: float | Schedule,
        annealing: str | None = None,
        total_steps: int | None = None,
        reduction: str = "mean",
    ) -> None:
        if annealing not in (None, "cosine"):
            raise ValueError(f"annealing must be None or 'cosine', got {annealing!r}")
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}")
        if (annealing is None) is not (total_steps is None):
            raise ValueError(f"annealing and total_steps go together, got {annealing!r} and {total_steps}")
        if total_steps is not None:
            if callable(weight):
                raise ValueError(
                    "annealing starts from a number; a weight that is a schedule already has its own course"
                )
            weight = Cosine(weight, 0.0, total_steps)  # λ/2 (1 + cos(π t / T))
        super().__init__(weight)
        self.reduction = reduction
        self.entropy = self.normalized_entropy = None

    def penalty(self, scores: Float[Tensor, "..."], mask: Bool[Tensor, "..."] | None = None) -> Float[Tensor, ""]:
        """Negative entropy of attention.

        Args:
            scores: raw scores of a batch, ``(bags, instances)`` or ``(bags, rows, instances)``, as the models return them.
            mask: True where an instance is real, ``(bags, instances)``.

        Raises:
            ValueError: the scores are no batch of bags, or hold no instance.
        """
        if scores.ndim < 2 or scores.numel() == 0:
            raise ValueError(
                f"scores must have shape (bags, ..., instances) and hold an instance, got {tuple(scores.shape)}"
            )
        real = None if mask is None else _for_every_row(mask, scores, -1)
        rows = entropy(scores, real)
        self.entropy = rows.detach().mean()
        self.normalized_entropy = _relative(rows.detach(), real, scores.shape[-1]).mean()
        mean = rows.mean()  # over the rows of a bag, never their sum, and over the bags
        return -mean if self.reduction == "mean" else -mean * len(scores)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, reduction={self.reduction!r}"


def _relative(value: Tensor, real: Tensor | None, instances: int) -> Tensor:
    """``value`` over its maximum, the logarithm of the number of instances; 1 where there is one instance only."""
    if real is None:
        return value / math.log(instances) if instances > 1 else value + 1.0  # the entropy of one is 0
    count = real.sum(-1).to(value.dtype)
    return torch.where(count > 1, value / count.clamp(min=2).log(), 1.0)


def _for_every_row(mask: Tensor, scores: Tensor, dim: int) -> Tensor:
    """``mask`` in the number of dimensions of ``scores``. Plain broadcasting would take (bags, instances) for (rows, instances)."""
    per_bag = (scores.shape[0], scores.shape[-1])
    if mask.ndim == scores.ndim and mask.movedim(dim, -1).shape == scores.shape:
        return mask.movedim(dim, -1)
    if tuple(mask.shape) == per_bag:
        return mask.reshape(per_bag[0], *[1] * (scores.ndim - 2), per_bag[1])
    raise ValueError(
        f"mask must be (bags, instances) = {per_bag} or of the shape of the scores {tuple(scores.shape)}, got {tuple(mask.shape)}"
    )
