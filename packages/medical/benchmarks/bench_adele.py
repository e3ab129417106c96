"""Cost of ADELE: of a training step with consistency over three scales, of correction, and of the fit, against MONAI and SciPy.

uv run python tools/bench.py medical/adele
"""

from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from monai.losses import DiceCELoss
from monai.metrics import MeanIoU
from monai.networks.nets import UNet
from scipy.optimize import curve_fit
from torch import Tensor, nn
from torch.nn import functional as F

from poise.core.bench import Case, Peer, case, peer
from poise.medical import (
    MEDICAL,
    AdeleLoss,
    LabelStore,
    MemorizationDetector,
    StreamingIoU,
    correct_labels,
    fit_iou_curve,
    multiscale_forward,
)

CLASSES = 5


def network() -> UNet:
    """MONAI's U-Net of 16 to 64 channels."""
    torch.manual_seed(0)
    return UNet(spatial_dims=2, in_channels=1, out_channels=CLASSES, channels=(16, 32, 64), strides=(2, 2))


def slices(count: int, side: int) -> tuple[Tensor, Tensor]:
    """Images, and masks with a square of one class each."""
    generator = torch.Generator().manual_seed(0)
    masks = torch.zeros(count, side, side, dtype=torch.long)
    for place, mask in enumerate(masks):
        mask[side // 4 : side // 2, side // 4 : 3 * side // 4] = 1 + place % (CLASSES - 1)
    return torch.randn(count, 1, side, side, generator=generator), masks


def training_step(
    model: nn.Module, loss: Callable[[], Tensor], parameters: list[nn.Parameter] | None = None
) -> Callable[[], None]:
    """Forward, backward and an SGD step."""
    optimizer = torch.optim.SGD(parameters or list(model.parameters()), 0.01, momentum=0.99)

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return step


def three_scales(side: int, batch: int = 5) -> Case:
    """A step with cross-entropy, and one with ADELE's loss on three scales."""
    images, masks = slices(batch, side)
    plain, method, criterion = network(), network(), AdeleLoss()
    return case(
        f"MONAI UNet 16-64, {batch} slices of {side} x {side}: ADELE's loss at scales 0.7, 1, 1.5 against cross-entropy",
        training_step(plain, lambda: F.cross_entropy(plain(images), masks)),
        training_step(method, lambda: criterion(multiscale_forward(method, images, divisor=4), masks)),
    )


def loss_alone(side: int = 128, batch: int = 5) -> Case:
    """The loss and its gradient for given logits, against the cross-entropy of one scale."""
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(batch, CLASSES, side, side, generator=generator).requires_grad_() for _ in range(3)]
    _, masks = slices(batch, side)
    criterion = AdeleLoss(gate=0.0)

    def cross_entropy() -> None:
        F.cross_entropy(logits[1], masks).backward()

    def adele() -> None:
        criterion(logits, masks).backward()

    return case(
        f"the loss alone, logits of {batch} x {CLASSES} x {side} x {side}: ADELE against cross-entropy",
        cross_entropy,
        adele,
    )


