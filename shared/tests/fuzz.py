"""How every public name of poise.core is called under changed arguments, or why it is not."""

from functools import partial

import torch
from torch import Tensor, nn

from poise.core import functional, gates, gpu, schedule
from poise.core.adapters.low_rank import low_rank_factorize, rank_for_ratio
from poise.core.adapters.singular_change import singular_change
from poise.core.adapters.svd import truncated_svd
from poise.core.dynamics.grokking_stability.networks import algorithmic_mlp
from poise.core.dynamics.grokking_stability.perp_grad import PerpGrad, perp_grad_
from poise.core.dynamics.grokking_stability.tasks import ModularArithmetic, SparseParity
from poise.core.labels.calibration import aurc, eaurc, expected_calibration_error, negative_log_likelihood
from poise.core.labels.elr import detect_label_errors
from poise.core.labels.elr_plus import WeightAverage, sigmoid_rampup
from poise.core.labels.mixing import Mix, draw_mix
from poise.core.labels.noise import asymmetric_noise, confusions, next_in_group, symmetric_noise
from poise.core.labels.ps_kd import progressive_alpha, ps_kd_loss
from poise.core.labels.ps_kd_teacher import PreviousModelTeacher
from poise.core.labels.soft_targets import soft_labels
from poise.core.memory.ema import RampedDecay
from poise.core.memory.gather import gather_rows
from poise.core.memory.samples import SampleBank
from poise.core.neighbors.search import Neighbors
from poise.core.penalty import Penalties, Penalty
from poise.core.testing import Exempt, Fuzz, randn, sampled, valid
from poise.core.weights.companding import compand, compand_inverse
from poise.core.weights.conv_geometry import ConvGeometry, orthogonal_exists, orthogonal_obstacle
from poise.core.weights.conv_spectrum import conv_as_matrix, conv_singular_values, orth_residuals
from poise.core.weights.orthogonal_conv import conv_orth_loss, orthogonal_conv_init_

RECORD = Exempt("a record of what was found; it computes nothing")
SURGERY = Exempt("takes a model and settings, no tensors")
FILE = Exempt("reads or writes a file")
BASE = Exempt("a base class; its subclasses are called")
LOOP = Exempt("drives the training of models; the losses in it are called by themselves")
MACHINE = Exempt("is about the machine, not about tensors")

MASKED = "what the mask leaves out takes no part"
ROUNDED = "a step function: what is not a number lies on neither side of the step"
INTEGERS = "PyTorch has no parameters of integers"
COUNTED = "a count of comparisons, which are false for what is not a number"
TWICE = "of a row that is written twice the last value counts"
CLASS = "whether a label is one of fewer classes is known on the device only; PyTorch says so there"
IGNORED = "one label says that its row does not count"
GIVEN = "what the given function says about shapes is its own"
OVERFLOWS = "the fourth power of a huge number is infinite"

LABELS = torch.tensor([0, 2, 1, 1])


def _probs(generator: torch.Generator) -> tuple[Tensor, ...]:
    return randn(generator, 4, 3).softmax(1), LABELS


def _labels(generator: torch.Generator) -> Tensor:
    return torch.randint(3, (8,), generator=generator)


def _mixed(partner: Tensor, share: float, rows: Tensor) -> Tensor:
    return Mix(partner, share)(rows)


def _errors(labels: Tensor) -> Tensor:
    memory = SampleBank(4, 3)
    memory.write(torch.arange(4), torch.eye(4, 3) * 0.8)
    return detect_label_errors(memory, labels).corrected


def _sum_of_terms(x: Tensor) -> Tensor:
    class Energy(Penalty):
        def penalty(self, x: Tensor) -> Tensor:
            return x.square().sum()

    return Penalties(energy=Energy(0.5))(energy=x)


def _taught(teacher: PreviousModelTeacher, model: nn.Module, x: Tensor) -> Tensor | None:
    teacher.update(model)
    return teacher(x)


def _parameter(weights: Tensor) -> nn.Parameter:
    """With a gradient that is neither parallel nor perpendicular to it."""
    parameter = nn.Parameter(weights.detach().clone())
    parameter.grad = weights.detach().flip(0) + 0.1 * weights.detach()
    return parameter


def _step(weights: Tensor) -> Tensor:
    parameter = _parameter(weights)
    PerpGrad(torch.optim.SGD([parameter], lr=0.1)).step()
    return parameter.detach()


