"""Give one image the colours of another by transport between their palettes.

The palettes are found by k-means; every pixel moves as its palette colour moves, to the barycentre of where the plan sends it
(Ferradans, Papadakis, Peyré and Aujol, Regularized Discrete Optimal Transport, SIAM J. Imaging Sciences 2014; Liu et al. 2023, colour
transfer experiment).

>>> import torch
>>> from poise.ot import color_transfer
>>> dark, bright = 0.4 * torch.rand(3, 32, 32), 0.6 + 0.4 * torch.rand(3, 32, 32)
>>> moved = color_transfer(dark, bright, n_colors=8, k=2)
>>> moved.shape, bool(moved.mean() > 0.6)
(torch.Size([3, 32, 32]), True)
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from poise.ot.sparse.recovery import recover_plan
from poise.ot.sparse.sparse_ot import sparsity_constrained_ot

CHUNK = 1 << 22
"""Distances computed at a time when pixels look for their palette colour."""

KMEANS_STEPS = 50
EMPTY = 1e-9
"""Mass of a palette colour that no pixel has, so that all masses are positive."""


class Palette(NamedTuple):
    """Colours (n, channels) and the share of pixels that each one stands for."""

    colors: Float[Tensor, "n channels"]
    weights: Float[Tensor, "n"]


def color_transfer(
    image1: Float[Tensor, "..."],
    image2: Float[Tensor, "..."],
    n_colors: int = 256,
    k: int = 4,
    gamma: float = 1.0,
    *,
    sample: int = 4_000,
    keep_detail: bool = True,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "..."]:
    """``image1`` in the colours of ``image2``.

    Args:
        image1: (channels, height, width) in [0, 1].
        image2: (channels, any height, any width) in [0, 1].
        n_colors: size of both palettes.
        k: target colours per source colour at most, where the marginals allow it.
        gamma: strength of the quadratic term.
        sample: pixels of each image that k-means sees.
        keep_detail: shift every pixel by what its palette colour moves; else replace it by the image of that colour.
        generator: of the pixels sampled and the first centres, on the CPU; default a generator seeded with 0.

    Returns:
        An image shaped like ``image1``, in [0, 1].

    Raises:
        TypeError: an image is not floating-point.
        ValueError: shapes do not fit, an entry is outside [0, 1], or there are fewer pixels than colours.
    """
    for name, image in (("image1", image1), ("image2", image2)):
        _check(name, image)
    if image1.shape[0] != image2.shape[0]:
        raise ValueError(f"both images need the same channels, got {image1.shape[0]} and {image2.shape[0]}")
    if generator is None:
        generator = torch.Generator().manual_seed(0)
    source, target = (image.flatten(1).T.double() for image in (image1, image2))
    one, two = (palette(pixels, n_colors, sample=sample, generator=generator) for pixels in (source, target))
    cost = torch.cdist(one.colors, two.colors).square()
    # every source colour is a column, so that the cap is on where it may go
    result = sparsity_constrained_ot(two.weights, one.weights, cost.mT, k, gamma)
    plan = recover_plan(result)
    moved = (plan.mT @ two.colors) / plan.sum(0)[:, None]
    nearest = nearest_color(source, one.colors)
    pixels = source + (moved - one.colors)[nearest] if keep_detail else moved[nearest]
    return pixels.clamp(0, 1).T.reshape(image1.shape).to(image1.dtype)


def palette(
    pixels: Float[Tensor, "pixels channels"], n_colors: int, *, sample: int = 4_000, generator: torch.Generator
) -> Palette:
    """``n_colors`` centres of random pixels by k-means, with k-means++ seeding.

    Raises:
        ValueError: ``n_colors`` is below 1 or there are fewer pixels.
    """
    if not 1 <= n_colors <= len(pixels):
        raise ValueError(f"n_colors must lie in 1..{len(pixels)}, the number of pixels, got {n_colors}")
    rows = torch.randperm(len(pixels), generator=generator)[: max(sample, n_colors)]
    seen = pixels[rows.to(pixels.device)]
    colors = _spread_out(seen, n_colors, generator)
    for _ in range(KMEANS_STEPS):
        member = nearest_color(seen, colors)
        counts = torch.bincount(member, minlength=n_colors).to(seen)
        sums = torch.zeros_like(colors).index_add_(0, member, seen)
        moved = torch.where(counts[:, None] > 0, sums / counts[:, None].clamp_min(1), colors)
        if torch.equal(moved, colors):
            break
        colors = moved
    weights = torch.bincount(nearest_color(seen, colors), minlength=n_colors).to(seen) + EMPTY
    return Palette(colors, weights / weights.sum())


def nearest_color(pixels: Float[Tensor, "pixels channels"], colors: Float[Tensor, "n channels"]) -> Tensor:
    """The number of the nearest colour of every pixel, in bounded memory."""
    parts = pixels.split(max(1, CHUNK // len(colors)))
    return torch.cat([torch.cdist(part, colors).argmin(1) for part in parts])


def _spread_out(pixels: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Arthur and Vassilvitskii 2007: each next centre is a pixel drawn in proportion to its squared distance from the others."""
    chosen = pixels[:1]
    distance = (pixels - chosen).square().sum(1)
    while len(chosen) < count:
        total = distance.cumsum(0)
        draw = torch.rand((), generator=generator, dtype=torch.float64).to(pixels) * total[-1]
        row = torch.searchsorted(total, draw.reshape(1)).clamp_max(len(pixels) - 1)
        chosen = torch.cat([chosen, pixels[row]])
        distance = torch.minimum(distance, (pixels - pixels[row]).square().sum(1))
    return chosen


def _check(name: str, image: Tensor) -> None:
    if not image.is_floating_point():
        raise TypeError(f"{name} must be floating-point with entries in [0, 1], got {image.dtype}")
    if image.ndim != 3 or image.numel() == 0:
        raise ValueError(f"{name} must have shape (channels, height, width), got {tuple(image.shape)}")
    low, high = (float(bound) for bound in image.detach().aminmax())
    if not (low >= 0 and high <= 1):
        raise ValueError(f"{name} must lie in [0, 1], got entries from {low:g} to {high:g}")
