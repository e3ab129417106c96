"""Images and volumes too big for the network: computed tile by tile, blended where tiles overlap.

>>> import torch
>>> photograph = torch.rand(1, 3, 300, 451)
>>> enlarge = torch.nn.Upsample(scale_factor=2)
>>> tiled_apply(enlarge, photograph, tile=128, overlap=32).shape
torch.Size([1, 3, 600, 902])
>>> torch.equal(tiled_apply(lambda tiles: tiles, photograph, tile=64, overlap=16), photograph)
True
"""

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from poise.core.gpu.chunking import backing_off


def _linear(middle: Float[Tensor, "side"]) -> Float[Tensor, "side"]:
    return 1 - (2 * middle - 1).abs()


PROFILES: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": _linear,
    "hann": lambda middle: torch.sin(math.pi * middle).square(),
    "gaussian": lambda middle: torch.exp(-((middle - 0.5) * 8).square() / 2),
    "nearest": _linear,
}
"""Weight of a pixel by its place across the tile, from 0 at one edge to 1 at the other; positive in between."""


def tiled_apply(
    fn: Callable[[Tensor], Tensor],
    image: Shaped[Tensor, "batch channels *space"],
    tile: int | Sequence[int],
    overlap: int | Sequence[int] = 0,
    *,
    blend: str = "linear",
    tiles_per_call: int = 1,
) -> Shaped[Tensor, "batch channels_out *space_out"]:
    r"""``fn(image)`` in memory that does not depend on the size of the image, apart from the result itself.

    All tiles have the same size, lie inside the image, and are spread evenly with at least the overlap asked for.
    Where tiles overlap the result is the mean of theirs, :math:`\sum_t w_t y_t / \sum_t w_t`, with weights that fall
    towards the edge of a tile. It is kept as a running mean, so that tiles that agree give their value exactly, bit
    for bit.

    The result is assembled on the device of ``image``. For an image in host memory and a network on a GPU, let ``fn``
    move the tiles: ``lambda tiles: network(tiles.to("cuda"))``.

    Args:
        fn: takes ``(batch * tiles, channels, *tile)`` and returns ``(batch * tiles, channels_out, *(scale * tile))``,
            with a whole number as scale, the same in every dimension: 1 for restoration and segmentation, 4 for
            fourfold super-resolution.
        image: a 2-D image or a 3-D volume.
        tile: side of the tiles in pixels, one number or one per dimension; cut to the size of the image where that is
            smaller.
        overlap: least overlap of neighbouring tiles in pixels, one number or one per dimension.
        blend: the weights across a tile. ``"linear"`` and ``"hann"`` rise from the edge to the middle, straight or as
            a raised cosine. ``"gaussian"`` has a standard deviation of an eighth of the side, and is the usual choice
            for segmentation. ``"nearest"`` takes every pixel from the tile whose middle is nearest: for a network
            whose outputs depend on pixels at most r away, and an overlap of at least 2 r, the result then equals
            ``fn(image)``.
        tiles_per_call: tiles that go into one call of ``fn``; halved when memory runs out.

    Raises:
        ValueError: the image is neither 2-D nor 3-D, or empty, a number does not fit, or ``fn`` returns another size than a whole
            multiple of the tile.
    """
    shape = image.shape[2:]
    if len(shape) not in (2, 3):
        raise ValueError(
            f"image must be (batch, channels, *space) with 2 or 3 space dimensions, got {tuple(image.shape)}"
        )
    if image.numel() == 0:
        raise ValueError(f"image must not be empty, got shape {tuple(image.shape)}")
    if blend not in PROFILES:
        raise ValueError(f"blend must be one of {', '.join(PROFILES)}, got {blend!r}")
    if tiles_per_call < 1:
        raise ValueError(f"tiles_per_call must be at least 1, got {tiles_per_call}")
    sides = [min(side, size) for side, size in zip(_per_dimension(tile, len(shape), "tile"), shape, strict=True)]
    overlaps = _per_dimension(overlap, len(shape), "overlap")
    starts = [_starts(*numbers) for numbers in zip(shape, sides, overlaps, strict=True)]
    corners = list(itertools.product(*starts))

    def evaluate(start: int, length: int) -> tuple[Tensor, int]:
        tiles = torch.cat([image[_window(corner, sides)] for corner in corners[start : start + length]])
        outputs = fn(tiles)
        return outputs.to(image.device), _scale(outputs, tiles)

    waiting = iter(corners)
    mean: _RunningMean | None = None
    for outputs, scale in backing_off(evaluate, len(corners), tiles_per_call):
        if mean is None:
            mean = _RunningMean(outputs, [scale * size for size in shape], len(image), blend)
        for output in outputs.split(len(image)):
            mean.add(output, [scale * position for position in next(waiting)])
    assert mean is not None  # there is at least one tile
    return mean.value.to(mean.dtype)