def _perpendicular(weights: Tensor) -> Tensor | None:
    parameter = _parameter(weights)
    perp_grad_([parameter])
    return parameter.grad


FUNCTIONAL: dict[str, Fuzz | Exempt] = {
    "functional.cosine_alignment": sampled("functional/cosine_alignment"),
    "functional.cross_correlation": sampled("functional/cross_correlation"),
    "functional.decorrelation": sampled("functional/decorrelation"),
    "functional.nt_xent": valid(
        lambda: functional.nt_xent, lambda g: (randn(g, 4, 3), randn(g, 4, 3), 0.5), differentiable=(0, 1)
    ),
    "functional.entropy": sampled("functional/entropy_of_masked", nan=MASKED),
    "functional.js_divergence": sampled("functional/js_divergence"),
    "functional.kl_divergence": sampled("functional/kl_divergence"),
    "functional.focal_loss": valid(
        lambda: functional.focal_loss,
        lambda g: (randn(g, 4, 3), LABELS, 2.0, 0.5),
        differentiable=(0,),
        shortened=CLASS,
    ),
    "functional.consensus": sampled("functional/consensus"),
    "functional.group_lasso": sampled("functional/group_lasso"),
    "functional.group_norms": valid(
        lambda: lambda a, b: functional.group_norms([a, [a, b]]), lambda g: (randn(g, 3, 2), randn(g, 4)), (0, 1)
    ),
    "functional.hoyer_sparsity": sampled("functional/hoyer_sparsity"),
    "functional.hoyer_square": sampled("functional/hoyer_square"),
    "functional.l1": sampled("functional/l1"),
    "functional.l2": sampled("functional/l2"),
    "functional.polarization": valid(lambda: functional.polarization, lambda g: (randn(g, 9).abs(), 1.2, 1), (0,)),
    "functional.squared_l2": sampled("functional/squared_l2"),
    "functional.effective_rank": sampled("functional/effective_rank"),
    "functional.nuclear_norm": sampled("functional/nuclear_norm"),
    "functional.orthonormality": sampled("functional/orthonormality"),
    "functional.stable_rank": sampled("functional/stable_rank"),
    "functional.total_variation": valid(
        lambda: lambda x, spacing: functional.total_variation(x, spacing=spacing),
        lambda g: (randn(g, 2, 3, 5, 4), 0.5),
        differentiable=(0,),
    ),
}

GATES: dict[str, Fuzz | Exempt] = {
    "gates.straight_through": valid(
        lambda: gates.straight_through, lambda g: (randn(g, 4, 3).round(), randn(g, 4, 3)), differentiable=(1,)
    ),
    "gates.binarize": valid(lambda: gates.binarize, lambda g: (randn(g, 4, 3), 0.5), (0,)),
    "gates.round_through": sampled("gates/round_through"),
    "gates.clamp_through": valid(lambda: gates.clamp_through, lambda g: (randn(g, 4, 3), -0.5, 0.5), (0,)),
    "gates.gumbel_noise": valid(lambda: gates.gumbel_noise, lambda g: (randn(g, 4, 3), g), nan="only the shape counts"),
    "gates.logistic_noise": valid(
        lambda: gates.logistic_noise, lambda g: (randn(g, 4, 3), g), nan="only the shape counts"
    ),
    "gates.gumbel_softmax": valid(
        lambda: lambda logits, noise, temperature: gates.gumbel_softmax(logits, temperature, noise=noise),
        lambda g: (randn(g, 4, 3), randn(g, 4, 3), 0.7),
        differentiable=(0,),
    ),
    "gates.gumbel_sigmoid": valid(
        lambda: lambda logits, noise, temperature: gates.gumbel_sigmoid(logits, temperature, noise=noise),
        lambda g: (randn(g, 4, 3), randn(g, 4, 3), 0.7),
        differentiable=(0,),
    ),
    "gates.HardConcrete": valid(
        lambda: lambda shape, noise: gates.HardConcrete(shape).double()((4,), noise=noise),
        lambda g: (3, randn(g, 4, 3)),
    ),
    "gates.topk_mask": valid(lambda: gates.topk_mask, lambda g: (randn(g, 3, 5), 2)),
    "gates.topk_masks": valid(
        lambda: lambda a, b, k: gates.topk_masks([a, b], k), lambda g: (randn(g, 3, 5), randn(g, 4), 6)
    ),
    "gates.topk_gate": valid(lambda: gates.topk_gate, lambda g: (randn(g, 3, 5), 2), (0,)),
}

