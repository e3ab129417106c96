"""PASCAL VOC 2012 with pseudo labels: masks from class activation maps (AffinityNet, SEAM, NSROM, ICD, ...) instead of drawn ones.

The layout is that of ``VOCdevkit/VOC2012``: ``JPEGImages``, ``SegmentationClassAug`` (or ``SegmentationClass``) and
``ImageSets/Segmentation/trainaug.txt``; pseudo labels are PNG files of the same names in a folder of their own.
"""

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Integer
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from poise.core.gpu import derive_generator
from poise.medical.segmentation.adele.checks import check_labels
from poise.medical.segmentation.adele.label_store import LabelStore

CLASSES = (
    *(
        "background",
        "aeroplane",
        "bicycle",
        "bird",
        "boat",
        "bottle",
        "bus",
        "car",
        "cat",
        "chair",
        "cow",
        "diningtable",
    ),
    *("dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IGNORE = 255


class Masks:
    """Masks of a data set, read one at a time; what :class:`LabelStore` is made of.

    Args:
        paths: PNG files.
    """

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        return _mask(self.paths[index])


class VOCPseudoLabels(Dataset[tuple[Tensor, int]]):
    """Images as they are, each of its own size, and their pseudo labels.

    ``LabelStore(dataset.masks, 21)`` holds the labels that are corrected; :class:`VOCCrops` is what is trained on.

    Args:
        folder: ``VOC2012``.
        pseudo: folder of the pseudo labels; relative paths are looked up in ``folder`` too.
        split: name of the list in ``ImageSets/Segmentation``. Its lines may hold paths; the first one names the image.

    Attributes:
        names: of the images.
        masks: the pseudo labels, read one at a time.

    Raises:
        FileNotFoundError: the list, an image or a pseudo label is missing.
        ValueError: the list is empty, or an image and its pseudo label differ in size.
    """

    def __init__(self, folder: str | Path, pseudo: str | Path, split: str = "trainaug") -> None:
        self.folder = Path(folder)
        source = Path(pseudo) if Path(pseudo).is_dir() else self.folder / pseudo
        lines = (self.folder / "ImageSets" / "Segmentation" / f"{split}.txt").read_text(encoding="utf-8").split("\n")
        self.names = [Path(line.split()[0]).stem for line in lines if line.strip()]
        if not self.names:
            raise ValueError(f"{split}.txt lists no image")
        images, masks = [self._image_path(name) for name in self.names], [source / f"{name}.png" for name in self.names]
        for path in (*images, *masks):
            if not path.is_file():
                raise FileNotFoundError(f"{path} is missing")
        for one, other in zip(images, masks, strict=True):
            if (size := _size(one)) != _size(other):
                raise ValueError(f"{one.name} is {size}, its pseudo label {other} is {_size(other)} (width, height)")
        self.masks = Masks(masks)

    def __len__(self) -> int:
        return len(self.names)

    def pixels(self, index: int) -> Integer[Tensor, "h w 3"]:
        """The picture, uint8."""
        from PIL import Image

        with Image.open(self._image_path(self.names[index])) as picture:
            return torch.from_numpy(np.array(picture.convert("RGB")))

    def __getitem__(self, index: int) -> tuple[Float[Tensor, "3 h w"], int]:
        """The picture, normalised, and its place in the data set."""
        return normalized(self.pixels(index)), index

    def clean(self, index: int) -> Integer[Tensor, "h w"]:
        """The mask that was drawn, for evaluation; 255 along the edges.

        Raises:
            FileNotFoundError: there is none.
        """
        for name in ("SegmentationClassAug", "SegmentationClass"):
            path = self.folder / name / f"{self.names[index]}.png"
            if path.is_file():
                return _mask(path)
        raise FileNotFoundError(f"{self.folder} has no drawn mask of {self.names[index]}")

    def _image_path(self, name: str) -> Path:
        return self.folder / "JPEGImages" / f"{name}.jpg"


class VOCCrops(Dataset[tuple[Tensor, Tensor, Tensor, int]]):
    """Random crops of images together with the labels in use: hue, saturation and value, mirroring, scale, crop.

    Workers of a ``DataLoader`` see corrections if the store's memory is shared (``store.share_memory()``) or in files.

    Args:
        images: the data set.
        store: its labels.
        crop: side of the crops; what lies outside the image is 0 there and ignored in the labels.
        scale: least and largest factor of the image's size.
        colour: largest change of hue, saturation and value, of 180, 255 and 255.
        seed: of the draws, which depend on it, on ``epoch`` and on the image.

    Attributes:
        epoch: set it before every epoch.

    Raises:
        ValueError: store and images differ in number, or a setting is out of range.
    """

    def __init__(
        self,
        images: VOCPseudoLabels,
        store: LabelStore,
        crop: int = 448,
        scale: tuple[float, float] = (0.5, 1.5),
        colour: int = 10,
        seed: int = 0,
    ) -> None:
        if len(images) != len(store):
            raise ValueError(f"{len(images)} images, but a store of {len(store)}")
        if crop < 1 or not 0 < scale[0] <= scale[1] or colour < 0:
            raise ValueError(f"crop, scale and colour are out of range: {crop}, {scale}, {colour}")
        self.images, self.store, self.crop, self.scale, self.colour = images, store, crop, scale, colour
        self.seed, self.epoch = seed, 0

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(
        self, index: int
    ) -> tuple[Float[Tensor, "3 crop crop"], Integer[Tensor, "crop crop"], Integer[Tensor, "crop crop"], int]:
        """Picture, labels in use, labels as given, and place in the data set."""
        generator = derive_generator(self.seed, "crop", self.epoch, index)
        draws = torch.rand(5, generator=generator).tolist()
        shift = torch.randint(-self.colour, self.colour + 1, (3,), generator=generator)
        picture = normalized(_recoloured(self.images.pixels(index), shift))
        masks = torch.stack([self.store[index], self.store.original(index)])
        if draws[0] < 0.5:
            picture, masks = picture.flip(-1), masks.flip(-1)
        factor = self.scale[0] + draws[1] * (self.scale[1] - self.scale[0])
        size = tuple(max(1, round(factor * side)) for side in picture.shape[1:])
        picture = F.interpolate(picture[None], size, mode="bicubic", align_corners=False)[0]
        masks = F.interpolate(masks[None].float(), size, mode="nearest")[0].long()
        picture, masks = (_crop(each, self.crop, draws[2:4], fill) for each, fill in ((picture, 0), (masks, IGNORE)))
        return picture, masks[0], masks[1], index


def normalized(pixels: Integer[Tensor, "h w 3"]) -> Float[Tensor, "3 h w"]:
    """A picture as networks pretrained on ImageNet expect it."""
    values = pixels.permute(2, 0, 1).float() / 255
    return (values - values.new_tensor(MEAN)[:, None, None]) / values.new_tensor(DEVIATION)[:, None, None]


def _recoloured(pixels: Tensor, shift: Tensor) -> Tensor:
    from PIL import Image

    hsv = np.array(Image.fromarray(pixels.numpy()).convert("HSV")).astype(np.int64)
    hue, saturation, value = shift.tolist()
    hsv[..., 0] = (hsv[..., 0] + round(hue * 256 / 180)) % 256
    hsv[..., 1:] = np.clip(hsv[..., 1:] + [saturation, value], 0, 255)
    return torch.from_numpy(np.array(Image.fromarray(hsv.astype(np.uint8), "HSV").convert("RGB")))


def _crop(picture: Tensor, side: int, draws: list[float], fill: int) -> Tensor:
    """A square of (channels, h, w) at a random place; of smaller pictures all, at a random place in the square."""
    result = picture.new_full((len(picture), side, side), fill)
    source, target = [], []
    for length, draw in zip(picture.shape[1:], draws, strict=True):
        part, room = min(length, side), abs(length - side)
        start = int(draw * (room + 1))
        source.append(slice(start, start + part) if length > side else slice(0, part))
        target.append(slice(0, part) if length > side else slice(start, start + part))
    result[:, target[0], target[1]] = picture[:, source[0], source[1]]
    return result


def _size(path: Path) -> tuple[int, int]:
    from PIL import Image

    with Image.open(path) as picture:
        return picture.size


def _mask(path: Path) -> Tensor:
    from PIL import Image

    with Image.open(path) as picture:
        mask = torch.from_numpy(np.array(picture))
    if mask.ndim != 2:
        raise ValueError(
            f"{path} must hold one class per pixel (a palette or grey image), got shape {tuple(mask.shape)}"
        )
    check_labels(mask, len(CLASSES), IGNORE, f"labels of {path}")
    return mask
