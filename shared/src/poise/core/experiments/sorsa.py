r"""SORSA: do trained singular triplets start faster than LoRA and PiSSA, and does the penalty keep them orthonormal at no loss?

Cao, "SORSA: Singular Values and Orthonormal Regularized Singular Vectors Adaptation of Large Language Models", arXiv 2409.00055.

    W = W_res + U diag(S) V^T,   loss + (gamma / lr) mean ||A A^T - I||_F

All arms of a seed tune the same pretrained network on the same batches. The change of every weight is measured by its singular value
decomposition, while training and where the arms have the same training loss.

Presets:

- ``quick``: a network that learned digits lying on their side learns to read them upright; MNIST, rank 8, each arm at its own best
  learning rate.
- ``one-rate``: the same with one learning rate for all arms.
- ``text``: MiniLM, a pretrained sentence encoder, learns to say which module of NumPy or SciPy a docstring is from.
- ``paper``: a causal language model learns MetaMathQA and is tested on GSM-8K and MATH, as published.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from poise.core.adapters.sorsa import sorsa_deltas
from poise.core.adapters.sorsa_penalty import SorsaRegularizer
from poise.core.experiments import sorsa_measures as measures
from poise.core.experiments.sorsa_digits import digits_task
from poise.core.experiments.sorsa_math import math_task
from poise.core.experiments.sorsa_task import Task, adapt
from poise.core.experiments.sorsa_text import text_task
from poise.core.lab import ArmResult, Claim, Experiment, Run
from poise.core.names import unwrap
from poise.core.schedule import Cosine

ARMS = {
    "baseline": "LoRA",
    "pissa": "PiSSA",
    "sorsa_unregularized": "SORSA, gamma = 0",
    "sorsa": "SORSA",
    "sorsa_strong": "SORSA, ten times gamma",
    "sorsa_decoupled": "SORSA, the regularizer's step after the optimizer's",
    "full": "all weights",
}

PUBLISHED = ("baseline", "pissa", "sorsa", "full")
"""The arms of the paper's tables."""


@dataclass(frozen=True)
class Config:
    """Settings; the defaults are those of the ``quick`` preset.

    Attributes:
        data: what is learned.
        rank: of the adapters.
        svd: how the triplets are found.
        gamma: size of the regularizer's step.
        lora_rate: highest learning rate of LoRA.
        pissa_rate: of PiSSA.
        sorsa_rate: of SORSA, with and without the penalty.
        full_rate: of training all weights.
        steps: optimizer steps.
        batch: examples of one step.
        micro_batch: examples of one backward pass.
        schedule: of the learning rate: constant, or half a cosine after a warm-up.
        warmup: share of the steps in which the learning rate rises.
        clip: the gradient's greatest norm; 0 for no limit.
        window: the loss around this step is what ``start_loss`` is the mean of, 20 steps.
        measure_every: steps between two measures of the weights; 0 for none.
        equal_loss: training loss at which the arms' weights are compared.
        pretraining: steps on the sideways digits.
        test: test images.
        train_texts: training texts of each module.
        test_texts: test texts of each module, at most.
        tokens: length at which texts are cut.
        examples: rows of MetaMathQA.
        answers: tokens of a generated answer, at most.
        problems: test problems of each kind; 0 for all.
    """

    data: Literal["digits", "docstrings", "math"] = "digits"
    rank: int = 8
    svd: Literal["exact", "randomized"] = "exact"
    gamma: float = 4e-4
    lora_rate: float = 1e-2
    pissa_rate: float = 1e-2
    sorsa_rate: float = 3e-3
    full_rate: float = 3e-3
    steps: int = 200
    batch: int = 64
    micro_batch: int = 64
    schedule: Literal["constant", "cosine"] = "constant"
    warmup: float = 0.0
    clip: float = 0.0
    window: int = 50
    measure_every: int = 5
    equal_loss: float = 0.5
    pretraining: int = 600
    test: int = 1_000
    train_texts: int = 50
    test_texts: int = 26
    tokens: int = 64
    examples: int = 100_000
    answers: int = 512
    problems: int = 0


# Data and networks


def load(config: Config, run: Run) -> Task:
    """The pretrained network and what it is tuned on, the same for all arms of a seed."""
    if config.data == "docstrings":
        return text_task(
            run, train=config.train_texts, test=config.test_texts, tokens=config.tokens, batch=config.micro_batch
        )
    if config.data == "math":
        return math_task(
            run,
            examples=config.examples,
            tokens=config.tokens,
            batch=config.micro_batch,
            answers=config.answers,
            problems=config.problems,
        )
    return digits_task(run, pretraining=config.pretraining, test=config.test, batch=config.micro_batch)


