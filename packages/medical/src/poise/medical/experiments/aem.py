r"""AEM: does attention over a bag, kept from collapsing, classify bags better, and does it still find the telling instances?

Zhang et al., "AEM: Attention Entropy Maximization for Multiple Instance Learning based Whole Slide Image Classification", arXiv
2406.15303.

    L = bag loss + lambda * mean over rows of sum_n a_n log a_n

Nothing here says anything about clinical use.

Presets:

- ``quick``: bags of 30 MNIST digits, positive when some are nines; 80 bags to learn from. Five models, each with and without AEM.
- ``histology``: bags of 32 tiles of one picture of stained tissue, positive when at least three of them are among the brownest; the
  left half trains, the right half tests. Features are those of an ImageNet network.
- ``paper`` (CAMELYON16), ``camelyon17``, ``bracs``, ``lct``: slides as files of features, as published; ``--data`` names the file or
  folder, ``--set layout=clam_pt`` its layout.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from poise.core.experiments.published_images import visiting_order
from poise.core.lab import ArmResult, Claim, Experiment, Run
from poise.core.schedule import Cosine
from poise.medical.experiments import aem_figures as figures
from poise.medical.experiments.aem_data import Bags, BagSplit, digit_bags, slide_bags, tile_bags
from poise.medical.experiments.aem_measures import correlation, evaluate
from poise.medical.mil.abmil import ABMIL
from poise.medical.mil.aem import AttentionEntropyLoss
from poise.medical.mil.bags import Bag, Subsample, collate_bags
from poise.medical.mil.dsmil import DSMIL
from poise.medical.mil.heatmap import heat_map
from poise.medical.mil.reading import BagModel
from poise.medical.mil.transmil import TransMIL

MODELS = ("gated", "plain", "multihead", "dsmil", "transmil")


class Arm(NamedTuple):
    """Which model, how strongly regularized, and how its bags are drawn.

    Attributes:
        text: what it is.
        model: one of ``MODELS``.
        strength: factor of the weight lambda.
        annealed: whether lambda goes to 0 on half a cosine.
        subsampled: whether a random part of each bag is seen.
    """

    text: str
    model: str
    strength: float
    annealed: bool = False
    subsampled: bool = False


SETUPS = {
    "baseline": Arm("gated ABMIL, lambda = 0", "gated", 0.0),
    "light": Arm("gated ABMIL, a tenth of lambda", "gated", 0.1),
    "aem": Arm("gated ABMIL with AEM", "gated", 1.0),
    "annealed": Arm("gated ABMIL, lambda going to 0", "gated", 1.0, annealed=True),
    "subsampled": Arm("gated ABMIL on parts of the bags", "gated", 0.0, subsampled=True),
    "subsampled_aem": Arm("gated ABMIL on parts of the bags, with AEM", "gated", 1.0, subsampled=True),
    "plain": Arm("plain ABMIL", "plain", 0.0),
    "plain_aem": Arm("plain ABMIL with AEM", "plain", 1.0),
    "multihead": Arm("multi-head ABMIL", "multihead", 0.0),
    "multihead_aem": Arm("multi-head ABMIL with AEM", "multihead", 1.0),
    "dsmil": Arm("DSMIL", "dsmil", 0.0),
    "dsmil_aem": Arm("DSMIL with AEM", "dsmil", 1.0),
    "transmil": Arm("TransMIL", "transmil", 0.0),
    "transmil_aem": Arm("TransMIL with AEM", "transmil", 1.0),
}
PAIRS = {
    "gated": ("baseline", "aem"),
    "subsampled": ("subsampled", "subsampled_aem"),
    **{model: (model, f"{model}_aem") for model in MODELS[1:]},
}
"""Arms without and with AEM, for each way to train."""


@dataclass(frozen=True)
class Config:
    """Settings; the defaults are those of the ``quick`` preset.

    Attributes:
        data: digits, tiles of the histology picture, or slides from ``--data``.
        train: training bags that are made.
        test: test bags that are made.
        instances: in each of them.
        negatives: least and largest number of positive instances in a negative bag.
        positives: the same in a positive bag.
        lam: lambda, the weight of AEM.
        rho: share of each bag that the subsampled arms see.
        hidden: width of the embedding.
        att_dim: width of gated, plain and DSMIL attention.
        heads: of multi-head attention and TransMIL.
        epochs: passes over the training bags.
        learning_rate: of AdamW at the start; half a cosine takes it to 0.
        weight_decay: of AdamW.
        layout: of slides: ``aem_h5``, ``clam_h5`` or ``clam_pt``.
        table: of slides: the CSV file of labels beside the features; an ``aem_h5`` file may do without.
        folds: of slides: CLAM's CSV file of splits, if there is one.
        protocol: of slides: how they are split, ``table``, ``patients`` (60/20/20), ``camelyon16`` or ``camelyon17``.
        groups: of slides: classes to merge.
    """

    data: Literal["digits", "histology", "slides"] = "digits"
    train: int = 80
    test: int = 200
    instances: int = 30
    negatives: tuple[int, int] = (0, 0)
    positives: tuple[int, int] = (2, 5)
    lam: float = 0.1
    rho: float = 0.6
    hidden: int = 64
    att_dim: int = 128
    heads: int = 8
    epochs: int = 25
    learning_rate: float = 1e-3
    weight_decay: float = 1e-5
    layout: str = "aem_h5"
    table: str = "labels.csv"
    folds: str = ""
    protocol: str = "table"
    groups: tuple[tuple[int, ...], ...] = ()


# Data and networks


def load(config: Config, run: Run) -> BagSplit:
    """The bags, the same for all arms of a seed."""
    if config.data == "digits":
        return digit_bags(run.seed, config.train, config.test, config.instances, config.positives)
    if config.data == "histology":
        sizes = (config.train, config.test, config.instances)
        return tile_bags(run.seed, *sizes, config.negatives, config.positives)

    def read(path: Path) -> BagSplit:
        """Features of slides with their labels."""
        return slide_bags(path, config.layout, config.table, config.folds, config.protocol, config.groups, run.seed)

    return run.load(read)


def build(config: Config, arm: Arm, width: int, classes: int) -> BagModel:
    """The arm's model."""
    if arm.model == "dsmil":
        return DSMIL(width, classes, att_dim=config.att_dim)
    if arm.model == "transmil":
        return TransMIL(width, config.hidden, classes, heads=config.heads)
    return ABMIL(width, config.hidden, classes, arm.model, att_dim=config.att_dim, heads=config.heads)


