"""Sample inputs that put poise.core under the workspace contract."""

from functools import partial

import torch
from torch import Tensor, nn

from poise.core import functional, gates
from poise.core.adapters.adapter import AdaptedLayer
from poise.core.adapters.lora import LoRADelta
from poise.core.adapters.low_rank import LowRankLinear, low_rank_factorize
from poise.core.adapters.low_rank_surgery import apply_low_rank
from poise.core.adapters.pela import (
    FeatureDistillation,
    WeightPerturbation,
    feature_distillation_loss,
    largest_weight_changes,
    weight_perturbation_loss,
)
from poise.core.adapters.sorsa import SorsaConfig, SorsaLinear, apply_sorsa, sorsa_parameters
from poise.core.adapters.sorsa_penalty import SorsaRegularizer, orthonormal_penalty
from poise.core.dynamics.grokking_stability.diagnostics import nlm_cosine, softmax_collapse_fraction, zero_loss_fraction
from poise.core.dynamics.grokking_stability.perp_grad import perp_grad_
from poise.core.dynamics.grokking_stability.stablemax import (
    StableMaxCrossEntropy,
    log_stablemax,
    stablemax,
    stablemax_cross_entropy,
)
from poise.core.labels.elr import ELRLoss, elr_regularizer
from poise.core.labels.elr_plus import ELRPlusLoss, ELRPlusTrainer
from poise.core.labels.mixing import Mix
from poise.core.labels.ps_kd import PSKDLoss, ps_kd_loss
from poise.core.labels.soft_targets import soft_cross_entropy
from poise.core.memory.ema import EMA
from poise.core.memory.features import FeatureBank
from poise.core.memory.samples import SampleBank
from poise.core.memory.storage import DenseRows, TopKRows
from poise.core.neighbors.search import nearest
from poise.core.testing import Sample, randn
from poise.core.weights.companding import WeightCompander, compand, compand_inverse
from poise.core.weights.conv_spectrum import conv_singular_values, orth_residuals
from poise.core.weights.orthogonal_conv import OrthogonalRegularizer, conv_orth_loss, kernel_orth_loss
from poise.core.weights.weight_compander import apply_weight_compander

ALL_MASKED = "a distribution without entries raises, which takes the values of the mask"
DISCRETE = "the forward pass is a step function; the gradient is that of the identity by definition"


def _mask(*shape: int) -> Tensor:
    """Two entries of every row at least, and not all."""
    columns = torch.arange(shape[-1]).expand(shape)
    lengths = 2 + torch.arange(shape[0]).view(-1, *[1] * (len(shape) - 1)) % (shape[-1] - 2)
    return columns < lengths


