r"""From a scanned slide to a bag: tiles of tissue at one resolution, their features, and the file that keeps them.

Slides in the formats of scanners (SVS, NDPI, MRXS, tiled TIFF, ...) are read region by region with OpenSlide
(``pip install 'poise-medical[slides]'``), so that a slide of 100,000 pixels a side never has to fit in memory; PNG and JPEG pictures
are read whole.

.. code-block:: python

    tiles = SlideTiles("case_17.svs", size=256, mpp=0.5)  # 20x
    extract_features(tiles, EfficientNetLite0(side=224), "features/h5_files/case_17.h5")
    bags = FeatureBagDataset("features", "clam_h5", read_slides("labels.csv"))
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader, Dataset

PICTURES = (".png", ".jpg", ".jpeg", ".bmp")
"""Endings of ordinary pictures; everything else is for OpenSlide."""
OVERVIEW = 2_048
"""Longest side, in pixels, of the picture in which tissue is told from glass."""


class Tile(NamedTuple):
    """One tile and where it lies.

    Attributes:
        pixels: ``(3, size, size)`` in [0, 1].
        coords: ``(2,)``: x and y of its upper left corner in pixels of the slide's finest level.
    """

    pixels: Tensor
    coords: Tensor


class SlideTiles(Dataset[Tile]):
    """The tiles of a slide that show tissue, on a regular grid, row by row; read one at a time, in the worker that needs them.

    Args:
        path: the slide or picture.
        size: side of a tile in pixels, after scaling to ``mpp``.
        stride: distance of neighbouring tiles, in the same pixels; ``size`` by default.
        mpp: micrometres per pixel of the tiles; by default the slide's finest level as it is.
        tissue: least share of tissue in a tile, from 0 (every tile) to 1. Tissue is what is more saturated than Otsu's threshold of a
            small picture of the slide.

    Attributes:
        coords: where the tiles lie ``(tiles, 2)``, as in :class:`Tile`.
        side: side of a tile in pixels of the finest level.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: a slide in a scanner's format, and OpenSlide is not installed.
        ValueError: no slide or picture; an option out of range; ``mpp`` of a slide that does not tell its own, or finer than it; or no
            tile shows tissue.

    Source:
        The protocol of CLAM, Lu et al., Nature Biomedical Engineering 5, 2021; Otsu, IEEE Trans. SMC 9, 1979.
    """

    def __init__(
        self,
        path: Path | str,
        size: int = 256,
        stride: int | None = None,
        *,
        mpp: float | None = None,
        tissue: float = 0.25,
    ) -> None:
        self.path, self.size, self.stride = Path(path), size, size if stride is None else stride
        if not self.path.is_file():
            raise FileNotFoundError(f"{path} does not exist")
        if size < 1 or self.stride < 1:
            raise ValueError(f"size and stride must be at least 1, got {size} and {stride}")
        if not 0 <= tissue <= 1:
            raise ValueError(f"tissue must lie in [0, 1], got {tissue}")
        self._source: _Source | None = None
        width, height = self.source.size
        self.scale = self._scale(mpp)
        self.side = round(size * self.scale)
        step = max(1, round(self.stride * self.scale))
        if self.side > min(width, height):
            raise ValueError(f"a tile covers {self.side} pixels of {self.path.name}, which has {width} x {height}")
        y, x = torch.meshgrid(
            torch.arange(0, height - self.side + 1, step), torch.arange(0, width - self.side + 1, step), indexing="ij"
        )
        self.coords: Int[Tensor, "tiles 2"] = torch.stack([x.flatten(), y.flatten()], 1)
        if tissue > 0:
            self.coords = self.coords[self._share_of_tissue() >= tissue]
        if not len(self.coords):
            raise ValueError(f"no tile of {self.path.name} shows tissue on {tissue:.0%} of its area")

    def __len__(self) -> int:
        return len(self.coords)

    def __getitem__(self, index: int) -> Tile:
        """One tile, scaled with antialiasing."""
        x, y = self.coords[index].tolist()
        pixels = self.source.read(x, y, self.side, self.scale)
        if pixels.shape[-1] != self.size:
            pixels = interpolate(pixels[None], (self.size, self.size), mode="bilinear", antialias=True)[0].clamp(0, 1)
        return Tile(pixels, self.coords[index])

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_source": None}  # an open slide stays with its process

    @property
    def source(self) -> "_Source":
        if self._source is None:
            picture = self.path.suffix.lower() in PICTURES
            self._source = _Picture(self.path) if picture else _Scan(self.path)
        return self._source

    def _scale(self, mpp: float | None) -> float:
        """Pixels of the finest level per pixel of a tile."""
        if mpp is None:
            return 1.0
        if not mpp > 0:
            raise ValueError(f"mpp must be positive, got {mpp}")
        finest = self.source.mpp
        if finest is None:
            raise ValueError(f"{self.path.name} does not tell its resolution: leave mpp out")
        if mpp < 0.99 * finest:
            raise ValueError(f"mpp must be at least that of {self.path.name}, {finest:.3g}, got {mpp}")
        return mpp / finest

    def _share_of_tissue(self) -> Float[Tensor, " tiles"]:
        overview = self.source.overview()
        saturation = overview.amax(0) - overview.amin(0)  # chroma: glass is grey, stains are not
        covered = saturation > _otsu(saturation)
        area = torch.zeros(covered.shape[0] + 1, covered.shape[1] + 1, dtype=torch.int64)
        area[1:, 1:] = covered.cumsum(0).cumsum(1)
        width, height = self.source.size
        shrink = torch.tensor([covered.shape[1] / width, covered.shape[0] / height])
        first = (self.coords * shrink).floor().long()
        last = torch.maximum(((self.coords + self.side) * shrink).round().long(), first + 1)
        (x0, y0), (x1, y1) = first.T, last.T
        inside = area[y1, x1] - area[y0, x1] - area[y1, x0] + area[y0, x0]
        return inside / ((x1 - x0) * (y1 - y0))


def extract_features(
    tiles: SlideTiles,
    encoder: Callable[[Tensor], Tensor],
    target: Path | str,
    *,
    batch: int = 64,
    workers: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float16,
) -> Path:
    """Encode every tile and keep features and coordinates in CLAM's layout, as :class:`FeatureBagDataset` reads it.

    The file appears when it is complete; one that is there already is kept, so that an interrupted run over many slides goes on
    where it stopped.

    Args:
        tiles: of one slide.
        encoder: from tiles ``(batch, 3, size, size)`` in [0, 1] to features ``(batch, features)``; such as
            :class:`EfficientNetLite0`, or a pathology model with its own normalisation put before it.
        target: the HDF5 file.
        batch: tiles at a time; memory does not grow with the slide.
        workers: processes that read tiles.
        device: where the encoder is.
        dtype: what features are stored as.

    Returns:
        ``target``.

    Raises:
        ValueError: the encoder does not give one row of finite features per tile.
    """
    import h5py

    target = Path(target)
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".partial")
    loader: DataLoader[Tile] = DataLoader(tiles, batch, num_workers=workers)
    with h5py.File(partial, "w") as file, torch.no_grad():
        file["coords"] = tiles.coords.numpy()
        start = 0
        for pixels, _ in loader:
            features = encoder(pixels.to(device)).to("cpu", dtype)
            if features.ndim != 2 or len(features) != len(pixels) or not features.isfinite().all():
                raise ValueError(
                    f"the encoder must give a row of finite features for each of {len(pixels)} tiles, "
                    f"got shape {tuple(features.shape)}"
                )
            if start == 0:
                file.create_dataset("features", (len(tiles), features.shape[1]), features.numpy().dtype)
            file["features"][start : start + len(features)] = features.numpy()
            start += len(features)
    partial.replace(target)
    return target


class _Picture:
    """An ordinary picture, read whole."""

    mpp: float | None = None

    def __init__(self, path: Path) -> None:
        import numpy as np
        from PIL import Image, UnidentifiedImageError

        try:
            with Image.open(path) as image:
                pixels = np.asarray(image.convert("RGB"))
        except UnidentifiedImageError as error:
            raise ValueError(f"{path} is not a picture") from error
        self.pixels = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
        self.size = (self.pixels.shape[2], self.pixels.shape[1])

    def read(self, x: int, y: int, side: int, scale: float) -> Float[Tensor, "3 height width"]:
        return self.pixels[:, y : y + side, x : x + side] / 255

    def overview(self) -> Float[Tensor, "3 height width"]:
        shrink = max(1.0, max(self.size) / OVERVIEW)
        size = (max(1, round(self.size[1] / shrink)), max(1, round(self.size[0] / shrink)))
        return interpolate(self.pixels[None] / 255, size, mode="bilinear", antialias=True)[0]


class _Scan:
    """A slide that OpenSlide reads."""

    def __init__(self, path: Path) -> None:
        try:
            import openslide
        except ImportError as error:
            raise ImportError(
                f"{path.name} needs OpenSlide: pip install 'poise-medical[slides]' (PNG and JPEG pictures do without)"
            ) from error
        try:
            self.slide = openslide.OpenSlide(path)
        except openslide.OpenSlideError as error:
            raise ValueError(f"{path} is not a slide that OpenSlide can read: {error}") from error
        self.size = self.slide.dimensions
        told = self.slide.properties.get(openslide.PROPERTY_NAME_MPP_X)
        self.mpp = None if told is None else float(told)

    def read(self, x: int, y: int, side: int, scale: float) -> Float[Tensor, "3 height width"]:
        """From the coarsest level that is still as fine as the tile."""
        level = self.slide.get_best_level_for_downsample(scale * 1.01)
        pixels = max(1, round(side / self.slide.level_downsamples[level]))
        return _on_white(self.slide.read_region((x, y), level, (pixels, pixels)))

    def overview(self) -> Float[Tensor, "3 height width"]:
        return _on_white(self.slide.get_thumbnail((OVERVIEW, OVERVIEW)))


_Source = _Picture | _Scan


def _on_white(image: Any) -> Float[Tensor, "3 height width"]:
    """Pixels that were never scanned are transparent, and glass is white."""
    import numpy as np

    rgba = torch.from_numpy(np.asarray(image.convert("RGBA")).copy()).permute(2, 0, 1) / 255
    return rgba[:3] * rgba[3:] + (1 - rgba[3:])


def _otsu(values: Tensor, bins: int = 256) -> Tensor:
    """The threshold that parts the values into two classes with the largest variance between them."""
    count = torch.histc(values.float(), bins, 0.0, 1.0).double()
    level = (torch.arange(bins, dtype=torch.float64) + 0.5) / bins
    below, mass = count.cumsum(0), (count * level).cumsum(0)
    above = below[-1] - below
    apart = mass / below.clamp_min(1) - (mass[-1] - mass) / above.clamp_min(1)
    return ((below * above * apart.square()).argmax() + 1).float() / bins