def epoch(correct: bool, side: int = 64, count: int = 40, batch: int = 5) -> Callable[[], None]:
    """An epoch of cross-entropy; with remembered predictions, detection, and a correction of every mask."""
    images, masks = slices(count, side)
    model = network()
    store, iou, triggered = LabelStore(masks, CLASSES), StreamingIoU(CLASSES), torch.ones(CLASSES, dtype=torch.bool)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.99)

    def run() -> None:
        detector = MemorizationDetector(CLASSES, 100)
        for value in np.linspace(0.1, 0.8, 9):
            detector.record(torch.full((CLASSES,), value))
        for index in torch.arange(count).split(batch):
            labels = store.read(index) if correct else masks[index]
            logits = model(images[index])
            loss = F.cross_entropy(logits, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if correct:
                probabilities = logits.detach().softmax(1)
                store.remember(index, probabilities)
                iou.update(probabilities.argmax(1), labels)
        if correct:
            detector.update(iou.compute())
            iou.reset()
            store.correct(triggered, MEDICAL)

    return run


def correction_of_an_epoch() -> Case:
    """What memory, detection and correction add to an epoch."""
    return case(
        "an epoch of MONAI UNet 16-64 on 40 slices of 64 x 64: with memory of predictions, detection and correction against without",
        epoch(correct=False),
        epoch(correct=True),
        repeats=5,
        warmup=1,
    )


def correction_alone(side: int = 64, count: int = 40) -> Case:
    """The correction of all masks after an epoch (the method), against the epoch (the plain call): its ratio is its share."""
    _, masks = slices(count, side)
    store = LabelStore(masks, CLASSES)
    generator = torch.Generator().manual_seed(0)
    store.remember(torch.arange(count), torch.randn(count, CLASSES, side, side, generator=generator).softmax(1))
    triggered = torch.ones(CLASSES, dtype=torch.bool)

    def correct() -> None:
        store.reset()
        store.correct(triggered)

    return case(
        "correction of 40 masks of 64 x 64 (the method) against the training epoch between two of them",
        epoch(correct=False),
        correct,
        repeats=5,
        warmup=1,
    )


def correction_and_loop(count: int = 100, side: int = 128) -> Case:
    """The correction of many masks at once, against image by image with NumPy, as the authors' code goes about it."""
    _, masks = slices(count, side)
    generator = torch.Generator().manual_seed(0)
    probabilities = (4 * torch.randn(count, CLASSES, side, side, generator=generator)).softmax(1)
    labels, probs = masks.numpy(), probabilities.numpy()
    triggered = torch.tensor([False, True, True, False, True])

    def loop() -> None:
        chosen = [0, 1, 2, 4]
        for label, p in zip(labels, probs, strict=True):
            present = np.unique(label)
            if not np.isin(present, chosen[1:]).any():
                continue
            predicted = p.argmax(0)
            sure = (p[1:].max(0) > 0.7) | (p[0] > 0.7)
            replace = sure & np.isin(label, chosen) & np.isin(predicted, chosen)
            np.where(replace & ((predicted == 0) | np.isin(predicted, present)), predicted, label)

    def at_once() -> None:
        correct_labels(masks, probabilities, triggered)

    return case(
        f"correction of {count} masks of {side} x {side}, {CLASSES} classes: at once against image by image",
        loop,
        at_once,
    )


def memory_of_predictions(count: int = 200, side: int = 128, classes: int = 21) -> Case:
    """Keeping what a correction needs of predictions, against keeping the probabilities (the plain call): time and memory."""
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.randn(8, classes, side, side, generator=generator).softmax(1)
    masks = torch.zeros(count, side, side, dtype=torch.uint8)

    def keep_all() -> Tensor:
        kept = torch.empty(count, classes, side, side)
        for index in torch.arange(count).split(8):
            kept[index] = probabilities
        return kept

    def keep_summary() -> LabelStore:
        store = LabelStore(masks, classes)
        for index in torch.arange(count).split(8):
            store.remember(index, probabilities)
        return store

    return case(
        f"predictions of {count} images of {side} x {side}, {classes} classes: summary against all",
        keep_all,
        keep_summary,
    )


def fit_against_scipy(count: int = 40) -> Peer:
    """The fit of one curve; the peer is the bare call that it wraps."""
    t = np.linspace(0, count, count)
    iou = 0.8 * (1 - np.exp(-(t**0.7) / 3)) + np.random.default_rng(0).normal(0, 0.01, count)
    iou = iou.clip(0, 1)
    sigma = np.geomspace(1, 0.1, count)

    def theirs() -> np.ndarray:
        bounds = ([0, 0, 0], [1, 1, np.inf])
        found, _ = curve_fit(
            lambda x, a, b, c: a * (1 - np.exp(-(x**b) / c)),
            t,
            iou,
            (1, 1, 1),
            sigma=sigma,
            absolute_sigma=True,
            bounds=bounds,
        )
        return found

    name = f"fit of the IoU curve of one class, {count} epochs; agreement of a, b and c"
    return peer("SciPy curve_fit", version("scipy"), name, lambda: np.array(fit_iou_curve(iou)), theirs, repeats=15)


def against_dice_ce(side: int = 128, batch: int = 5) -> Peer:
    """A step with ADELE's loss against one with MONAI's Dice and cross-entropy; agreement of the cross-entropies."""
    images, masks = slices(batch, side)
    ours, theirs = network(), network()
    criterion = AdeleLoss()
    dice_ce, only_ce = (
        DiceCELoss(to_onehot_y=True, softmax=True),
        DiceCELoss(to_onehot_y=True, softmax=True, lambda_dice=0.0),
    )
    labels = masks.unsqueeze(1)
    with torch.no_grad():
        logits = ours(images)
        one = AdeleLoss(0.0, scales=1)([logits], masks).item()
        other = only_ce(logits, labels).item()
    difference = abs(one - other) / abs(other)
    return peer(
        "MONAI DiceCELoss",
        version("monai"),
        f"training step of MONAI UNet 16-64, {batch} slices of {side} x {side}; agreement of the cross-entropy of one scale",
        training_step(ours, lambda: criterion(multiscale_forward(ours, images, divisor=4), masks)),
        training_step(theirs, lambda: dice_ce(theirs(images), labels)),
        agreement=difference,
    )


def iou_against_monai(count: int = 20, side: int = 128) -> Peer:
    """Pooled IoU of an epoch's predictions, batch by batch."""
    generator = torch.Generator().manual_seed(0)
    predicted, labels = torch.randint(0, CLASSES, (2, count, side, side), generator=generator)

    def ours() -> Tensor:
        iou = StreamingIoU(CLASSES)
        for index in torch.arange(count).split(5):
            iou.update(predicted[index], labels[index])
        return iou.compute()

    def theirs() -> Tensor:
        one_hot = [F.one_hot(each.reshape(1, -1, 1), CLASSES).movedim(-1, 1) for each in (predicted, labels)]
        metric = MeanIoU(reduction="none", get_not_nans=False)
        result = metric(*one_hot)
        assert isinstance(result, Tensor)
        return result[0]

    name = f"IoU of {CLASSES} classes, {count} predictions of {side} x {side}; MONAI's, of all pixels as one image"
    return peer("MONAI MeanIoU", version("monai"), name, ours, theirs)


def fits_of_an_epoch(classes: int = 21, count: int = 60) -> Case:
    """Detection for all classes of PASCAL VOC after an epoch, against one class (the plain call)."""
    t = np.linspace(0, count, count)
    curves = np.stack([0.8 * (1 - np.exp(-(t**0.7) / (3 + index))) for index in range(classes)], 1)

    def decide(width: int) -> Callable[[], None]:
        def run() -> None:
            detector = MemorizationDetector(width, 1000)
            for values in curves[:, :width]:
                detector.record(values)
            detector.decide(0)

        return run

    name = f"detection after {count} values: {classes - 1} classes against one"
    return case(name, decide(2), decide(classes), memory=False)


def bench() -> dict[str, Any]:
    """All cases."""
    cases = [
        three_scales(64),
        three_scales(128),
        loss_alone(),
        correction_of_an_epoch(),
        correction_alone(),
        correction_and_loop(),
        memory_of_predictions(),
        fits_of_an_epoch(),
    ]
    peers = [fit_against_scipy(), against_dice_ce(), iou_against_monai()]
    return {"method": "medical/adele", "cases": cases, "peers": peers}
