"""Labelled images as their publishers lay them out on disk, in batches that depend on the step and the seed alone.

CIFAR-10 and CIFAR-100 in their Python or binary version, and a folder of one folder per class (ImageNet, Imagenette, Tiny
ImageNet). Training batches can be computed by workers in any order, and a run that resumes continues with the batch it would
have had.
"""

import io
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.utils import data

from poise.core.data import Dataset
from poise.core.gpu import derive_generator, prefetch

if TYPE_CHECKING:
    from PIL.Image import Image

Batch = tuple[Float[Tensor, "batch channels height width"], Int[Tensor, "batch"]]


@runtime_checkable
class Images(Protocol):
    """Labelled images that are read by number."""

    @property
    def labels(self) -> Int[Tensor, " images"]:
        """The class of every image."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Name of every class."""

    def read(self, rows: Sequence[int], augment: torch.Generator | None = None) -> Float[Tensor, "batch c h w"]:
        """The images of these numbers in [0, 1], randomly augmented if there is a generator."""


@dataclass(frozen=True, eq=False)
class InMemory:
    """Images of one size, held as bytes or as numbers in [0, 1].

    Attributes:
        pixels: the images.
        labels: their classes.
        classes: names of the classes.
        shift: augmentation: shift by up to so many pixels (zeros move in) and mirror at random; 0 for none.
    """

    pixels: Float[Tensor, "images c h w"] | UInt8[Tensor, "images c h w"]
    labels: Int[Tensor, " images"]
    classes: tuple[str, ...]
    shift: int = 0

    @classmethod
    def of(cls, dataset: Dataset) -> "InMemory":
        """A bundled set, as it is."""
        return cls(dataset.inputs, dataset.targets, dataset.classes)

    def read(self, rows: Sequence[int], augment: torch.Generator | None = None) -> Float[Tensor, "batch c h w"]:
        chosen = self.pixels[torch.as_tensor(rows)]
        images = chosen if chosen.is_floating_point() else chosen.float() / 255
        return images if augment is None or not self.shift else _shifted_and_mirrored(images, self.shift, augment)


@dataclass(frozen=True, eq=False)
class Folder:
    """Image files, one folder per class, cut to one size when they are read.

    Attributes:
        files: the image files.
        labels: their classes.
        classes: names of the class folders, in alphabetical order.
        size: height and width of what is cut out: for training a random part of 8 to 100 % of the area at a random aspect of 3:4
            to 4:3, mirrored at random; else the middle, 87.5 % of the shorter side.
    """

    files: tuple[Path, ...]
    labels: Int[Tensor, " images"]
    classes: tuple[str, ...]
    size: int

    def read(self, rows: Sequence[int], augment: torch.Generator | None = None) -> Float[Tensor, "batch c h w"]:
        draws = [None if augment is None else torch.rand(5, generator=augment, dtype=torch.float64) for _ in rows]
        with ThreadPoolExecutor(4) as pool:
            images = pool.map(self._image, [self.files[row] for row in rows], draws)
            return torch.stack(list(images))

    def _image(self, file: Path, draw: Tensor | None) -> Float[Tensor, "c h w"]:
        from PIL import Image

        with Image.open(file) as opened:
            picture = opened.convert("RGB")
        box = _middle(picture) if draw is None else _random_part(picture, draw)
        cut = picture.resize((self.size, self.size), Image.Resampling.BILINEAR, box=box, reducing_gap=2.0)
        image = torch.from_numpy(np.array(cut)).permute(2, 0, 1).float() / 255
        return image.flip(-1) if draw is not None and draw[4] < 0.5 else image


@dataclass(frozen=True)
class ImageSplit:
    """Images to learn from, and images to judge by."""

    train: Images
    test: Images


# Reading


def read_cifar(folder: Path, shift: int = 4) -> ImageSplit:
    """CIFAR-10 or CIFAR-100, the Python or the binary version, as its publisher packs it.

    Args:
        folder: the folder ``cifar-10-batches-py``, ``cifar-10-batches-bin``, ``cifar-100-python`` or ``cifar-100-binary``, or the
            one that holds it.
        shift: of the augmentation.

    Raises:
        FileNotFoundError: none of them is there, or a file of it is missing.
        ValueError: a file holds something else.
    """
    for name, read in _LAYOUTS.items():
        found = folder if folder.name == name else folder / name
        if found.is_dir():
            train, test, classes = read(found)
            return ImageSplit(InMemory(*train, classes, shift), InMemory(*test, classes))
    raise FileNotFoundError(f"expected one of the folders {', '.join(_LAYOUTS)} in {folder}")


