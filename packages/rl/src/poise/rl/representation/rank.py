r"""How many directions a representation uses.

>>> import torch
>>> features = torch.randn(1_024, 8, generator=torch.Generator().manual_seed(0)) @ torch.diag(torch.tensor([1.0] * 4 + [0.0] * 4))
>>> int(representation_rank(features))
4
"""

from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor


@torch.no_grad()
def representation_rank(
    features: Float[Tensor, "..."], delta: float = 0.01, method: Literal["svd", "gram"] = "svd"
) -> Int64[Tensor, ""]:
    r"""The least number of singular values that make up a share :math:`1 - \delta` of their sum.

    .. math:: \min\{k : \textstyle\sum_{i \le k} \sigma_i \ge (1 - \delta) \sum_i \sigma_i\}

    See :func:`poise.core.functional.effective_rank` and :func:`~poise.core.functional.stable_rank` for smooth ones.

    Args:
        features: Φ (n, d), a row per state-action pair.
        delta: δ, in [0, 1).
        method: ``"svd"``, or ``"gram"``, eigenvalues of the smaller Gram matrix in float64, which is faster where n and d differ a lot.

    Returns:
        The rank, 0 for a matrix of zeros.

    Raises:
        ValueError: not a matrix with entries, all of them finite, δ out of range, or an unknown method.

    Source:
        Kumar et al., "Implicit Under-Parameterization Inhibits Data-Efficient Deep Reinforcement Learning", ICLR 2021; He et al. 2024.
    """
    if features.ndim != 2 or features.numel() == 0 or not 0 <= delta < 1 or method not in ("svd", "gram"):
        raise ValueError(
            "expected features (n, d), delta in [0, 1) and method 'svd' or 'gram', got "
            f"{tuple(features.shape)}, {delta} and {method!r}"
        )
    matrix = features.double()
    try:
        values = torch.linalg.svdvals(matrix) if method == "svd" else _roots_of_gram(matrix)
    except torch.linalg.LinAlgError as error:
        raise ValueError(f"no singular values of features of shape {tuple(features.shape)}: {error}") from error
    shares = values.cumsum(0)
    # A tie to rounding counts as reached, so that the identity of size d has rank ceil((1 - delta) d).
    return (shares < (1 - delta) * shares[-1] * (1 - 1e-12)).sum() + (shares[-1] > 0)


def _roots_of_gram(matrix: Float[Tensor, "n d"]) -> Float[Tensor, " values"]:
    """The singular values by the smaller Gram matrix."""
    tall = matrix.shape[0] >= matrix.shape[1]
    squares = torch.linalg.eigvalsh(matrix.mT @ matrix if tall else matrix @ matrix.mT).flip(0)
    # What is below the precision of the largest eigenvalue is rounding, whose square root would not be small.
    return torch.where(squares > squares[:1] * 1e-13, squares, 0.0).clamp_min(0).sqrt()
