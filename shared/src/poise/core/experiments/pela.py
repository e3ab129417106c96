r"""PELA: does a short stage beside the original repair a network whose layers were cut to low rank?

Guo, Wang and Kankanhalli, "PELA: Learning Parameter-Efficient Models with Low-Rank Approximation", CVPR 2024,
arXiv 2310.10700.

    task loss + alpha * MSE of block outputs + w * mean over layers of (max |W2 W1 - W0| - eps)^2

Every arm takes the same pretrained network, factorises it at each ratio, and sees the same batches in the intermediate stage. What
comes out is judged as it is and, on digits, after fine-tuning on other data.

Presets:

- ``quick``: the digits of scikit-learn, a transformer of three blocks on patches of 2 x 2, fine-tuned on MNIST at 8 x 8.
- ``text``: a pretrained sentence encoder (MiniLM) on docstrings without labels, judged by its sentence vectors.
- ``paper``: Swin-Base on ImageNet, and ``deit``: DeiT-Base, both at the settings of the released scripts.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from poise.core.adapters.low_rank_surgery import apply_low_rank
from poise.core.adapters.pela import WeightPerturbation, feature_distillation_loss
from poise.core.adapters.pela_trainer import PelaTrainer
from poise.core.experiments import pela_figures as figures
from poise.core.experiments.pela_problem import Problem
from poise.core.lab import ArmResult, Claim, Experiment, Run
from poise.core.taps import Taps

ARMS = {
    "baseline": "factorised, then trained on the task alone",
    "svd": "factorised, and nothing else",
    "scratch": "the same small structure with new factors, trained on the task alone",
    "distill": "factorised, task and feature distillation",
    "pela": "factorised, task, feature distillation and the perturbation term",
}


@dataclass(frozen=True)
class Config:
    """Settings; the defaults are those of the ``quick`` preset.

    Attributes:
        data: what is learnt.
        ratios: k, by which each layer is made smaller.
        teacher_passes: passes over the digits in which the original is trained.
        teacher_rate: its learning rate.
        passes: passes over the training data in the intermediate stage.
        steps: steps of the intermediate stage instead, on text.
        batch: examples per step.
        learning_rate: of AdamW in the intermediate stage; on ImageNet for 512 images, scaled to the batch.
        weight_decay: of AdamW.
        feature_weight: alpha.
        perturbation_weight: w; none to choose it so that the term is a tenth of the loss at the start.
        eps: of the perturbation term.
        transfer_train: images of MNIST for fine-tuning.
        transfer_test: images of MNIST for testing.
        transfer_passes: passes over them.
        temperature: of the contrastive loss on text.
        tokens: to which texts are cut.
        network: name of the network in timm.
        checkpoint: file of its weights; none for those that timm finds online.
        skip: layers that stay dense, beyond the head.
        size: height and width of ImageNet's images.
        warmup: passes in which the learning rate rises.
        warmup_rate: the learning rate at first, scaled as the other.
        least_rate: the learning rate at last, scaled as the other.
        drop_path: rate of stochastic depth.
        mixup: alpha of mixup.
        cutmix: alpha of CutMix.
        smoothing: of the labels.
        workers: processes that read images ahead.
    """

    data: Literal["digits", "text", "imagenet"] = "digits"
    ratios: tuple[float, ...] = (2.0, 4.0, 6.0)
    teacher_passes: int = 30
    teacher_rate: float = 2e-3
    passes: int = 3
    steps: int = 0
    batch: int = 32
    learning_rate: float = 3e-3
    weight_decay: float = 0.05
    feature_weight: float = 1.0
    perturbation_weight: float | None = None
    eps: float = 0.0
    transfer_train: int = 1_000
    transfer_test: int = 1_000
    transfer_passes: int = 3
    temperature: float = 0.05
    tokens: int = 64
    network: str = ""
    checkpoint: Path | None = None
    skip: tuple[str, ...] = ()
    size: int = 224
    warmup: int = 0
    warmup_rate: float = 0.0
    least_rate: float = 0.0
    drop_path: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    smoothing: float = 0.0
    workers: int = 0


# Data and networks


def problem_of(config: Config, run: Run) -> Problem:
    """The pretrained network and its data, the same for all arms of a seed."""
    if config.data == "text":
        from poise.core.experiments.pela_text import text_problem

        return text_problem(config, run)
    if config.data == "imagenet":
        from poise.core.experiments.pela_imagenet import imagenet_problem

        return imagenet_problem(config, run)
    from poise.core.experiments.pela_digits import digit_problem

    return digit_problem(config, run)


# Training


def repair(config: Config, arm: str, run: Run, problem: Problem, student: nn.Module, name: str) -> None:
    """Train the student, beside its teacher where the arm says so."""
    optimizer = torch.optim.AdamW(student.parameters(), problem.rate, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, problem.schedule)
    model, optimizer = run.prepare(student, optimizer)
    model.train()
    alpha = config.feature_weight if arm in ("distill", "pela") else 0.0
    w = config.perturbation_weight if arm == "pela" else 0.0
    if w is None:
        w = tenth_of_the_loss(problem, model, alpha, config.eps)
    pela = PelaTrainer(
        model, problem.teacher, problem.blocks, feature_weight=alpha, perturbation_weight=w, eps=config.eps
    )
    batches = None
    state = {"student": student, "optimizer": optimizer, "schedule": schedule, "pela": pela}
    for step in run.steps(problem.steps, name=f"stage_{name}", **state):
        batches = batches or problem.batches(range(step, problem.steps))
        batch = next(batches)
        output, penalty = pela(**batch.inputs)
        task = problem.task_loss(model, batch, output)
        loss = task + penalty
        optimizer.zero_grad()
        run.backward(loss)
        optimizer.step()
        schedule.step()
        pela.step()
        if step % 10 == 0:
            run.log(step, loss=loss, task=task, **pela.metrics)
    pela.close()
    student.eval()


def tenth_of_the_loss(problem: Problem, student: nn.Module, alpha: float, eps: float) -> float:
    """The weight at which the perturbation term starts as a tenth of the rest of the loss."""
    batch = next(problem.batches(range(1)))
    with (
        PelaTrainer(student, problem.teacher, problem.blocks, feature_weight=alpha, eps=eps) as pela,
        torch.random.fork_rng(),  # the arms draw the same dropout afterwards
        torch.no_grad(),
    ):
        output, penalty = pela(**batch.inputs)
        rest = problem.task_loss(student, batch, output) + penalty - pela.metrics["perturbation"]
    return float(0.1 * rest / pela.metrics["perturbation"])


# Measuring


@torch.no_grad()
def feature_gap(problem: Problem, student: nn.Module) -> float:
    """The distillation loss on inputs that were not trained on."""
    gaps = []
    with Taps(student, *problem.blocks) as ours, Taps(problem.teacher, *problem.blocks) as theirs:
        for batch in problem.unseen():
            student(**batch.inputs)
            problem.teacher(**batch.inputs)
            gaps.append(feature_distillation_loss(ours, theirs))
    return float(torch.stack(gaps).mean())


def largest_change(problem: Problem, student: nn.Module) -> float:
    """The largest change of a weight, averaged over layers."""
    return float(torch.stack(list(WeightPerturbation(student, problem.teacher).changes().values())).mean())


def label(ratio: float) -> str:
    return f"k{ratio:g}".replace(".", "_")


def run(config: Config, arm: str, run: Run) -> dict[str, float]:
    """Make, repair and measure the students of one arm."""
    problem = problem_of(config, run)
    teacher = problem.teacher.eval()
    original = copy.deepcopy(teacher.state_dict())
    judged = problem.measure(teacher, "teacher")
    metrics = {f"teacher_{name}": value for name, value in judged.items()}
    for ratio in config.ratios:
        name = label(ratio)
        student, report = apply_low_rank(teacher, ratio, problem.skip, decompose=arm != "scratch")
        if arm != "svd":
            repair(config, arm, run, problem, student, name)
        found = problem.measure(student, name)
        found |= {"feature_gap": feature_gap(problem, student), "largest_change": largest_change(problem, student)}
        found |= {"parameters": report.share}
        if "accuracy" in found:
            found["accuracy_drop"] = judged["accuracy"] - found["accuracy"]
        metrics |= {f"{key}_{name}": value for key, value in found.items()}
    changed = [key for key, tensor in teacher.state_dict().items() if not torch.equal(tensor, original[key])]
    return metrics | {"teacher_changed": float(len(changed))}


def compare(config: Config, results: Mapping[str, ArmResult], run: Run) -> None:
    """Figures across arms."""
    run.figure("compression", figures.compression(results, {ratio: label(ratio) for ratio in config.ratios}))


# Claims

PAPER = "Guo et al. 2024"
DISTILLATION = f"{PAPER}, section on feature distillation"
PERTURBATION = f"{PAPER}, section on the weight perturbation regularization"
HEADLINE = f"{PAPER}, abstract and tables: little is lost at a third to two thirds fewer parameters"
QUICK, TEXT = ("k2", "k4", "k6"), ("k2", "k3")


def lower(metric: str, arm: str, versus: str, source: str, presets: tuple[str, ...], factor: float = 1.0) -> Claim:
    """The metric falls by more than this factor."""
    return Claim(
        metric=metric,
        arm=arm,
        versus=versus,
        direction="lower",
        kind="mechanism",
        scale="ratio",
        margin=factor,
        source=source,
        presets=presets,
    )


def higher(metric: str, arm: str, versus: str, presets: tuple[str, ...], margin: float = 0.0) -> Claim:
    """The metric rises by more than the margin; for a negative one, it does not fall by more."""
    note = "not lower by a point or more" if margin < 0 else ""
    return Claim(
        metric=metric,
        arm=arm,
        versus=versus,
        direction="higher",
        kind="outcome",
        margin=margin,
        source=HEADLINE,
        note=note,
        presets=presets,
    )


def bound(metric: str, arm: str, most: float, kind: Literal["mechanism", "outcome"], source: str) -> Claim:
    """The metric itself is less than so much."""
    return Claim(metric=metric, arm=arm, versus=None, direction="lower", kind=kind, margin=most, source=source)


SWIN = Config(
    data="imagenet",
    ratios=(1.5,),
    passes=50,
    batch=256,
    learning_rate=2.5e-5,
    weight_decay=0.05,
    perturbation_weight=1.0,
    network="swin_base_patch4_window7_224",
    skip=("patch_embed", "layers.*.downsample", "layers.*.blocks.*.attn.proj"),
    warmup=3,
    warmup_rate=1e-7,
    least_rate=1e-8,
    drop_path=0.5,
    mixup=0.8,
    cutmix=1.0,
    smoothing=0.1,
    workers=16,
)
DEIT = replace(
    SWIN,
    ratios=(2.0,),
    learning_rate=5e-4,
    perturbation_weight=0.0,
    eps=1e-3,
    network="deit_base_patch16_224",
    skip=("patch_embed",),
    warmup=1,
    warmup_rate=1e-6,
    least_rate=1e-5,
    drop_path=0.1,
)

EXPERIMENT = Experiment(
    method="core/pela",
    presets={
        "quick": Config(),
        "text": Config(data="text", ratios=(2.0, 3.0), steps=150, batch=32, learning_rate=1e-4),
        "paper": SWIN,
        "deit": DEIT,
    },
    arms=ARMS,
    only={
        "text": ("baseline", "svd", "distill", "pela"),
        "paper": ("baseline", "svd", "distill", "pela"),
        "deit": ("baseline", "svd", "distill"),
    },
    run=run,
    compare=compare,
    claims=(
        *(lower(f"feature_gap_{k}", "distill", "baseline", DISTILLATION, ("quick",)) for k in QUICK),
        *(lower(f"feature_gap_{k}", "distill", "baseline", DISTILLATION, ("quick",), factor=2.0) for k in QUICK),
        *(lower(f"largest_change_{k}", "pela", "distill", PERTURBATION, ("quick",)) for k in QUICK),
        bound(
            "teacher_changed", "pela", 0.5, "mechanism", f"{PAPER}, section on feature distillation: a frozen teacher"
        ),
        *(higher(f"accuracy_{k}", "svd", "scratch", ("quick",)) for k in QUICK),
        *(higher(f"accuracy_{k}", "baseline", "svd", ("quick",)) for k in QUICK),
        *(higher(f"accuracy_{k}", "distill", "baseline", ("quick",), margin=-0.01) for k in QUICK),
        *(higher(f"accuracy_{k}", "pela", "distill", ("quick",), margin=-0.01) for k in QUICK),
        bound("accuracy_drop_k2", "pela", 0.01, "outcome", HEADLINE),
        *(lower(f"largest_change_{k}", "pela", "distill", PERTURBATION, ("text",)) for k in TEXT),
        *(higher(f"agreement_{k}", "distill", "svd", ("text",)) for k in TEXT),
        *(higher(f"agreement_{k}", "distill", "baseline", ("text",)) for k in TEXT),
        *(higher(f"agreement_{k}", "pela", "distill", ("text",), margin=-0.01) for k in TEXT),
    ),
)
