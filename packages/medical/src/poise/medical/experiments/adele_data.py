"""Images with badly drawn masks: digits, SegTHOR, PASCAL VOC with pseudo labels."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional as F

from poise.core.data import mnist5k
from poise.core.gpu import derive_generator
from poise.medical.segmentation import segthor, voc
from poise.medical.segmentation.adele.label_store import LabelStore
from poise.medical.segmentation.noise import random_under_over
from poise.medical.segmentation.segthor import PATIENTS, SegTHORSlices
from poise.medical.segmentation.voc import VOCCrops, VOCPseudoLabels

SIDE, MARGIN = 32, 2
SHIFT = 2
INK = 0.35


class Batch(NamedTuple):
    """What a step trains on.

    Attributes:
        images: (B, channels, H, W).
        labels: (B, H, W) masks in use.
        original: (B, H, W) masks as given.
    """

    images: Tensor
    labels: Tensor
    original: Tensor


@runtime_checkable
class Task(Protocol):
    """A training set whose masks are in a store, and a test set.

    Attributes:
        classes: names, background first.
        channels: of the images.
        store: the masks.
        aligned: whether what a step predicts lies on the stored masks; else predictions are made in a pass of their own.
    """

    classes: tuple[str, ...]
    channels: int
    store: LabelStore
    aligned: bool

    def batch(self, index: Tensor, epoch: int) -> Batch:
        """Training samples."""
        ...

    def images(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Training images as they are, in batches of one size, with their places in the store."""
        ...

    def clean(self, index: Tensor) -> Tensor:
        """True masks (B, H, W) of training samples, padded with 255 like those of the store."""
        ...

    def test(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Test images and their true masks, in batches."""
        ...


class MaskedImages:
    """A task in memory: images of one size with true masks, and worse masks for training.

    Args:
        classes: names, background first.
        images: of training, (B, 1, H, W) for places (B,).
        clean: (N, H, W) true masks for training.
        noisy: (N, H, W) masks that are trained on.
        test_images: as ``images``, of the test set.
        test_masks: (M, H, W) true masks.
        batch_size: of the test set.
    """

    channels, aligned = 1, True

    def __init__(
        self,
        classes: tuple[str, ...],
        images: Callable[[Tensor], Tensor],
        clean: Tensor,
        noisy: Tensor,
        test_images: Callable[[Tensor], Tensor],
        test_masks: Tensor,
        batch_size: int = 50,
    ) -> None:
        self.classes, self._images, self._clean = classes, images, clean
        self.store = LabelStore(noisy, len(classes))
        self._test_images, self._test_masks, self._batch_size = test_images, test_masks, batch_size

    def batch(self, index: Tensor, epoch: int) -> Batch:
        """Images, and their masks from the store."""
        return Batch(self._images(index), self.store.read(index), self.store.read_original(index))

    def images(self) -> Iterator[tuple[Tensor, Tensor]]:
        """All of them."""
        for index in torch.arange(len(self._clean)).split(self._batch_size):
            yield self._images(index), index

    def clean(self, index: Tensor) -> Tensor:
        """True masks."""
        return self._clean[index].long()

    def test(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of the test set."""
        for index in torch.arange(len(self._test_masks)).split(self._batch_size):
            yield self._test_images(index), self._test_masks[index].long()


def digit_masks(seed: int, digits: tuple[int, ...], train: int, test: int, noise: str) -> MaskedImages:
    """Handwritten digits, enlarged to 32 x 32 and noisy; the class of a pixel is that of its digit where there is ink.

    Args:
        seed: of the choice of images and of all noise.
        digits: which of them; each is a class.
        train: training images.
        test: test images, with true masks.
        noise: how training masks are drawn: ``"mixed"``, each eroded by 1, dilated by 2 or by 3, or shifted by 2 pixels at random, or
            ``"dilated"``, all of them dilated by 2.

    Raises:
        ValueError: there are not as many digits, or the noise is unknown.
    """
    if noise not in ("mixed", "dilated"):
        raise ValueError(f"noise must be 'mixed' or 'dilated', got {noise!r}")
    data = mnist5k()
    choice = torch.isin(data.targets, torch.tensor(digits)).nonzero()[:, 0]
    if train + test > len(choice):
        raise ValueError(f"there are {len(choice)} digits {digits}, not {train + test}")
    order = torch.randperm(len(choice), generator=derive_generator(seed, "digits"))[: train + test]
    written = data.inputs[choice[order]]
    names = (data.targets[choice[order], None] == torch.tensor(digits)).long().argmax(1)
    trimmed = written[..., MARGIN:-MARGIN, MARGIN:-MARGIN]
    ink = F.interpolate(trimmed, (SIDE, SIDE), mode="bilinear", align_corners=False).clamp(0, 1)
    shown = ink + 0.15 * torch.randn(ink.shape, generator=derive_generator(seed, "sensor"))
    clean = torch.where(ink[:, 0] > INK, names[:, None, None] + 1, 0)
    drawn = torch.stack([badly_drawn(mask, seed, place, noise) for place, mask in enumerate(clean[:train])])
    classes = ("background", *(str(digit) for digit in digits))
    return MaskedImages(
        classes, shown[:train].__getitem__, clean[:train], drawn, shown[train:].__getitem__, clean[train:]
    )


def badly_drawn(mask: Tensor, seed: int, place: int, noise: str) -> Tensor:
    """A mask of one class, drawn too small, too large, or in the wrong place."""
    generator = derive_generator(seed, "drawing", place)
    region, label = (mask > 0).float()[None, None], mask.max()
    kind = int(torch.randint(4, (), generator=generator)) if noise == "mixed" else 1
    if kind == 0:
        region = -F.max_pool2d(-region, 3, 1, 1)
    elif kind in (1, 2):
        pixels = kind + 1
        region = F.max_pool2d(region, 2 * pixels + 1, 1, pixels)
    else:
        angle = 2 * torch.pi * torch.rand((), generator=generator)
        x, y = (int((SHIFT * component).round()) for component in (angle.cos(), angle.sin()))
        region = F.pad(region, (x, -x, y, -y))
    return torch.where(region[0, 0] > 0, label, 0)


def segthor_slices(folder: Path, seed: int, size: int) -> MaskedImages:
    """SegTHOR volumes in folders ``Patient_XX`` (of the folder itself or its ``train``), masks drawn too small or too large."""
    root = folder / "train" if (folder / "train").is_dir() else folder
    if not root.is_dir() or not any(path.is_dir() for path in root.glob("Patient_*")):
        raise FileNotFoundError(f"no folder Patient_XX in {root}")
    here = {part: [name for name in names if (root / name).is_dir()] for part, names in PATIENTS.items()}
    train, test = (SegTHORSlices(root, here[part], size) for part in ("train", "test"))
    noisy = [
        random_under_over(mask, derive_generator(seed, "drawing", place)) for place, mask in enumerate(train.labels)
    ]
    return MaskedImages(
        segthor.CLASSES, train.image, train.labels, torch.stack(noisy), test.image, test.labels, batch_size=8
    )


class PascalTask:
    """PASCAL VOC 2012 with pseudo labels for training, and its validation images.

    Args:
        folder: ``VOC2012``, or a folder with ``VOCdevkit/VOC2012`` in it.
        pseudo: folder of pseudo labels, absolute or in ``VOC2012``.
        seed: of the augmentation.
        crop: side of training crops.
    """

    classes: tuple[str, ...] = voc.CLASSES
    channels, aligned = 3, False

    def __init__(self, folder: Path, pseudo: str, seed: int, crop: int) -> None:
        inside = folder / "VOCdevkit" / "VOC2012"
        root = inside if inside.is_dir() else folder
        self._train = VOCPseudoLabels(root, pseudo)
        self._test = VOCPseudoLabels(root, "SegmentationClass", "val")
        self.store = LabelStore(self._train.masks, len(self.classes))
        self._crops = VOCCrops(self._train, self.store, crop, seed=seed)

    def batch(self, index: Tensor, epoch: int) -> Batch:
        """Augmented crops, with masks augmented the same."""
        self._crops.epoch = epoch
        images, labels, original, _ = zip(*(self._crops[place] for place in index.tolist()), strict=True)
        return Batch(torch.stack(images), torch.stack(labels), torch.stack(original))

    def images(self) -> Iterator[tuple[Tensor, Tensor]]:
        """One at a time, because they differ in size."""
        for place in range(len(self._train)):
            image, _ = self._train[place]
            yield image[None], torch.tensor([place])

    def clean(self, index: Tensor) -> Tensor:
        """Drawn masks, padded."""
        masks = torch.full((len(index), *self.store.labels.shape), voc.IGNORE)
        for row, place in zip(masks, index.tolist(), strict=True):
            mask = self._train.clean(place)
            row[: mask.shape[0], : mask.shape[1]] = mask
        return masks

    def test(self) -> Iterator[tuple[Tensor, Tensor]]:
        """One at a time."""
        for place in range(len(self._test)):
            yield self._test[place][0][None], self._test.clean(place)[None].long()