STEP = 3
OTHERS: dict[str, Fuzz | Exempt] = {
    "schedule.Constant": valid(lambda: lambda value, step: schedule.Constant(value)(step), lambda g: (0.5, STEP)),
    "schedule.Linear": valid(
        lambda: lambda start, end, steps, delay, step: schedule.Linear(start, end, steps, delay)(step),
        lambda g: (0.5, 1.5, 10, 1, STEP),
    ),
    "schedule.Cosine": valid(
        lambda: lambda start, end, steps, delay, step: schedule.Cosine(start, end, steps, delay)(step),
        lambda g: (0.5, 1.5, 10, 1, STEP),
    ),
    "schedule.GaussianRamp": valid(
        lambda: lambda end, steps, step: schedule.GaussianRamp(end, steps)(step), lambda g: (1.5, 10, STEP)
    ),
    "schedule.Exponential": valid(
        lambda: lambda start, decay, floor, step: schedule.Exponential(start, decay, floor)(step),
        lambda g: (0.5, 0.9, 0.1, STEP),
    ),
    "schedule.Piecewise": valid(
        lambda: lambda boundary, low, high, step: schedule.Piecewise((boundary,), (low, high))(step),
        lambda g: (2, 0.5, 1.5, STEP),
    ),
    "gpu.Precision": MACHINE,
    "gpu.StepTimer": MACHINE,
    "gpu.chunked_map": valid(
        lambda: lambda x, y, chunk: gpu.chunked_map(torch.add, x, y, chunk=chunk),
        lambda g: (randn(g, 5, 3), randn(g, 5, 3), 2),
        shortened=GIVEN,
        reranked=GIVEN,
    ),
    "gpu.derive_generator": valid(
        lambda: lambda seed: gpu.derive_generator(seed, "data").initial_seed(), lambda g: (3,)
    ),
    "gpu.deterministic": MACHINE,
    "gpu.is_out_of_memory": MACHINE,
    "gpu.peak_memory": MACHINE,
    "gpu.pick_device": MACHINE,
    "gpu.pick_precision": MACHINE,
    "gpu.prefetch": MACHINE,
    "gpu.seed_everything": MACHINE,
    "gpu.seed_worker": MACHINE,
    "gpu.tiled_apply": valid(
        lambda: lambda image, tile, overlap: gpu.tiled_apply(lambda x: 2 * x, image, tile, overlap),
        lambda g: (randn(g, 2, 3, 7, 6), 4, 1),
    ),
    "data": Exempt("reads the data that packages bundle"),
}

ADAPTERS: dict[str, Fuzz | Exempt] = {
    "AdaptedLayer": sampled("lora/linear"),
    "Adapters": SURGERY,
    "Delta": BASE,
    "LoRAConfig": RECORD,
    "LoRADelta": sampled("lora/linear"),
    "LowRankDelta": BASE,
    "LowRankLinear": sampled("pela/layer"),
    "LowRankModel": RECORD,
    "LowRankReport": RECORD,
    "FeatureDistillation": sampled("pela/features_penalty"),
    "WeightPerturbation": sampled("pela/perturbation_penalty"),
    "feature_distillation_loss": sampled("pela/features"),
    "largest_weight_changes": sampled("pela/largest_changes"),
    "weight_perturbation_loss": sampled("pela/perturbation"),
    "PelaOutput": RECORD,
    "PelaTrainer": LOOP,
    "SingularChange": RECORD,
    "singular_change": valid(lambda: singular_change, lambda g: (randn(g, 5, 4), randn(g, 5, 4), 3)),
    "SorsaConfig": RECORD,
    "SorsaDelta": sampled("sorsa/linear"),
    "SorsaLinear": sampled("sorsa/linear"),
    "SorsaRegularizer": sampled("sorsa/regularizer_norm"),
    "adapted_layers": SURGERY,
    "apply_lora": SURGERY,
    "apply_low_rank": SURGERY,
    "apply_sorsa": SURGERY,
    "attach_adapters": SURGERY,
    "find_targets": SURGERY,
    "load_adapter": FILE,
    "load_peft_lora": FILE,
    "low_rank_factorize": valid(lambda: low_rank_factorize, lambda g: (randn(g, 6, 5), 2)),
    "merge_sorsa": SURGERY,
    "orthonormal_penalty": sampled("sorsa/orthonormal_penalty"),
    "rank_for_ratio": valid(lambda: rank_for_ratio, lambda g: (8, 6, 0.5)),
    "read_sorsa_lora_config": FILE,
    "save_adapter": FILE,
    "save_peft_lora": FILE,
    "sorsa_lora_config": SURGERY,
    "sorsa_parameters": SURGERY,
    "sorsa_penalty": sampled("sorsa/regularizer_norm"),
    "truncated_svd": valid(lambda: truncated_svd, lambda g: (randn(g, 6, 5), 2)),
}