def read_image_folders(folder: Path, size: int = 224) -> ImageSplit:
    """Images in folders: ``train/<class>/*`` and ``val/<class>/*``, as ImageNet and Imagenette are unpacked.

    Args:
        folder: holds ``train`` and ``val``.
        size: height and width of the images that are read.

    Raises:
        FileNotFoundError: a folder is missing or holds no image.
        ValueError: a class is only in one of the two.
    """
    train, test = (_image_files(folder / part, size) for part in ("train", "val"))
    if train.classes != test.classes:
        raise ValueError(f"train and val hold different classes: {sorted(set(train.classes) ^ set(test.classes))[:5]}")
    return ImageSplit(train, test)


def _image_files(folder: Path, size: int) -> Folder:
    if not folder.is_dir():
        raise FileNotFoundError(f"expected the folder {folder} with a folder of images per class")
    classes = tuple(sorted(entry.name for entry in folder.iterdir() if entry.is_dir()))
    found = [
        (file, label)
        for label, name in enumerate(classes)
        for file in sorted((folder / name).rglob("*"))
        if file.suffix.lower() in (".jpeg", ".jpg", ".png")
    ]
    if not found:
        raise FileNotFoundError(f"no JPEG or PNG file in the folders of {folder}")
    files, labels = zip(*found, strict=True)
    return Folder(tuple(files), torch.tensor(labels), classes, size)


Rows = tuple[UInt8[Tensor, "_ 3 32 32"], Int[Tensor, "_"]]
Part = tuple[Rows, Rows, tuple[str, ...]]


def _cifar10_python(folder: Path) -> Part:
    classes = _strings(_unpickled(folder / "batches.meta")["label_names"])
    train = [_python_rows(folder / f"data_batch_{number}", "labels") for number in range(1, 6)]
    return _joined(train), _python_rows(folder / "test_batch", "labels"), classes


def _cifar100_python(folder: Path) -> Part:
    classes = _strings(_unpickled(folder / "meta")["fine_label_names"])
    return _python_rows(folder / "train", "fine_labels"), _python_rows(folder / "test", "fine_labels"), classes


def _cifar10_binary(folder: Path) -> Part:
    classes = tuple((folder / "batches.meta.txt").read_text(encoding="utf-8").split())
    train = [_binary_rows(folder / f"data_batch_{number}.bin", labels=1) for number in range(1, 6)]
    return _joined(train), _binary_rows(folder / "test_batch.bin", labels=1), classes


def _cifar100_binary(folder: Path) -> Part:
    classes = tuple((folder / "fine_label_names.txt").read_text(encoding="utf-8").split())
    return _binary_rows(folder / "train.bin", labels=2), _binary_rows(folder / "test.bin", labels=2), classes


_LAYOUTS: Mapping[str, Callable[[Path], Part]] = {
    "cifar-10-batches-py": _cifar10_python,
    "cifar-10-batches-bin": _cifar10_binary,
    "cifar-100-python": _cifar100_python,
    "cifar-100-binary": _cifar100_binary,
}


def _python_rows(file: Path, labels: str) -> Rows:
    stored = _unpickled(file)
    return _rows(file, np.asarray(stored["data"]), np.asarray(stored[labels]))


def _binary_rows(file: Path, labels: int) -> Rows:
    content = np.fromfile(file, dtype=np.uint8)
    if content.size % (labels + 3072):
        raise ValueError(f"{file} is not a binary file of CIFAR: {content.size} bytes")
    table = content.reshape(-1, labels + 3072)
    return _rows(file, table[:, labels:], table[:, labels - 1].astype(np.int64))


def _rows(file: Path, pixels: np.ndarray, labels: np.ndarray) -> Rows:
    if pixels.dtype != np.uint8 or pixels.shape != (len(labels), 3072):
        raise ValueError(f"{file} must hold images of 3072 bytes, got {pixels.dtype} of shape {pixels.shape}")
    images = np.ascontiguousarray(pixels).reshape(-1, 3, 32, 32)
    return torch.from_numpy(images.copy()), torch.from_numpy(labels.astype(np.int64))


def _joined(parts: Sequence[Rows]) -> Rows:
    return torch.cat([pixels for pixels, _ in parts]), torch.cat([labels for _, labels in parts])


def _strings(names: Iterable[Any]) -> tuple[str, ...]:
    return tuple(name.decode() if isinstance(name, bytes) else str(name) for name in names)