# Training


def run(config: Config, arm: str, run: Run) -> dict[str, float]:
    """Tune one arm and measure it."""
    task = load(config, run)
    before = measures.original_weights(task.model, task.targets) if config.measure_every else {}
    network = adapt(task, arm, config.rank, config.svd, run)
    singular_values = {name: delta.s.detach().clone() for name, delta in sorsa_deltas(network).items()}
    rate, regularizer = rate_of(config, arm), penalty_of(config, arm, network)
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    model, optimizer = run.prepare(network, optimizer)

    losses = torch.zeros(config.steps, dtype=torch.float64)
    history = torch.zeros(config.steps // config.measure_every if config.measure_every else 0, 3, dtype=torch.float64)
    weights = {name: parameter.data for name, parameter in network.named_parameters() if parameter.requires_grad}
    state = {"weights": weights, "optimizer": optimizer, "losses": losses, "history": history}
    if regularizer is not None:
        state["regularizer"] = regularizer
    parts = config.batch // config.micro_batch
    batches = None
    model.train()
    for step in run.steps(config.steps, **state):
        for group in optimizer.param_groups:
            group["lr"] = rate * share_of_rate(config, step)
        batches = batches or task.batches(range(step * parts, config.steps * parts))
        optimizer.zero_grad()
        total = torch.zeros((), device=run.device)
        for _ in range(parts):
            loss = task.loss(model, next(batches)) / parts
            run.backward(loss)
            total += loss.detach()
        if regularizer is not None and regularizer.weight > 0 and regularizer.mode == "loss":
            run.backward(regularizer())  # once per step, not per micro-batch
        if config.clip:
            run.accelerator.clip_grad_norm_(trained, config.clip)
        optimizer.step()
        if regularizer is not None:
            regularizer.step()
        losses[step] = total
        if step % 10 == 0:
            run.log(step, loss=total)
        if config.measure_every and (step + 1) % config.measure_every == 0:
            history[step // config.measure_every] = measured(config, task, unwrap(model), before)

    tuned = unwrap(model).eval()
    near = slice(max(0, config.window - 10), config.window + 10)
    metrics = {
        "start_loss": float(losses[near].mean() if config.window < config.steps else losses.mean()),
        "end_loss": float(losses[-20:].mean()),
        "trained": float(sum(parameter.numel() for parameter in trained)),
        **task.judge(tuned),
    }
    if config.measure_every:
        after = measures.effective_weights(tuned, before)
        metrics["delta_sigma"], metrics["delta_direction"] = measures.mean_change(before, after, config.rank)
        equal = measures.at_equal_loss(history, config.equal_loss)
        metrics["delta_sigma_at_equal_loss"], metrics["delta_direction_at_equal_loss"] = equal
    if singular_values:
        metrics |= measures.triplet_metrics(tuned, singular_values)
    run.save("course", losses=losses, history=history)
    return metrics


def penalty_of(config: Config, arm: str, network: nn.Module) -> SorsaRegularizer | None:
    """The regularizer of an arm."""
    if arm in ("sorsa", "sorsa_strong"):
        gamma = config.gamma * (10 if arm == "sorsa_strong" else 1)
        return SorsaRegularizer(network, gamma, lr=config.sorsa_rate)
    return SorsaRegularizer(network, config.gamma, mode="decoupled") if arm == "sorsa_decoupled" else None


def rate_of(config: Config, arm: str) -> float:
    """The arm's highest learning rate."""
    return {"baseline": config.lora_rate, "pissa": config.pissa_rate, "full": config.full_rate}.get(
        arm, config.sorsa_rate
    )


def share_of_rate(config: Config, step: int) -> float:
    """The part of the highest learning rate that is used at a step."""
    if config.schedule == "constant":
        return 1.0
    rise = max(1, round(config.warmup * config.steps))
    return (step + 1) / rise if step < rise else Cosine(1.0, 0.0, config.steps - rise, delay=rise)(step)


# Measuring


def measured(config: Config, task: Task, net: nn.Module, before: measures.Weights) -> Tensor:
    """The training loss on the probe, and the change of the weights so far."""
    net.eval()
    loss = task.probe(net) if task.probe is not None else 0.0
    change = measures.mean_change(before, measures.effective_weights(net, before), config.rank)
    net.train()
    return torch.tensor([loss, *change], dtype=torch.float64)


def compare(config: Config, results: Mapping[str, ArmResult], run: Run) -> None:
    """Training loss and change of the weights."""
    courses = {arm: result.load("course") for arm, result in results.items()}
    losses = {arm: course["losses"] for arm, course in courses.items()}
    histories = {arm: course["history"] for arm, course in courses.items()} if config.measure_every else {}
    run.figure("loss", measures.curves(losses, histories, config.measure_every))
    if histories:
        run.figure("change", measures.changes(histories, ARMS))


# Claims

PAPER = "Cao 2024"
DIGITS = ("quick", "one-rate")
SMALL = (*DIGITS, "text")


def starts_faster(arm: str, versus: str) -> Claim:
    return Claim(
        metric="start_loss",
        arm=arm,
        versus=versus,
        direction="lower",
        kind="outcome",
        source=f"{PAPER}, abstract: faster convergence than PiSSA and LoRA",
        note="Mean training loss of steps 40 to 60.",
        presets=SMALL,
    )


def changes_less(metric: str, versus: str) -> Claim:
    return Claim(
        metric=metric,
        arm="sorsa",
        versus=versus,
        direction="lower",
        kind="mechanism",
        source=f"{PAPER}, section 3: SORSA alters the weights least",
        note="Where the arms have the same training loss; singular vectors are matched.",
        presets=DIGITS,
    )


EXPERIMENT = Experiment(
    method="core/sorsa",
    presets={
        "quick": Config(),
        "one-rate": Config(lora_rate=1e-3, pissa_rate=1e-3, sorsa_rate=1e-3, full_rate=1e-3, equal_loss=1.2),
        "text": Config(
            data="docstrings",
            lora_rate=1e-3,
            pissa_rate=1e-3,
            sorsa_rate=1e-3,
            full_rate=3e-4,
            steps=150,
            batch=16,
            micro_batch=16,
            measure_every=0,
        ),
        "paper": Config(
            data="math",
            rank=128,
            svd="randomized",
            lora_rate=2e-5,
            pissa_rate=2e-5,
            sorsa_rate=3e-5,
            full_rate=2e-5,
            steps=781,
            batch=128,
            micro_batch=2,
            schedule="cosine",
            warmup=0.03,
            clip=1.0,
            measure_every=0,
            tokens=512,
        ),
    },
    arms=ARMS,
    only={"text": tuple(arm for arm in ARMS if arm != "sorsa_decoupled"), "paper": PUBLISHED},
    run=run,
    compare=compare,
    claims=(
        Claim(
            metric="penalty",
            arm="sorsa",
            versus="sorsa_unregularized",
            direction="lower",
            kind="mechanism",
            margin=5.0,
            scale="ratio",
            source=f"{PAPER}, section 4: the regularizer keeps U and V orthonormal",
            note="At most a fifth of what it is without the regularizer.",
            presets=SMALL,
        ),
        Claim(
            metric="norm_spread",
            arm="sorsa",
            versus="sorsa_unregularized",
            direction="lower",
            kind="mechanism",
            source=f"{PAPER}, section 4: changes of scale go into S",
            note="Mean distance of the vectors' lengths from 1.",
            presets=SMALL,
        ),
        Claim(
            metric="scale_change",
            arm="sorsa",
            versus="sorsa_unregularized",
            direction="higher",
            kind="mechanism",
            source=f"{PAPER}, section 4: changes of scale go into S",
            note="Relative change of S.",
            presets=SMALL,
        ),
        Claim(
            metric="condition",
            arm="sorsa",
            versus="sorsa_unregularized",
            direction="lower",
            kind="mechanism",
            source=f"{PAPER}, section 5: the regularizer lowers the condition number of the principal weight",
            note="Geometric mean over layers.",
            presets=SMALL,
        ),
        *(
            changes_less(f"delta_{what}_at_equal_loss", versus)
            for versus in ("baseline", "full")
            for what in ("sigma", "direction")
        ),
        starts_faster("sorsa", "pissa"),
        starts_faster("sorsa", "baseline"),
        starts_faster("pissa", "baseline"),
        Claim(
            metric="accuracy",
            arm="sorsa",
            versus="sorsa_unregularized",
            direction="higher",
            kind="outcome",
            margin=-0.01,
            source=f"{PAPER}, section 4: the regularizer costs nothing",
            note="Not lower by a point or more.",
            presets=SMALL,
        ),
        *(
            Claim(
                metric="accuracy",
                arm="sorsa",
                versus=versus,
                direction="higher",
                kind="outcome",
                margin=-0.01 if versus == "full" else 0.0,
                source=f"{PAPER}, table 1: above LoRA, PiSSA and full fine-tuning",
                note="Not lower than training all weights by a point or more." if versus == "full" else "",
                presets=SMALL,
            )
            for versus in ("baseline", "pissa", "full")
        ),
    ),
)
