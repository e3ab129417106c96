"""Labelled sets cut from pictures: the left part of a picture trains, the right part tests, and no pixel is in both.

>>> train, test = photograph_crops(size=24, train=10, test=4, names=("brick", "grass"))
>>> train.inputs.shape, test.targets.tolist(), train.classes
(torch.Size([20, 3, 24, 24]), [0, 0, 0, 0, 1, 1, 1, 1], ('brick', 'grass'))
"""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import conv2d, interpolate

from poise.core.data.dataset import Dataset, Split
from poise.core.data.pictures import PHOTOGRAPHS, Picture, histology, photographs
from poise.core.gpu.seeds import derive_generator


def photograph_crops(
    size: int = 32,
    *,
    train: int = 128,
    test: int = 32,
    names: Sequence[str] = PHOTOGRAPHS,
    gray: bool = False,
    left: float = 0.5,
    gap: float = 0.0,
    scale: tuple[float, float] = (1.0, 1.0),
    seed: int = 0,
) -> Split:
    """Random square crops of photographs; the class of a crop is the photograph it comes from.

    Args:
        size: side of the crops in pixels.
        train: crops for training of each photograph, from its left part.
        test: crops for testing of each photograph, from its right part.
        names: which pictures, any of ``PICTURES``.
        gray: one channel of brightness instead of red, green and blue.
        left: share of a photograph's width that the training crops come from.
        gap: share of its width left out between the two parts.
        scale: least and largest factor by which a photograph is resized, drawn for every crop (uniform), before it
            is cut.
        seed: the same seed gives the same crops on every machine.

    Returns:
        Inputs ``(crops, 3 or 1, size, size)`` in [0, 1], in the order of the photographs.

    Raises:
        ValueError: a crop does not fit into its part of a photograph, or a number is out of range.
    """
    _check_shares(left, gap)
    if not 0 < scale[0] <= scale[1]:
        raise ValueError(f"scale must be (least, largest), both positive, got {scale}")
    pictures = photographs(names)

    def cut(part: str, count: int, start: float, stop: float) -> Dataset:
        generator = derive_generator(seed, "photograph_crops", part)
        crops = []
        for picture in pictures.values():
            pixels = picture.gray() if gray else picture.rgb()
            width = pixels.shape[2]
            region = pixels[:, :, math.ceil(start * width) : math.floor(stop * width)]
            crops += list(_random_crops(picture.name, region, size, count, scale, generator))
        return _labelled(f"photograph_crops, {part}", crops, pictures, count)

    return Split(cut("train", train, 0.0, left), cut("test", test, left + gap, 1.0))


def histology_tiles(
    size: int = 32, *, stride: int = 16, label: str = "stain", left: float = 0.5, gap: float = 0.0
) -> Split:
    """Tiles of the histology picture on a regular grid, in two classes of equal size (over the training tiles).

    Args:
        size: side of the tiles in pixels.
        stride: distance of neighbouring tiles in pixels.
        label: what the class says: ``"stain"``, whether the tile holds more of the brown stain (mean optical density
            of DAB) than the median training tile; ``"texture"``, whether it is rougher (mean absolute Laplacian of
            the brightness), which low resolution hides.
        left: share of the width that the training tiles lie in; tiles across the border belong to neither part.
        gap: share of the width left out between the two parts.

    Returns:
        Inputs ``(tiles, 3, size, size)`` in [0, 1], row by row.

    Raises:
        ValueError: an unknown label, shares out of range, or no tile fits into a part.
    """
    _check_shares(left, gap)
    if label not in LABELS:
        raise ValueError(f"label must be one of {', '.join(LABELS)}, got {label!r}")
    picture = histology()
    width = picture.pixels.shape[2]
    border, beyond = round(left * width), round((left + gap) * width)
    parts = [_tiles(picture.pixels[:, :, :border], size, stride), _tiles(picture.pixels[:, :, beyond:], size, stride)]
    measure, classes = LABELS[label]
    threshold = measure(parts[0]).median()
    train, test = (
        Dataset(
            name=f"histology_tiles, {part}",
            inputs=tiles,
            targets=(measure(tiles) > threshold).long(),
            classes=classes,
            licence=picture.licence,
            source=picture.source,
        )
        for part, tiles in zip(("train", "test"), parts, strict=True)
    )
    return Split(train, test)


