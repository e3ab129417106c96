"""Attention over a slide: from one weight per tile to a picture on the grid of tiles.

>>> import torch
>>> coords = torch.tensor([[0, 0], [256, 0], [256, 512]])  # x and y in pixels of the slide
>>> tile_grid(torch.tensor([0.2, 0.3, 0.5]), coords)
tensor([[0.2000, 0.3000],
        [   nan,    nan],
        [   nan, 0.5000]])
"""

import math
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def tile_grid(
    values: Float[Tensor, "tiles"], coords: Shaped[Tensor, "tiles 2"], stride: int | None = None
) -> Float[Tensor, "rows columns"]:
    """Values of tiles on their grid; NaN where the slide has no tile.

    Args:
        values: one per tile.
        coords: x and y of every tile in pixels.
        stride: distance of neighbouring tiles in pixels; by default the largest that explains all of them.

    Raises:
        ValueError: the lengths differ, or tiles do not lie on a grid of that stride.
    """
    if len(values) != len(coords) or len(values) == 0:
        raise ValueError(f"every tile needs one value and one place, got {len(values)} values and {len(coords)} places")
    place = (coords - coords.amin(0)).long().cpu()
    if stride is None:
        stride = math.gcd(*place.flatten().tolist()) or 1
    if stride < 1 or (place % stride).any():
        raise ValueError(f"tiles do not lie on a grid of {stride} pixels")
    column, row = (place // stride).unbind(1)
    grid = torch.full((int(row.max()) + 1, int(column.max()) + 1), math.nan)
    grid[row, column] = values.detach().float().cpu()
    return grid


def heat_map(
    weights: Float[Tensor, "tiles"],
    coords: Shaped[Tensor, "tiles 2"],
    *,
    stride: int | None = None,
    picture: Float[Tensor, "channels height width"] | None = None,
    title: str = "",
) -> "Figure":
    """A picture of the attention: how many times more than its even share each tile gets, on a logarithmic scale.

    Args:
        weights: attention weights of one bag, which sum to 1.
        coords: x and y of every tile in pixels.
        stride: see :func:`tile_grid`.
        picture: the slide itself, drawn beside its map, ``(1 or 3, height, width)`` in [0, 1].
        title: of the figure.
    """
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    share = (tile_grid(weights, coords, stride) * len(weights)).clamp(min=1e-2, max=1e2)
    panels = 1 if picture is None else 2
    width = min(max(4 * share.shape[1] / share.shape[0], 1.5), 12)  # as wide as the slide at a height of 4
    figure = Figure(figsize=(panels * width + 1.5, 4), layout="constrained")
    *beside, axes = figure.subplots(1, panels, squeeze=False).flat
    if picture is not None:
        beside[0].imshow(picture.permute(1, 2, 0).squeeze(-1).cpu(), cmap="gray", vmin=0, vmax=1)
        beside[0].set_axis_off()
    image = axes.imshow(share, norm=LogNorm(1e-2, 1e2), cmap="magma", interpolation="nearest")
    axes.set(xticks=[], yticks=[], title=title)
    figure.colorbar(image, ax=axes, label="attention relative to even")
    return figure
