r"""SHISRCNet: does classifying low-resolution tissue get better when the images are restored for that purpose?

Xie et al., "SHISRCNet: Super-resolution And Classification Network For Low-resolution Breast Cancer Histopathology Image", MICCAI
2023, arXiv 2306.14119.

    L = 0.6 |SR - HR|_1 + 0.3 mean of focal(SR), focal(HR) + 0.1 NT-Xent(features of SR, features of HR)

Nothing here says anything about clinical use.

Presets:

- ``quick``: tiles of 32 x 32 pixels of one stained section, seen at half the resolution; the class is whether the tile is rough, which
  low resolution hides. The left half trains, the right half tests. Super-resolution warms up on crops without labels, once for all
  arms, and the classifier stands on frozen ImageNet features.
- ``paper``: BreaKHis at 384 x 384 from 192 x 192, no patient in two parts; ``--set split=image`` for the published split,
  ``--set scale=4`` and ``8``.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import l1_loss

from poise.core.experiments.published_images import steps_per_epoch, training_batches
from poise.core.lab import ArmResult, Experiment, Run
from poise.medical.experiments import shisrcnet_figures as figures
from poise.medical.experiments.shisrcnet_claims import CLAIMS
from poise.medical.experiments.shisrcnet_data import Tissue, breakhis_tissue, picture_tissue
from poise.medical.experiments.shisrcnet_measures import Answer, fidelity, gradient_share, predictions, rates
from poise.medical.experiments.shisrcnet_parts import Bicubic, PretrainedStages, released_loss
from poise.medical.histopathology.resolution import degrade, enlarge
from poise.medical.histopathology.shisrcnet.classifier import ClassifierCF
from poise.medical.histopathology.shisrcnet.losses import SHISRCLoss
from poise.medical.histopathology.shisrcnet.network import SHISRCNet
from poise.medical.histopathology.shisrcnet.super_resolution import SRResNetMFE


class Arm(NamedTuple):
    """What the classifier sees, and what trains together.

    Attributes:
        text: what it is.
        sees: low resolution enlarged (``bicubic``), restored (``sr``), or high resolution (``hr``).
        restores: whether super-resolution trains with the classifier.
        detached: whether the gradient is cut between the two.
        second_view: whether high resolution is classified in training as well.
        contrast: whether the two views are compared.
        released: whether the losses are wired as in the authors' release.
    """

    text: str
    sees: Literal["bicubic", "sr", "hr"] = "sr"
    restores: bool = True
    detached: bool = False
    second_view: bool = True
    contrast: bool = True
    released: bool = False


SETUPS = {
    "baseline": Arm("low resolution, enlarged without learning", "bicubic", False, second_view=False),
    "two_stage": Arm("super-resolution first, then classification of what it gives", restores=False, second_view=False),
    "joint": Arm("both trained together, without high resolution as a second view", second_view=False),
    "no_contrast": Arm("both views classified, not compared", contrast=False),
    "detached": Arm("SHISRCNet with the gradient cut between its halves", detached=True),
    "shisrcnet": Arm("SHISRCNet"),
    "released": Arm("SHISRCNet, features and logits exchanged as in the release", released=True),
    "hr": Arm("high resolution, also at test time: an upper bound", "hr", False, second_view=False),
}


@dataclass(frozen=True)
class Config:
    """Settings; the defaults are those of the ``quick`` preset.

    Attributes:
        data: tiles of the histology picture, or BreaKHis from ``--data``.
        scale: between the two resolutions.
        hr_size: height and width at high resolution.
        width: channels of the super-resolution.
        blocks: its blocks.
        score_norm: its scores as in the release.
        bicubic_skip: whether it learns the difference to the bicubic image.
        classifier: the published one (``cf``), or its pyramid on frozen ImageNet features (``pretrained``).
        crops: random crops of each of two pictures that super-resolution warms up on.
        warmup: steps of super-resolution alone before the joint training; 0 for none.
        epochs: passes of joint training.
        batch: images per step.
        warmup_rate: learning rate of Adam in the warm-up.
        learning_rate: of Adam.
        decay: factor of the learning rate after every second epoch.
        w_sr: weight of the pixels.
        w_cls: weight of classification.
        w_con: weight of the contrastive term.
        gamma: of the focal loss.
        temperature: of the contrastive term.
        joint_batch: whether both views share batch statistics.
        evaluate_every: epochs between measurements.
        magnification: of BreaKHis: 40, 100, 200 or 400; none for all.
        split: of BreaKHis: ``patient`` or ``image``.
        split_seed: of BreaKHis.
        cache: of BreaKHis: folder for resized images.
        workers: processes that read images ahead.
    """

    data: Literal["histology", "breakhis"] = "histology"
    scale: int = 2
    hr_size: int = 32
    width: int = 16
    blocks: int = 1
    score_norm: bool = False
    bicubic_skip: bool = True
    classifier: Literal["cf", "pretrained"] = "pretrained"
    crops: int = 1_000
    warmup: int = 800
    epochs: int = 10
    batch: int = 16
    warmup_rate: float = 2e-3
    learning_rate: float = 1e-3
    decay: float = 0.95
    w_sr: float = 0.6
    w_cls: float = 0.3
    w_con: float = 0.1
    gamma: float = 5.0
    temperature: float = 2.0
    joint_batch: bool = False
    evaluate_every: int = 2
    magnification: int | None = None
    split: str = "patient"
    split_seed: int = 0
    cache: Path | None = field(default=None)
    workers: int = 0


# Data and networks


def load(config: Config, run: Run) -> Tissue:
    """The images, the same for all arms of a seed."""
    if config.data == "histology":
        return picture_tissue(config.hr_size, config.crops, run.seed)

    def read(path: Path) -> Tissue:
        """BreaKHis_v1 as its publishers pack it."""
        sizes = (config.scale, config.hr_size)
        return breakhis_tissue(path, config.magnification, config.split, *sizes, config.split_seed, config.cache)

    return run.load(read)


def build_upscaler(config: Config) -> SRResNetMFE:
    """Super-resolution, untrained."""
    options = {"score_norm": config.score_norm, "bicubic_skip": config.bicubic_skip}
    return SRResNetMFE(config.scale, config.width, config.blocks, **options)


def build(config: Config, setup: Arm, classes: int) -> SHISRCNet:
    """The arm's network; arms of a seed start alike."""
    upscaler: nn.Module = build_upscaler(config)
    if setup.sees != "sr":
        upscaler = nn.Identity() if setup.sees == "hr" else Bicubic(config.scale)
    backbone = PretrainedStages() if config.classifier == "pretrained" else None
    return SHISRCNet(
        1 if setup.sees == "hr" else config.scale,
        upscaler=upscaler,
        classifier=ClassifierCF(classes, backbone),
        detach_sr=setup.detached,
        joint_batch=config.joint_batch,
    )


