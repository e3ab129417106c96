r"""Progressive self-knowledge distillation: are confidences better calibrated and better ordered, and which examples get less gradient?

Kim, Ji, Yoon and Hwang, "Self-Knowledge Distillation with Progressive Refinement of Targets", ICCV 2021, arXiv 2006.12000.

    target = (1 - a_t) y + a_t P_{t-1}(x),   a_t = a_T t / T

All arms of a seed train on the same images from the same initial weights, with the same augmentation. In the middle epoch
every training example's gradients of PS-KD and of cross-entropy are compared at the same weights and the same input.

Presets:

- ``quick``: MNIST, 1,000 training and 3,000 test images, a small convolutional network that fits them perfectly, as networks do
  on CIFAR-100.
- ``augmented``: the same with random rotations and shifts and twice the layers.
- ``paper``: CIFAR-100 (or CIFAR-10) as published, ResNet-18.
- ``imagenet``: ImageNet from folders, ResNet-50, with the 16 largest predictions of each image remembered.
"""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from poise.core.experiments.image_data import ImageData, load_images
from poise.core.experiments.noisy_labels import Batches, all_logits, indexed_batches, percent, predictor
from poise.core.experiments.ps_kd_measures import Gradients, reliability_figure
from poise.core.experiments.published_images import Images, ImageSplit, steps_per_epoch
from poise.core.experiments.resnets import IMAGENET, Channels, resnet
from poise.core.gpu import derive_generator
from poise.core.lab import ArmResult, Claim, Experiment, Run
from poise.core.labels.calibration import aurc, eaurc, expected_calibration_error, negative_log_likelihood
from poise.core.labels.mixing import Mix
from poise.core.labels.ps_kd import PSKDLoss
from poise.core.memory.samples import SampleBank
from poise.core.memory.storage import TopKRows

ARMS = {
    "baseline": "cross-entropy",
    "label_smoothing": "cross-entropy with smoothed labels",
    "ps_kd": "PS-KD",
    "cutmix": "cross-entropy, half of the batches with CutMix",
    "cutmix_ps_kd": "PS-KD, half of the batches with CutMix",
}
CIFAR100 = Channels((0.507, 0.487, 0.441), (0.267, 0.256, 0.276))


@dataclass(frozen=True)
class Config:
    """Settings; the defaults are those of the ``quick`` preset.

    Attributes:
        data: where the images come from.
        size: height and width of images from folders.
        depth: of the residual network for published images.
        alpha_T: weight of the past prediction in the last epoch.
        smoothing: of the labels in the arm ``label_smoothing``.
        cutmix: share of the batches that are mixed in the arms with CutMix.
        top: predictions that are remembered of each image; 0 for all.
        train: training images of the quick preset.
        test: test images of the quick preset.
        degrees: largest random rotation of MNIST digits.
        shift: their largest random shift, as a share of the image.
        widths: channels of the convolutions for MNIST; the first two have stride 2.
        epochs: passes over the training images.
        batch: images per step.
        learning_rate: of SGD with Nesterov's momentum 0.9.
        milestones: shares of the run after which the learning rate is divided by 10.
        weight_decay: of SGD.
    """

    data: ImageData = "mnist"
    size: int = 224
    depth: int = 18
    alpha_T: float = 0.8
    smoothing: float = 0.1
    cutmix: float = 0.5
    top: int = 0
    train: int = 1_000
    test: int = 3_000
    degrees: float = 0.0
    shift: float = 0.0
    widths: tuple[int, ...] = (16, 32)
    epochs: int = 40
    batch: int = 50
    learning_rate: float = 0.05
    milestones: tuple[float, ...] = (0.5, 0.75)
    weight_decay: float = 5e-4


# Data and networks


def load(config: Config, run: Run) -> ImageSplit:
    """The images, the same for all arms of a seed."""
    return load_images(config.data, run, train=config.train, test=config.test, size=config.size)


def build(config: Config, classes: int) -> nn.Sequential:
    """The network, for images in [0, 1]."""
    if config.data == "cifar":
        return resnet(config.depth, classes, "small", CIFAR100)
    if config.data == "folders":
        return resnet(config.depth, classes, "large", IMAGENET)
    layers: list[nn.Module] = []
    for number, (inputs, outputs) in enumerate(itertools.pairwise((1, *config.widths))):
        stride = 2 if number < 2 else 1
        layers += [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(7 * 7 * config.widths[-1], classes))