def _group_lasso(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return functional.group_lasso([[a, b], c], weights=[1.0, 0.5])


FUNCTIONAL = (
    Sample(name="functional/l1", build=lambda: functional.l1, inputs=lambda g: (randn(g, 4, 3),)),
    Sample(name="functional/squared_l2", build=lambda: functional.squared_l2, inputs=lambda g: (randn(g, 4, 3),)),
    Sample(name="functional/l2", build=lambda: partial(functional.l2, dim=-1), inputs=lambda g: (randn(g, 4, 3),)),
    Sample(
        name="functional/group_lasso",
        build=lambda: _group_lasso,
        inputs=lambda g: (randn(g, 3, 2), randn(g, 2, 4), randn(g, 5)),
        differentiable=(0, 1, 2),
    ),
    Sample(name="functional/hoyer_sparsity", build=lambda: functional.hoyer_sparsity, inputs=lambda g: (randn(g, 7),)),
    Sample(name="functional/hoyer_square", build=lambda: functional.hoyer_square, inputs=lambda g: (randn(g, 7),)),
    Sample(
        name="functional/nt_xent",
        build=lambda: functional.nt_xent,
        inputs=lambda g: (randn(g, 4, 3), randn(g, 4, 3)),
        differentiable=(0, 1),
    ),
    Sample(
        name="functional/focal_loss",
        build=lambda: partial(functional.focal_loss, gamma=5.0),
        inputs=lambda g: (randn(g, 4, 3), torch.tensor([0, 1, 2, 1])),
    ),
    Sample(
        name="functional/polarization",
        build=lambda: partial(functional.polarization, t=1.2),
        inputs=lambda g: (randn(g, 9).abs(),),
    ),
    Sample(
        name="functional/consensus", build=lambda: functional.consensus, inputs=lambda g: (randn(g, 6, 4).sigmoid(),)
    ),
    Sample(
        name="functional/nuclear_norm", build=lambda: functional.nuclear_norm, inputs=lambda g: (randn(g, 2, 5, 3),)
    ),
    Sample(
        name="functional/nuclear_norm_of_low_rank",
        build=lambda: lambda a, b: functional.nuclear_norm(a @ b),
        inputs=lambda g: (randn(g, 5, 2), randn(g, 2, 4)),
        differentiable=(0, 1),
    ),
    Sample(name="functional/stable_rank", build=lambda: functional.stable_rank, inputs=lambda g: (randn(g, 2, 5, 3),)),
    Sample(
        name="functional/effective_rank", build=lambda: functional.effective_rank, inputs=lambda g: (randn(g, 2, 5, 3),)
    ),
    Sample(
        name="functional/orthonormality",
        build=lambda: partial(functional.orthonormality, along="columns"),
        inputs=lambda g: (randn(g, 2, 5, 3),),
    ),
    Sample(
        name="functional/total_variation",
        build=lambda: functional.total_variation,
        inputs=lambda g: (randn(g, 2, 3, 5, 4),),
    ),
    Sample(
        name="functional/total_variation_of_volumes",
        build=lambda: partial(functional.total_variation, kind="vectorial", spacing=(0.5, 1.0, 2.0), reduction="none"),
        inputs=lambda g: (randn(g, 2, 2, 3, 3, 4),),
    ),
    Sample(name="functional/entropy", build=lambda: functional.entropy, inputs=lambda g: (randn(g, 4, 5),)),
    Sample(
        name="functional/entropy_of_masked",
        build=lambda: functional.entropy,
        inputs=lambda g: (randn(g, 4, 5), _mask(4, 5)),
        fake_cuda=False,
        reason=ALL_MASKED,
    ),
    Sample(
        name="functional/kl_divergence",
        build=lambda: functional.kl_divergence,
        inputs=lambda g: (randn(g, 4, 5), randn(g, 4, 5)),
        differentiable=(0, 1),
    ),
    Sample(
        name="functional/js_divergence",
        build=lambda: partial(functional.js_divergence, weights=(0.5, 0.2, 0.3)),
        inputs=lambda g: (randn(g, 4, 5), randn(g, 4, 5), randn(g, 4, 5)),
        differentiable=(0, 1, 2),
    ),
    Sample(
        name="functional/js_divergence_of_masked",
        build=lambda: lambda a, b, mask: functional.js_divergence(a, b, mask=mask),
        inputs=lambda g: (randn(g, 4, 5), randn(g, 4, 5), _mask(4, 5)),
        differentiable=(0, 1),
        fake_cuda=False,
        reason=ALL_MASKED,
    ),
    Sample(
        name="functional/cosine_alignment",
        build=lambda: functional.cosine_alignment,
        inputs=lambda g: (randn(g, 4, 2, 5), randn(g, 4, 2, 5)),
        differentiable=(0, 1),
    ),
    Sample(
        name="functional/cross_correlation",
        build=lambda: functional.cross_correlation,
        inputs=lambda g: (randn(g, 6, 3), randn(g, 6, 2)),
        differentiable=(0, 1),
    ),
    Sample(
        name="functional/decorrelation",
        build=lambda: functional.decorrelation,
        inputs=lambda g: (randn(g, 6, 4), randn(g, 6, 4)),
        differentiable=(0, 1),
    ),
    Sample(
        name="functional/decorrelation_of_few_samples",
        build=lambda: functional.decorrelation,
        inputs=lambda g: (randn(g, 4, 9),),
    ),
)

GATES = (
    Sample(
        name="gates/straight_through",
        build=lambda: lambda soft: gates.straight_through(torch.ones_like(soft), soft.sigmoid()),
        inputs=lambda g: (randn(g, 5),),
        differentiable=(),
        reason=DISCRETE,
    ),
    Sample(
        name="gates/binarize",
        build=lambda: gates.binarize,
        inputs=lambda g: (randn(g, 5),),
        differentiable=(),
        reason=DISCRETE,
    ),
    Sample(
        name="gates/round_through",
        build=lambda: gates.round_through,
        inputs=lambda g: (3 * randn(g, 5),),
        differentiable=(),
        reason=DISCRETE,
    ),
    Sample(
        name="gates/clamp_through",
        build=lambda: partial(gates.clamp_through, low=-0.5, high=0.5),
        inputs=lambda g: (randn(g, 5),),
        differentiable=(),
        reason=DISCRETE,
    ),
    Sample(
        name="gates/gumbel_softmax",
        build=lambda: lambda logits, noise: gates.gumbel_softmax(logits, 0.7, noise=noise),
        inputs=lambda g: (randn(g, 4, 3), randn(g, 4, 3)),
    ),
    Sample(
        name="gates/gumbel_softmax_drawn",
        build=lambda: partial(gates.gumbel_softmax, hard=True),
        inputs=lambda g: (randn(g, 4, 3),),
        differentiable=(),
        reason=DISCRETE,
    ),
    Sample(
        name="gates/gumbel_sigmoid",
        build=lambda: lambda logits, noise: gates.gumbel_sigmoid(logits, 0.7, noise=noise),
        inputs=lambda g: (randn(g, 4, 3), randn(g, 4, 3)),
    ),
    Sample(
        name="gates/hard_concrete",
        build=lambda: gates.HardConcrete((2, 3), keep=0.6, generator=torch.Generator().manual_seed(1)).double().eval(),
        inputs=lambda g: (),
        differentiable=(),
        parameters=True,
    ),
    Sample(
        name="gates/hard_concrete_drawn",
        build=lambda: gates.HardConcrete(6, generator=torch.Generator().manual_seed(1)).double(),
        inputs=lambda g: (),
        differentiable=(),
        parameters=True,
    ),
    Sample(
        name="gates/topk_mask",
        build=lambda: partial(gates.topk_mask, k=2),
        inputs=lambda g: (randn(g, 3, 5),),
        differentiable=(),
        reason="a mask has no gradient",
    ),
    Sample(
        name="gates/topk_gate",
        build=lambda: partial(gates.topk_gate, k=2),
        inputs=lambda g: (randn(g, 3, 5),),
        differentiable=(),
        reason=DISCRETE,
    ),
)


def _remember(bank: SampleBank, index: Tensor, rows: Tensor) -> Tensor:
    return bank.update(index, rows, momentum=0.7)


def _push(bank: FeatureBank, rows: Tensor) -> Tensor:
    bank.push(rows=rows)
    return bank["rows"]


def _follow(ema: EMA, model: nn.Module, x: Tensor) -> Tensor:
    ema.update(model)
    return ema(x)


def _averaged() -> partial[Tensor]:
    ema, model = (nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).double() for _ in range(2))
    return partial(_follow, EMA(ema, decay=0.5), model)


