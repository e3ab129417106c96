r"""Softmax collapse and perpGrad: why does a network that fits modular addition not learn to add, and what makes it learn?

Prieto, Barsbey, Mediano and Birdal, "Grokking at the Edge of Numerical Stability", ICLR 2025, arXiv 2501.04697.

A bias-free perceptron sees 40 % of all sums modulo p and is tested on the rest. Full batch, no regularization except in the arms that
are about one; the order of the rows is drawn anew in every step, because rounding depends on it.

- Arms of ``steps`` steps compare what grokking needs: nothing, perpGrad, and the known remedies, all of which keep the logits small.
- Arms of ``long_steps`` steps wait for softmax collapse: cross-entropy in float32 (the baseline) and float64, and StableMax. In
  float16 the collapse comes within ``steps``.

The cosine of the negative gradient with the weights is that of the raw gradient: perpGrad's own is 0 by construction.

Presets: ``quick``, addition modulo 59; ``paper``, modulo 113 (multiplication with ``--set op=mul``, other shares with
``--set train_fraction=0.6``); ``precision``, the paper's study of floating-point types; ``transformer``, one layer; ``parity``, sparse
parity. All data are generated.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from poise.core.dynamics.grokking_stability.diagnostics import nlm_cosine, softmax_collapse_fraction, zero_loss_fraction
from poise.core.dynamics.grokking_stability.networks import AlgorithmicTransformer, algorithmic_mlp
from poise.core.dynamics.grokking_stability.perp_grad import PerpGrad
from poise.core.dynamics.grokking_stability.stablemax import stablemax_cross_entropy
from poise.core.dynamics.grokking_stability.tasks import ModularArithmetic, Operation, SparseParity, Split
from poise.core.experiments import grokking_stability_figures as figures
from poise.core.experiments.grokking_stability_measures import Loss, fidelity, first, squared_error
from poise.core.functional import l1
from poise.core.lab import ArmResult, Claim, Experiment, Run


@dataclass(frozen=True, kw_only=True)
class Arm:
    """What an arm changes.

    Attributes:
        text: what it is.
        loss: the loss.
        precision: the type to which the logits are cast for the loss.
        perp: whether the optimizer is wrapped in perpGrad.
        rescale: whether perpGrad gives the gradient its norm back.
        long: whether the arm trains for ``long_steps``.
        remedy: the regularization, if the arm has one.
    """

    text: str
    loss: Literal["softmax", "stablemax", "squared"] = "softmax"
    precision: torch.dtype = torch.float32
    perp: bool = False
    rescale: bool = True
    long: bool = False
    remedy: Literal["", "weight_decay", "l1", "alpha"] = ""


SETUPS = {
    "baseline": Arm(text="AdamW without weight decay, softmax cross-entropy in float32", long=True),
    "perp_grad": Arm(text="the same with perpGrad", perp=True),
    "perp_grad_unscaled": Arm(text="perpGrad without giving the gradient its norm back", perp=True, rescale=False),
    "stablemax": Arm(text="StableMax cross-entropy in float64", loss="stablemax", precision=torch.float64, long=True),
    "softmax_float16": Arm(text="softmax cross-entropy in float16", precision=torch.float16),
    "softmax_float64": Arm(text="softmax cross-entropy in float64", precision=torch.float64, long=True),
    "weight_decay": Arm(text="decoupled weight decay", remedy="weight_decay"),
    "l1": Arm(text="L1 penalty on the weights", remedy="l1"),
    "small_output": Arm(text="output scaled by a small alpha", remedy="alpha"),
    "squared_error": Arm(text="mean squared error to one-hot labels", loss="squared"),
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings; the defaults are those of the ``quick`` preset.

    Attributes:
        task: modular arithmetic, or the parity of 3 of 43 bits.
        op: the operation of modular arithmetic.
        p: its modulus.
        train_fraction: share of the samples to train on.
        network: a perceptron on one-hot or bit inputs, or a transformer on residues.
        bias: whether the perceptron has biases.
        steps: full-batch steps.
        long_steps: full-batch steps of the arms that wait for softmax collapse.
        learning_rate: of AdamW.
        beta2: of AdamW, except with StableMax.
        stablemax_beta2: of AdamW with StableMax.
        adam_eps: of AdamW. The usual 1e-8 would end training before the softmax does.
        weight_decay: of the arm ``weight_decay``.
        l1: weight of the arm ``l1``.
        alpha: output scale of the arm ``small_output``; its learning rate is divided by the square.
        measure_every: steps between measurements; the numbers of steps are multiples of it.
    """

    task: Literal["modular", "parity"] = "modular"
    op: Operation = "add"
    p: int = 59
    train_fraction: float = 0.4
    network: Literal["mlp", "transformer"] = "mlp"
    bias: bool = False
    steps: int = 400
    long_steps: int = 1_800
    learning_rate: float = 0.01
    beta2: float = 0.99
    stablemax_beta2: float = 0.999
    adam_eps: float = 1e-25
    weight_decay: float = 1.0
    l1: float = 1e-5
    alpha: float = 0.5
    measure_every: int = 25

    def __post_init__(self) -> None:
        if self.steps % self.measure_every or self.long_steps % self.measure_every or self.long_steps < self.steps:
            raise ValueError(
                f"steps and long_steps must be multiples of measure_every, and long_steps not below steps, "
                f"got {self.steps}, {self.long_steps} and {self.measure_every}"
            )


