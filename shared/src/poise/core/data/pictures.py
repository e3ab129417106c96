"""Single pictures: photographs, textures and medical images.

>>> picture("chelsea").pixels.shape
torch.Size([3, 300, 451])
>>> list(photographs(TEXTURES))
['brick', 'grass', 'gravel']
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from poise.core.data.wheels import DISTRIBUTIONS, wheel_file


@dataclass(frozen=True, eq=False)
class Picture:
    """One picture.

    Attributes:
        name: what it is called.
        pixels: float32 ``(channels, height, width)`` with 1 or 3 channels (red, green, blue).
        licence: licence of the picture, as its source states it.
        source: where it comes from, and the package that ships it.
        unit: what a pixel means.
        spacing: height and width of a pixel in millimetres, where known.
    """

    name: str
    pixels: Float[Tensor, "channels height width"]
    licence: str
    source: str
    unit: str = "intensity in [0, 1]"
    spacing: tuple[float, float] | None = None

    def gray(self) -> Float[Tensor, "1 height width"]:
        """Brightness (ITU-R BT.601 luma) of a colour picture; a grey one as it is."""
        if len(self.pixels) == 1:
            return self.pixels
        luma = self.pixels.new_tensor([0.299, 0.587, 0.114])
        return torch.einsum("c,chw->hw", luma, self.pixels).unsqueeze(0)

    def rgb(self) -> Float[Tensor, "3 height width"]:
        """A colour picture as it is; a grey one with three equal channels."""
        return self.pixels.expand(3, -1, -1)


@dataclass(frozen=True)
class Origin:
    """Where a picture lies, and whose it is."""

    package: str
    path: str
    licence: str
    author: str
    unit: str = "intensity in [0, 1]"
    spacing: tuple[float, float] | None = None


ORIGINS = {
    "astronaut": Origin("skimage", "data/astronaut.png", "public domain", "NASA"),
    "chelsea": Origin("skimage", "data/chelsea.png", "CC0-1.0", "Stefan van der Walt"),
    "china": Origin("sklearn", "datasets/images/china.jpg", "CC-BY-2.0", "danielbuechele, Flickr 6061409035"),
    "coffee": Origin("skimage", "data/coffee.png", "CC0-1.0", "Rachel Michetti, Pikolo Espresso Bar"),
    "flower": Origin("sklearn", "datasets/images/flower.jpg", "CC-BY-2.0", "vultilion, Flickr 6056698931"),
    "hubble": Origin("skimage", "data/hubble_deep_field.jpg", "public domain", "NASA, Hubble eXtreme Deep Field"),
    "motorcycle": Origin("skimage", "data/motorcycle_left.png", "not stated", "D. Scharstein et al., Middlebury 2014"),
    "rocket": Origin("skimage", "data/rocket.jpg", "public domain", "SpaceX"),
    "camera": Origin("skimage", "data/camera.png", "CC0-1.0", "Lav Varshney"),
    "coins": Origin("skimage", "data/coins.png", "no known copyright restrictions", "Brooklyn Museum"),
    "moon": Origin("skimage", "data/moon.png", "not stated", "scikit-image"),
    "brick": Origin("skimage", "data/brick.png", "CC0-1.0", "CC0Textures, Bricks25"),
    "grass": Origin("skimage", "data/grass.png", "CC0-1.0", "linolafett, DeviantArt"),
    "gravel": Origin("skimage", "data/gravel.png", "CC0-1.0", "CC0Textures, Gravel04"),
    "histology": Origin("skimage", "data/ihc.png", "no known copyright restrictions", "CMMI (colonic glands)"),
    "retina": Origin("skimage", "data/retina.jpg", "CC0-1.0", "Mikael Häggström, fundus of a normal left eye"),
    "cell": Origin(
        *("skimage", "data/cell.png", "CC0-1.0", "P. Müller et al., Optics Express 26(8), 2018"),
        unit="phase, scaled to [0, 1]",
        spacing=(1.07e-4, 1.07e-4),
    ),
    "microaneurysms": Origin("skimage", "data/microaneurysms.png", "CC0-1.0", "A. Maier, HRF image 07_dr"),
}
"""Every picture by name."""

FILES = {name: (origin.package, origin.path) for name, origin in ORIGINS.items()}
"""Package and path of each picture."""

PICTURES = tuple(ORIGINS)
"""Names of all pictures."""

TEXTURES = ("brick", "grass", "gravel")
"""Grey textures."""

PHOTOGRAPHS = (
    *("astronaut", "chelsea", "china", "coffee", "flower", "hubble", "motorcycle", "rocket"),  # in colour
    *("camera", "coins", "moon"),  # grey
    *TEXTURES,
)
"""Names of the photographs, of which those in colour come first and the textures last."""


def picture(name: str) -> Picture:
    """The photograph, texture or medical picture called ``name``, one of :data:`PICTURES`.

    Raises:
        ValueError: there is none of that name.
        MissingDataError: the package that ships it is not installed.
    """
    if name not in ORIGINS:
        raise ValueError(f"there is no picture {name!r}, only {', '.join(ORIGINS)}")
    origin = ORIGINS[name]
    file = wheel_file(*FILES[name])
    from PIL import Image  # comes with scikit-image

    with Image.open(file) as image:
        pixels = torch.from_numpy(np.array(image)).float() / 255
    return Picture(
        name=name,
        pixels=pixels.permute(2, 0, 1).contiguous() if pixels.ndim == 3 else pixels.unsqueeze(0),
        licence=origin.licence,
        source=f"{origin.author}; in {DISTRIBUTIONS[origin.package]}",
        unit=origin.unit,
        spacing=origin.spacing,
    )


def photographs(names: Iterable[str] = PHOTOGRAPHS) -> dict[str, Picture]:
    """Several pictures by name, in the order of ``names``; see :func:`picture`."""
    return {name: picture(name) for name in names}


def histology() -> Picture:
    """Colon glands, 3 x 512 x 512: FHL2 protein stained brown (DAB), cell nuclei blue (haematoxylin)."""
    return picture("histology")


def retina() -> Picture:
    """Fundus of a healthy left eye, 3 x 1,411 x 1,411."""
    return picture("retina")


def cell() -> Picture:
    """A cell in saline by quantitative phase imaging, 1 x 660 x 550; a pixel is 0.107 micrometres wide."""
    return picture("cell")


def microaneurysms() -> Picture:
    """Detail of a diabetic retina with lesions, green channel, 1 x 102 x 102."""
    return picture("microaneurysms")
