r"""TransMIL: a transformer over the instances of a bag, read out at a class token.

Shao et al., "TransMIL: Transformer based Correlated Multiple Instance Learning for Whole Slide Image Classification", NeurIPS 2021,
arXiv 2106.00908.

Instances are embedded and laid out row by row on the smallest square that holds them (the first ones again where it is not full).
Two layers of landmark attention with a block of convolutions on that square between them (PPEG); the class token is classified.

The attention read here is that of the class token to the instances in the last layer: its exact scores, since the row that the
landmarks approximate has negative entries and no entropy.

>>> import torch
>>> model = TransMIL(in_dim=384, hidden=64, num_classes=2).eval()
>>> logits, scores = model(torch.randn(1, 500, 384), return_attention=True)
>>> logits.shape, scores.shape
(torch.Size([1, 2]), torch.Size([1, 8, 500]))
"""

import math
from typing import cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import conv2d, pad

from poise.medical.mil.bags import check_bags
from poise.medical.mil.nystrom import NystromAttention
from poise.medical.mil.reading import BagModel, Reading


class TransMIL(BagModel):
    """The transformer; memory is linear in the number of instances times ``landmarks``.

    Bags of different size in one padded batch get squares and landmarks of their own: what each would get alone.

    Args:
        in_dim: features of an instance.
        hidden: width of a token, divisible by ``heads``.
        num_classes: classes of a bag.
        heads: of the attention.
        landmarks: half of ``hidden`` by default.
        dropout: of the output of each attention layer.
    """

    def __init__(
        self,
        in_dim: int,
        hidden: int = 512,
        num_classes: int = 2,
        *,
        heads: int = 8,
        landmarks: int | None = None,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(in_dim, hidden)
        self.class_token = nn.Parameter(torch.randn(hidden))
        self.norms = nn.ModuleList(nn.LayerNorm(hidden) for _ in range(2))
        self.layers = nn.ModuleList(
            NystromAttention(hidden, heads, landmarks=landmarks, dropout=dropout) for _ in range(2)
        )
        self.position = PositionConvolutions(hidden)
        self.norm = nn.LayerNorm(hidden)
        self.classifier = nn.Linear(hidden, num_classes)

    def read(self, bags: Float[Tensor, "..."], mask: Bool[Tensor, "..."] | None = None) -> Reading:
        check_bags(bags, mask, self.embed.in_features)
        instances = self.embed(bags).relu()
        if mask is None:
            order, sizes = None, torch.full((len(bags),), bags.shape[1], device=bags.device)
        else:
            order, sizes = (~mask).long().argsort(dim=1, stable=True), mask.sum(1)  # real instances first
            instances = instances.gather(1, order.unsqueeze(-1).expand_as(instances))
        square, sides = on_square(instances, sizes)
        lengths = sides**2 + 1
        tokens = torch.cat([self.class_token.expand(len(bags), 1, -1), square], 1)
        tokens = tokens + self.layers[0](self.norms[0](tokens), lengths)[0]
        tokens = torch.cat([tokens[:, :1], self.position(tokens[:, 1:], sides)], 1)
        attended, scores = self.layers[1](self.norms[1](tokens), lengths)
        logits = self.classifier(self.norm(tokens[:, 0] + attended[:, 0]))
        scores = scores[..., 1 : bags.shape[1] + 1]
        if order is not None:
            scores = torch.zeros_like(scores).scatter(2, order.unsqueeze(1).expand_as(scores), scores)
        return Reading(logits, scores, streams=(logits,))


class PositionConvolutions(nn.Module):
    """Pyramid position encoding (PPEG): depthwise convolutions of 7, 5 and 3 on the square, added to it.

    Being linear, the three are applied as one kernel of 7.

    Source:
        Shao et al. 2021, section 3.3 and algorithm 3.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.seven, self.five, self.three = (nn.Conv2d(dim, dim, size, groups=dim) for size in (7, 5, 3))

    def forward(
        self, tokens: Float[Tensor, "bags cells dim"], sides: Int[Tensor, "bags"]
    ) -> Float[Tensor, "bags cells dim"]:
        """Convolve the first ``sides**2`` tokens of each bag, row by row on its square; the others pass as they are."""
        _, cells, dim = tokens.shape
        largest = math.isqrt(cells)
        place = torch.arange(cells, device=tokens.device)
        side = sides[:, None]
        # Each square lies in the corner of the largest one, zeros around it; what is beyond it goes to a spare last cell.
        cell = torch.where(place < side**2, place // side * largest + place % side, cells)
        index = cell.unsqueeze(-1).expand_as(tokens)
        canvas = tokens.new_zeros(len(tokens), cells + 1, dim).scatter(1, index, tokens)
        plane = canvas[:, :cells].mT.unflatten(2, (largest, largest))
        kernel = self.seven.weight + pad(self.five.weight, (1, 1, 1, 1)) + pad(self.three.weight, (2, 2, 2, 2))
        bias = cast(Tensor, self.seven.bias) + cast(Tensor, self.five.bias) + cast(Tensor, self.three.bias)
        moved = conv2d(plane, kernel, bias, padding=3, groups=dim).flatten(2).mT
        return tokens + pad(moved, (0, 0, 0, 1)).gather(1, index)


def on_square(
    instances: Float[Tensor, "bags instances dim"], sizes: Int[Tensor, "bags"]
) -> tuple[Float[Tensor, "bags cells dim"], Int[Tensor, "bags"]]:
    """Fill the smallest square that holds each bag, beginning anew where instances run out, and tell its side.

    Cells beyond the square of a smaller bag are zero.
    """
    largest = math.isqrt(instances.shape[1] - 1) + 1
    sides = (sizes - 1).double().sqrt().floor().long() + 1  # exact: sizes are far below 2**52
    cell = torch.arange(largest**2, device=instances.device).expand(len(instances), -1)
    source = torch.where(cell < sizes[:, None], cell, cell - sizes[:, None])
    used = cell < sides[:, None] ** 2
    source = torch.where(used, source, 0).unsqueeze(-1).expand(-1, -1, instances.shape[2])
    return instances.gather(1, source) * used.unsqueeze(-1), sides
