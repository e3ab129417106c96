r"""ADELE: are badly drawn masks corrected when it is time, class by class, and does the network then forget less?

Liu et al., "Adaptive Early-Learning Correction for Segmentation from Noisy Annotations", CVPR 2022, arXiv 2110.03740.

    f(t) = a (1 - exp(-t^b / c)) is fitted to each class's training IoU; where its slope has fallen by 90 %, masks of that class take
    confident predictions; L = (sum over scales of cross-entropy + lambda * sum of KL(p_i || mixture)) / 3

Nothing here says anything about clinical use.

Presets:

- ``quick``: handwritten digits to be segmented; each training mask is eroded, dilated or shifted at random. The arm ``dilated`` is a
  negative control: all of its masks are dilated alike, an error that the image predicts, which is learnt at once and which no early
  phase can undo.
- ``paper``: SegTHOR, a folder of ``Patient_XX/Patient_XX.nii.gz`` and ``GT.nii.gz``, with synthetic noise.
- ``pascal``: PASCAL VOC 2012 with pseudo labels, ``--set pseudo=FOLDER``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from poise.core.experiments.published_images import visiting_order
from poise.core.lab import ArmResult, Claim, Experiment, Run
from poise.medical.experiments import adele_figures as figures
from poise.medical.experiments.adele_data import PascalTask, Task, digit_masks, segthor_slices
from poise.medical.experiments.adele_measures import (
    MEASURES,
    early_learning,
    epoch_measures,
    final_measures,
    trigger_measures,
)
from poise.medical.experiments.adele_networks import DeepLabV1, UNet
from poise.medical.segmentation.adele.consistency import AdeleLoss
from poise.medical.segmentation.adele.correction import MEDICAL, PASCAL, Prediction
from poise.medical.segmentation.adele.detector import MemorizationDetector
from poise.medical.segmentation.adele.iou import StreamingIoU
from poise.medical.segmentation.adele.multiscale import SCALES, multiscale_forward, multiscale_probabilities
from poise.medical.segmentation.adele.trainer import CorrectionSchedule


class Arm(NamedTuple):
    """What an arm does.

    Attributes:
        text: what it is.
        correction: when labels are corrected: never, when all classes together, or when each class is being memorised.
        consistent: whether predictions at three scales are kept consistent.
        dilated: whether all masks are dilated alike (digits only).
    """

    text: str
    correction: Literal["never", "global", "class"]
    consistent: bool = False
    dilated: bool = False


SETUPS = {
    "baseline": Arm("cross-entropy on the masks as given", "never"),
    "global": Arm("correction, one trigger for all classes", "global"),
    "correction": Arm("correction, a trigger for each class", "class"),
    "consistency": Arm("consistency over scales", "never", consistent=True),
    "both": Arm("ADELE: correction and consistency", "class", consistent=True),
    "dilated": Arm("correction where all masks are dilated", "class", dilated=True),
}


@dataclass(frozen=True)
class Config:
    """Settings; the defaults are those of the ``quick`` preset.

    Attributes:
        data: digits, SegTHOR slices or PASCAL VOC.
        digits: which of them there are.
        train: training images (digits).
        test: test images (digits).
        size: side of slices (SegTHOR) or of training crops (PASCAL VOC).
        pseudo: folder of the pseudo labels (PASCAL VOC).
        width: channels of the network's first level.
        levels: how often the U-Net halves the image.
        norm: normalisation of the U-Net.
        weights: file of the network's weights to start from (``torch.save`` of a state dict); of the backbone for PASCAL VOC.
        epochs: passes over the training images.
        batch: images per step.
        learning_rate: of SGD.
        momentum: of SGD.
        weight_decay: of SGD.
        power: exponent of the decay of the learning rate; 0 keeps it.
        r: share of its slope that a class's curve loses before the class is corrected.
        interval: epochs between two values of the training IoU.
        correct_every: epochs between corrections of a class.
        lam: lambda, the weight of the consistency.
        gate: rho, the confidence that an image needs to count there.
        tempered: whether the consistent arms' cross-entropies see logits times the weights of the scales, as in the authors' code.
        evaluate_every: epochs between evaluations on the test set.
    """

    data: Literal["digits", "segthor", "pascal"] = "digits"
    digits: tuple[int, ...] = (0, 1)
    train: int = 60
    test: int = 200
    size: int = 256
    pseudo: str = "pseudo"
    width: int = 8
    levels: int = 3
    norm: Literal["batch", "instance"] = "instance"
    weights: str = ""
    epochs: int = 40
    batch: int = 5
    learning_rate: float = 0.02
    momentum: float = 0.9
    weight_decay: float = 0.0
    power: float = 0.0
    r: float = 0.9
    interval: float = 1.0
    correct_every: int = 5
    lam: float = 1.0
    gate: float = 0.8
    tempered: bool = False
    evaluate_every: int = 5


# Data and networks


def load(config: Config, arm: Arm, run: Run) -> Task:
    """Images and masks, the same for all arms of a seed but for ``dilated``."""
    if config.data == "digits":
        return digit_masks(run.seed, config.digits, config.train, config.test, "dilated" if arm.dilated else "mixed")

    def read(path: Path) -> Task:
        """SegTHOR's patients, or VOC2012."""
        if config.data == "segthor":
            return segthor_slices(path, run.seed, config.size)
        return PascalTask(path, config.pseudo, run.seed, config.size)

    return run.load(read)