# Training


def run(config: Config, arm: str, run: Run) -> dict[str, float]:
    """Train and measure one arm."""
    split, setup = load(config, run), SETUPS[arm]
    model = build(config, setup, split.width, split.classes).to(run.device)
    optimizer = torch.optim.AdamW(model.parameters(), config.learning_rate, weight_decay=config.weight_decay)
    steps = config.epochs * len(split.train)
    lam = config.lam * setup.strength
    aem = AttentionEntropyLoss(Cosine(lam, 0.0, steps) if setup.annealed else lam)
    subsample = Subsample(config.rho if setup.subsampled else 1.0, run.generator)
    rate = Cosine(config.learning_rate, 0.0, steps)
    history = {name: torch.zeros(config.epochs, dtype=torch.float64) for name in figures.CURVES}
    best = {name: value.clone() for name, value in model.state_dict().items()}
    best_score = torch.tensor(-1.0, dtype=torch.float64)

    state: dict[str, Any] = {"model": model, "optimizer": optimizer, "aem": aem}
    state |= {"history": history, "best": best, "score": best_score}
    for step in run.steps(steps, **state):
        epoch, place = divmod(step, len(split.train))
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        bag = split.train[int(visiting_order(run.seed, epoch, len(split.train))[place])]
        batch = collate_bags([bag]).to(run.device)
        features, _ = subsample(batch.features)

        model.train()
        reading = model.read(features)
        loss = reading.loss(batch.labels) + aem(reading.scores)
        optimizer.zero_grad()
        run.backward(loss)
        optimizer.step()
        aem.step()

        if place + 1 == len(split.train):
            metrics = evaluate(model, split.test, run.device, split.truth)
            for name in figures.CURVES:
                history[name][epoch] = metrics[name]
            run.log(step, loss=loss, **metrics)
            if split.validation is not None:
                keep_best(model, split.validation, run.device, best, best_score)

    if split.validation is not None:
        model.load_state_dict(best)
    draw(arm, model, split, history, run)
    return evaluate(model, split.test, run.device, split.truth) | {"epochs_correlation": correlation(history)}


def keep_best(model: BagModel, validation: Bags, device: torch.device, best: dict[str, Tensor], score: Tensor) -> None:
    """Remember the model if macro F1 plus macro AUC of the validation bags is larger than ever."""
    metrics = evaluate(model, validation, device)
    reached = metrics["macro_f1"] + metrics["auc"]
    if reached > score:
        score.fill_(reached)
        for name, value in model.state_dict().items():
            best[name].copy_(value)


# Figures