def _check_shares(left: float, gap: float) -> None:
    if not (0 < left < 1 and 0 <= gap < 1 - left):
        raise ValueError(f"left and gap must be shares of the width that leave a right part, got {left} and {gap}")


def _random_crops(
    name: str,
    region: Float[Tensor, "channels height width"],
    size: int,
    count: int,
    scale: tuple[float, float],
    generator: torch.Generator,
) -> Iterator[Float[Tensor, "channels size size"]]:
    height, width = region.shape[1:]
    smallest, largest = round(size / scale[1]), round(size / scale[0])
    if not 1 <= smallest <= largest <= min(height, width):
        raise ValueError(
            f"crops of side {smallest} to {largest} do not fit into the {height} x {width} pixels of this part of {name!r}"
        )
    for factor, down, right in torch.rand(count, 3, generator=generator).tolist():
        side = round(size / (scale[0] + factor * (scale[1] - scale[0])))
        top, start = int(down * (height - side + 1)), int(right * (width - side + 1))
        crop = region[:, top : top + side, start : start + side]
        yield crop if side == size else _resized(crop, size)


def _resized(crop: Float[Tensor, "channels side side"], size: int) -> Float[Tensor, "channels size size"]:
    resized = interpolate(crop.unsqueeze(0), size=(size, size), mode="bilinear", antialias=True)
    return resized.squeeze(0).clamp(0, 1)


def _labelled(name: str, crops: list[Tensor], pictures: dict[str, Picture], count: int) -> Dataset:
    return Dataset(
        name=name,
        inputs=torch.stack(crops),
        targets=torch.arange(len(pictures)).repeat_interleave(count),
        classes=tuple(pictures),
        licence="; ".join(f"{picture.name}: {picture.licence}" for picture in pictures.values()),
        source="; ".join(f"{picture.name}: {picture.source}" for picture in pictures.values()),
    )


def _tiles(pixels: Float[Tensor, "3 height width"], size: int, stride: int) -> Float[Tensor, "tiles 3 size size"]:
    if size < 1 or stride < 1 or size > min(pixels.shape[1:]):
        raise ValueError(f"size {size} and stride {stride} give no tile in {tuple(pixels.shape[1:])} pixels")
    grid = pixels.unfold(1, size, stride).unfold(2, size, stride)  # (3, rows, columns, size, size)
    return grid.permute(1, 2, 0, 3, 4).flatten(0, 1).contiguous()


def _brown_stain(tiles: Float[Tensor, "tiles 3 size size"]) -> Float[Tensor, "tiles"]:
    """Mean optical density of DAB, by the colour deconvolution of Ruifrok and Johnston (2001)."""
    haematoxylin, eosin, dab = [0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]
    separate = torch.linalg.inv(tiles.new_tensor([haematoxylin, eosin, dab]))
    density = -tiles.clamp(min=1e-6).log()
    return torch.einsum("nchw,c->nhw", density, separate[:, 2]).clamp(min=0).mean(dim=(1, 2))


def _roughness(tiles: Float[Tensor, "tiles 3 size size"]) -> Float[Tensor, "tiles"]:
    """Mean absolute Laplacian of the brightness inside the tile."""
    luma = tiles.new_tensor([0.299, 0.587, 0.114])
    laplacian = tiles.new_tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]])
    return conv2d(tiles, luma[:, None, None] * laplacian[None, None]).abs().mean(dim=(1, 2, 3))


LABELS: dict[str, tuple[Callable[[Tensor], Tensor], tuple[str, str]]] = {
    "stain": (_brown_stain, ("little stain", "much stain")),
    "texture": (_roughness, ("smooth", "rough")),
}
"""What is measured for each label of :func:`histology_tiles`, and the classes of less and more of it."""
