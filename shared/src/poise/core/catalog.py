"""The record that describes a method, and what poise.core itself offers. Imports no torch, so that ``poise list`` is instant."""

from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["penalty", "loss", "solver", "layer", "parametrization", "optimizer", "adapter", "training", "network"]


@dataclass(frozen=True, kw_only=True)
class Headline:
    """The one claim and the one price that stand for a method where there is room for one line.

    The claim is the gain that the abstract promises of the method as published, over what the paper compares it with; a claim
    that nothing is lost stands here only where it is the paper's promise. Its verdict plays no part in the choice, and neither
    does the measured cost in that of the cases.

    Attributes:
        promise: the claim in plain words ("test accuracy rises although half of the training labels are redrawn").
        metric: the metric of the claim.
        arm: the arm that the claim is about.
        versus: the arm that it is compared with; None for a claim on the metric itself.
        preset: the preset that measures it.
        unit: what the effect is measured in, ``points`` for example; none for a ratio.
        factor: what the metric is multiplied by to be in that unit, 100 for shares in points.
        step: the benchmark's case that is a training step with the method.
        peer: the best known alternative that the benchmark compares with; empty when there is none.
        peer_case: the case of that comparison nearest to what the method is used for.
    """

    promise: str
    metric: str
    arm: str
    versus: str | None = "baseline"
    preset: str = "quick"
    unit: str = ""
    factor: float = 1.0
    step: str
    peer: str = ""
    peer_case: str = ""


@dataclass(frozen=True, kw_only=True)
class Method:
    """What a reader needs to choose a method, and what the command line and the docs need to find it.

    Attributes:
        slug: the method's name on the command line, ``monge-gap`` in ``ot/monge-gap``.
        package: the member that holds it, ``ot``; ``core`` for poise.core.
        title: its name in the literature.
        kind: what a user holds in hand.
        problem: the problem it solves, as its user would say it ("learn a transport map for a cost of my choice").
        summary: one sentence, what it does about that.
        formula: LaTeX without delimiters.
        usage: a few lines of Python that run as they are.
        api: dotted names of the public objects, most important first.
        presets: names of the experiment's presets, ``quick`` first.
        arms: names of the experiment's arms, ``baseline`` first.
        headline: what stands for it in tables: its main claim and its main cost.
        paper: authors, title, venue, year, in one line.
        url: where the paper is.
        bibtex: the BibTeX entry.
        tags: words people search for.
    """

    slug: str
    package: str
    title: str
    kind: Kind
    problem: str
    summary: str
    formula: str
    usage: str
    api: tuple[str, ...]
    presets: tuple[str, ...]
    arms: tuple[str, ...]
    headline: Headline
    paper: str
    url: str
    bibtex: str
    tags: tuple[str, ...] = field(default=())

    @property
    def name(self) -> str:
        """The full name, ``ot/monge-gap``."""
        return f"{self.package}/{self.slug}"

    @property
    def experiment(self) -> str:
        """The module whose ``EXPERIMENT`` shows the method at work."""
        return f"poise.{self.package}.experiments.{self.slug.replace('-', '_')}"


