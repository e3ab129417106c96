"""Convex combinations of the rows of a batch, the same for inputs, labels and remembered targets.

>>> import torch
>>> mix = Mix(partner=torch.tensor([1, 0]), share=0.75)
>>> mix(torch.tensor([[0.0], [4.0]])).tolist()
[[1.0], [3.0]]
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Mix:
    r"""Maps each row :math:`x_i` of a batch to :math:`l\,x_i + (1 - l)\,x_{\pi(i)}`.

    Attributes:
        partner: the other row, :math:`\pi`.
        share: weight of the row itself, :math:`l` in [0, 1], one for all rows or one for each.
    """

    partner: Int[Tensor, " batch"]
    share: float | Float[Tensor, " batch"]

    def __call__(self, rows: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
        """The mixed rows.

        Raises:
            ValueError: there are not as many rows as partners.
        """
        if len(rows) != len(self.partner):
            raise ValueError(f"expected {len(self.partner)} rows, one for each partner, got {len(rows)}")
        share = self.share
        if isinstance(share, Tensor):
            share = share.to(rows).view(-1, *[1] * (rows.dim() - 1))
        return share * rows + (1 - share) * rows[self.partner.to(rows.device)]


def draw_mix(batch: int, alpha: float, generator: torch.Generator, *, own_share_larger: bool = True) -> Mix:
    r"""Draw a mixup: :math:`l' \sim Beta(\alpha, \alpha)` for the batch, partners by a random permutation.

    Args:
        batch: number of rows.
        alpha: of the Beta distribution; 1 is uniform, 0 mixes nothing.
        generator: where the draws come from; the partners are on its device.
        own_share_larger: use :math:`l = \max(l', 1 - l')`, so that a row outweighs its partner, as MixMatch and ELR+ do.

    Raises:
        ValueError: ``batch`` or ``alpha`` is negative.

    Source:
        Zhang et al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018; the maximum: Berthelot et al., "MixMatch",
    NeurIPS 2019, eq. 9.
    """
    if alpha < 0:
        raise ValueError(f"alpha must not be negative, got {alpha}")
    if batch < 0:
        raise ValueError(f"batch must not be negative, got {batch}")
    partner = torch.randperm(batch, generator=generator, device=generator.device)
    # torch draws no Beta variable from a generator of one's own
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    share = float(np.random.default_rng(seed).beta(alpha, alpha)) if alpha else 1.0
    return Mix(partner, max(share, 1 - share) if own_share_larger else share)