# Data and networks


def samples(config: Config, generator: torch.Generator) -> Split:
    if config.task == "parity":
        return SparseParity(n_parity=3, n_noise=40, n_samples=2_000).split(config.train_fraction, generator)
    return modular(config).split(config.train_fraction, generator)


def modular(config: Config) -> ModularArithmetic:
    """The transformer's residues start at 1, as in the authors' data."""
    if config.network == "transformer":
        return ModularArithmetic(config.p, config.op, encoding="index", start=1)
    return ModularArithmetic(config.p, config.op)


def network(config: Config, alpha: float) -> nn.Module:
    if config.network == "transformer":
        return AlgorithmicTransformer(config.p, alpha=alpha)
    inputs, outputs = (43, 2) if config.task == "parity" else (2 * config.p, config.p)
    return algorithmic_mlp(inputs, outputs, bias=config.bias, alpha=alpha)


# Training


LOSSES: dict[str, Loss] = {"softmax": F.cross_entropy, "stablemax": stablemax_cross_entropy, "squared": squared_error}


def optimizer_of(config: Config, setup: Arm, model: nn.Module, alpha: float) -> torch.optim.Optimizer:
    adamw = torch.optim.AdamW(
        model.parameters(),
        lr=config.learning_rate / alpha**2,
        betas=(0.9, config.stablemax_beta2 if setup.loss == "stablemax" else config.beta2),
        eps=config.adam_eps,
        weight_decay=config.weight_decay if setup.remedy == "weight_decay" else 0.0,
    )
    return PerpGrad(adamw, rescale=setup.rescale) if setup.perp else adamw