METHODS: tuple[Method, ...] = (
    Method(
        slug="elr",
        package="core",
        title="Early-learning regularization (ELR, ELR+)",
        kind="loss",
        problem="Train a classifier when many training labels are wrong.",
        summary=(
            "A running average of the model's own predictions for each example remembers what it knew before it began to memorise, "
            "and a term that pulls it there cancels the gradient of wrong labels."
        ),
        formula=(
            r"L = \frac1B \sum_i CE(z_i, y_i) + \lambda \frac1B \sum_i \log(1 - \langle p_i, t_i \rangle), \qquad "
            r"t_i \leftarrow \beta t_i + (1 - \beta) p_i"
        ),
        usage="""
import torch
from torch.utils.data import DataLoader, TensorDataset
from poise.core import ELRLoss, IndexedDataset, detect_label_errors

x, y = torch.randn(200, 8), torch.randint(3, (200,))
model = torch.nn.Linear(8, 3)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
criterion = ELRLoss(num_examples=len(x), num_classes=3, lam=3.0, beta=0.7)

for inputs, labels, index in DataLoader(IndexedDataset(TensorDataset(x, y)), batch_size=50, shuffle=True):
    loss = criterion(model(inputs), labels, index)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

suspect, corrected = detect_label_errors(criterion.memory, y)
""",
        api=(
            "poise.core.ELRLoss",
            "poise.core.elr_regularizer",
            "poise.core.detect_label_errors",
            "poise.core.ELRPlusTrainer",
            "poise.core.ELRPlusLoss",
            "poise.core.WeightAverage",
            "poise.core.sigmoid_rampup",
            "poise.core.symmetric_noise",
            "poise.core.asymmetric_noise",
            "poise.core.IndexedDataset",
        ),
        presets=("quick", "paper", "cifar10-asymmetric", "cifar100"),
        arms=("baseline", "dropout", "target_loss", "elr", "elr_plus"),
        headline=Headline(
            promise="test accuracy rises although half of the training labels are redrawn",
            metric="last_accuracy",
            arm="elr",
            unit="points",
            step="ResNet-18, 32 x 32, batch 32, memory 50,000 x 100 float32",
            peer="torchvision MixUp",
            peer_case="128 x 3 x 32 x 32 and labels",
        ),
        paper=(
            "S. Liu, J. Niles-Weed, N. Razavian, C. Fernandez-Granda, Early-Learning Regularization Prevents Memorization of Noisy "
            "Labels, NeurIPS 2020"
        ),
        url="https://arxiv.org/abs/2007.00151",
        bibtex=r"""
@inproceedings{liu2020early,
  title     = {Early-Learning Regularization Prevents Memorization of Noisy Labels},
  author    = {Liu, Sheng and Niles-Weed, Jonathan and Razavian, Narges and Fernandez-Granda, Carlos},
  booktitle = {Advances in Neural Information Processing Systems},
  volume    = {33},
  year      = {2020},
}
""",
        tags=("noisy labels", "memorization", "label errors", "mixup", "weight averaging", "classification"),
    ),
    Method(
        slug="ps-kd",
        package="core",
        title="Progressive self-knowledge distillation (PS-KD)",
        kind="loss",
        problem="Train a classifier whose confidences can be trusted, at almost no cost.",
        summary=(
            "Labels are softened with the model's own predictions of the last epoch, more and more as training goes on, so that "
            "examples it has become certain of get less gradient."
        ),
        formula=(
            r"\tilde y_t = (1 - \alpha_t)\, y + \alpha_t P_{t-1}(x), \quad \alpha_t = \alpha_T \tfrac{t}{T}, \qquad "
            r"L = -\frac1B \sum_i \sum_k \tilde y_{ik} \log p_{ik}"
        ),
        usage="""
import torch
from torch.utils.data import DataLoader, TensorDataset
from poise.core import IndexedDataset, PSKDLoss

x, y = torch.randn(200, 8), torch.randint(3, (200,))
model = torch.nn.Linear(8, 3)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
criterion = PSKDLoss(num_examples=len(x), num_classes=3, alpha_T=0.8, total_epochs=5)

for epoch in range(5):
    criterion.set_epoch(epoch)
    for inputs, labels, index in DataLoader(IndexedDataset(TensorDataset(x, y)), batch_size=50, shuffle=True):
        loss = criterion(model(inputs), labels, index)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
""",
        api=(
            "poise.core.PSKDLoss",
            "poise.core.ps_kd_loss",
            "poise.core.progressive_alpha",
            "poise.core.PreviousModelTeacher",
            "poise.core.PSKDTrainer",
            "poise.core.PSKDDetector",
            "poise.core.soft_cross_entropy",
            "poise.core.expected_calibration_error",
            "poise.core.negative_log_likelihood",
            "poise.core.aurc",
            "poise.core.eaurc",
        ),
        presets=("quick", "augmented", "paper", "imagenet"),
        arms=("baseline", "label_smoothing", "ps_kd", "cutmix", "cutmix_ps_kd"),
        headline=Headline(
            promise="confidence is better calibrated: the calibration error falls",
            metric="ece_percent",
            arm="ps_kd",
            unit="points",
            step="ResNet-18, 32 x 32, batch 32, memory 50,000 x 100 float32",
            peer="torch cross_entropy",
            peer_case="soft targets, 256 x 1000",
        ),
        paper=(
            "K. Kim, B. Ji, D. Yoon, S. Hwang, Self-Knowledge Distillation with Progressive Refinement of Targets, ICCV 2021"
        ),
        url="https://arxiv.org/abs/2006.12000",
        bibtex=r"""
@inproceedings{kim2021self,
  title     = {Self-Knowledge Distillation with Progressive Refinement of Targets},
  author    = {Kim, Kyungyul and Ji, ByeongMoon and Yoon, Doyoung and Hwang, Sangheum},
  booktitle = {Proceedings of the IEEE/CVF International Conference on Computer Vision},
  year      = {2021},
}
""",
        tags=("self-distillation", "soft targets", "calibration", "label smoothing", "hard examples", "classification"),
    ),
    Method(
        slug="orthogonal-conv",
        package="core",
        title="Orthogonal convolutions",
        kind="penalty",
        problem="Bound how much a change of a convolutional network's input can change its output, and keep its gradients stable.",
        summary=(
            "A penalty on the kernel alone makes the layer, not just the reshaped kernel, an isometry at every input size; "
            "with it come the conditions under which such a layer exists, and its exact singular values."
        ),
        formula=(
            r"L_{orth}(K) = \lVert \mathrm{conv}(K, K, \text{padding } P, \text{stride } S) - I_{r0} \rVert_F^2 "
            r"- \max(0, M - C S^2), \qquad P = \lfloor (k - 1) / S \rfloor S"
        ),
        usage="""
import torch
from torch import nn
from poise.core import OrthogonalRegularizer, conv_singular_values, orthogonal_obstacle

model = nn.Sequential(
    nn.Conv2d(3, 16, 3, padding=1, padding_mode="circular"),
    nn.ReLU(),
    nn.Conv2d(16, 32, 3, stride=2, padding=1, padding_mode="circular"),
    nn.ReLU(),
    nn.Flatten(),
    nn.Linear(32 * 8 * 8, 10),
)
orthogonality = OrthogonalRegularizer(model, weight=0.1)
optimizer = torch.optim.Adam(model.parameters())

for _ in range(3):
    x, y = torch.rand(8, 3, 16, 16), torch.randint(10, (8,))
    loss = nn.functional.cross_entropy(model(x), y) + orthogonality()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

print(orthogonality.report()["2"].loss)
print(conv_singular_values(model[2].weight, input_size=16, stride=2).max())
print(orthogonal_obstacle(out_channels=256, in_channels=128, kernel_size=1, stride=2))
""",
        api=(
            "poise.core.OrthogonalRegularizer",
            "poise.core.conv_orth_loss",
            "poise.core.kernel_orth_loss",
            "poise.core.orthogonal_exists",
            "poise.core.orthogonal_obstacle",
            "poise.core.orthogonal_conv_init_",
            "poise.core.conv_singular_values",
            "poise.core.orth_residuals",
            "poise.core.conv_as_matrix",
            "poise.core.ConvGeometry",
        ),
        presets=("quick", "paper", "imagenet"),
        arms=("baseline", "faint", "light", "medium", "strong", "kernel", "landscape"),
        headline=Headline(
            promise="accuracy under attack rises",
            metric="robust_accuracy_middle",
            arm="strong",
            unit="points",
            factor=100.0,
            step="ResNet-18, 32 x 32, batch 128",
            peer="self-convolution (Wang et al. 2020)",
            peer_case="loss and gradient, 64 x 64 x 3 x 3, stride 1",
        ),
        paper=(
            "E. M. Achour, F. Malgouyres, F. Mamalet, Existence, Stability and Scalability of Orthogonal Convolutional Neural "
            "Networks, JMLR 2022"
        ),
        url="https://arxiv.org/abs/2108.05623",
        bibtex=r"""
@article{achour2022existence,
  title   = {Existence, Stability and Scalability of Orthogonal Convolutional Neural Networks},
  author  = {Achour, El Mehdi and Malgouyres, Fran{\c{c}}ois and Mamalet, Franck},
  journal = {Journal of Machine Learning Research},
  volume  = {23},
  number  = {347},
  pages   = {1--56},
  year    = {2022},
}
""",
        tags=(
            "orthogonality",
            "isometry",
            "Lipschitz",
            "robustness",
            "spectral norm",
            "singular values",
            "initialization",
        ),
    ),
    Method(
        slug="grokking-stability",
        package="core",
        title="StableMax and perpGrad",
        kind="optimizer",
        problem="Go on learning after the training set is fitted, without weight decay.",
        summary=(
            "Removes from each gradient the direction that only scales the weights (perpGrad), replaces the softmax by one that does "
            "not collapse in rounding (StableMax), and measures both."
        ),
        formula=r"g_\perp = g - \frac{w^\top g}{w^\top w}\, w, \qquad g \leftarrow \frac{\|g\|}{\|g_\perp\|}\, g_\perp",
        usage="""
import torch
from poise.core import PerpGrad, nlm_cosine, softmax_collapse_fraction, stablemax_cross_entropy

model = torch.nn.Sequential(torch.nn.Linear(64, 32, bias=False), torch.nn.ReLU(), torch.nn.Linear(32, 10, bias=False))
optimizer = PerpGrad(torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0))
x, y = torch.randn(128, 64), torch.randint(10, (128,))

logits = model(x)
loss = stablemax_cross_entropy(logits, y)  # or cross_entropy
loss.backward()
print(nlm_cosine(model.parameters()), softmax_collapse_fraction(logits))
optimizer.step()
""",
        api=(
            "poise.core.PerpGrad",
            "poise.core.perp_grad_",
            "poise.core.stablemax_cross_entropy",
            "poise.core.StableMaxCrossEntropy",
            "poise.core.stablemax",
            "poise.core.log_stablemax",
            "poise.core.softmax_collapse_fraction",
            "poise.core.zero_loss_fraction",
            "poise.core.nlm_cosine",
            "poise.core.ModularArithmetic",
            "poise.core.SparseParity",
            "poise.core.algorithmic_mlp",
            "poise.core.OptimizerWrapper",
        ),
        presets=("quick", "paper", "precision", "transformer", "parity"),
        arms=(
            "baseline",
            "perp_grad",
            "perp_grad_unscaled",
            "stablemax",
            "softmax_float16",
            "softmax_float64",
            "weight_decay",
            "l1",
            "small_output",
            "squared_error",
        ),
        headline=Headline(
            promise="the test set is learned as well, without weight decay: test accuracy rises",
            metric="test_accuracy",
            arm="perp_grad",
            unit="points",
            factor=100.0,
            step="training step with AdamW, 20 tensors, width 1,024, batch 1,024",
            peer="torch, tensor by tensor",
            peer_case="the projection alone, 20 tensors, width 512",
        ),
        paper="L. Prieto, M. Barsbey, P. A. M. Mediano, T. Birdal, Grokking at the Edge of Numerical Stability, ICLR 2025",
        url="https://arxiv.org/abs/2501.04697",
        bibtex=r"""
@inproceedings{prieto2025grokking,
  title     = {Grokking at the Edge of Numerical Stability},
  author    = {Prieto, Lucas and Barsbey, Melih and Mediano, Pedro A. M. and Birdal, Tolga},
  booktitle = {International Conference on Learning Representations},
  year      = {2025},
}
""",
        tags=("grokking", "numerical stability", "softmax", "optimizer", "gradient projection", "training dynamics"),
    ),
    Method(
        slug="pela",
        package="core",
        title="Parameter-efficient models with low-rank approximation (PELA)",
        kind="training",
        problem="Shrink a pretrained transformer to a half or a third, and use it afterwards as if it were the original.",
        summary=(
            "Every Linear layer becomes the best product of two thin ones; a short stage of training beside the frozen original, with "
            "its block outputs as targets and a bound on how far any weight moves, repairs what was lost."
        ),
        formula=(
            r"L = L_{task} + \alpha \frac1B \sum_b \mathrm{MSE}(F_s^b, F_t^b) + "
            r"w \frac1P \sum_p \big( \|W_2^p W_1^p - W_0^p\|_\infty - \epsilon \big)^2, \qquad W_0 \approx W_2 W_1"
        ),
        usage="""
import torch
from torch.nn import functional as F
from poise.core import PelaTrainer, apply_low_rank

blocks = [torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU()) for _ in range(3)]
teacher = torch.nn.Sequential(*blocks, torch.nn.Linear(64, 10))  # your pretrained network

student, report = apply_low_rank(teacher, ratio=2, skip=["3"])
print(report)

optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
student.train()
with PelaTrainer(student, teacher, blocks=["0", "1", "2"]) as pela:
    for _ in range(10):
        x, y = torch.randn(32, 64), torch.randint(10, (32,))
        logits, penalty = pela(x)
        loss = F.cross_entropy(logits, y) + penalty
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

# later, to load a checkpoint: the same structure without a decomposition
rebuilt = apply_low_rank(teacher, ratio=2, skip=["3"], decompose=False).model
rebuilt.load_state_dict(student.state_dict())
""",
        api=(
            "poise.core.apply_low_rank",
            "poise.core.PelaTrainer",
            "poise.core.PelaOutput",
            "poise.core.LowRankLinear",
            "poise.core.LowRankModel",
            "poise.core.LowRankReport",
            "poise.core.low_rank_factorize",
            "poise.core.rank_for_ratio",
            "poise.core.WeightPerturbation",
            "poise.core.FeatureDistillation",
            "poise.core.weight_perturbation_loss",
            "poise.core.largest_weight_changes",
            "poise.core.feature_distillation_loss",
        ),
        presets=("quick", "text", "paper", "deit"),
        arms=("baseline", "svd", "scratch", "distill", "pela"),
        headline=Headline(
            promise="half of the parameters go, and less than a point of accuracy is lost with them",
            metric="accuracy_drop_k2",
            arm="pela",
            versus=None,
            unit="points",
            factor=100.0,
            step="training step of a transformer, width 192, 512 tokens: both",
            peer="torch.linalg.svd, thin",
            peer_case="factors of 768 x 3072 at rank 307",
        ),
        paper="Y. Guo, G. Wang, M. Kankanhalli, PELA: Learning Parameter-Efficient Models with Low-Rank Approximation, CVPR 2024",
        url="https://arxiv.org/abs/2310.10700",
        bibtex=r"""
@inproceedings{guo2024pela,
  title     = {{PELA}: Learning Parameter-Efficient Models with Low-Rank Approximation},
  author    = {Guo, Yangyang and Wang, Guangzhi and Kankanhalli, Mohan},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year      = {2024},
}
""",
        tags=(
            "compression",
            "low rank",
            "SVD",
            "distillation",
            "pretrained models",
            "transformers",
            "vision transformer",
            "adapters",
        ),
    ),
    Method(
        slug="weight-compander",
        package="core",
        title="Weight Compander",
        kind="parametrization",
        problem="Keep a few large weights from dominating a network, and make its small ones take part.",
        summary=(
            "Every weight passes through a bounded, odd function that is steepest at zero; the optimizer trains what goes in. It fits "
            "any model, keeps what it computes, and is removed at no cost after training."
        ),
        formula=r"w = a \arctan(v / b), \qquad |w| < a \pi / 2, \qquad \frac{\partial w}{\partial v} = \frac{a b}{b^2 + v^2}",
        usage="""
import torch
from torch import nn
from poise.core import (
    apply_weight_compander,
    compander_report,
    remove_weight_compander,
    weight_compander_param_groups,
)

model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 6 * 6, 10))
model = apply_weight_compander(model)  # the network computes what it did
groups = weight_compander_param_groups(model, lr=0.05, weight_decay=5e-4, lr_ab=0.005)
optimizer = torch.optim.SGD(groups, momentum=0.9)

for _ in range(3):
    x, y = torch.rand(16, 3, 8, 8), torch.randint(10, (16,))
    loss = nn.functional.cross_entropy(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

print(compander_report(model)["3.weight"])
model = remove_weight_compander(model)  # plain layers again
""",
        api=(
            "poise.core.apply_weight_compander",
            "poise.core.remove_weight_compander",
            "poise.core.weight_compander_param_groups",
            "poise.core.compander_report",
            "poise.core.CompandedWeight",
            "poise.core.WeightCompander",
            "poise.core.compand",
            "poise.core.compand_inverse",
        ),
        presets=("quick", "convolutions", "paper", "imagenet"),
        arms=(
            "baseline",
            "decay",
            "dropout",
            "learned",
            "slope_1",
            "slope_2",
            "slope_4",
            "decay_learned",
            "decay_slope_1",
            "decay_slope_2",
            "decay_slope_4",
            "dropout_learned",
            "dropout_slope_1",
            "dropout_slope_2",
            "dropout_slope_4",
        ),
        headline=Headline(
            promise="networks generalise better: the gap between test and training loss falls",
            metric="loss_gap",
            arm="learned",
            step="ResNet-18, 32 x 32, batch 32",
            peer="weight_norm",
            peer_case="forward and backward, convolution 256 -> 256, 3 x 3, on 4 x 4, batch 1, learned scales",
        ),
        paper=(
            "R. A. Cakaj, J. Mehnert, B. Yang, Weight Compander: A Simple Weight Reparameterization for Regularization, IJCNN 2023"
        ),
        url="https://arxiv.org/abs/2306.16993",
        bibtex=r"""
@inproceedings{cakaj2023weight,
  title     = {Weight Compander: A Simple Weight Reparameterization for Regularization},
  author    = {Cakaj, Rinor and Mehnert, Jens and Yang, Bin},
  booktitle = {International Joint Conference on Neural Networks},
  year      = {2023},
}
""",
        tags=("reparametrization", "weights", "bounded weights", "sparsity", "parametrize", "arctan"),
    ),
    Method(
        slug="sorsa",
        package="core",
        title="SORSA",
        kind="adapter",
        problem="Fine-tune a large model with few parameters, starting faster than LoRA does.",
        summary=(
            "Trains the leading singular triplets of every weight with the rest frozen, and a penalty keeps the singular vectors "
            "orthonormal, so that changes of scale go into the singular values; merged, nothing is left to pay for."
        ),
        formula=(
            r"W = W_{res} + c\, U_p\, \mathrm{diag}(S_p)\, V_p^\top, \qquad "
            r"R = \frac1M \sum_{A \in \{U_p^\top, V_p^\top\}} \lVert A A^\top - I \rVert_F"
        ),
        usage="""
import torch
from torch import nn
from poise.core import SorsaConfig, SorsaRegularizer, apply_sorsa, merge_sorsa, sorsa_parameters

model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 3))  # any pretrained model
model = apply_sorsa(model, SorsaConfig(r=8, target_modules="0"))
regularizer = SorsaRegularizer(model, gamma=4e-4, lr=3e-3)
optimizer = torch.optim.AdamW(sorsa_parameters(model), lr=3e-3, weight_decay=0.0)

for _ in range(3):
    x, y = torch.randn(16, 32), torch.randint(3, (16,))
    loss = nn.functional.cross_entropy(model(x), y) + regularizer()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    regularizer.step()

model = merge_sorsa(model)  # plain layers
""",
        api=(
            "poise.core.apply_sorsa",
            "poise.core.SorsaConfig",
            "poise.core.SorsaRegularizer",
            "poise.core.sorsa_parameters",
            "poise.core.merge_sorsa",
            "poise.core.SorsaLinear",
            "poise.core.SorsaDelta",
            "poise.core.sorsa_penalty",
            "poise.core.orthonormal_penalty",
            "poise.core.singular_change",
            "poise.core.save_adapter",
            "poise.core.load_adapter",
            "poise.core.Adapters",
            "poise.core.sorsa_lora_config",
            "poise.core.read_sorsa_lora_config",
            "poise.core.save_peft_lora",
            "poise.core.load_peft_lora",
            "poise.core.apply_lora",
            "poise.core.LoRAConfig",
        ),
        presets=("quick", "one-rate", "text", "paper"),
        arms=("baseline", "pissa", "sorsa_unregularized", "sorsa", "sorsa_strong", "sorsa_decoupled", "full"),
        headline=Headline(
            promise="fine-tuning with few parameters ends at a higher accuracy than LoRA's",
            metric="accuracy",
            arm="sorsa",
            unit="points",
            factor=100.0,
            step="MiniLM, 8 x 64 tokens, rank 8, all projections; plain: all weights are trained",
            peer="peft LoRA",
            peer_case="forward and backward, 1024 x 4096, rank 64, 512 rows",
        ),
        paper=(
            "Y. Cao, SORSA: Singular Values and Orthonormal Regularized Singular Vectors Adaptation of Large Language Models, 2024"
        ),
        url="https://arxiv.org/abs/2409.00055",
        bibtex=r"""
@article{cao2024sorsa,
  title   = {{SORSA}: Singular Values and Orthonormal Regularized Singular Vectors Adaptation of Large Language Models},
  author  = {Cao, Yang},
  journal = {arXiv preprint arXiv:2409.00055},
  year    = {2024},
}
""",
        tags=("fine-tuning", "LoRA", "PEFT", "low rank", "singular values", "orthogonality", "language models"),
    ),
)
