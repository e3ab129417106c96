r"""Weight Compander: does no weight dominate, do more of them take part, and does the network generalize better on top of the rest?

Cakaj, Mehnert and Yang, "Weight Compander: A Simple Weight Reparameterization for Regularization", IJCNN 2023, arXiv 2306.16993.

    w = a arctan(v / b)

Every arm of a seed starts from the same function, by the exact inverse, and takes the same steps. Each of three hosts (no other
regularizer, weight decay, dropout) is trained plainly and with companded weights: with a and b learned, and with both fixed so that
the slope a / b at zero is 1, 2 or 4.

Presets:

- ``quick``: 500 MNIST digits, a multilayer perceptron without normalization, so that the scale of a weight matters.
- ``convolutions``: 300 MNIST digits at half resolution, three convolutions with batch normalization, weight decay.
- ``paper``: CIFAR-10 or CIFAR-100 as published, ResNet-18, 34 or 50, SGD with weight decay.
- ``imagenet``: images in folders, ResNet-50.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from poise.core.experiments import weight_compander_figures as figures
from poise.core.experiments.image_data import ImageData, load_images
from poise.core.experiments.published_images import (
    Images,
    ImageSplit,
    evaluation_batches,
    steps_per_epoch,
    training_batches,
)
from poise.core.experiments.resnets import CIFAR, IMAGENET, resnet
from poise.core.lab import ArmResult, Claim, Experiment, Run
from poise.core.weights.weight_compander import (
    apply_weight_compander,
    compander_report,
    weight_compander_param_groups,
)

HOSTS = {"baseline": "no other regularizer", "decay": "weight decay", "dropout": "dropout"}
COMPANDERS = {
    "learned": "a and b learned, starting with slope 1",
    "slope_1": "a and b fixed, a / b = 1",
    "slope_2": "a and b fixed, a / b = 2",
    "slope_4": "a and b fixed, a / b = 4",
}


def with_compander(host: str, compander: str) -> str:
    """The arm that compands the weights of a host's network."""
    return compander if host == "baseline" else f"{host}_{compander}"


ARMS = HOSTS | {
    with_compander(host, name): f"{what}; companded, {how}"
    for host, what in HOSTS.items()
    for name, how in COMPANDERS.items()
}
UNDER_DECAY = ("decay", *(with_compander("decay", name) for name in COMPANDERS))
"""Arms of the presets whose networks are always trained with weight decay."""


@dataclass(frozen=True)
class Config:
    """Settings; the defaults are those of the ``quick`` preset.

    Attributes:
        data: where the images come from.
        size: height and width of images from folders.
        network: ``perceptron``, ``convolutions``, or a residual network.
        widths: of the hidden layers of the first two.
        train: training images from MNIST.
        test: test images from MNIST.
        epochs: passes over the training images.
        batch: images per step.
        learning_rate: of SGD with momentum 0.9; it falls to 0 on half a cosine.
        scale_rate: learning rate of a and b, as a share of that of the weights.
        weight_decay: in the arms with weight decay; it never acts on a and b.
        dropout: in the arms with dropout, after every hidden layer of the perceptron.
        deviations: first a (and b) where it is learned, in standard deviations of the layer's first weights.
        reach: first bound of the weights, as a multiple of the largest of them, where a is fixed; at least so much where it is learned.
        near_zero: magnitude below which a weight counts as near zero.
        measured: most images that the losses are measured on.
        workers: processes that read images ahead.
    """

    data: ImageData = "mnist"
    size: int = 224
    network: Literal["perceptron", "convolutions", "resnet18", "resnet34", "resnet50"] = "perceptron"
    widths: tuple[int, ...] = (512, 512)
    train: int = 500
    test: int = 2_000
    epochs: int = 60
    batch: int = 50
    learning_rate: float = 0.05
    scale_rate: float = 0.1
    weight_decay: float = 5e-4
    dropout: float = 0.3
    deviations: float = 2.0
    reach: float = 1.2
    near_zero: float = 0.01
    measured: int = 10_000
    workers: int = 0


# Data and networks


def load(config: Config, run: Run) -> ImageSplit:
    """The images, the same for all arms of a seed."""
    halved = config.network != "perceptron"
    return load_images(config.data, run, train=config.train, test=config.test, size=config.size, halved=halved)


