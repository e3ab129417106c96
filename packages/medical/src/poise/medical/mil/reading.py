"""What a multiple-instance model says of its bags and where it looked: one form for every model.

>>> import torch
>>> from poise.medical import DSMIL, AttentionEntropyLoss
>>> model, aem = DSMIL(in_dim=16, num_classes=3), AttentionEntropyLoss(weight=0.1)
>>> bags, labels = torch.randn(4, 20, 16), torch.tensor([0, 2, 1, 0])
>>> reading = model.read(bags)
>>> loss = reading.loss(labels) + aem(reading.scores)
>>> reading.scores.shape  # DSMIL has a row of attention for every class
torch.Size([4, 3, 20])
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy


class Reading(NamedTuple):
    """A model's answer to a batch of bags.

    Attributes:
        logits: of the prediction ``(bags, classes)``; their softmax is the predicted distribution.
        scores: raw attention scores, before the softmax ``(bags, rows, instances)``, with a row for every head, branch or class.
            Scores of padding mean nothing: use the mask.
        streams: the logits that are trained, each ``(bags, classes)``: the prediction itself for most models, two for DSMIL.
        instance_logits: of every instance ``(bags, instances, classes)``, if the model has them.
    """

    logits: Tensor
    scores: Tensor
    streams: tuple[Tensor, ...]
    instance_logits: Tensor | None = None

    def loss(self, labels: Int[Tensor, "bags"]) -> Float[Tensor, ""]:
        """The bag loss: cross-entropy, the mean over the streams.

        Raises:
            ValueError: a label is not one of the classes (not checked under ``torch.compile``).
        """
        classes = self.logits.shape[1]
        if not torch.compiler.is_compiling() and bool(((labels < 0) | (labels >= classes)).any()):
            raise ValueError(f"labels must lie in 0..{classes - 1}, got {sorted(set(labels.tolist()))}")
        return sum(
            (cross_entropy(stream, labels) for stream in self.streams[1:]), cross_entropy(self.streams[0], labels)
        ) / len(self.streams)

    def weights(self, mask: Bool[Tensor, "bags instances"] | None = None) -> Float[Tensor, "bags rows instances"]:
        """Attention weights: the softmax of the scores over the real instances."""
        scores = self.scores if mask is None else self.scores.masked_fill(~mask.unsqueeze(1), -torch.inf)
        return scores.softmax(-1)


class BagModel(nn.Module):
    """Base of the models here, and of the wrappers around those of other libraries. A subclass writes :meth:`read`."""

    def read(self, bags: Float[Tensor, "..."], mask: Bool[Tensor, "..."] | None = None) -> Reading:
        """Prediction and attention.

        Args:
            bags: features ``(bags, instances, features)``.
            mask: True where an instance is real ``(bags, instances)``.

        Raises:
            ValueError: empty bags, a bag without a real instance, or shapes that do not fit.
        """
        raise NotImplementedError(f"{type(self).__name__} must define read()")

    def forward(
        self, bags: Float[Tensor, "..."], mask: Bool[Tensor, "..."] | None = None, return_attention: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The logits of the prediction, and with ``return_attention`` the raw scores ``(bags, rows, instances)`` too.

        Train on :meth:`read`, whose ``loss`` knows what a model trains: DSMIL does not train its prediction but two streams.
        """
        reading = self.read(bags, mask)
        return (reading.logits, reading.scores) if return_attention else reading.logits