def build(config: Config, task: Task) -> nn.Module:
    """The network, on channels-last memory, which is faster for few channels."""
    model: nn.Module
    if config.data == "pascal":
        model = DeepLabV1(len(task.classes), config.width)
    else:
        model = UNet(task.channels, len(task.classes), config.width, config.levels, config.norm)
    if config.weights:
        start = torch.load(config.weights, map_location="cpu", weights_only=True)
        (model.backbone if isinstance(model, DeepLabV1) else model).load_state_dict(start)
    return model.to(memory_format=torch.channels_last)


# Training


def run(config: Config, arm: str, run: Run) -> dict[str, float]:
    """Train and measure one arm."""
    setup, pascal = SETUPS[arm], config.data == "pascal"
    task = load(config, setup, run)
    classes, store = len(task.classes), task.store
    model = build(config, task).to(run.device)
    criterion = AdeleLoss(config.lam, config.gate, learn_weights=pascal, average=not pascal, tempered=config.tempered)
    criterion = criterion.to(run.device)
    optimizer = torch.optim.SGD(
        [
            *parameter_groups(model, config),
            {"params": list(criterion.parameters()), "weight_decay": 0.0, "factor": 1.0},
        ],
        config.learning_rate,
        config.momentum,
        weight_decay=config.weight_decay,
    )
    correction = PASCAL if pascal else MEDICAL
    # One trigger for all classes looks at their mean, as if there were one class.
    judged = 2 if setup.correction == "global" else classes
    detector = MemorizationDetector(judged, config.epochs, config.r, skip_flat=not pascal, interval=config.interval)
    schedule = CorrectionSchedule(classes, config.correct_every)
    iou = StreamingIoU(classes).to(run.device)
    count = len(store)
    per_epoch = max(1, count // config.batch)
    per_value = max(1, round(per_epoch * config.interval))
    history = torch.full((config.epochs, len(MEASURES)), torch.nan, dtype=torch.float64)
    scales = SCALES if setup.consistent else (1.0,)

    state: dict[str, Any] = {"model": model, "optimizer": optimizer, "criterion": criterion, "store": store}
    state |= {"detector": detector, "schedule": schedule, "iou": iou, "history": history}
    for step in run.steps(config.epochs * per_epoch, **state):
        epoch, place = divmod(step, per_epoch)
        for group in optimizer.param_groups:
            left = 1 - step / (config.epochs * per_epoch + 1)
            group["lr"] = config.learning_rate * group["factor"] * left**config.power
        index = visiting_order(run.seed, epoch, count)[place * config.batch :][: config.batch]
        images, labels, original = task.batch(index, epoch)
        images, labels, original = (each.to(run.device) for each in (images, labels, original))

        model.train()
        logits = multiscale_forward(model, images, scales)
        if setup.consistent:
            loss = criterion(logits, labels)
        else:
            loss = F.cross_entropy(logits[0], labels, ignore_index=255)
        optimizer.zero_grad()
        run.backward(loss)
        optimizer.step()

        probabilities = logits[len(scales) // 2].detach().softmax(1)
        if task.aligned:
            store.remember(index, probabilities)
        iou.update(Prediction.of(probabilities).label, original if pascal else labels)
        if (place + 1) % per_value == 0:
            values = iou.compute()
            detector.record(values if judged == classes else torch.stack([values[0], values[1:].mean()]))
            iou.reset()
        if place + 1 < per_epoch:
            continue

        # Between two epochs: which classes are being memorised, and what to correct
        triggered = detector.decide(epoch)
        if judged != classes:
            triggered = torch.cat([triggered[:1], triggered[1:].expand(classes - 1)])
        due = schedule.due(triggered, epoch + 1) if setup.correction != "never" else torch.zeros_like(triggered)
        history[epoch] = epoch_measures(task, model, run.device, evaluate=(epoch + 1) % config.evaluate_every == 0)
        if due.any():
            if not task.aligned:
                predict(task, model, run.device)
            if pascal:
                store.reset()
            store.correct(triggered if pascal else due, correction)
        run.log(step, loss=loss, **dict(zip(MEASURES, history[epoch], strict=True)))

    draw(task, model, detector, history, run)
    metrics = final_measures(task, model, run.device, history) | early_learning(history)
    return metrics | trigger_measures(detector, task, config.epochs)


def parameter_groups(model: nn.Module, config: Config) -> list[dict[str, Any]]:
    """All alike for a U-Net; the four groups of DeepLabV1, whose new layers and whose biases learn faster."""
    if isinstance(model, DeepLabV1):
        return model.parameter_groups(config.weight_decay)
    return [{"params": list(model.parameters()), "factor": 1.0}]


def predict(task: Task, model: nn.Module, device: torch.device) -> None:
    """Remember predictions of all training images, averaged over scales and mirror images, at a temperature of 3."""
    for images, index in task.images():
        probabilities = multiscale_probabilities(model, images.to(device), flip=True, temperature=3.0)
        task.store.remember(index, probabilities)


# Figures


def draw(task: Task, model: nn.Module, detector: MemorizationDetector, history: Tensor, run: Run) -> None:
    """IoU of every class with its fit, and masks before and after."""
    run.save("history", history=history, iou=detector.history, trigger_epochs=detector.trigger_epochs)
    names = task.classes if len(task.classes) == detector.num_classes else ("background", "all classes")
    run.figure("iou", figures.iou_curves(detector, names))
    shown = torch.arange(min(8, len(task.store)))
    image, index = next(task.images())
    shown = shown[: len(index)]
    predicted = multiscale_probabilities(model, image[shown].to(run.device), (1.0,)).max(1).indices.cpu()
    masks = {"noisy": task.store.read_original(shown), "corrected": task.store.read(shown), "prediction": predicted}
    masks["clean"] = task.clean(shown)
    crop: Any = (..., *(slice(side) for side in image.shape[2:]))
    masks = {name: mask[crop] for name, mask in masks.items()}
    run.save("masks", image=image[shown], **masks)
    run.figure("masks", figures.masks(image[shown], masks, len(task.classes)))


def compare(config: Config, results: Mapping[str, ArmResult], run: Run) -> None:
    """The masks that the method ended with beside how all arms got there, and what training images were fitted to."""
    histories = {arm: result.load("history")["history"] for arm, result in results.items()}
    named = {figures.NAMES[arm]: history for arm, history in histories.items() if not SETUPS[arm].dilated}
    correcting = [arm for arm, setup in SETUPS.items() if setup.correction != "never" and not setup.dilated]
    shown = [arm for arm in ("both", *correcting) if arm in results]
    if shown:
        run.figure("corrected", figures.corrections(results[shown[0]].load("masks"), figures.NAMES[shown[0]], named))
    run.figure("miou", figures.histories({figures.NAMES[arm]: history for arm, history in histories.items()}))
    if "baseline" in histories:
        run.figure("early_learning", figures.early_learning(histories["baseline"]))


# Claims

PAPER = "Liu et al. 2022"


def mechanism(
    metric: str,
    arm: str,
    versus: str | None,
    direction: Literal["higher", "lower"],
    source: str,
    margin: float = 0.0,
    scale: Literal["difference", "ratio"] = "difference",
) -> Claim:
    """A claim about what the method does."""
    return Claim(
        metric=metric,
        arm=arm,
        versus=versus,
        direction=direction,
        kind="mechanism",
        margin=margin,
        scale=scale,
        source=f"{PAPER}: {source}",
    )


def outcome(metric: str, arm: str, versus: str, direction: Literal["higher", "lower"], source: str) -> Claim:
    """A claim about what that is good for."""
    return Claim(
        metric=metric, arm=arm, versus=versus, direction=direction, kind="outcome", source=f"{PAPER}: {source}"
    )


EARLY = "early learning: a network fits the true shapes before it memorises the mistakes"
BETTER = "adaptive correction per class, and consistency, raise the IoU of the last epoch"

EXPERIMENT = Experiment(
    method="medical/adele",
    presets={
        "quick": Config(),
        "paper": Config(
            data="segthor",
            width=64,
            levels=4,
            norm="batch",
            epochs=100,
            learning_rate=0.01,
            momentum=0.99,
            correct_every=10,
            tempered=True,
            evaluate_every=1,
        ),
        "pascal": Config(
            data="pascal",
            size=448,
            width=64,
            epochs=19,  # 20,000 steps
            batch=10,
            learning_rate=1e-3,
            weight_decay=5e-4,
            power=0.9,
            interval=100 / 1058,
            correct_every=1,
            tempered=True,
            evaluate_every=1,
        ),
    },
    only={name: tuple(SETUPS)[:5] for name in ("paper", "pascal")},
    arms={name: setup.text for name, setup in SETUPS.items()},
    run=run,
    compare=compare,
    claims=(
        mechanism("noisy_rise", "baseline", None, "higher", EARLY),
        mechanism("clean_fall", "baseline", None, "higher", EARLY),
        *(
            mechanism("label_gain", arm, None, "higher", "corrected masks are closer to the true ones", margin=3.0)
            for arm in ("correction", "both")
        ),
        *(
            mechanism("untriggered_changed", arm, None, "lower", "classes are corrected one by one", margin=0.5)
            for arm in ("correction", "both")
        ),
        *(
            mechanism("trigger_spread", arm, None, "higher", "classes are memorised at different times")
            for arm in ("correction", "both")
        ),
        mechanism(
            "label_gain", "dilated", "correction", "lower", "a systematic error has no early phase to go back to"
        ),
        mechanism("inconsistency", "consistency", "baseline", "lower", "the consistency term"),
        mechanism("inconsistency", "both", "correction", "lower", "the consistency term"),
        outcome("miou", "both", "baseline", "higher", BETTER),
        outcome("miou", "correction", "baseline", "higher", BETTER),
        outcome("miou", "consistency", "baseline", "higher", BETTER),
        outcome("miou", "both", "correction", "higher", BETTER),
        outcome("miou", "correction", "global", "higher", BETTER),
        outcome("miou_drop", "both", "baseline", "lower", "without correction, the last epoch is worse than the best"),
    ),
)