class _ArraysOnly(pickle.Unpickler):
    """Unpickles containers, numbers, strings and arrays, and refuses everything that would run code."""

    _ALLOWED = (
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("_codecs", "encode"),
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed in a data file")
        return super().find_class(module, name)


def _unpickled(file: Path) -> dict[str, Any]:
    try:
        stored = _ArraysOnly(io.BytesIO(file.read_bytes()), encoding="bytes").load()
    except pickle.UnpicklingError as error:
        raise ValueError(f"{file}: {error}") from error
    return {key.decode() if isinstance(key, bytes) else key: value for key, value in stored.items()}


# Batches


class _Steps(data.Dataset[Batch]):
    """The training batch of every step, of one of several processes."""

    def __init__(self, images: Images, batch: int, seed: int, rank: int, world: int) -> None:
        self.images, self.batch, self.seed, self.rank, self.world = images, batch, seed, rank, world

    def __getitem__(self, step: int) -> Batch:
        epoch, place = divmod(step, steps_per_epoch(self.images, self.batch))
        order = visiting_order(self.seed, epoch, len(self.images.labels))
        rows = order[place * self.batch : (place + 1) * self.batch][self.rank :: self.world]
        augment = derive_generator(self.seed, "augment", step, self.rank)
        return self.images.read(rows.tolist(), augment), self.images.labels[rows]


def steps_per_epoch(images: Images, batch: int) -> int:
    """Full batches in one pass over the images.

    Raises:
        ValueError: there is not a single one.
    """
    if len(images.labels) < batch:
        raise ValueError(f"a batch of {batch} needs at least as many training images, got {len(images.labels)}")
    return len(images.labels) // batch


def training_batches(
    images: Images,
    batch: int,
    steps: range,
    *,
    seed: int,
    device: torch.device,
    workers: int = 0,
    rank: int = 0,
    world: int = 1,
) -> Iterator[Batch]:
    """The batches of these steps, on the device, every epoch in another order.

    Args:
        images: what to draw from.
        batch: images per step, of all processes together.
        steps: whose batches; it may begin anywhere.
        seed: of order and augmentation.
        device: where the batches are wanted.
        workers: processes that read ahead.
        rank: this process's number, and ``world`` the number of processes, among which each batch is divided.
        world: see ``rank``.
    """
    loader = data.DataLoader(
        _Steps(images, batch, seed, rank, world),
        batch_size=None,
        sampler=steps,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # the loader draws a seed for its workers; not from the run's generators
    )
    return prefetch(loader, device)


def evaluation_batches(images: Images, batch: int, device: torch.device, count: int | None = None) -> Iterator[Batch]:
    """The images in order, on the device.

    Args:
        images: what to read.
        batch: images at a time.
        device: where they are wanted.
        count: take only so many, evenly spaced, so that classes which are stored one after the other all have their share.
    """
    total = len(images.labels)
    rows = torch.arange(total) if count is None or count >= total else torch.arange(count) * total // count
    for part in rows.split(batch):
        yield images.read(part.tolist()).to(device), images.labels[part].to(device)


@lru_cache(maxsize=2)
def visiting_order(seed: int, epoch: int, count: int) -> Int[Tensor, " count"]:
    """The order in which an epoch visits its examples, the same for all arms of a seed."""
    return torch.randperm(count, generator=derive_generator(seed, "order", epoch))


# Augmentation


def _shifted_and_mirrored(
    images: Float[Tensor, "batch c h w"], shift: int, generator: torch.Generator
) -> Float[Tensor, "batch c h w"]:
    count, _, height, width = images.shape
    padded = torch.nn.functional.pad(images, [shift] * 4)
    top, left = torch.randint(2 * shift + 1, (2, count, 1, 1), generator=generator)
    rows, columns = top + torch.arange(height).view(1, -1, 1), left + torch.arange(width).view(1, 1, -1)
    cut = padded[torch.arange(count).view(-1, 1, 1), :, rows, columns].permute(0, 3, 1, 2)
    mirrored = torch.rand(count, generator=generator) < 0.5
    return torch.where(mirrored.view(-1, 1, 1, 1), cut.flip(-1), cut)


def _middle(picture: "Image") -> tuple[float, float, float, float]:
    width, height = picture.size
    side = 0.875 * min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def _random_part(picture: "Image", draw: Float[Tensor, "5"]) -> tuple[float, float, float, float]:
    width, height = picture.size
    share, aspect, across, down, _ = draw.tolist()
    area = (0.08 + 0.92 * share) * width * height
    ratio = (3 / 4) ** (1 - 2 * aspect)
    part_width, part_height = min(width, (area * ratio) ** 0.5), min(height, (area / ratio) ** 0.5)
    left, top = across * (width - part_width), down * (height - part_height)
    return left, top, left + part_width, top + part_height