DYNAMICS: dict[str, Fuzz | Exempt] = {
    "ModularArithmetic": valid(lambda: lambda p, start: ModularArithmetic(p, start=start).table(), lambda g: (5, 0)),
    "OptimizerWrapper": BASE,
    "PerpGrad": valid(lambda: _step, lambda g: (randn(g, 4, 3),), retyped=INTEGERS),
    "SparseParity": valid(
        lambda: lambda parity, noise, samples, g: SparseParity(parity, noise, samples).draw(g), lambda g: (3, 4, 9, g)
    ),
    "StableMaxCrossEntropy": sampled("grokking_stability/module", shortened=CLASS),
    "algorithmic_mlp": valid(
        lambda: lambda inputs, outputs, x: algorithmic_mlp(inputs, outputs, (4,)).to(x.dtype)(x),
        lambda g: (5, 3, randn(g, 4, 5)),
        retyped=INTEGERS,
    ),
    "log_stablemax": sampled("grokking_stability/log_stablemax"),
    "nlm_cosine": sampled("grokking_stability/nlm_cosine"),
    "perp_grad_": valid(lambda: _perpendicular, lambda g: (randn(g, 4, 3),), retyped=INTEGERS),
    "softmax_collapse_fraction": sampled("grokking_stability/softmax_collapse_fraction", nan=COUNTED),
    "stablemax": sampled("grokking_stability/stablemax"),
    "stablemax_cross_entropy": sampled("grokking_stability/cross_entropy", nan=IGNORED, shortened=CLASS),
    "zero_loss_fraction": sampled("grokking_stability/zero_loss_fraction", nan=COUNTED),
}

LABELLED: dict[str, Fuzz | Exempt] = {
    "CIFAR10_CONFUSIONS": RECORD,
    "ELRLoss": sampled("elr/loss"),
    "ELRPlusLoss": sampled("elr/plus"),
    "ELRPlusTrainer": sampled("elr/two_networks"),
    "IndexedDataset": SURGERY,
    "LabelErrors": RECORD,
    "Mix": valid(lambda: _mixed, lambda g: (torch.tensor([2, 0, 3, 1]), 0.7, randn(g, 4, 3))),
    "PSKDDetector": LOOP,
    "PSKDLoss": sampled("ps_kd/loss"),
    "PSKDTrainer": LOOP,
    "PreviousModelTeacher": valid(
        lambda: partial(_taught, PreviousModelTeacher(nn.Linear(5, 3)), nn.Linear(5, 3)), lambda g: (randn(g, 4, 5),)
    ),
    "WeightAverage": valid(lambda: WeightAverage(nn.Linear(5, 3).double()), lambda g: (randn(g, 4, 5),)),
    "asymmetric_noise": valid(lambda: asymmetric_noise, lambda g: (_labels(g), 0.4, torch.tensor([1, 2, 0]), g)),
    "aurc": valid(lambda: aurc, _probs),
    "confusions": valid(lambda: lambda one, two, classes: confusions({one: two}, classes), lambda g: (1, 2, 4)),
    "detect_label_errors": valid(lambda: _errors, lambda g: (LABELS,)),
    "draw_mix": valid(lambda: draw_mix, lambda g: (4, 0.5, g)),
    "eaurc": valid(lambda: eaurc, _probs),
    "elr_regularizer": sampled("elr/regularizer", huge="probabilities are at most 1"),
    "expected_calibration_error": valid(
        lambda: lambda probs, labels, bins: expected_calibration_error(probs, labels, bins=bins),
        lambda g: (*_probs(g), 5),
    ),
    "negative_log_likelihood": valid(lambda: negative_log_likelihood, _probs, shortened=CLASS),
    "next_in_group": valid(lambda: next_in_group, lambda g: (10, 5)),
    "progressive_alpha": valid(lambda: progressive_alpha, lambda g: (0.8, 2, 10)),
    "ps_kd_loss": valid(lambda: ps_kd_loss, lambda g: (randn(g, 4, 3), LABELS, randn(g, 4, 3).softmax(1), 0.4), (0,)),
    "sigmoid_rampup": valid(lambda: sigmoid_rampup, lambda g: (3, 10)),
    "soft_cross_entropy": sampled("elr/soft_cross_entropy"),
    "soft_labels": valid(lambda: soft_labels, lambda g: (LABELS, 3)),
    "symmetric_noise": valid(lambda: symmetric_noise, lambda g: (_labels(g), 0.4, 3, g)),
}