def build_loss(config: Config, setup: Arm) -> SHISRCLoss:
    """The arm's loss."""
    w_con = config.w_con if setup.second_view and setup.contrast else 0.0
    return SHISRCLoss(config.w_sr if setup.restores else 0.0, config.w_cls, w_con, config.gamma, config.temperature)


@lru_cache(maxsize=1)
def warmed_up(config: Config, seed: int, device: torch.device) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Super-resolution after its warm-up, and its mean absolute difference on test images before and after.

    It depends on nothing else, so that arms of a seed share it; it leaves the random numbers of the run alone.
    """
    tissue = picture_tissue(config.hr_size, config.crops, seed)
    assert tissue.textures is not None, "the warm-up has images of its own"
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        upscaler = build_upscaler(config).to(device)
    judged = (tissue.test, config.scale, 256, device)
    before = fidelity(upscaler, *judged)["l1"]
    optimizer = torch.optim.Adam(upscaler.parameters(), config.warmup_rate)
    for hr, _ in training_batches(tissue.textures, config.batch, range(config.warmup), seed=seed, device=device):
        loss = l1_loss(upscaler(degrade(hr, config.scale)), hr)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = fidelity(upscaler, *judged)["l1"]
    return upscaler.state_dict(), {"l1_warm": after, "warmup_ratio": after / before}


# Training


def run(config: Config, arm: str, run: Run) -> dict[str, float]:
    """Train and measure one arm."""
    tissue, setup = load(config, run), SETUPS[arm]
    model = build(config, setup, len(tissue.train.classes)).to(run.device).to(memory_format=torch.channels_last)
    criterion = build_loss(config, setup)
    measured: dict[str, float] = {}
    if config.warmup and setup.sees == "sr":
        state, measured = warmed_up(config, run.seed, run.device)
        model.upscaler.load_state_dict(state)
    if not setup.restores:
        model.upscaler.requires_grad_(False)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.Adam(weights, config.learning_rate)
    per_epoch = steps_per_epoch(tissue.train, config.batch)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2 * per_epoch, config.decay)
    trained, optimizer = run.prepare(model, optimizer)

    judge = Judge(config, setup, tissue, run.device)
    points = len([epoch for epoch in range(config.epochs) if judge.due(epoch)])
    history = {name: torch.zeros(points, dtype=torch.float64) for name in judge.measures}
    best = {name: value.clone() for name, value in model.state_dict().items()}
    best_score = torch.tensor(-1.0, dtype=torch.float64)

    batches: Iterator[tuple[Tensor, Tensor]] | None = None
    total = config.epochs * per_epoch
    state_of: dict[str, Any] = {"model": model, "optimizer": optimizer, "schedule": schedule}
    state_of |= {"history": history, "best": best, "score": best_score}
    for step in run.steps(total, **state_of):
        batches = batches or training_batches(
            tissue.train,
            config.batch,
            range(step, total),
            seed=run.seed,
            device=run.device,
            workers=config.workers,
            rank=run.rank,
            world=run.world,
        )
        hr, labels = next(batches)
        hr = hr.contiguous(memory_format=torch.channels_last)
        images = hr if setup.sees == "hr" else degrade(hr, config.scale)

        trained.train()
        if not setup.restores:
            model.upscaler.eval()
        output = trained(images, hr if setup.second_view else None)
        terms = released_loss(criterion, output, hr, labels) if setup.released else criterion(output, hr, labels)
        optimizer.zero_grad()
        run.backward(terms["loss"])
        optimizer.step()
        schedule.step()

        epoch, place = divmod(step, per_epoch)
        if place + 1 == per_epoch and judge.due(epoch):
            found = judge(model)
            for name, value in {"epoch": epoch + 1.0, **found}.items():
                history[name][(epoch + 1) // config.evaluate_every - 1 if epoch + 1 < config.epochs else -1] = value
            run.log(step, **terms, **found)
            if tissue.validation is not None and found["accuracy"] > best_score:
                best_score.fill_(found["accuracy"])
                for name, tensor in model.state_dict().items():
                    best[name].copy_(tensor)

    if tissue.validation is not None:
        model.load_state_dict(best)
    draw(config, arm, model, tissue, history, run)
    return measured | measure(config, setup, model, tissue, run.device, measured.get("l1_warm"))


# Measuring


class Judge:
    """Measures a network every few epochs: on validation images, or without them on test images."""

    def __init__(self, config: Config, setup: Arm, tissue: Tissue, device: torch.device) -> None:
        self.config, self.setup, self.device = config, setup, device
        self.images = tissue.test if tissue.validation is None else tissue.validation
        self.measures = ("epoch", "accuracy") if setup.sees == "hr" else ("epoch", "accuracy", "psnr")

    def due(self, epoch: int) -> bool:
        """After every few epochs, and after the last."""
        return (epoch + 1) % self.config.evaluate_every == 0 or epoch + 1 == self.config.epochs

    def __call__(self, model: SHISRCNet) -> dict[str, float]:
        batch = evaluation_batch(self.config)
        judged = (self.images, self.config.scale, batch, self.device)
        predicted, _ = predictions(model, *judged, answer_of(self.setup))
        found = {"accuracy": 100 * float((predicted == self.images.labels).double().mean())}
        if "psnr" in self.measures:
            found["psnr"] = fidelity(model.upscaler, *judged)["psnr"]
        return found


def answer_of(setup: Arm) -> Answer:
    """The class with the largest logit; in the release's wiring the largest feature."""
    return lambda output: (output.features if setup.released else output.logits).argmax(1)


