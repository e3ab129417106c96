r"""Orthogonal convolutions: does the penalty make *layers* isometric, at every input size, and is the network more robust for it?

Achour, Malgouyres and Mamalet, "Existence, Stability and Scalability of Orthogonal Convolutional Neural Networks", JMLR 2022,
arXiv 2108.05623.

    task loss + lambda * sum over layers of L_orth(K)

The arms raise lambda from 0 by factors of ten; ``kernel`` makes the reshaped kernels orthogonal instead of the layers, and
``landscape`` minimizes L_orth alone from random kernels, for sizes that allow an orthogonal layer and sizes that do not.

Presets:

- ``quick``: MNIST at half resolution, 1,000 training images, four convolutions on circular signals. Activations sort pairs of
  channels, which keeps the norm that orthogonal layers keep.
- ``paper``: CIFAR-10 or CIFAR-100 as published; ResNet-18, 34 or 50, or an all-convolutional net; SGD.
- ``imagenet``: ImageNet, or Imagenette, from folders, at the settings of Wang et al. 2020.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from poise.core.experiments import orthogonal_conv_figures as figures
from poise.core.experiments.attacks import accuracy, attacked_batches
from poise.core.experiments.image_data import ImageData, load_images
from poise.core.experiments.orthogonal_conv_landscape import landscape
from poise.core.experiments.orthogonal_conv_measures import (
    Trained,
    convolutional,
    extremes,
    growth_metrics,
    input_sizes,
    orthogonality,
    residuals,
    spectra,
    spread_metrics,
)
from poise.core.experiments.published_images import (
    Images,
    ImageSplit,
    evaluation_batches,
    steps_per_epoch,
    training_batches,
)
from poise.core.experiments.resnets import CIFAR, IMAGENET, Standardize, convolution, resnet
from poise.core.lab import ArmResult, Claim, Experiment, Run
from poise.core.weights.orthogonal_conv import OrthogonalRegularizer, kernel_orth_loss

ARMS = {
    "baseline": "no penalty, lambda = 0",
    "faint": "a thousandth of the largest lambda",
    "light": "a hundredth of the largest lambda",
    "medium": "a tenth of the largest lambda",
    "strong": "the largest lambda",
    "kernel": "the largest lambda, on the reshaped kernels instead of the layers",
    "landscape": "L_orth alone, from random kernels",
}
SHARES = {"baseline": 0.0, "faint": 1e-3, "light": 1e-2, "medium": 1e-1, "strong": 1.0, "kernel": 1.0}
"""The part of the largest lambda that each arm uses."""


@dataclass(frozen=True)
class Config:
    """Settings; the defaults are those of the ``quick`` preset.

    Attributes:
        data: where the images come from.
        size: height and width of images from folders.
        network: ``plain`` (four convolutions), ``allconv`` (nine), or a residual network.
        padding_mode: boundaries of the convolutions.
        optimizer: ``adam``, or ``sgd`` with momentum 0.9.
        learning_rate: its first value.
        milestones: shares of the run after which the learning rate is divided by 10.
        weight_decay: of the optimizer.
        epochs: passes over the training images.
        batch: images per step.
        train: training images of the quick preset.
        test: test images of the quick preset.
        largest: lambda of the arm ``strong``.
        skip: layers that are not regularized, by name or pattern.
        layer_factors: what lambda is multiplied by for some layers, ``name or pattern=factor`` each.
        radii: L2 norms of the attacks, small, middle and large, for pixels in [0, 1].
        attack_steps: gradient steps of an attack.
        attacked: test images that are attacked.
        factors: input sizes at which the layers are measured, in training sizes; the first is 1.
        spectrum_every: epochs between two entries of the layers' spectra in the log.
        workers: processes that read images ahead.
        landscape_steps: optimizer steps of the landscape, the second half at a tenth of the learning rate.
        landscape_starts: random kernels per size.
    """

    data: ImageData = "mnist"
    size: int = 224
    network: Literal["plain", "allconv", "resnet18", "resnet34", "resnet50"] = "plain"
    padding_mode: Literal["circular", "zeros"] = "circular"
    optimizer: Literal["adam", "sgd"] = "adam"
    learning_rate: float = 3e-3
    milestones: tuple[float, ...] = ()
    weight_decay: float = 0.0
    epochs: int = 20
    batch: int = 50
    train: int = 1_000
    test: int = 2_000
    largest: float = 1.0
    skip: tuple[str, ...] = ()
    layer_factors: tuple[str, ...] = ()
    radii: tuple[float, float, float] = (0.25, 0.5, 1.0)
    attack_steps: int = 10
    attacked: int = 500
    factors: tuple[int, ...] = (1, 2, 4)
    spectrum_every: int = 5
    workers: int = 0
    landscape_steps: int = 2_000
    landscape_starts: int = 10


# Data and networks


def load(config: Config, run: Run) -> ImageSplit:
    """The images, the same for all arms of a seed."""
    return load_images(config.data, run, train=config.train, test=config.test, size=config.size, halved=True)


def build(config: Config, classes: int) -> nn.Sequential:
    """A network that takes images in [0, 1]; its convolutions are initialised as its source says."""
    conv = partial(nn.Conv2d, kernel_size=3, padding=1, padding_mode=config.padding_mode)
    channels = IMAGENET if config.data == "folders" else CIFAR
    if config.network == "plain":
        return nn.Sequential(
            *(conv(1, 16), MaxMin(), conv(16, 16), MaxMin(), conv(16, 32, stride=2), MaxMin(), conv(32, 32), MaxMin()),
            *(nn.Flatten(), nn.Linear(32 * 7 * 7, classes)),
        )
    if config.network == "allconv":  # Springenberg et al., "Striving for Simplicity", 2015, All-CNN-C
        sizes = [(3, 96, 3, 1), (96, 96, 3, 1), (96, 96, 3, 2), (96, 192, 3, 1), (192, 192, 3, 1), (192, 192, 3, 2)]
        sizes += [(192, 192, 3, 1), (192, 192, 1, 1), (192, classes, 1, 1)]
        layers = [layer for size in sizes for layer in (convolution(*size, config.padding_mode), nn.ReLU())]
        return nn.Sequential(Standardize(channels), *layers[:-1], nn.AdaptiveAvgPool2d(1), nn.Flatten())
    large: Literal["small", "large"] = "large" if config.data == "folders" else "small"
    depth = int(config.network.removeprefix("resnet"))
    return resnet(depth, classes, large, channels, padding_mode=config.padding_mode)


class MaxMin(nn.Module):
    """Sort the channels in pairs: an activation that keeps the norm (Anil, Lucas and Grosse, ICML 2019)."""

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=1)
        return torch.cat((torch.maximum(first, second), torch.minimum(first, second)), dim=1)


# Training


def train(config: Config, arm: str, run: Run, images: Images) -> Trained:
    """Fit a network with the arm's penalty."""
    net = build(config, len(images.classes)).to(run.device)
    penalty = OrthogonalRegularizer(
        net, SHARES[arm] * config.largest, skip=config.skip, factors=dict(map(pattern_and_factor, config.layer_factors))
    )
    trained = Trained(net, penalty, input_sizes(net, penalty, images.read([0]).to(run.device)))
    optimizer = make_optimizer(config, net)
    epoch = steps_per_epoch(images, config.batch)
    steps = config.epochs * epoch
    drops = [round(share * steps) for share in config.milestones]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, drops, gamma=0.1)
    model, optimizer = run.prepare(net, optimizer)
    model.train()
    batches = None
    for step in run.steps(steps, net=net, optimizer=optimizer, schedule=schedule, penalty=penalty):
        batches = batches or training_batches(
            images,
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
        run.backward(loss + (kernel_penalty(penalty) if arm == "kernel" else penalty()))
        optimizer.step()
        schedule.step()
        penalty.step()
        if (step + 1) % epoch == 0:
            run.log(step, loss=loss, **orthogonality(penalty))
        if (step + 1) % (config.spectrum_every * epoch) == 0:
            values = spectra(trained)
            run.log(step, **spread_metrics(values), **extremes(values))
    net.eval()
    return trained


def make_optimizer(config: Config, net: nn.Module) -> torch.optim.Optimizer:
    if config.optimizer == "adam":
        return torch.optim.Adam(net.parameters(), config.learning_rate, weight_decay=config.weight_decay)
    return torch.optim.SGD(net.parameters(), config.learning_rate, momentum=0.9, weight_decay=config.weight_decay)


def pattern_and_factor(text: str) -> tuple[str, float]:
    """The two parts of an entry of ``layer_factors``.

    Raises:
        ValueError: it is not made of a name and a number.
    """
    pattern, equals, factor = text.rpartition("=")
    if not equals:
        raise ValueError(f"layer_factors must be entries like 'stages.0.**=0.1', got {text!r}")
    return pattern, float(factor)


def kernel_penalty(penalty: OrthogonalRegularizer) -> Tensor:
    """The penalty with the reshaped kernels in place of the layers."""
    layers = penalty.layers.items()
    losses = [penalty.factors[name] * kernel_orth_loss(convolutional(layer).weight) for name, layer in layers]
    return penalty.weight * torch.stack(losses).sum()


# Measuring


def classify(config: Config, arm: str, run: Run) -> dict[str, float]:
    """Train and measure one network."""
    split = load(config, run)
    trained = train(config, arm, run, split.train)
    net, batches = trained.net, partial(evaluation_batches, split.test, 250, run.device)
    metrics = {"accuracy": accuracy(net, batches())}
    for name, radius in zip(("small", "middle", "large"), config.radii, strict=True):
        attacked = attacked_batches(net, batches(count=config.attacked), radius, steps=config.attack_steps)
        metrics[f"robust_accuracy_{name}"] = accuracy(net, attacked)
    metrics["total_orthogonality"] = orthogonality(trained.penalty)["total_orthogonality"]
    values = spectra(trained)
    metrics |= spread_metrics(values)
    errors = residuals(trained, config.factors)
    metrics["share_of_bound"] = float(torch.stack(list(errors.values()))[..., 2].max())
    if config.factors == (1, 2, 4):
        metrics |= growth_metrics(torch.stack(list(errors.values())))
    run.save("residuals", **errors)
    run.figure("spectra", figures.spectra(ARMS[arm], values))
    return metrics


def run(config: Config, arm: str, run: Run) -> dict[str, float]:
    """Train and measure one arm."""
    if arm == "landscape":
        return landscape(config.landscape_starts, config.landscape_steps, run)
    return classify(config, arm, run)


def compare(config: Config, results: Mapping[str, ArmResult], run: Run) -> None:
    """Figures across arms."""
    trained = {arm: result for arm, result in results.items() if arm in SHARES}
    if len(trained) > 1:
        strengths = {arm: SHARES[arm] * config.largest for arm in trained}
        run.figure("effect", figures.effect(trained, strengths, config.radii))
        run.figure("scalability", figures.scalability(trained, config.factors))


# Claims

PAPER = "Achour, Malgouyres and Mamalet 2022"


def stronger(metric: str, source: str) -> tuple[Claim, ...]:
    """The metric falls from each lambda to the next."""
    order = ("baseline", "faint", "light", "medium", "strong")
    return tuple(
        Claim(
            metric=metric,
            arm=more,
            versus=less,
            direction="lower",
            kind="mechanism",
            scale="ratio",
            margin=1.0,
            source=source,
        )
        for less, more in pairwise(order)
    )


def bound(metric: str, arm: str, most: float, source: str) -> Claim:
    """The metric itself is at most so much."""
    return Claim(metric=metric, arm=arm, versus=None, direction="lower", kind="mechanism", margin=most, source=source)


FROBENIUS = f"{PAPER}, theorem on the Frobenius norm"
SPECTRAL = f"{PAPER}, theorem on the spectral norm (scalability)"
TRADE_OFF = (
    f"{PAPER}, abstract and experiments: lambda tunes a trade-off, to the benefit of both accuracy and robustness"
)

PUBLISHED = Config(
    data="cifar",
    network="resnet18",
    padding_mode="zeros",
    optimizer="sgd",
    learning_rate=0.1,
    milestones=(1 / 3, 2 / 3),
    weight_decay=1e-4,
    epochs=90,
    batch=128,
    skip=("stem.0",),
    attacked=1_000,
    factors=(1,),
    spectrum_every=1,
    workers=4,
)

EXPERIMENT = Experiment(
    method="core/orthogonal-conv",
    presets={
        "quick": Config(),
        "paper": PUBLISHED,
        "imagenet": replace(PUBLISHED, data="folders", network="resnet50", batch=256, spectrum_every=10, workers=16),
    },
    arms=ARMS,
    run=run,
    compare=compare,
    claims=(
        *stronger("total_orthogonality", f"{PAPER}, section on the weight of the penalty"),
        *stronger("singular_value_spread", SPECTRAL),
        bound("frobenius_not_doubled", "strong", 1e-6, FROBENIUS),
        bound("share_of_bound", "baseline", 1.0, SPECTRAL),
        bound("share_of_bound", "strong", 1.0, SPECTRAL),
        bound("spectral_growth", "strong", 1.1, SPECTRAL),
        Claim(
            metric="total_orthogonality",
            arm="strong",
            versus="kernel",
            direction="lower",
            kind="mechanism",
            scale="ratio",
            margin=2.0,
            source="Wang et al. 2020, section 3: orthogonality of the reshaped kernel is not that of the layer",
        ),
        bound("admissible_worst", "landscape", 1e-3, f"{PAPER}, theorem on existence and section on the landscape"),
        bound("above_bound", "landscape", 1e-3, f"{PAPER}, theorem on existence, its converse"),
        Claim(
            metric="robust_accuracy_middle",
            arm="strong",
            direction="higher",
            kind="outcome",
            margin=0.05,
            source=TRADE_OFF,
        ),
        Claim(
            metric="robust_accuracy_middle",
            arm="light",
            direction="higher",
            kind="outcome",
            margin=0.02,
            source=TRADE_OFF,
        ),
        Claim(
            metric="accuracy",
            arm="light",
            direction="higher",
            kind="outcome",
            margin=-0.01,
            source=TRADE_OFF,
            note="not lower by a point or more",
        ),
    ),
)