# Training


def run(config: Config, arm: str, run: Run) -> dict[str, float]:
    """Train one arm; measure accuracy, confidences, and the gradients in the middle of training."""
    split = load(config, run)
    classes, per_epoch = len(split.train.classes), steps_per_epoch(split.train, config.batch)
    network = build(config, classes)
    criterion = loss_of(config, arm, len(split.train.labels), classes).to(run.device)
    optimizer = torch.optim.SGD(
        network.parameters(), lr=config.learning_rate, momentum=0.9, nesterov=True, weight_decay=config.weight_decay
    )
    network, optimizer = run.prepare(network, optimizer)
    labels = split.train.labels.to(run.device)
    target_max = torch.zeros(config.epochs, dtype=torch.float64)
    gradients = Gradients(len(labels))

    count, batches = config.epochs * per_epoch, None
    state = {"model": network, "optimizer": optimizer, "criterion": criterion}
    for step in run.steps(count, **state, target_max=target_max, gradients=gradients.of):
        epoch, place = divmod(step, per_epoch)
        for group in optimizer.param_groups:
            passed = sum(epoch >= share * config.epochs for share in config.milestones)
            group["lr"] = config.learning_rate * 0.1**passed
        criterion.set_epoch(epoch)
        batches = batches or batches_from(step, count, config, split.train, run)
        inputs, index = next(batches)
        mix = None
        if arm.startswith("cutmix"):
            inputs, mix = cut_and_mix(inputs, config.cutmix, derive_generator(run.seed, "cutmix", step))
        targets = criterion.soft_targets(labels[index], index)
        target_max[epoch] += targets.amax(1).mean().cpu() / per_epoch
        logits = network(inputs)
        if arm == "ps_kd" and epoch == config.epochs // 2:
            gradients.measure(logits, labels[index], criterion.memory.read(index), criterion.alpha, index)
        loss = criterion(logits, labels[index], index, mix=mix)
        optimizer.zero_grad()
        run.backward(loss)
        optimizer.step()
        if place + 1 == per_epoch:
            run.log(step, loss=loss, target_max=target_max[epoch])

    probs = all_logits(predictor(network), split.test, run.device).double().softmax(1)
    run.save("predictions", probs=probs, labels=split.test.labels, target_max=target_max)
    run.figure("reliability", reliability_figure({arm: (probs, split.test.labels)}))
    metrics = {
        "accuracy": percent(probs.argmax(1) == split.test.labels),
        "nll": negative_log_likelihood(probs, split.test.labels),
        "ece_percent": 100 * expected_calibration_error(probs, split.test.labels),
        "aurc_x1000": 1000 * aurc(probs, split.test.labels),
        "eaurc_x1000": 1000 * eaurc(probs, split.test.labels),
        "last_target_max": target_max[-1].item(),
    }
    return metrics | gradients.summary() if arm == "ps_kd" else metrics


def loss_of(config: Config, arm: str, examples: int, classes: int) -> PSKDLoss:
    """PS-KD with weight 0 is cross-entropy, so that all arms have one loop."""
    storage = TopKRows(config.top) if config.top else None
    memory = SampleBank(examples, classes, storage=storage)
    return PSKDLoss(
        examples,
        classes,
        config.alpha_T if arm.endswith("ps_kd") else 0.0,
        config.epochs,
        label_smoothing=config.smoothing if arm == "label_smoothing" else 0.0,
        memory=memory,
    )


# Augmentation


def batches_from(step: int, count: int, config: Config, images: Images, run: Run) -> Batches:
    """Augmented images and their numbers, from this step, the first of a new or of a resumed run, on."""
    batches = indexed_batches(images, config.batch, range(step, count), run)
    if not (config.degrees or config.shift):
        return batches
    return augmented(batches, step, config, run)


def augmented(batches: Batches, step: int, config: Config, run: Run) -> Batches:
    """The batches from ``step`` on, randomly turned and shifted."""
    for number, (inputs, index) in enumerate(batches, step):
        generator = derive_generator(run.seed, "affine", number, run.rank)
        yield turned_and_shifted(inputs, config.degrees, config.shift, generator), index


