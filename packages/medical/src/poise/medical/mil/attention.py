r"""Attention pooling: one feature for a whole bag, the mean of its instances under weights that the instances choose.

Ilse, Tomczak and Welling, "Attention-based Deep Multiple Instance Learning", ICML 2018, arXiv 1802.04712 (plain and gated); a
learned query with several heads as in Zhang et al., arXiv 2406.15303.

.. math:: e_n = w^\top \tanh(V h_n) \quad\text{or}\quad w^\top (\tanh(V h_n + b_V) \odot \sigma(U h_n + b_U)) + b, \qquad
          z = \sum_n \mathrm{softmax}(e)_n h_n

>>> import torch
>>> pool = GatedAttention(in_dim=16)
>>> scores, weights, pooled = pool(torch.randn(2, 30, 16))
>>> scores.shape, pooled.shape
(torch.Size([2, 1, 30]), torch.Size([2, 1, 16]))
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from poise.medical.mil.bags import check_bags


class Pooled(NamedTuple):
    """What attention pooling gives.

    Attributes:
        scores: raw scores, before the softmax ``(bags, rows, instances)``.
        weights: their softmax over the real instances of each bag, of the same shape.
        pooled: the features of the bag.
    """

    scores: Tensor
    weights: Tensor
    pooled: Tensor


class AttentionPooling(nn.Module):
    """Base of the attention mechanisms: three steps, of which the first two treat instances one by one and can so be taken in chunks.

    :meth:`score` gives each instance its raw scores, :meth:`gather` sums instances under their weights, and :meth:`finish` makes
    that sum the feature of the bag.
    """

    def score(self, instances: Float[Tensor, "bags instances features"]) -> Float[Tensor, "bags instances rows"]:
        """Raw scores of every instance."""
        raise NotImplementedError(f"{type(self).__name__} must define score()")

    def gather(
        self, instances: Float[Tensor, "bags instances features"], weights: Float[Tensor, "bags instances rows"]
    ) -> Float[Tensor, "bags rows width"]:
        """The sum over the instances under their weights; sums over parts of a bag add up to that over the bag."""
        raise NotImplementedError(f"{type(self).__name__} must define gather()")

    def finish(self, gathered: Float[Tensor, "bags rows width"]) -> Float[Tensor, "bags ..."]:
        """From that sum to the feature of the bag."""
        raise NotImplementedError(f"{type(self).__name__} must define finish()")

    def forward(self, instances: Float[Tensor, "..."], mask: Bool[Tensor, "..."] | None = None) -> Pooled:
        """Pool every bag.

        Args:
            instances: features ``(bags, instances, features)``.
            mask: True where an instance is real ``(bags, instances)``.

        Raises:
            ValueError: no instance, a bag without a real one, or a mask that does not fit.
        """
        check_bags(instances, mask)
        scores = self.score(instances)
        weights = instance_softmax(scores, mask)
        pooled = self.finish(self.gather(instances, weights))
        return Pooled(scores.mT, weights.mT, pooled)


class GatedAttention(AttentionPooling):
    r"""The attention of Ilse et al.

    Args:
        in_dim: features of an instance.
        att_dim: rows of V and U.
        branches: sets of scores, each with a pooled feature of its own.
        gated: equation 9, with a sigmoid gate; otherwise equation 8, which has no biases.

    ``pooled`` is ``(bags, branches, in_dim)``.

    Source:
        Ilse et al. 2018, equations 7 to 9.
    """

    def __init__(self, in_dim: int, att_dim: int = 128, branches: int = 1, gated: bool = True) -> None:
        super().__init__()
        self.V = nn.Linear(in_dim, att_dim, bias=gated)
        self.U = nn.Linear(in_dim, att_dim) if gated else None
        self.w = nn.Linear(att_dim, branches, bias=gated)

    def score(self, instances: Float[Tensor, "bags instances features"]) -> Float[Tensor, "bags instances rows"]:
        hidden = self.V(instances).tanh()
        if self.U is not None:
            hidden = hidden * self.U(instances).sigmoid()
        return self.w(hidden)

    def gather(
        self, instances: Float[Tensor, "bags instances features"], weights: Float[Tensor, "bags instances rows"]
    ) -> Float[Tensor, "bags rows width"]:
        return weights.mT @ instances

    def finish(self, gathered: Float[Tensor, "bags rows width"]) -> Float[Tensor, "bags ..."]:
        return gathered


class QueryAttention(AttentionPooling):
    r"""A learned query that attends to the instances with several heads.

    .. math:: e_{mn} = \langle q_m, k_{mn} \rangle / \sqrt{d / M}

    The query starts almost at zero, so attention starts almost even. Dropout acts on the pooled feature, not on the attention.

    Args:
        in_dim: features of an instance, divisible by ``heads``.
        heads: M.
        dropout: of the pooled feature.

    ``pooled`` is ``(bags, in_dim)``.

    Raises:
        ValueError: ``heads`` does not divide ``in_dim``.

    Source:
        Zhang et al. 2024; the layout of heads, the size of the query and the layer norm follow their code.
    """

    def __init__(self, in_dim: int, heads: int = 8, dropout: float = 0.1) -> None:
        super().__init__()
        if in_dim % heads:
            raise ValueError(f"in_dim must be a multiple of heads, got {in_dim} and {heads}")
        self.heads = heads
        self.query = nn.Parameter(torch.empty(in_dim))
        nn.init.normal_(self.query, std=1e-6)
        self.q_proj = nn.Linear(in_dim, in_dim)
        self.k_proj = nn.Linear(in_dim, in_dim)
        self.v_proj = nn.Linear(in_dim, in_dim)
        self.out_proj = nn.Linear(in_dim, in_dim)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(in_dim, eps=1e-6)

    def score(self, instances: Float[Tensor, "bags instances features"]) -> Float[Tensor, "bags instances rows"]:
        query = self.q_proj(self.query).unflatten(-1, (self.heads, -1))
        keys = self.k_proj(instances).unflatten(-1, (self.heads, -1))
        return (keys * query).sum(-1) / math.sqrt(query.shape[-1])

    def gather(
        self, instances: Float[Tensor, "bags instances features"], weights: Float[Tensor, "bags instances rows"]
    ) -> Float[Tensor, "bags rows width"]:
        values = self.v_proj(instances).unflatten(-1, (self.heads, -1))
        return torch.einsum("bnm,bnmd->bmd", weights, values)

    def finish(self, gathered: Float[Tensor, "bags rows width"]) -> Float[Tensor, "bags ..."]:
        return self.norm(self.dropout(self.out_proj(gathered.flatten(1))))


def instance_softmax(
    scores: Float[Tensor, "bags instances rows"], mask: Tensor | None
) -> Float[Tensor, "bags instances rows"]:
    """Softmax over the real instances of each bag; weight 0 for padding."""
    if mask is not None:
        scores = scores.masked_fill(~mask.unsqueeze(-1), -math.inf)
    return scores.softmax(1)
