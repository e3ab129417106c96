r"""How fine-tuning changed a weight, seen through its singular value decomposition.

.. math:: \Delta\Sigma = \frac1k \sum_{i \le k} |\sigma_i - \sigma_i^0|, \qquad
          \Delta D = 1 - \frac{1}{2k} \sum_{i \le k} \big( |\langle u_i, u_i^0 \rangle| + |\langle v_i, v_i^0 \rangle| \big)

>>> import torch
>>> before = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
>>> change = singular_change(before, 2 * before, k=4)
>>> change.direction < 1e-6, torch.allclose(change.sigma, torch.linalg.svdvals(before)[:4].mean())
(tensor(True), True)
"""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from poise.core.adapters.svd import truncated_svd


class SingularChange(NamedTuple):
    """Mean change of the singular values, and of the directions of their vectors (0 none, 1 orthogonal)."""

    sigma: Float[Tensor, ""]
    direction: Float[Tensor, ""]


@torch.no_grad()
def singular_change(
    before: Float[Tensor, "_ _"],
    after: Float[Tensor, "_ _"],
    k: int,
    match: Literal["index", "hungarian"] | str = "index",
) -> SingularChange:
    """Compare the k leading singular triplets of two weights.

    Args:
        before: the pretrained weight.
        after: the tuned weight.
        k: number of triplets, from 1 to the smaller side.
        match: ``"index"``: the i-th against the i-th, as in the paper. ``"hungarian"``: pair the triplets so that their directions
            agree best, for spectra whose neighbours swap places; needs SciPy.

    Raises:
        ValueError: the shapes differ, k is out of range, or ``match`` is unknown.
        ModuleNotFoundError: ``match="hungarian"`` without SciPy.

    Source:
        Cao 2024, section 3. How the two sides are averaged is not stated there; here both count half.
    """
    if before.shape != after.shape:
        raise ValueError(
            f"before and after must have the same shape, got {tuple(before.shape)} and {tuple(after.shape)}"
        )
    if match not in ("index", "hungarian"):
        raise ValueError(f"match must be 'index' or 'hungarian', got {match!r}")
    old, new = truncated_svd(before, k), truncated_svd(after, k)
    order = (
        torch.arange(k, device=before.device) if match == "index" else _assignment(old.u.mT @ new.u, old.vh @ new.vh.mT)
    )
    sigma = (new.s[order] - old.s).abs().mean()
    sides = _angle(old.u.mT, new.u.mT[order]), _angle(old.vh, new.vh[order])
    return SingularChange(sigma, torch.cat(sides).mean())


def _angle(a: Tensor, b: Tensor) -> Tensor:
    """1 - |<a, b>| of unit vectors, as half the squared distance to the nearer of b and -b: exactly 0 where they are equal."""
    distance = torch.minimum((a - b).square().sum(-1), (a + b).square().sum(-1))
    return (distance / 2).clamp_max(1.0)


def _assignment(left: Tensor, right: Tensor) -> Tensor:
    """For every old triplet the new one that it is paired with."""
    try:
        from scipy.optimize import linear_sum_assignment
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "match='hungarian' needs SciPy: pip install 'poise-core[lab]', or pip install scipy"
        ) from error
    cosines = (left.abs() + right.abs()).double().cpu().numpy()
    return torch.as_tensor(linear_sum_assignment(cosines, maximize=True)[1], device=left.device)