def build(config: Config, classes: int, dropout: float) -> nn.Sequential:
    """A network that takes images in [0, 1]."""
    if config.network == "perceptron":
        layers: list[nn.Module] = [nn.Flatten()]
        for inputs, outputs in zip((784, *config.widths), config.widths, strict=False):
            layers += [nn.Linear(inputs, outputs), nn.ReLU(), nn.Dropout(dropout)]
        return nn.Sequential(*layers, nn.Linear(config.widths[-1], classes))
    if config.network == "convolutions":
        layers = []
        for number, (inputs, outputs) in enumerate(zip((1, *config.widths), config.widths, strict=False)):
            conv = nn.Conv2d(inputs, outputs, 3, stride=2 if number else 1, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(outputs), nn.ReLU()]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(config.widths[-1], classes))
    depth = int(config.network.removeprefix("resnet"))
    if config.data == "folders":
        return resnet(depth, classes, "large", IMAGENET)
    return resnet(depth, classes, "small", CIFAR)


def compand(config: Config, compander: str, net: nn.Module) -> None:
    """Compand the weights of a network, which goes on computing what it did."""
    learned = compander == "learned"

    def scale(weights: Tensor) -> Tensor:
        least = config.reach * weights.abs().max() / (torch.pi / 2)
        return torch.maximum(config.deviations * weights.std(), least) if learned else least

    steepness = 1.0 if learned else float(compander.removeprefix("slope_"))
    apply_weight_compander(net, a=scale, steepness=steepness, learnable=learned)


# Training


def run(config: Config, arm: str, run: Run) -> dict[str, float]:
    """Train one arm; measure its weights, its losses and its accuracy."""
    split = load(config, run)
    host, compander = parts_of(arm)
    net = build(config, len(split.train.classes), config.dropout if host == "dropout" else 0.0).to(run.device)
    decay = config.weight_decay if host == "decay" else 0.0
    groups: list[dict[str, object]] = [{"params": list(net.parameters()), "weight_decay": decay}]
    if compander:
        compand(config, compander, net)
        rate = config.learning_rate
        groups = weight_compander_param_groups(net, rate, weight_decay=decay, lr_ab=config.scale_rate * rate)
    optimizer = torch.optim.SGD(groups, config.learning_rate, momentum=0.9)
    epoch = steps_per_epoch(split.train, config.batch)
    steps = config.epochs * epoch
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model, optimizer = run.prepare(net, optimizer)
    model.train()
    batches = None
    for step in run.steps(steps, net=net, optimizer=optimizer, schedule=schedule):
        batches = batches or training_batches(
            split.train,
            config.batch,
            range(step, steps),
            seed=run.seed,
            device=run.device,
            workers=config.workers,
            rank=run.rank,
            world=run.world,
        )
        x, y = next(batches)
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        run.backward(loss)
        optimizer.step()
        schedule.step()
        if (step + 1) % epoch == 0:
            run.log(step, loss=loss, **(scales_of(net) if compander else {}))
    net.eval()

    layers = weights_of(net)
    run.save("weights", **{name: weight.flatten().float() for name, weight in layers.items()})
    run.figure("weights", figures.histograms({arm: layers}))
    metrics = losses_of(config, net, split, run.device) | weight_metrics(layers.values(), config.near_zero)
    if compander:
        metrics |= bound_metrics(net, config.near_zero)
    return metrics


# Measuring


def parts_of(arm: str) -> tuple[str, str | None]:
    """The host of an arm, and its compander."""
    for host in HOSTS:
        for compander in COMPANDERS:
            if arm == with_compander(host, compander):
                return host, compander
    return arm, None


def losses_of(config: Config, net: nn.Module, split: ImageSplit, device: torch.device) -> dict[str, float]:
    train_loss, train_accuracy = evaluate(net, split.train, config.measured, device)
    test_loss, accuracy = evaluate(net, split.test, config.measured, device)
    return {
        "accuracy": accuracy,
        "train_accuracy": train_accuracy,
        "test_loss": test_loss,
        "loss_gap": test_loss - train_loss,
    }


@torch.no_grad()
def evaluate(net: nn.Module, images: Images, count: int, device: torch.device) -> tuple[float, float]:
    """Mean cross-entropy, and the share of images that are classified correctly."""
    found = [(net(x), y) for x, y in evaluation_batches(images, 250, device, count)]
    logits, labels = (torch.cat(part) for part in zip(*found, strict=True))
    return float(F.cross_entropy(logits, labels)), float((logits.argmax(1) == labels).float().mean())


@torch.no_grad()
def weights_of(net: nn.Module) -> dict[str, Tensor]:
    """The weights that the layers compute with, companded or not."""
    return {
        name: module.weight.detach().cpu()
        for name, module in net.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }


def weight_metrics(layers: Iterable[Tensor], near_zero: float) -> dict[str, float]:
    """Do some weights dominate? The participation ratio is 1 if all of a layer's weights have one magnitude, 1 / n if one is all."""
    weights = [layer.double().flatten() for layer in layers]
    together = torch.cat(weights).abs()
    shares = [weight.square().sum() ** 2 / (len(weight) * weight.pow(4).sum()) for weight in weights]
    return {
        "largest_weight": float(together.max()),
        "near_zero": float((together < near_zero).double().mean()),
        "participation": float(torch.stack(shares).mean()),
    }