REMEMBERED = "what is remembered takes no part in autograd"

MEMORY = (
    Sample(
        name="memory/sample_bank",
        build=lambda: partial(_remember, SampleBank(9, 4), torch.tensor([5, 2, 5])),
        inputs=lambda g: (randn(g, 3, 4),),
        differentiable=(),
        reason=REMEMBERED,
    ),
    Sample(
        name="memory/sample_bank_top_k",
        build=lambda: partial(_remember, SampleBank(9, 4, storage=TopKRows(2)), torch.tensor([5, 2, 5])),
        inputs=lambda g: (randn(g, 3, 4).softmax(1),),
        differentiable=(),
        atol=1e-3,
        reason=REMEMBERED,
    ),
    Sample(
        name="memory/feature_bank",
        build=lambda: partial(_push, FeatureBank(5, rows=torch.zeros(4, dtype=torch.float64))),
        inputs=lambda g: (randn(g, 3, 4),),
        differentiable=(),
        reason=REMEMBERED,
    ),
    Sample(
        name="memory/ema",
        build=_averaged,
        inputs=lambda g: (randn(g, 5, 4),),
    ),
)

NEIGHBORS = (
    Sample(
        name="neighbors/nearest",
        build=lambda: partial(nearest, k=3),
        inputs=lambda g: (randn(g, 5, 4), randn(g, 60, 4)),
        differentiable=(),
        fake_cuda=False,
        reason="row numbers have no gradient, and whether the candidates are proven is decided on the host",
    ),
)


