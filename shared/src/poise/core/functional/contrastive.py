r"""Contrastive losses: views of one sample are alike, views of different samples are not.

>>> import torch
>>> a, b = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[2.0, 0.0], [0.0, 3.0]])
>>> round(nt_xent(a, b, temperature=0.1).item(), 4)  # each view has its own direction
0.0001
>>> round(nt_xent(a, b.flip(0), temperature=0.1).item(), 4)  # each view has that of the other sample
10.0001
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy

from poise.core.functional._numerics import full_precision, safe_ratio, widen
from poise.core.functional.norms import l2


def nt_xent(
    z1: Float[Tensor, "samples features"], z2: Float[Tensor, "samples features"], temperature: float = 0.5
) -> Float[Tensor, ""]:
    r"""Normalized temperature-scaled cross-entropy between two views of the same samples.

    Of the 2B views, each one has to pick its partner among the 2B - 1 others by cosine similarity:

    .. math:: L = -\frac{1}{2B} \sum_{i=1}^{2B} \log
        \frac{\exp(\cos(z_i, z_{p(i)}) / \tau)}{\sum_{j \ne i} \exp(\cos(z_i, z_j) / \tau)}

    Exchanging the views changes nothing. For a single sample there is nothing to tell its partner from: 0. A zero vector has no
    direction; its cosine with everything is 0, with gradient 0.

    Args:
        z1: one row per sample.
        z2: another view of the same samples, in the same order.
        temperature: :math:`\tau`; the smaller, the more the hardest negative counts.

    Returns:
        A scalar from 0 on; float32 for half types.

    Raises:
        ValueError: not two matrices of the same shape, no sample, or a temperature that is not positive.
        TypeError: ``z1`` or ``z2`` is not floating-point.

    Source:
        Chen, Kornblith, Norouzi and Hinton, "A Simple Framework for Contrastive Learning of Visual Representations", ICML 2020,
        eq. 1.
    """
    if z1.ndim != 2 or z1.shape != z2.shape or len(z1) == 0:
        raise ValueError(
            f"z1 and z2 must be (samples, features) of the same shape, got {tuple(z1.shape)} and {tuple(z2.shape)}"
        )
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    views = torch.cat([widen(z1, "z1"), widen(z2, "z2")])
    directions = safe_ratio(views, l2(views, 1).unsqueeze(1))
    with full_precision(views):
        similarity = directions @ directions.T / temperature
    count = len(views)
    similarity = similarity.masked_fill(torch.eye(count, dtype=torch.bool, device=views.device), -math.inf)
    partners = torch.arange(count, device=views.device).roll(count // 2)
    return cross_entropy(similarity, partners)