@torch.no_grad()
def draw(arm: str, model: BagModel, split: BagSplit, history: Mapping[str, Tensor], run: Run) -> None:
    """Curves, the attention to one positive bag, and its map over a slide."""
    model.eval()
    run.save("history", **history)
    run.figure("curves", figures.curves({arm: history}))
    if split.pictures is not None:
        shown = next(index for index in range(len(split.test)) if split.test[index].label == 1)
        weights = attention(model, split.test[shown], run.device)
        assert split.truth is not None, "bags of pictures are made of labelled instances"
        run.save("bag", weights=weights, pictures=split.pictures, truth=split.truth[shown])
    if split.slide is not None:
        bag, picture = split.slide
        assert bag.coords is not None, "a slide is drawn by its coordinates"
        weights = attention(model, bag, run.device)
        run.figure("heat_map", heat_map(weights, bag.coords, picture=picture, title=SETUPS[arm].text))
        run.save("slide", weights=weights, coords=bag.coords)


def attention(model: BagModel, bag: Bag, device: torch.device) -> Tensor:
    """Mean attention of the rows to each instance."""
    return model.read(bag.features[None].to(device)).weights()[0].mean(0).cpu()


def compare(config: Config, results: Mapping[str, ArmResult], run: Run) -> None:
    """One bag as the arms see it, curves of all arms, and what AEM does to each model."""
    histories = {arm: result.load("history") for arm, result in results.items()}
    drawn = {SETUPS[arm].text: histories[arm] for arm in list(histories)[:4]}
    bags = {arm: result.load("bag") for arm, result in results.items() if result.has("bag")}
    if bags:
        first = sorted(bags, key=lambda arm: arm not in PAIRS["gated"])[:2]
        run.figure("bags", figures.bags({SETUPS[arm].text: bags[arm] for arm in first}, drawn))
    run.figure("arms", figures.curves(drawn))
    unregularized = {arm: history for arm, history in histories.items() if SETUPS[arm].strength == 0}
    if unregularized:
        run.figure("entropy_and_auc", figures.entropy_and_auc(unregularized))
    pairs = {name: pair for name, pair in PAIRS.items() if set(pair) <= results.keys()}
    if pairs:
        run.figure(
            "models", figures.pairs({n: (results[a].metrics, results[b].metrics) for n, (a, b) in pairs.items()})
        )


# Claims

PAPER = "Zhang et al. 2024"


def mechanism(
    metric: str, arm: str, versus: str, direction: Literal["higher", "lower"], presets: tuple[str, ...]
) -> Claim:
    """A claim about what the term itself does."""
    return Claim(
        metric=metric,
        arm=arm,
        versus=versus,
        direction=direction,
        kind="mechanism",
        source=f"{PAPER}: the loss is the negative entropy of the attention, so that a larger lambda spreads it",
        presets=presets,
    )


def outcome(
    metric: str, arm: str, versus: str, direction: Literal["higher", "lower"], presets: tuple[str, ...]
) -> Claim:
    """A claim about what that is good for."""
    return Claim(
        metric=metric,
        arm=arm,
        versus=versus,
        direction=direction,
        kind="outcome",
        source=f"{PAPER}, abstract: consistent gains, with other models, attention mechanisms and subsampling",
        presets=presets,
    )


BOTH = ("quick", "histology")
SLIDES = Config(data="slides", hidden=128, epochs=50, learning_rate=1e-4)

EXPERIMENT = Experiment(
    method="medical/aem",
    presets={
        "quick": Config(),
        "histology": Config(data="histology", instances=32, negatives=(0, 2), positives=(3, 6)),
        "paper": replace(SLIDES, protocol="camelyon16"),
        "camelyon17": replace(SLIDES, protocol="camelyon17"),
        "bracs": replace(SLIDES, groups=((0, 1, 2), (3, 4), (5, 6))),
        "lct": replace(SLIDES, protocol="patients"),
    },
    arms={name: setup.text for name, setup in SETUPS.items()},
    run=run,
    compare=compare,
    claims=(
        mechanism("entropy", "light", "baseline", "higher", BOTH),
        mechanism("entropy", "aem", "light", "higher", BOTH),
        mechanism("largest_weight", "light", "baseline", "lower", BOTH),
        mechanism("largest_weight", "aem", "light", "lower", BOTH),
        *(
            mechanism("entropy", regularized, plain, "higher", ("quick",))
            for name, (plain, regularized) in PAIRS.items()
            if name != "gated"
        ),
        Claim(
            metric="attention_auc",
            arm="light",
            direction="higher",
            kind="mechanism",
            margin=-3.0,
            source="attention that is spread must not have forgotten: it ranks the telling instances at most 3 points worse",
            presets=BOTH,
        ),
        outcome("auc", "light", "baseline", "higher", BOTH),
        outcome("nll", "light", "baseline", "lower", BOTH),
        *(outcome("auc", regularized, plain, "higher", ("quick",)) for plain, regularized in PAIRS.values()),
        outcome("auc", "aem", "baseline", "higher", ("histology",)),
    ),
)