def bound_metrics(net: nn.Module, near_zero: float) -> dict[str, float]:
    report = compander_report(net, near_zero).values()
    return {
        "share_of_bound": max(layer.largest / layer.bound for layer in report),
        "saturated": sum(layer.saturated for layer in report) / len(report),
    }


def scales_of(net: nn.Module) -> dict[str, float]:
    """a and b of every layer."""
    report = compander_report(net)
    return {f"{scale}/{name}": getattr(layer, scale) for name, layer in report.items() for scale in ("a", "b")}


def compare(config: Config, results: Mapping[str, ArmResult], run: Run) -> None:
    """The weights of the arms of each host, and what companding does to the gap and to accuracy."""
    for host in HOSTS:
        arms = [arm for arm in results if parts_of(arm)[0] == host]
        if len(arms) > 1:
            run.figure(f"weights_{host}", figures.histograms({arm: results[arm].load("weights") for arm in arms}))
    groups = {host: (host, *(with_compander(host, name) for name in COMPANDERS)) for host in HOSTS}
    ran = {arm: result.metrics for arm, result in results.items()}
    run.figure("generalization", figures.generalization(ran, groups, ("plain", *figures.NAMES.values())))


# Claims

PAPER = "Cakaj, Mehnert and Yang 2023"
WEIGHTS = f"{PAPER}, abstract: a bounded, odd function restricts the magnitude of weights and forces those near zero away from it"
OUTCOME = f"{PAPER}, abstract: generalization improves on top of standard regularization"


def moves_weights(host: str, presets: tuple[str, ...]) -> tuple[Claim, ...]:
    """What companding does to the weights of a host's network."""
    directions: dict[str, Literal["higher", "lower"]] = {
        "largest_weight": "lower",
        "near_zero": "lower",
        "participation": "higher",
    }
    arms = [with_compander(host, name) for name in COMPANDERS]
    flat, *steep = arms[1:]
    pairs = [(arm, host) for arm in arms] + [(arm, flat) for arm in steep]
    return (
        *(
            Claim(
                metric="share_of_bound",
                arm=arm,
                versus=None,
                direction="lower",
                kind="mechanism",
                margin=1.0,
                source=WEIGHTS,
                presets=presets,
            )
            for arm in arms
        ),
        *(
            Claim(
                metric=metric,
                arm=arm,
                versus=versus,
                direction=direction,
                kind="mechanism",
                source=WEIGHTS,
                note="" if versus == host else "Same bound and same first function; only the slope at zero differs.",
                presets=presets,
            )
            for metric, direction in directions.items()
            for arm, versus in pairs
        ),
    )


def generalizes(host: str, margin: float, presets: tuple[str, ...]) -> tuple[Claim, ...]:
    """What companding does to generalization, next to a host's regularizer."""
    arms = [with_compander(host, name) for name in COMPANDERS]
    smaller = [
        Claim(
            metric="loss_gap", arm=arm, versus=host, direction="lower", kind="outcome", source=OUTCOME, presets=presets
        )
        for arm in arms
    ]
    as_accurate = [
        Claim(
            metric="accuracy",
            arm=arm,
            versus=host,
            direction="higher",
            kind="outcome",
            margin=-margin,
            source=OUTCOME,
            note=f"not lower by {100 * margin:g} points or more",
            presets=presets,
        )
        for arm in arms
    ]
    return (*smaller, *as_accurate)


PUBLISHED = Config(
    data="cifar",
    network="resnet18",
    epochs=200,
    batch=128,
    learning_rate=0.1,
    workers=4,
)

EXPERIMENT = Experiment(
    method="core/weight-compander",
    presets={
        "quick": Config(),
        "convolutions": Config(network="convolutions", widths=(16, 32, 32), train=300, test=1_500, epochs=20),
        "paper": PUBLISHED,
        "imagenet": replace(
            PUBLISHED, data="folders", network="resnet50", epochs=90, batch=256, weight_decay=1e-4, workers=16
        ),
    },
    arms=ARMS,
    only={"convolutions": UNDER_DECAY, "paper": UNDER_DECAY, "imagenet": UNDER_DECAY},
    run=run,
    compare=compare,
    claims=(
        *moves_weights("baseline", ("quick",)),
        *moves_weights("decay", ("convolutions",)),
        *(claim for host in HOSTS for claim in generalizes(host, 0.005, ("quick",))),
        *generalizes("decay", 0.02, ("convolutions",)),
    ),
)