MEMORY: dict[str, Fuzz | Exempt] = {
    "EMA": sampled("memory/ema"),
    "FeatureBank": sampled("memory/feature_bank"),
    "DenseRows": sampled("memory/sample_bank", nan=TWICE),
    "FrozenGuard": SURGERY,
    "Nearest": RECORD,
    "Neighbors": valid(
        lambda: lambda queries, data, k: Neighbors(data).query(queries, k),
        lambda g: (randn(g, 5, 4), randn(g, 20, 4), 3),
    ),
    "RampedDecay": valid(lambda: lambda decay, step: RampedDecay(decay)(step), lambda g: (0.9, 4)),
    "SampleBank": sampled("memory/sample_bank", nan=TWICE),
    "TopKRows": sampled("memory/sample_bank_top_k", nan=TWICE),
    "gather_rows": valid(lambda: gather_rows, lambda g: (randn(g, 4, 3), LABELS)),
    "match_modules": SURGERY,
    "nearest": sampled("neighbors/nearest"),
    "recalibrate_batchnorm": SURGERY,
    "Penalties": valid(lambda: _sum_of_terms, lambda g: (randn(g, 4, 3),), (0,)),
    "Penalty": BASE,
    "Taps": SURGERY,
}

GEOMETRY = (4, 3, 3, 1)

WEIGHTS: dict[str, Fuzz | Exempt] = {
    "CompandedWeight": RECORD,
    "ConvGeometry": valid(lambda: lambda o, i, k, s: ConvGeometry(o, i, (k, k), (s, s)), lambda g: GEOMETRY),
    "LayerOrthogonality": RECORD,
    "OrthogonalRegularizer": sampled("orthogonal_conv/regularizer"),
    "OrthogonalityWarning": RECORD,
    "WeightCompander": sampled("weight_compander/parametrization"),
    "apply_weight_compander": SURGERY,
    "compand": valid(lambda: compand, lambda g: (randn(g, 4, 3), 0.8, 0.5), (0,)),
    "compand_inverse": valid(lambda: compand_inverse, lambda g: (randn(g, 4, 3).tanh(), 1.2, 0.8), (0,)),
    "compander_report": SURGERY,
    "conv_as_matrix": valid(lambda: lambda size: conv_as_matrix(nn.Conv2d(2, 3, 3), size), lambda g: (4,)),
    "conv_orth_loss": valid(lambda: conv_orth_loss, lambda g: (randn(g, 4, 3, 3, 3), 1), (0,), huge=OVERFLOWS),
    "conv_singular_values": valid(lambda: conv_singular_values, lambda g: (randn(g, 5, 2, 3, 3), 6, 2), (0,)),
    "kernel_orth_loss": sampled("orthogonal_conv/kernel"),
    "orth_residuals": valid(lambda: orth_residuals, lambda g: (randn(g, 4, 2, 3, 3), 5), (0,)),
    "orthogonal_conv_init_": valid(
        lambda: lambda weight: orthogonal_conv_init_(weight.detach()),
        lambda g: (randn(g, 4, 2, 3, 3),),
        nan="overwrites what it is given",
        expanded="writes in place, where PyTorch refuses shared memory",
    ),
    "orthogonal_exists": valid(lambda: orthogonal_exists, lambda g: GEOMETRY),
    "orthogonal_obstacle": valid(lambda: orthogonal_obstacle, lambda g: GEOMETRY),
    "remove_weight_compander": SURGERY,
    "weight_compander_param_groups": SURGERY,
}

FUZZ = FUNCTIONAL | GATES | OTHERS | ADAPTERS | DYNAMICS | LABELLED | MEMORY | WEIGHTS