class _RunningMean:
    """The weighted mean of the tiles added so far, per pixel.

    ``mean += w / (w_before + w) * (tile - mean)`` leaves a pixel as it is, to the last bit, when a tile agrees with it.
    """

    def __init__(self, tiles: Tensor, shape: Sequence[int], batch: int, blend: str) -> None:
        self.dtype = tiles.dtype
        self.nearest = blend == "nearest"
        precise = torch.promote_types(tiles.dtype, torch.float32)
        self.window = _weights(tiles.shape[2:], blend).to(precise).to(tiles.device)
        self.value = tiles.new_zeros((batch, tiles.shape[1], *shape), dtype=precise)
        self.weight = tiles.new_zeros(shape, dtype=precise)

    def add(self, tile: Tensor, corner: Sequence[int]) -> None:
        place = _window(corner, tile.shape[2:])
        weight = self.weight[place[2:]]
        if self.nearest:
            share = (self.window > weight).to(weight.dtype)
            weight.copy_(torch.maximum(weight, self.window))
        else:
            weight += self.window
            share = self.window / weight
        self.value[place].lerp_(tile.to(self.value.dtype), share)


def _weights(shape: Sequence[int], blend: str) -> Float[Tensor, "*space"]:
    """Positive weights over a tile: the product of one profile per dimension."""
    weights = torch.ones([1] * len(shape), dtype=torch.float64)
    for axis, size in enumerate(shape):
        middle = (torch.arange(size, dtype=torch.float64) + 0.5) / size  # of the pixels, in (0, 1)
        profile = PROFILES[blend](middle)
        weights = weights * profile.reshape([-1 if dimension == axis else 1 for dimension in range(len(shape))])
    return weights


def _starts(size: int, side: int, overlap: int) -> list[int]:
    """Where the tiles begin along one dimension: as few as possible, spread evenly, from 0 to ``size - side``."""
    if side == size:
        return [0]
    if overlap >= side:
        raise ValueError(f"overlap must be smaller than the tile, got {overlap} and {side}")
    steps = math.ceil((size - side) / (side - overlap))
    return [round(step * (size - side) / steps) for step in range(steps + 1)]


def _per_dimension(given: int | Sequence[int], dimensions: int, name: str) -> list[int]:
    numbers = [given] * dimensions if isinstance(given, int) else list(given)
    least = 1 if name == "tile" else 0
    if len(numbers) != dimensions or min(numbers) < least:
        raise ValueError(f"{name} must be one number or {dimensions}, each at least {least}, got {given}")
    return numbers


def _scale(outputs: Tensor, tiles: Tensor) -> int:
    scale = outputs.shape[2] // tiles.shape[2] if outputs.ndim == tiles.ndim else 0
    if scale < 1 or outputs.shape[2:] != tuple(scale * side for side in tiles.shape[2:]) or len(outputs) != len(tiles):
        raise ValueError(
            "fn must return as many tiles as it gets, a whole number of times as large, "
            f"got {tuple(outputs.shape)} for {tuple(tiles.shape)}"
        )
    return scale


def _window(corner: Sequence[int], sides: Sequence[int]) -> tuple[slice, ...]:
    """Index of a tile in ``(batch, channels, *space)``."""
    space = (slice(start, start + side) for start, side in zip(corner, sides, strict=True))
    return (slice(None), slice(None), *space)
