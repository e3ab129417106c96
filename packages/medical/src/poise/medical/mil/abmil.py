r"""Attention-based multiple-instance learning (ABMIL), for whole slides as frozen features.

Ilse, Tomczak and Welling, "Attention-based Deep Multiple Instance Learning", ICML 2018, arXiv 1802.04712.

.. math:: H = \mathrm{ReLU}(X W_d), \qquad z = \mathrm{pool}(H), \qquad \text{logits} = W_c z + b_c

>>> import torch
>>> model = ABMIL(in_dim=384, hidden=128, num_classes=2, attention="multihead")
>>> logits, scores = model(torch.randn(1, 500, 384), return_attention=True)
>>> logits.shape, scores.shape
(torch.Size([1, 2]), torch.Size([1, 8, 500]))
"""

from jaxtyping import Bool, Float
from torch import Tensor, nn

from poise.core.gpu import chunked_map
from poise.medical.mil.attention import AttentionPooling, GatedAttention, QueryAttention, instance_softmax
from poise.medical.mil.bags import check_bags
from poise.medical.mil.reading import BagModel, Reading


class ABMIL(BagModel):
    """Embed, pool by attention, classify.

    Args:
        in_dim: features of an instance.
        hidden: width of the embedding.
        num_classes: classes of a bag.
        attention: ``"gated"`` or ``"plain"`` (:class:`GatedAttention`), or ``"multihead"`` (:class:`QueryAttention`).
        att_dim: width of gated or plain attention.
        heads: of multi-head attention.
        dropout: of multi-head attention.
        chunk: instances that are embedded at a time. With it, memory does not grow with the bag beyond the bag itself: embeddings
            are computed again when they are needed, also in the backward pass, for about twice the time.

    Raises:
        ValueError: an unknown mechanism, or ``heads`` does not divide ``hidden``.
    """

    def __init__(
        self,
        in_dim: int,
        hidden: int = 128,
        num_classes: int = 2,
        attention: str = "gated",
        *,
        att_dim: int = 128,
        heads: int = 8,
        dropout: float = 0.1,
        chunk: int | None = None,
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(in_dim, hidden, bias=False)
        self.attention: AttentionPooling
        if attention == "multihead":
            self.attention = QueryAttention(hidden, heads, dropout)
        elif attention in ("gated", "plain"):
            self.attention = GatedAttention(hidden, att_dim, gated=attention == "gated")
        else:
            raise ValueError(f"attention must be 'gated', 'plain' or 'multihead', got {attention!r}")
        self.classifier = nn.Linear(hidden, num_classes)
        self.chunk = chunk

    def read(self, bags: Float[Tensor, "..."], mask: Bool[Tensor, "..."] | None = None) -> Reading:
        check_bags(bags, mask, self.embed.in_features)
        if self.chunk is None:
            scores, _, pooled = self.attention(self.embedded(bags), mask)
        else:
            scores, pooled = self._in_chunks(bags, mask)
        logits = self.classifier(pooled.flatten(1))
        return Reading(logits, scores, streams=(logits,))

    def embedded(self, bags: Float[Tensor, "bags instances features"]) -> Float[Tensor, "bags instances hidden"]:
        """The instances as attention sees them."""
        return self.embed(bags).relu()

    def _in_chunks(self, bags: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        def score(part: Tensor) -> Tensor:
            return self.attention.score(self.embedded(part))

        def gather(part: Tensor, weights: Tensor) -> Tensor:
            return self.attention.gather(self.embedded(part), weights).unsqueeze(1)

        scores = chunked_map(score, bags, chunk=self.chunk, dim=1, recompute=True)
        weights = instance_softmax(scores, mask)
        sums = chunked_map(gather, bags, weights, chunk=self.chunk, dim=1, recompute=True)  # one sum per chunk
        return scores.mT, self.attention.finish(sums.sum(1))
