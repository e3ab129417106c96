"""The bags of the AEM experiment: of digits, of tiles of one histology picture, and of slides as files of features."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from poise.core.data import histology, mnist5k
from poise.core.gpu import derive_generator
from poise.medical.mil.bags import Bag
from poise.medical.mil.feature_bags import FeatureBagDataset, slides_of_h5
from poise.medical.mil.slides import Slide, Slides, read_slides, split_patients
from poise.medical.mil.tiles import EfficientNetLite0, picture_tiles


@runtime_checkable
class Bags(Protocol):
    """A sequence of bags, in memory or read when asked for."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Bag: ...


@dataclass(frozen=True, eq=False)
class BagSplit:
    """Bags to train on, to choose the epoch by, and to test on.

    Attributes:
        train: training bags.
        test: test bags.
        validation: ``None`` where the last epoch counts.
        classes: number of classes.
        width: features of an instance.
        truth: which instances of the test bags make them positive ``(bags, instances)``, where that is known.
        pictures: the instances of one positive test bag as images.
        slide: a bag with coordinates to draw a map of attention over, and its picture.
    """

    train: Bags
    test: Bags
    classes: int
    width: int
    validation: Bags | None = None
    truth: Tensor | None = None
    pictures: Tensor | None = None
    slide: tuple[Bag, Tensor | None] | None = None


# Bags made of labelled instances


def digit_bags(
    seed: int, train: int, test: int, instances: int, positives: tuple[int, int], components: int = 32
) -> BagSplit:
    """Bags of digits, positive when they hold some nines; training and test bags share no digit.

    Features are principal components of the training digits, each scaled to unit standard deviation on them.
    """
    digits = mnist5k().split(test=0.5, seed=seed)
    mean = digits.train.inputs.flatten(1).mean(0)
    centred = digits.train.inputs.flatten(1).double() - mean
    axes = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -components:].flip(1)
    # Eigenvectors are known up to their sign only, which may differ from machine to machine.
    axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
    scale = (centred @ axes).std(0)
    parts = []
    for name, part, count in (("train", digits.train, train), ("test", digits.test, test)):
        features = ((part.inputs.flatten(1).double() - mean) @ axes / scale).float()
        generator = derive_generator(seed, "digit_bags", name)
        parts.append(draw_bags(features, part.targets == 9, count, instances, (0, 0), positives, generator))
    (train_bags, _, _), (test_bags, truth, members) = parts
    shown = next(index for index in range(test) if test_bags[index].label == 1)
    pictures = digits.test.inputs[members[shown], 0]
    return BagSplit(train_bags, test_bags, classes=2, width=components, truth=truth, pictures=pictures)


def tile_bags(
    seed: int, train: int, test: int, instances: int, negatives: tuple[int, int], positives: tuple[int, int]
) -> BagSplit:
    """Bags of tiles of one picture, positive when enough of them are among the brownest; the left half trains, the right tests."""
    left, right, brownest, tiles, corner = _histology_features()
    parts = []
    for name, half, count in (("train", left, train), ("test", right, test)):
        generator = derive_generator(seed, "tile_bags", name)
        parts.append(draw_bags(half.features, brownest[name], count, instances, negatives, positives, generator))
    (train_bags, _, _), (test_bags, truth, members) = parts
    shown = next(index for index in range(test) if test_bags[index].label == 1)
    picture = histology().pixels[:, :, corner:]
    pictures = tiles[members[shown]]
    width = left.features.shape[1]
    return BagSplit(
        train_bags, test_bags, classes=2, width=width, truth=truth, pictures=pictures, slide=(right, picture)
    )


def draw_bags(
    features: Tensor,
    positive: Tensor,
    count: int,
    instances: int,
    negatives: tuple[int, int],
    positives: tuple[int, int],
    generator: torch.Generator,
) -> tuple[list[Bag], Tensor, Tensor]:
    """Bags of distinct instances, every second one positive.

    Args:
        features: of all instances.
        positive: which of them are.
        count: bags.
        instances: in each bag.
        negatives: least and largest number of positive instances in a negative bag.
        positives: the same in a positive bag.
        generator: where to draw from.

    Returns:
        The bags; which instances of each are positive; and which of ``features`` they are.
    """
    those, others = positive.nonzero().flatten(), (~positive).nonzero().flatten()
    bags, members = [], []
    for number in range(count):
        label = number % 2
        low, high = positives if label else negatives
        hits = int(torch.randint(low, high + 1, (), generator=generator))
        chosen = torch.cat(
            [
                those[torch.randperm(len(those), generator=generator)[:hits]],
                others[torch.randperm(len(others), generator=generator)[: instances - hits]],
            ]
        )
        chosen = chosen[torch.randperm(instances, generator=generator)]
        bags.append(Bag(features[chosen], label, id=str(number)))
        members.append(chosen)
    index = torch.stack(members)
    return bags, positive[index], index


