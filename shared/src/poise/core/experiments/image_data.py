"""The images that experiments on classification share: handwritten digits that come with poise, and published sets of the user."""

from functools import partial
from typing import Literal

from torch.nn import functional as F

from poise.core.data import mnist5k
from poise.core.experiments.published_images import ImageSplit, InMemory, read_cifar, read_image_folders
from poise.core.lab import Run

ImageData = Literal["mnist", "cifar", "folders"]


def load_images(
    data: ImageData, run: Run, *, train: int, test: int, size: int = 224, halved: bool = False
) -> ImageSplit:
    """Images to learn from and to judge by, the same for all arms of a seed.

    Args:
        data: ``mnist``, or what is in the folder of the run: CIFAR (``cifar``), or image files in folders (``folders``).
        run: its seed splits MNIST.
        train: training images from MNIST.
        test: test images from MNIST.
        size: height and width of images from folders.
        halved: MNIST at 14 x 14 pixels.
    """
    if data == "cifar":
        return run.load(read_cifar)
    if data == "folders":
        return run.load(partial(read_image_folders, size=size))
    rest, judged = mnist5k().split(test=test, seed=run.seed)
    parts = rest.split(test=train, seed=run.seed).test, judged
    if halved:
        return ImageSplit(*(InMemory(F.avg_pool2d(part.inputs, 2), part.targets, part.classes) for part in parts))
    return ImageSplit(*map(InMemory.of, parts))
