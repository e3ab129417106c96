r"""How far representations point the same way, and how far their features repeat each other.

>>> import torch
>>> student, teacher = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[3.0, 0.0], [1.0, 0.0]])
>>> cosine_alignment(student, teacher).mean().item()
-0.5
>>> features = torch.tensor([[1.0, 1.0, 1.0], [-1.0, -1.0, 1.0], [1.0, 1.0, -1.0], [-1.0, -1.0, -1.0]])
>>> decorrelation(features).item()  # the first two features are the same
2.0
"""

import torch
from jaxtyping import Float
from torch import Tensor

from poise.core.functional._numerics import full_precision, safe_ratio, safe_sqrt, widen
from poise.core.functional.norms import l2, squared_l2


def cosine_alignment(x: Float[Tensor, "..."], y: Float[Tensor, "..."], dim: int = -1) -> Float[Tensor, "..."]:
    r"""Negative cosine similarity :math:`-\langle x, y \rangle / (\|x\| \|y\|)`, from -1 (aligned) to 1 (opposed).

    Gradients flow into both; detach the one that is a target. A zero vector has no direction: it gives 0 with
    gradient 0, where ``torch.cosine_similarity`` gives a gradient of size 1 / eps.

    Args:
        x: vectors along ``dim``.
        y: vectors of the same shape.
        dim: the feature dimension.

    Returns:
        One value per pair: the shape of ``x`` without ``dim``.

    Raises:
        ValueError: the shapes differ.
        TypeError: ``x`` or ``y`` is not floating-point.

    Source:
        Chen and He, "Exploring Simple Siamese Representation Learning", CVPR 2021, eq. 1; for hidden states of a denoiser: Yu et
        al., "Representation Alignment for Generation", ICLR 2025, arXiv 2410.06940.
    """
    if x.shape != y.shape:
        raise ValueError(f"x and y must have the same shape, got {tuple(x.shape)} and {tuple(y.shape)}")
    wide_x, wide_y = widen(x, "x"), widen(y, "y")
    return -safe_ratio((wide_x * wide_y).sum(dim), l2(wide_x, dim) * l2(wide_y, dim))


def cross_correlation(
    x: Float[Tensor, "samples features_x"], y: Float[Tensor, "samples features_y"]
) -> Float[Tensor, "features_x features_y"]:
    r"""Correlation over the samples of every feature of x with every feature of y,

    .. math:: C_{ij} = \frac{\sum_b (x_{bi} - \bar x_i)(y_{bj} - \bar y_j)}
        {\sqrt{\sum_b (x_{bi} - \bar x_i)^2} \sqrt{\sum_b (y_{bj} - \bar y_j)^2}} \in [-1, 1]

    Args:
        x: one row per sample.
        y: the same samples; ``x`` itself for the auto-correlation.

    Returns:
        The correlation matrix. A constant feature correlates with nothing: 0, with gradient 0.

    Raises:
        ValueError: not matrices with the same number of rows, or fewer than two rows.
        TypeError: ``x`` or ``y`` is not floating-point.

    Source:
        Zbontar et al., "Barlow Twins: Self-Supervised Learning via Redundancy Reduction", ICML 2021, eq. 2, with the features
        centred as its section 2.1 says.
    """
    unit_x, unit_y = _standardized_pair(x, y)
    with full_precision(unit_x):
        return unit_x.T @ unit_y


def decorrelation(
    x: Float[Tensor, "samples features"], y: Float[Tensor, "samples features"] | None = None
) -> Float[Tensor, ""]:
    r"""Redundancy of features: the sum of squared correlations off the diagonal, :math:`\sum_{i \ne j} C_{ij}^2`.

    Features of one set (auto-correlation) or of two views of the same samples (cross-correlation). With fewer than
    half as many samples as features, the features x features matrix is not built:
    :math:`\|X^\top Y\|_F^2 = \langle X X^\top, Y Y^\top \rangle`.

    Args:
        x: one row per sample.
        y: a second view of the same samples and features; ``x`` itself by default.

    Returns:
        A scalar, 0 when no two different features correlate.

    Raises:
        ValueError: not matrices of the same shape, or fewer than two rows.
        TypeError: ``x`` or ``y`` is not floating-point.

    Source:
        second term of Zbontar et al., "Barlow Twins", ICML 2021, eq. 1; within one set: Cogswell et al., "Reducing Overfitting in
        Deep Networks by Decorrelating Representations", ICLR 2016, which uses covariances and a factor 1/2.
    """
    other = x if y is None else y
    if x.shape != other.shape:
        raise ValueError(f"x and y must have the same shape, got {tuple(x.shape)} and {tuple(other.shape)}")
    unit_x, unit_y = _standardized_pair(x, other)
    samples, features = unit_x.shape
    with full_precision(unit_x):
        if 2 * samples > features:
            return (unit_x.T @ unit_y).fill_diagonal_(0).square().sum()
        total = ((unit_x @ unit_x.T) * (unit_y @ unit_y.T)).sum()
    return total - (unit_x * unit_y).sum(0).square().sum()


def _standardized_pair(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y) or len(x) < 2:
        raise ValueError(
            "x and y must be (samples, features) with the same two or more samples, "
            f"got {tuple(x.shape)} and {tuple(y.shape)}"
        )
    return _standardize(widen(x, "x")), _standardize(widen(y, "y"))


def _standardize(x: Tensor) -> Tensor:
    """Features centred over the samples and of unit norm; one that varies by no more than its mean's rounding is 0."""
    centred = x - x.mean(0)
    rounding = (10 * torch.finfo(x.dtype).eps) ** 2 * squared_l2(x.detach(), 0)
    return safe_ratio(centred, safe_sqrt(squared_l2(centred, 0), floor=rounding))