@cache
def _histology_features() -> tuple[Bag, Bag, dict[str, Tensor], Tensor, int]:
    """Both halves of the picture as bags, their brownest tiles, the tiles of the right half and where that begins.

    The network sees each tile once per process.
    """
    pixels = histology().pixels
    middle = pixels.shape[2] // 2
    encoder = EfficientNetLite0()
    halves, stain = {}, {}
    for name, half in (("train", pixels[:, :, :middle]), ("test", pixels[:, :, middle:])):
        tiles, coords = picture_tiles(half)
        halves[name] = (Bag(encoder(tiles), 1, coords, id=f"histology, {name}"), tiles)
        stain[name] = brown_stain(tiles)
    threshold = stain["train"].quantile(0.9)
    mean, deviation = halves["train"][0].features.mean(0), halves["train"][0].features.std(0).clamp(min=1e-3)
    left, right = (replace(bag, features=(bag.features - mean) / deviation) for bag, _ in halves.values())
    return left, right, {name: values > threshold for name, values in stain.items()}, halves["test"][1], middle


def brown_stain(tiles: Tensor) -> Tensor:
    """Mean optical density of DAB in each tile, by the colour deconvolution of Ruifrok and Johnston (2001)."""
    from skimage.color import rgb2hed

    density = rgb2hed(tiles.double().numpy(), channel_axis=1)[:, 2]
    return torch.from_numpy(density).mean((1, 2))


# Slides


def slide_bags(
    path: Path, layout: str, table: str, folds: str, protocol: str, groups: Sequence[Sequence[int]], seed: int
) -> BagSplit:
    """Slides as features: an AEM file (.h5), or a CLAM folder with a table of labels and splits."""
    slides = _slides(path, layout, table, folds, protocol)
    if groups:
        slides = slides.merged(groups)
    slides = PROTOCOLS[protocol](slides, seed)
    train, validation, test = (FeatureBagDataset(path, layout, slides.part(name)) for name in ("train", "val", "test"))
    first = test[0]
    slide = None if first.coords is None else (first, None)
    return BagSplit(train, test, len(slides.classes), first.features.shape[1], validation, slide=slide)


def _slides(path: Path, layout: str, table: str, folds: str, protocol: str) -> Slides:
    folder = path.parent if layout == "aem_h5" else path
    if layout == "aem_h5" and not (folder / table).is_file():
        slides = slides_of_h5(path)
    else:
        slides = read_slides(folder / table, splits=folder / folds if folds else None)
    if protocol != "camelyon17":
        return slides
    return replace(slides, rows=tuple(replace(slide, patient=_camelyon17_patient(slide)) for slide in slides))


def _by_table(slides: Slides, _seed: int) -> Slides:
    """Splits as the table has them."""
    return slides


def _by_patient(slides: Slides, seed: int) -> Slides:
    """60 % for training, 20 % for validation, 20 % for testing."""
    return split_patients(slides, {"train": 0.6, "val": 0.2, "test": 0.2}, seed)


def _camelyon16(slides: Slides, seed: int) -> Slides:
    """The official test slides have "test" in their name."""
    return _held_out(slides, [slide for slide in slides if "test" in slide.id], seed)


def _camelyon17(slides: Slides, seed: int) -> Slides:
    """Centres 3 and 4 test: a shift of domain. Every centre has 20 of the 100 patients."""
    return _held_out(slides, [slide for slide in slides if int(slide.patient.split("_")[1]) // 20 in (3, 4)], seed)


def _held_out(slides: Slides, test: Sequence[Slide], seed: int) -> Slides:
    """These slides test; of the others, a tenth of the patients is for validation."""
    names = {slide.id for slide in test}
    rest = replace(slides, rows=tuple(replace(slide, split="") for slide in slides if slide.id not in names))
    parted = split_patients(rest, {"train": 0.9, "val": 0.1}, seed)
    return replace(slides, rows=(*parted.rows, *(replace(slide, split="test") for slide in test)))


def _camelyon17_patient(slide: Slide) -> str:
    """``patient_012`` of the slide ``patient_012_node_3``."""
    parts = slide.id.split("_")
    if len(parts) < 2 or parts[0] != "patient" or not parts[1].isdigit():
        raise ValueError(f"slides of CAMELYON17 are called patient_<number>_node_<number>, got {slide.id!r}")
    return "_".join(parts[:2])


PROTOCOLS = {"table": _by_table, "patients": _by_patient, "camelyon16": _camelyon16, "camelyon17": _camelyon17}
"""How slides are parted into splits, by name."""
