r"""Early-learning regularization: are wrong labels learnt by heart, and what does that cost at the last epoch?

Liu, Niles-Weed, Razavian and Fernandez-Granda, "Early-Learning Regularization Prevents Memorization of Noisy Labels", NeurIPS
2020, arXiv 2007.00151.

    L = CE + lambda * mean log(1 - <p, t>),   t <- beta t + (1 - beta) p for each example

All arms of a seed see the same wrong labels. Test labels are right, and best and last test accuracy are reported: the best epoch
is one that nobody could choose without right labels.

Presets:

- ``quick``: MNIST, 3,000 training images, half of the labels redrawn, a perceptron.
- ``paper``: CIFAR-10 as published, 40 % of the labels redrawn, ResNet-34; ``--set`` changes rate and kind of noise.
- ``cifar10-asymmetric`` and ``cifar100``: the published settings for these.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, cast

import torch
from torch import Tensor, nn

from poise.core.data import mnist5k
from poise.core.experiments.elr_measures import Progress, epochs_figure, story_figure
from poise.core.experiments.noisy_labels import Noise, all_logits, indexed_batches, noisy, part, percent, predictor
from poise.core.experiments.published_images import ImageSplit, InMemory, read_cifar, steps_per_epoch
from poise.core.experiments.resnets import Channels, resnet
from poise.core.gpu import derive_generator
from poise.core.lab import ArmResult, Claim, Experiment, Run
from poise.core.labels.elr import ELRLoss, detect_label_errors
from poise.core.labels.elr_plus import ELRPlusLoss, ELRPlusTrainer
from poise.core.labels.mixing import draw_mix

ARMS = {
    "baseline": "cross-entropy with the labels as given",
    "dropout": "cross-entropy, dropout 0.5 before the last layer",
    "target_loss": "lambda CE(t, p) as the regularizer: the same target, another function",
    "elr": "ELR",
    "elr_plus": "ELR+: two networks, weight averages, mixup",
}
CIFAR = Channels((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
"""With the deviations that are common in code for CIFAR-10."""


@dataclass(frozen=True)
class Config:
    """Settings; the defaults are those of the ``quick`` preset.

    Attributes:
        data: where the images come from.
        noise: kind of label noise.
        rate: share of labels that are redrawn or confused.
        lam: weight of the regularizer.
        beta: weight of the old target.
        ramp_steps: steps over which the weight of the regularizer rises in ELR+.
        target_weight: weight of the cross-entropy with the target in the arm ``target_loss``.
        alpha: of the mixup in ELR+.
        decay: of the weight average in ELR+.
        decay_ramp_steps: steps over which that decay rises.
        refine_labels: weight mixed labels by the target, as the released code does for 100 classes.
        train: training images of the quick preset; for CIFAR the last tenth of them is held out, as published.
        test: test images of the quick preset.
        epochs: passes over the training images.
        epochs_plus: the same in ELR+, for each network.
        batch: images per step.
        learning_rate: of SGD with momentum 0.9.
        weight_decay: of SGD.
        weight_decay_plus: the same in ELR+.
        schedule: ``constant``, ``restarts`` (half cosines of 10 epochs down to 1e-3), or ``steps``.
        milestones: epochs after which the learning rate is multiplied by 0.01 (``steps``).
        milestones_plus: the same in ELR+, by 0.1, whatever the schedule of ELR.
    """

    data: Literal["mnist", "cifar"] = "mnist"
    noise: Noise = "symmetric"
    rate: float = 0.5
    lam: float = 7.0
    beta: float = 0.7
    ramp_steps: int = 0
    target_weight: float = 3.0
    alpha: float = 1.0
    decay: float = 0.99
    decay_ramp_steps: int = 0
    refine_labels: bool = False
    train: int = 3_000
    test: int = 1_000
    epochs: int = 40
    epochs_plus: int = 40
    batch: int = 100
    learning_rate: float = 0.05
    weight_decay: float = 5e-4
    weight_decay_plus: float = 5e-4
    schedule: Literal["constant", "restarts", "steps"] = "constant"
    milestones: tuple[int, ...] = ()
    milestones_plus: tuple[int, ...] = ()


CIFAR10 = Config(
    data="cifar",
    rate=0.4,
    lam=3.0,
    beta=0.7,
    decay=0.997,
    decay_ramp_steps=40_000,
    epochs=150,
    epochs_plus=200,
    batch=128,
    learning_rate=0.02,
    weight_decay=1e-3,
    schedule="restarts",
    milestones_plus=(150,),
)


# Data and networks


def load(config: Config, run: Run) -> tuple[ImageSplit, Tensor]:
    """Training images with their true labels, test images, and the labels to learn from, the same for all arms of a seed."""
    if config.data == "cifar":
        split = run.load(read_cifar)
        assert isinstance(split.train, InMemory)  # CIFAR is not read from image files
        order = torch.randperm(len(split.train.labels), generator=derive_generator(run.seed, "held-out"))
        train, test = part(split.train, order[: len(order) * 9 // 10].sort().values), split.test
    else:
        bundled = mnist5k().split(test=config.test, seed=run.seed)
        rest = bundled.train
        chosen = torch.randperm(len(rest), generator=derive_generator(run.seed, "train"))[: config.train]
        train, test = part(InMemory.of(rest), chosen), InMemory.of(bundled.test)
    labels = noisy(train.labels, len(train.classes), config.noise, config.rate, run.seed)
    return ImageSplit(train, test), labels


def build(config: Config, classes: int, dropout: float = 0.0) -> nn.Sequential:
    """The network, for images in [0, 1]."""
    if config.data == "cifar":
        network = resnet(34, classes, "small", CIFAR)
        head = network.get_submodule("head")
        assert isinstance(head, nn.Sequential)
        head.insert(len(head) - 1, nn.Dropout(dropout))
        return network
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(784, 256),
        nn.ReLU(),
        nn.Linear(256, 128),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(128, classes),
    )


# Training


def train(config: Config, arm: str, run: Run, split: ImageSplit, labels: Tensor) -> Progress:
    """One network: cross-entropy alone, with dropout, or with a regularizer."""
    images, classes = split.train, len(split.train.classes)
    assert isinstance(images, InMemory)
    network = build(config, classes, dropout=0.5 if arm == "dropout" else 0.0)
    criterion = ELRLoss(len(labels), classes, config.lam if arm == "elr" else 0.0, config.beta).to(run.device)
    optimizer = sgd(network, config, config.weight_decay)
    network, optimizer = run.prepare(network, optimizer)
    per_epoch = steps_per_epoch(images, config.batch)
    progress = Progress(config.epochs)
    batches: Batches | None = None
    given = labels.to(run.device)

    count = config.epochs * per_epoch
    state = {"model": network, "optimizer": optimizer, "criterion": criterion, "progress": progress.history}
    for step in run.steps(count, **state):
        epoch, place = divmod(step, per_epoch)
        set_rate(optimizer, learning_rate(config, epoch))
        batches = batches or indexed_batches(images, config.batch, range(step, count), run)
        inputs, index = next(batches)
        logits = network(inputs)
        loss = criterion(logits, given[index], index)
        if arm == "target_loss":
            target = criterion.memory.read(index).to(logits)
            loss = loss - config.target_weight * (target * logits.log_softmax(1)).sum(1).mean()
        optimizer.zero_grad()
        run.backward(loss)
        optimizer.step()
        if place + 1 == per_epoch:
            progress.measure(epoch, predictor(network), criterion.memory, split, labels, config.lam, run)
            run.log(step, loss=loss, **progress.at(epoch))

    run.save("memory", suspects=detect_label_errors(criterion.memory, given).suspect)
    return progress


def train_plus(config: Config, run: Run, split: ImageSplit, labels: Tensor) -> Progress:
    """ELR+: an epoch of one network, then an epoch of the other."""
    images, classes = split.train, len(split.train.classes)
    assert isinstance(images, InMemory)
    trainer = ELRPlusTrainer(
        lambda: build(config, classes),
        len(labels),
        classes,
        lam=config.lam,
        beta=config.beta,
        ramp_steps=config.ramp_steps,
        refine_labels=config.refine_labels,
        alpha=config.alpha,
        decay=config.decay,
        decay_ramp_steps=config.decay_ramp_steps,
    ).to(run.device)
    optimizers = [sgd(network, config, config.weight_decay_plus) for network in trainer.networks]
    memory = cast(ELRPlusLoss, trainer.criteria[0]).memory
    first, second, *optimizers = run.prepare(*trainer.networks, *optimizers)
    trainer.networks = nn.ModuleList([first, second])
    per_epoch = steps_per_epoch(images, config.batch)
    progress = Progress(config.epochs_plus)
    batches: Batches | None = None
    given = labels.to(run.device)

    count = 2 * config.epochs_plus * per_epoch
    state = {"trainer": trainer, "first": optimizers[0], "second": optimizers[1], "progress": progress.history}
    for step in run.steps(count, **state):
        turn, place = divmod(step, per_epoch)
        epoch, student = divmod(turn, 2)
        set_rate(optimizers[student], learning_rate_plus(config, epoch))
        batches = batches or indexed_batches(images, config.batch, range(step, count), run)
        inputs, index = next(batches)
        mix = draw_mix(len(index), config.alpha, derive_generator(run.seed, "mix", step))
        loss = trainer.loss(student, inputs, given[index], index, mix)
        optimizers[student].zero_grad()
        run.backward(loss)
        optimizers[student].step()
        trainer.update_average(student)
        if place + 1 == per_epoch and student == 1:
            progress.measure(epoch, trainer, memory, split, labels, config.lam, run)
            run.log(step, loss=loss, **progress.at(epoch))

    live = percent(all_logits(lambda x: trainer(x, "live"), split.test, run.device).argmax(1) == split.test.labels)
    run.save("members", live=torch.tensor(live))
    return progress


def sgd(network: nn.Module, config: Config, weight_decay: float) -> torch.optim.SGD:
    return torch.optim.SGD(network.parameters(), lr=config.learning_rate, momentum=0.9, weight_decay=weight_decay)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def learning_rate(config: Config, epoch: int) -> float:
    """Of all arms but ELR+."""
    if config.schedule == "restarts":
        return 1e-3 + (config.learning_rate - 1e-3) * (1 + math.cos(math.pi * (epoch % 10) / 10)) / 2
    return config.learning_rate * 0.01 ** sum(epoch >= milestone for milestone in config.milestones)


def learning_rate_plus(config: Config, epoch: int) -> float:
    """Of ELR+."""
    return config.learning_rate * 0.1 ** sum(epoch >= milestone for milestone in config.milestones_plus)


# Measuring


def run(config: Config, arm: str, run: Run) -> dict[str, float]:
    """Train one arm on wrong labels and measure it on right ones."""
    split, labels = load(config, run)
    progress = train_plus(config, run, split, labels) if arm == "elr_plus" else train(config, arm, run, split, labels)
    history = progress.history
    run.save("history", **history)
    run.figure("epochs", epochs_figure({arm: history}))
    accuracy, late = history["accuracy"], slice(len(history["accuracy"]) // 3, None)
    return {
        "best_accuracy": accuracy.max().item(),
        "last_accuracy": accuracy[-1].item(),
        "accuracy_lost": (accuracy.max() - accuracy[-1]).item(),
        "memorized": history["memorized"][-1].item(),
        "recalled": history["recalled"][-1].item(),
        "gradients_on_wrong_labels": history["on_wrong"][late].mean().item(),
        "gradients_on_right_labels": history["on_right"][late].mean().item(),
        "gradients_on_remembered_labels": history["on_remembered"][late].mean().item(),
    }


def compare(config: Config, results: Mapping[str, ArmResult], run: Run) -> None:
    """The epochs of all arms: first what the method is about, then with the gradients behind it."""
    histories = {arm: result.load("history") for arm, result in results.items()}
    run.figure("arms", story_figure(histories))
    run.figure("epochs", epochs_figure(histories))


# Claims

PAPER = "Liu et al. 2020"
mechanism = partial(Claim, arm="elr", kind="mechanism")
outcome = partial(Claim, arm="elr", kind="outcome")

EXPERIMENT = Experiment(
    method="core/elr",
    presets={
        "quick": Config(),
        "paper": CIFAR10,
        "cifar10-asymmetric": replace(
            CIFAR10, noise="asymmetric", lam=1.0, beta=0.9, epochs=120, schedule="steps", milestones=(40, 80)
        ),
        "cifar100": replace(
            CIFAR10,
            lam=7.0,
            beta=0.9,
            ramp_steps=40_000,
            refine_labels=True,
            epochs_plus=250,
            schedule="steps",
            milestones=(80, 120),
            milestones_plus=(200,),
        ),
    },
    arms=ARMS,
    run=run,
    compare=compare,
    claims=(
        mechanism(
            metric="memorized",
            direction="lower",
            margin=3.0,
            scale="ratio",
            source=f"{PAPER}, section 3 and figure 1: the memorization of wrong labels is prevented",
            note="Share of the wrong training labels that are predicted after the last epoch.",
        ),
        mechanism(
            metric="recalled",
            versus=None,
            direction="higher",
            margin=85.0,
            source=f"{PAPER}, section 4.3: the targets recover the true labels",
            note="Mislabelled examples whose remembered class is the true one, in percent.",
        ),
        mechanism(
            metric="gradients_on_wrong_labels",
            versus=None,
            direction="lower",
            source=f"{PAPER}, section 4.2: on wrong labels the regularizer cancels the gradient of the cross-entropy",
            note="Mean inner product of the two logit gradients after the first third of training.",
        ),
        mechanism(
            metric="gradients_on_right_labels",
            versus=None,
            direction="higher",
            source=f"{PAPER}, section 4.2: on right labels the regularizer adds to the gradient of the cross-entropy",
            note="The same mean over the examples whose label is right. gradients_on_remembered_labels leaves out the few of them that "
            "the target contradicts.",
        ),
        outcome(
            metric="last_accuracy",
            direction="higher",
            margin=10.0,
            source=f"{PAPER}, tables 1 and 2: test accuracy above that of cross-entropy",
        ),
        outcome(
            metric="accuracy_lost",
            versus=None,
            direction="lower",
            margin=3.0,
            source=f"{PAPER}, figure 1: accuracy does not fall after the early phase",
            note="Best minus last test accuracy, in points.",
        ),
        outcome(
            metric="last_accuracy",
            arm="elr_plus",
            direction="higher",
            margin=10.0,
            source=f"{PAPER}, tables 1 to 3: ELR+ above cross-entropy",
        ),
    ),
)