def evaluation_batch(config: Config) -> int:
    """Many small images at a time, or few large ones."""
    return max(1, min(256, 256 * 64**2 // config.hr_size**2))


def measure(
    config: Config, setup: Arm, model: SHISRCNet, tissue: Tissue, device: torch.device, l1_warm: float | None
) -> dict[str, float]:
    """Everything that is measured on test images at the end."""
    judged = (tissue.test, config.scale, evaluation_batch(config), device)
    predicted, gap = predictions(model, *judged, answer_of(setup))
    found = rates(predicted, tissue.test.labels, tissue.patients, tissue.magnifications) | {"view_gap": gap}
    if setup.sees == "hr":
        return found
    found |= fidelity(model.upscaler, *judged)
    if setup.sees == "sr" and setup.restores:
        if l1_warm is not None:
            found["l1_ratio"] = found["l1"] / l1_warm
        rows = list(range(min(len(tissue.test.labels), 64 if config.hr_size < 128 else 4)))
        hr, labels = tissue.test.read(rows).to(device), tissue.test.labels[rows].to(device)
        criterion = SHISRCLoss(config.w_sr, config.w_cls, config.w_con, config.gamma, config.temperature)
        found["gradient_share"] = gradient_share(model, criterion, degrade(hr, config.scale), hr, labels)
    return found


# Figures


@torch.no_grad()
def draw(config: Config, arm: str, model: SHISRCNet, tissue: Tissue, history: Mapping[str, Tensor], run: Run) -> None:
    """Curves, and a few test images at low resolution, restored, and at high resolution."""
    model.eval()
    run.save("history", **history)
    run.figure("curves", figures.curves({arm: history}))
    if SETUPS[arm].sees == "hr":
        return
    lr = degrade(tissue.shown.to(run.device), config.scale)
    restored = model.upscaler(lr).cpu()
    run.save("shown", restored=restored, bicubic=enlarge(lr, config.scale).cpu(), truth=tissue.shown)
    columns = {"low resolution": lr.cpu(), "restored" if SETUPS[arm].sees == "sr" else "bicubic": restored}
    run.figure("images", figures.triptychs(columns, tissue.shown, SETUPS[arm].text))


def compare(config: Config, results: Mapping[str, ArmResult], run: Run) -> None:
    """The arms side by side: the same images restored, measures, and curves."""
    shown = {arm: result.load("shown") for arm, result in results.items() if result.has("shown")}
    restored = {arm: pictures["restored"] for arm, pictures in shown.items() if SETUPS[arm].sees == "sr"}
    first = next(iter(shown.values()), None)
    pictures: dict[str, Tensor] = {}
    if first is not None:
        pictures = {"low resolution": degrade(first["truth"], config.scale), "bicubic": first["bicubic"]}
        pictures |= {figures.ARMS[arm]: images for arm, images in restored.items() if arm == "shisrcnet"}
        pictures["high resolution"] = first["truth"]
    run.figure("arms", figures.arms({arm: result.metrics for arm, result in results.items()}, pictures))
    run.figure("curves", figures.curves({arm: result.load("history") for arm, result in results.items()}))
    if first is not None:
        columns = {"bicubic": first["bicubic"], **{figures.ARMS[arm]: images for arm, images in restored.items()}}
        run.figure("images", figures.triptychs(columns, first["truth"]))


# Claims

EXPERIMENT = Experiment(
    method="medical/shisrcnet",
    presets={
        "quick": Config(),
        "paper": Config(
            data="breakhis",
            hr_size=384,
            width=64,
            blocks=3,
            bicubic_skip=False,
            classifier="cf",
            warmup=0,
            epochs=100,
            batch=4,
            evaluate_every=1,
            workers=4,
        ),
    },
    arms={name: setup.text for name, setup in SETUPS.items()},
    only={"paper": tuple(name for name in SETUPS if name != "two_stage")},
    run=run,
    compare=compare,
    claims=CLAIMS,
)