def turned_and_shifted(images: Tensor, degrees: float, shift: float, generator: torch.Generator) -> Tensor:
    """Each image under a random rotation and shift, zeros moving in."""
    draws = (2 * torch.rand(3, len(images), generator=generator) - 1).to(images.device)
    angle = math.radians(degrees) * draws[0]
    # affine_grid maps the picture to [-1, 1], twice its size
    rows = torch.stack(
        [angle.cos(), -angle.sin(), 2 * shift * draws[1], angle.sin(), angle.cos(), 2 * shift * draws[2]], 1
    )
    grid = F.affine_grid(rows.view(-1, 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def cut_and_mix(images: Tensor, probability: float, generator: torch.Generator) -> tuple[Tensor, Mix | None]:
    """CutMix (Yun et al., ICCV 2019) with Beta(1, 1): a box of each image comes from its partner; or nothing, by chance."""
    share, row, column, whether = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
    if whether >= probability:
        return images, None
    partner = torch.randperm(len(images), generator=generator).to(images.device)
    height, width = images.shape[-2:]
    half = math.sqrt(1 - share) / 2
    top, bottom = (int(min(max(row + side, 0), 1) * height) for side in (-half, half))
    left, right = (int(min(max(column + side, 0), 1) * width) for side in (-half, half))
    mixed = images.clone()
    mixed[..., top:bottom, left:right] = images[partner][..., top:bottom, left:right]
    return mixed, Mix(partner, 1 - (bottom - top) * (right - left) / (height * width))


# Figures


def compare(config: Config, results: Mapping[str, ArmResult], run: Run) -> None:
    """Reliability of all arms."""
    stored = {arm: result.load("predictions") for arm, result in results.items()}
    run.figure("arms", reliability_figure({arm: (each["probs"], each["labels"]) for arm, each in stored.items()}))


# Claims

PAPER = "Kim et al. 2021"
mechanism = partial(Claim, arm="ps_kd", kind="mechanism")
outcome = partial(Claim, arm="ps_kd", kind="outcome", presets=("quick", "augmented"))

EXPERIMENT = Experiment(
    method="core/ps-kd",
    presets={
        "quick": Config(),
        "augmented": Config(degrees=15.0, shift=0.1, widths=(16, 32, 32, 64), epochs=60),
        "paper": Config(
            data="cifar", epochs=300, batch=128, learning_rate=0.1, milestones=(0.5, 0.75), weight_decay=5e-4
        ),
        "imagenet": Config(
            data="folders",
            depth=50,
            alpha_T=0.3,
            top=16,
            epochs=90,
            batch=256,
            learning_rate=0.1,
            milestones=(1 / 3, 2 / 3),
            weight_decay=1e-4,
        ),
    },
    arms=ARMS,
    run=run,
    compare=compare,
    claims=(
        mechanism(
            metric="gradient_ratio_error",
            versus=None,
            direction="lower",
            margin=1e-5,
            source=f"{PAPER}, section 3.2: the gradient is rescaled by the gain in confidence",
            note="Largest distance from 1 - a (1 - P_gt) / (1 - p_gt) over the training images, in the middle epoch.",
        ),
        mechanism(
            metric="gradient_gain_correlation",
            versus=None,
            direction="lower",
            source=f"{PAPER}, section 3.2: an example that became more certain is damped more",
            note="Spearman correlation of the ratio of gradient norms with p_gt - P_gt.",
        ),
        mechanism(
            metric="hard_share_gain",
            versus=None,
            direction="higher",
            source=f"{PAPER}, abstract: hard examples are mined",
            note="What the hardest quarter holds of the summed gradient norm, minus that under cross-entropy at the same weights.",
        ),
        mechanism(
            metric="last_target_max",
            direction="lower",
            source=f"{PAPER}, section 3.1: targets become softer as the weight grows",
        ),
        outcome(
            metric="ece_percent",
            direction="lower",
            source=f"{PAPER}, table 2: calibration error below that of cross-entropy",
        ),
        outcome(
            metric="nll",
            direction="lower",
            source=f"{PAPER}, table 2: likelihood above that of cross-entropy",
        ),
        outcome(
            metric="aurc_x1000",
            versus="label_smoothing",
            direction="lower",
            source=f"{PAPER}, table 2: confidences ordered better than with label smoothing",
        ),
        outcome(
            metric="accuracy",
            direction="higher",
            margin=-0.5,
            source=f"{PAPER}, table 2: accuracy at least that of cross-entropy",
            note="At most half a point worse.",
        ),
        outcome(
            metric="nll",
            arm="cutmix_ps_kd",
            versus="cutmix",
            direction="lower",
            source=f"{PAPER}, abstract: adds to existing regularizers",
        ),
    ),
)