def run(config: Config, arm: str, run: Run) -> dict[str, float]:
    """Train and measure one arm."""
    setup = SETUPS[arm]
    alpha = config.alpha if setup.remedy == "alpha" else 1.0
    data = samples(config, run.generator).to(run.device)
    model = network(config, alpha)
    model, optimizer = run.prepare(model.to(run.device), optimizer_of(config, setup, model, alpha))
    plain = run.accelerator.unwrap_model(model)
    loss_of, steps = LOSSES[setup.loss], config.long_steps if setup.long else config.steps
    curves = {key: torch.zeros(steps // config.measure_every + 1, dtype=torch.float64) for key in figures.CURVES}

    # One step more than asked for: each measurement comes before the update of its step.
    for step in run.steps(steps + 1, model=model, optimizer=optimizer, curves=curves):
        order = torch.randperm(len(data.x_train), generator=run.generator).to(run.device)
        x, y = data.x_train[order], data.y_train[order]
        loss = loss_of(model.train()(x).to(setup.precision), y)
        penalty = config.l1 * sum(map(l1, plain.parameters())) if setup.remedy == "l1" else 0.0
        optimizer.zero_grad()
        run.backward(loss + penalty)
        if step % config.measure_every == 0:
            measured = measure(setup, plain, x, y, data)
            for key, value in measured.items():
                curves[key][step // config.measure_every] = value
            run.log(step, loss=loss, **measured)
        optimizer.step()

    run.save("curves", step=torch.arange(0, steps + 1, config.measure_every), **curves)
    if config.task == "modular":
        run.save("table", **table_of(config, plain.eval(), run.device))
    run.figure("curves", figures.curves(setup.text, config.measure_every, curves))
    return summary(config, setup, curves)


# Measuring


def measure(setup: Arm, model: nn.Module, x: Tensor, y: Tensor, data: Split) -> dict[str, float]:
    """Fit, alignment and collapse; the gradient that training just took is in ``grad``, the rest is without dropout."""
    weights = list(model.parameters())
    cosine, gradient = nlm_cosine(weights), torch.cat([w.grad.flatten() for w in weights if w.grad is not None])
    logits = model.eval()(x)
    losses = LOSSES[setup.loss](logits.to(setup.precision), y, reduction="none")
    top = logits.detach().topk(2).values
    with torch.no_grad():
        test_accuracy = (model(data.x_test).argmax(-1) == data.y_test).double().mean()
    measured = {
        "train_accuracy": (logits.argmax(-1) == y).double().mean(),
        "test_accuracy": test_accuracy,
        "nlm_cosine": cosine,
        "weight_norm": torch.stack([w.detach().norm() for w in weights]).norm(),
        "margin": (top[:, 0] - top[:, 1]).mean(),
        "gradient_norm": gradient.double().norm(),
        "collapsed": softmax_collapse_fraction(logits, setup.precision),
        "zero_loss": zero_loss_fraction(losses),
        "fidelity": fidelity(LOSSES[setup.loss], logits, y, setup.precision, weights),
    }
    return {key: float(value) for key, value in measured.items()}


@torch.no_grad()
def table_of(config: Config, model: nn.Module, device: torch.device) -> dict[str, Tensor]:
    """What the network answers for every entry of the whole table of the operation, and where that is right."""
    inputs, labels = modular(config).table()
    answers = model(inputs.to(device)).argmax(-1).cpu()
    shape = (config.p - modular(config).start, -1)
    return {"answers": answers.reshape(shape).to(torch.int16), "right": (answers == labels).reshape(shape)}


def summary(config: Config, setup: Arm, curves: dict[str, Tensor]) -> dict[str, float]:
    """The metrics of an arm. A step that never came counts as the number of steps taken."""
    here = config.steps // config.measure_every
    at_steps = ("train_accuracy", "test_accuracy", "nlm_cosine", "weight_norm", "margin")
    metrics = {key: float(curves[key][here]) for key in at_steps} | {
        "grok_step": first(curves["test_accuracy"][: here + 1] > 0.95) * config.measure_every,
        "final_test_accuracy": float(curves["test_accuracy"][-1]),
        "zero_loss": float(curves["zero_loss"].max()),
        "gradient_left": float(curves["gradient_norm"].min() / curves["gradient_norm"][0]),
        "fidelity": float(curves["fidelity"].min()),
    }
    if setup.loss == "softmax" and (setup.long or setup.precision != torch.float32):
        metrics["collapse_step"] = first(curves["collapsed"] > 0.5) * config.measure_every
    return metrics


def compare(config: Config, results: Mapping[str, ArmResult], run: Run) -> None:
    """Figures across arms."""
    run.figure("grokking", figures.grokking(config.steps, results))
    run.figure("courses", figures.courses(config.steps, results))


# Claims

PAPER = "Prieto et al. 2025"
outcome = partial(Claim, kind="outcome", metric="test_accuracy", direction="higher", margin=0.5)
mechanism = partial(Claim, kind="mechanism", presets=("quick", "precision"))

EXPERIMENT = Experiment(
    method="core/grokking-stability",
    presets={
        "quick": Config(),
        "paper": Config(p=113, steps=5_000, long_steps=100_000, measure_every=50),
        "precision": Config(
            p=113, steps=20_000, long_steps=20_000, measure_every=500, learning_rate=5e-4, adam_eps=1e-30
        ),
        "transformer": Config(
            p=113,
            network="transformer",
            steps=5_000,
            long_steps=5_000,
            learning_rate=1e-3,
            weight_decay=1.5,
            measure_every=100,
        ),
        "parity": Config(
            task="parity",
            bias=True,
            train_fraction=0.5,
            steps=5_000,
            long_steps=100_000,
            adam_eps=1e-18,
            measure_every=100,
        ),
    },
    arms={name: setup.text for name, setup in SETUPS.items()},
    run=run,
    compare=compare,
    claims=(
        outcome(
            arm="perp_grad",
            source=f"{PAPER}, abstract and figure 1: it generalises without regularization",
            presets=("quick", "paper", "transformer"),
        ),
        outcome(
            arm="perp_grad_unscaled",
            source=f"{PAPER}, section 5: the equation, which does not restore the norm",
            presets=("quick", "paper"),
        ),
        outcome(
            metric="final_test_accuracy",
            arm="stablemax",
            source=f"{PAPER}, figures 1 and 4: it generalises without regularization, in tens of thousands of steps",
            presets=("paper", "parity"),
        ),
        mechanism(
            metric="nlm_cosine",
            arm="baseline",
            versus=None,
            direction="higher",
            margin=0.5,
            source=f"{PAPER}, section 4: beyond overfitting the gradient aligns with the weights",
            note="perpGrad removes this component; its raw gradient has no less of it",
            presets=("quick",),
        ),
        mechanism(
            metric="weight_norm",
            arm="perp_grad",
            direction="lower",
            source=f"{PAPER}, section 4: naive loss minimisation scales the weights",
        ),
        mechanism(
            metric="margin",
            arm="perp_grad",
            direction="lower",
            source=f"{PAPER}, section 4: naive loss minimisation scales the logits",
        ),
        mechanism(
            metric="collapse_step",
            arm="softmax_float16",
            direction="lower",
            source=f"{PAPER}, section 3 and figure 2: it comes earlier in a coarser type",
        ),
        mechanism(
            metric="collapse_step",
            arm="softmax_float64",
            direction="higher",
            source=f"{PAPER}, section 3 and figure 2: it comes later in a finer type",
            note="in float64 it does not come within these steps",
        ),
        mechanism(
            metric="gradient_left",
            arm="baseline",
            versus=None,
            direction="lower",
            margin=1e-3,
            source=f"{PAPER}, section 3: collapse halts training",
            note="least gradient norm over that of the first step",
            presets=("quick",),
        ),
        mechanism(
            metric="fidelity",
            arm="baseline",
            versus="softmax_float64",
            direction="lower",
            margin=0.5,
            source=f"{PAPER}, section 3: collapsed samples lose the gradient through their own class",
            note="least cosine of the gradient with the one in float64 at the same weights",
            presets=("quick",),
        ),
        mechanism(
            metric="zero_loss",
            arm="stablemax",
            versus=None,
            direction="lower",
            source=f"{PAPER}, section 3: StableMax does not collapse",
            note="largest share of samples with a loss of exactly 0",
        ),
        mechanism(
            metric="gradient_left",
            arm="stablemax",
            direction="higher",
            scale="ratio",
            margin=10.0,
            source=f"{PAPER}, section 3: StableMax does not collapse",
        ),
        *(
            mechanism(
                metric="margin",
                arm=arm,
                direction="lower",
                source=f"{PAPER}, section 6: the known remedies keep the logits from growing",
            )
            for arm in ("weight_decay", "l1", "squared_error")
        ),
    ),
)