class OwningRegularizer(OrthogonalRegularizer):
    """Registers its model, which a regularizer otherwise leaves to its owner, so that the contract finds the weights."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.model = model


ORTHOGONAL_CONV = (
    Sample(
        name="orthogonal_conv/rows",
        build=lambda: conv_orth_loss,
        inputs=lambda g: (0.4 * randn(g, 4, 3, 3, 3),),
    ),
    Sample(
        name="orthogonal_conv/columns",
        build=lambda: partial(conv_orth_loss, stride=2, groups=2),
        inputs=lambda g: (0.4 * randn(g, 20, 2, 3, 3),),
    ),
    Sample(
        name="orthogonal_conv/volumes",
        build=lambda: partial(conv_orth_loss, stride=(1, 2, 1), dilation=(2, 1, 1), squared=False),
        inputs=lambda g: (0.4 * randn(g, 4, 2, 2, 3, 1),),
    ),
    Sample(name="orthogonal_conv/kernel", build=lambda: kernel_orth_loss, inputs=lambda g: (randn(g, 6, 2, 3),)),
    Sample(
        name="orthogonal_conv/spectrum",
        build=lambda: partial(conv_singular_values, input_size=(6, 4), stride=2),
        inputs=lambda g: (randn(g, 5, 2, 3, 3),),
    ),
    Sample(
        name="orthogonal_conv/residuals",
        build=lambda: partial(orth_residuals, input_size=5),
        inputs=lambda g: (randn(g, 4, 2, 3, 3),),
    ),
    Sample(
        name="orthogonal_conv/regularizer",
        build=lambda: OwningRegularizer(
            nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Conv2d(3, 6, 3, groups=3, stride=2)).double()
        ),
        inputs=lambda g: (),
        differentiable=(),
        parameters=True,
    ),
)


DIAGNOSTIC = "counts what rounding makes equal, which has no gradient"
CLASSES = torch.tensor([2, 0, 1, 2])


def _perpendicular(weights: Tensor, gradients: Tensor, bias: Tensor) -> list[Tensor | None]:
    params = [weights.detach().clone(), bias.detach().clone(), bias.detach().clone()]
    params[0].grad, params[1].grad = gradients.detach().clone(), gradients.detach()[0].clone()
    perp_grad_(params)
    return [param.grad for param in params[:2]]


GROKKING_STABILITY = (
    Sample(name="grokking_stability/stablemax", build=lambda: stablemax, inputs=lambda g: (3 * randn(g, 4, 3),)),
    Sample(
        name="grokking_stability/log_stablemax",
        build=lambda: partial(log_stablemax, dim=0),
        inputs=lambda g: (3 * randn(g, 4, 3),),
    ),
    Sample(
        name="grokking_stability/cross_entropy",
        build=lambda: partial(stablemax_cross_entropy, reduction="none", ignore_index=1),
        inputs=lambda g: (3 * randn(g, 4, 3), CLASSES),
    ),
    Sample(
        name="grokking_stability/module",
        build=lambda: StableMaxCrossEntropy(label_smoothing=0.1),
        inputs=lambda g: (3 * randn(g, 4, 3), CLASSES),
    ),
    Sample(
        name="grokking_stability/perp_grad",
        build=lambda: _perpendicular,
        inputs=lambda g: (randn(g, 4, 3), randn(g, 4, 3), randn(g, 3)),
        differentiable=(),
        reason="changes gradients, and has none itself",
    ),
    Sample(
        name="grokking_stability/nlm_cosine",
        build=lambda: lambda w, b, gw, gb: nlm_cosine([w, b], [gw, gb], per_layer=True),
        inputs=lambda g: (randn(g, 4, 3), randn(g, 3), randn(g, 4, 3), randn(g, 3)),
        differentiable=(),
        reason="a diagnostic, without a gradient",
    ),
    Sample(
        name="grokking_stability/softmax_collapse_fraction",
        build=lambda: softmax_collapse_fraction,
        inputs=lambda g: (20 * randn(g, 8, 3),),
        differentiable=(),
        reason=DIAGNOSTIC,
    ),
    Sample(
        name="grokking_stability/zero_loss_fraction",
        build=lambda: zero_loss_fraction,
        inputs=lambda g: (randn(g, 8).relu(),),
        differentiable=(),
        reason=DIAGNOSTIC,
    ),
)

ELR_INDEX = torch.tensor([5, 0, 2, 6])
ELR_LABELS = torch.tensor([0, 2, 1, 1])
ELR_MIX = Mix(torch.tensor([2, 0, 3, 1]), 0.7)
MOVING_TARGET = "no gradient is to flow through the target, which the prediction or the input has moved before"


def _bank(*shape: int) -> SampleBank:
    return SampleBank(7, shape, storage=DenseRows(torch.float64))


def _elr_with_memory() -> ELRLoss:
    loss = ELRLoss(7, 3, memory=_bank(3))
    loss.memory.write(torch.arange(7), 0.8 * torch.randn(7, 3).softmax(1))
    return loss


def _elr_plus(
    loss: ELRPlusLoss, index: Tensor, mix: Mix, logits: Tensor, teacher: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    target = loss.update_targets(index, teacher, mix)
    return target, loss(logits, mix(labels), target, step=20)


def _elr_plus_pair() -> partial[Tensor]:
    trainer = ELRPlusTrainer(
        lambda: nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3)), 7, 3, make_memory=partial(_bank, 3)
    ).double()
    return partial(_elr_plus_loss, trainer, ELR_MIX, ELR_LABELS, ELR_INDEX)


def _elr_plus_loss(trainer: ELRPlusTrainer, mix: Mix, labels: Tensor, index: Tensor, x: Tensor) -> Tensor:
    return trainer.loss(0, x, labels, index, mix)


ELR = (
    Sample(
        name="elr/regularizer",
        build=lambda: elr_regularizer,
        inputs=lambda g: (randn(g, 4, 3).softmax(1), 0.7 * randn(g, 4, 3).softmax(1)),
    ),
    Sample(
        name="elr/loss",
        build=_elr_with_memory,
        inputs=lambda g: (randn(g, 4, 3), ELR_LABELS, ELR_INDEX),
        differentiable=(),
        reason=MOVING_TARGET,
    ),
    Sample(
        name="elr/loss_in_evaluation_mode",
        build=lambda: _elr_with_memory().eval(),
        inputs=lambda g: (randn(g, 4, 3), ELR_LABELS, ELR_INDEX),
    ),
    Sample(
        name="elr/loss_of_top_k",
        build=lambda: ELRLoss(7, 5, memory=SampleBank(7, 5, storage=TopKRows(2))),
        inputs=lambda g: (randn(g, 4, 5), ELR_LABELS, ELR_INDEX),
        differentiable=(),
        atol=1e-3,
        reason="the target jumps where the order of two probabilities changes, and is rounded",
    ),
    Sample(
        name="elr/plus",
        build=lambda: partial(
            _elr_plus, ELRPlusLoss(7, 3, ramp_steps=50, refine_labels=True, memory=_bank(3)), ELR_INDEX, ELR_MIX
        ),
        inputs=lambda g: (randn(g, 4, 3), randn(g, 4, 3), randn(g, 4, 3).softmax(-1)),
        differentiable=(0, 2),
    ),
    Sample(
        name="elr/two_networks",
        build=_elr_plus_pair,
        inputs=lambda g: (randn(g, 4, 5),),
        differentiable=(),
        reason=MOVING_TARGET,
    ),
    Sample(
        name="elr/soft_cross_entropy",
        build=lambda: soft_cross_entropy,
        inputs=lambda g: (randn(g, 4, 3, 2), randn(g, 4, 3, 2).softmax(1)),
        differentiable=(0, 1),
    ),
)


def _ps_kd(epoch: int, *shape: int, **options: float) -> PSKDLoss:
    loss = PSKDLoss(7, shape if len(shape) > 1 else shape[0], 0.8, 4, memory=_bank(*shape), **options)
    loss.memory.write(torch.arange(6), torch.randn(6, *shape).softmax(1))
    loss.set_epoch(epoch)
    return loss


def _mixed(loss: PSKDLoss, mix: Mix, logits: Tensor, labels: Tensor, index: Tensor) -> Tensor:
    return loss(logits, labels, index, mix=mix)


PS_KD = (
    Sample(
        name="ps_kd/loss",
        build=lambda: _ps_kd(2, 3, label_smoothing=0.1),
        inputs=lambda g: (randn(g, 4, 3), ELR_LABELS, ELR_INDEX),
    ),
    Sample(
        name="ps_kd/first_epoch",
        build=lambda: _ps_kd(0, 3),
        inputs=lambda g: (randn(g, 4, 3), ELR_LABELS, ELR_INDEX),
    ),
    Sample(
        name="ps_kd/mixed",
        build=lambda: partial(_mixed, _ps_kd(2, 3), ELR_MIX),
        inputs=lambda g: (randn(g, 4, 3), ELR_LABELS, ELR_INDEX),
    ),
    Sample(
        name="ps_kd/pixels",
        build=lambda: _ps_kd(3, 3, 2, 2),
        inputs=lambda g: (randn(g, 4, 3, 2, 2), torch.arange(16).view(4, 2, 2) % 3, ELR_INDEX),
    ),
    Sample(
        name="ps_kd/tokens",
        build=lambda: lambda logits, words, past: ps_kd_loss(logits, words, past, 0.4, ignore_index=0, dim=-1),
        inputs=lambda g: (randn(g, 2, 3, 4), torch.tensor([[1, 3, 0], [2, 0, 0]]), randn(g, 2, 3, 4).softmax(-1)),
    ),
)


class OwningPerturbation(WeightPerturbation):
    """Registers both networks, which the penalty otherwise leaves to their owner, so that the contract finds the weights."""

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        super().__init__(student, teacher, weight=0.5, eps=0.1)
        self.student, self.teacher = student, teacher.requires_grad_(False)


def _owning_perturbation() -> OwningPerturbation:
    teacher = nn.ModuleDict(
        {"layers": nn.Sequential(nn.Linear(6, 10), nn.Linear(10, 12)), "attention": nn.MultiheadAttention(12, 2)}
    )
    return OwningPerturbation(apply_low_rank(teacher.double(), 2).model, teacher.double())


def _product(weight: Tensor, generator: torch.Generator | None = None, method: str = "svd") -> Tensor:
    w1, w2 = low_rank_factorize(weight, 2, method, generator=generator)
    return w2 @ w1


FINITE = "looks for entries that are not finite, on the way to a decomposition"

PELA = (
    Sample(
        name="pela/factorize",
        build=lambda: _product,
        inputs=lambda g: (randn(g, 6, 5),),
        differentiable=(),
        compile=False,
        fake_cuda=False,
        reason=f"an initialisation, without a gradient; {FINITE}",
    ),
    Sample(
        name="pela/factorize_randomized",
        build=lambda: partial(_product, method="randomized"),
        inputs=lambda g: (randn(g, 14, 13), g),
        differentiable=(),
        compile=False,
        fake_cuda=False,
        reason=f"an initialisation, without a gradient; {FINITE}",
    ),
    Sample(
        name="pela/layer",
        build=lambda: LowRankLinear(5, 6, 2, dtype=torch.float64),
        inputs=lambda g: (randn(g, 2, 3, 5),),
        parameters=True,
    ),
    Sample(
        name="pela/features",
        build=lambda: lambda a, b, c, d: feature_distillation_loss([a, b], [c, d]),
        inputs=lambda g: (randn(g, 3, 4), randn(g, 2, 5), randn(g, 3, 4), randn(g, 2, 5)),
        differentiable=(0, 1),
    ),
    Sample(
        name="pela/features_penalty",
        build=lambda: FeatureDistillation(weight=0.3),
        inputs=lambda g: ([randn(g, 3, 4), randn(g, 2, 5)], [randn(g, 3, 4), randn(g, 2, 5)]),
        differentiable=(),
        reason="takes lists; the gradient is that of the function, which is checked",
    ),
    Sample(
        name="pela/largest_changes",
        build=lambda: lambda a, b, c, d, e, f: largest_weight_changes([(a, b, c), (d, e, f)]),
        inputs=lambda g: (
            randn(g, 2, 5),
            randn(g, 6, 2),
            randn(g, 6, 5),
            randn(g, 3, 4),
            randn(g, 7, 3),
            randn(g, 7, 4),
        ),
        differentiable=(0, 1, 3, 4),
    ),
    Sample(
        name="pela/perturbation",
        build=lambda: lambda a, b, c, d, e, f: weight_perturbation_loss([(a, b, c), (d, e, f)], eps=0.2),
        inputs=lambda g: (
            randn(g, 2, 5),
            randn(g, 6, 2),
            randn(g, 6, 5),
            randn(g, 2, 5),
            randn(g, 6, 2),
            randn(g, 6, 5),
        ),
        differentiable=(0, 1, 3, 4),
    ),
    Sample(
        name="pela/perturbation_penalty",
        build=_owning_perturbation,
        inputs=lambda g: (),
        differentiable=(),
        parameters=True,
    ),
)
WEIGHT_COMPANDER = (
    Sample(
        name="weight_compander/compand",
        build=lambda: compand,
        inputs=lambda g: (randn(g, 4, 3), randn(g, 1).abs() + 0.5, randn(g, 4, 1).abs() + 0.5),
        differentiable=(0, 1, 2),
    ),
    Sample(
        name="weight_compander/erf",
        build=lambda: partial(compand, a=0.7, b=0.5, kind="erf"),
        inputs=lambda g: (randn(g, 4, 3),),
    ),
    Sample(
        name="weight_compander/inverse",
        build=lambda: compand_inverse,
        inputs=lambda g: (randn(g, 4, 3).tanh(), randn(g, 1).abs() + 1.0, randn(g, 4, 1).abs() + 0.5),
        differentiable=(0, 1, 2),
        compile=False,
        fake_cuda=False,
        reason="whether every weight is below its bound is decided on the host",
    ),
    Sample(
        name="weight_compander/parametrization",
        build=lambda: WeightCompander(0.8, 0.5, kind="tanh").double(),
        inputs=lambda g: (randn(g, 4, 3),),
        parameters=True,
    ),
    Sample(
        name="weight_compander/network",
        build=lambda: apply_weight_compander(
            nn.Sequential(nn.Conv1d(2, 3, 3), nn.ReLU(), nn.ConvTranspose1d(3, 2, 3)).double(), per_channel=True
        ),
        inputs=lambda g: (randn(g, 2, 2, 6),),
        parameters=True,
    ),
)


def _tuned(model: nn.Module) -> nn.Module:
    """With factors away from where they start, at which the penalty has a kink."""
    with torch.no_grad():
        for factor in sorsa_parameters(model):
            factor.add_(0.2 * torch.randn_like(factor))
    return model


def _lora_layer(layer: nn.Module) -> AdaptedLayer:
    adapted = AdaptedLayer(layer.requires_grad_(False))
    delta = LoRADelta(layer, 2, alpha=4.0)
    nn.init.normal_(delta.b)
    adapted.add("default", delta)
    return adapted


class OwningSorsaRegularizer(SorsaRegularizer):
    """Registers its model, which a regularizer otherwise leaves to its owner, so that the contract finds the weights."""

    def __init__(self, squared: bool = False) -> None:
        model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 5))
        super().__init__(_tuned(apply_sorsa(model, SorsaConfig(r=2))), 0.1, lr=0.5, squared=squared)
        self.owned = model


SORSA = (
    Sample(
        name="sorsa/linear",
        build=lambda: _tuned(SorsaLinear(nn.Linear(6, 5), 3)),
        inputs=lambda g: (randn(g, 2, 6),),
        parameters=True,
    ),
    Sample(
        name="sorsa/convolution",
        build=lambda: _tuned(SorsaLinear(nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), 3, alpha=6.0)),
        inputs=lambda g: (randn(g, 2, 4, 5, 5),),
        parameters=True,
    ),
    Sample(
        name="lora/linear",
        build=lambda: _lora_layer(nn.Linear(6, 5)),
        inputs=lambda g: (randn(g, 2, 6),),
        parameters=True,
    ),
    Sample(
        name="sorsa/orthonormal_penalty",
        build=lambda: partial(orthonormal_penalty, dim="rows"),
        inputs=lambda g: (0.5 * randn(g, 2, 3, 6),),
    ),
    *(
        Sample(
            name=f"sorsa/regularizer_{name}",
            build=partial(OwningSorsaRegularizer, squared),
            inputs=lambda g: (),
            differentiable=(),
            parameters=True,
        )
        for name, squared in (("norm", False), ("squared", True))
    ),
)


SAMPLES = (
    *FUNCTIONAL,
    *GATES,
    *MEMORY,
    *NEIGHBORS,
    *ORTHOGONAL_CONV,
    *GROKKING_STABILITY,
    *ELR,
    *PS_KD,
    *PELA,
    *WEIGHT_COMPANDER,
    *SORSA,
)
