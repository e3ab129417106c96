"""Sample inputs that put every method of poise.medical under the workspace contract."""

from functools import partial

import torch
from torch import Tensor, nn

from poise.core.testing import Sample, randn
from poise.medical import (
    ABMIL,
    DSMIL,
    AdeleLoss,
    AttentionEntropyLoss,
    ClassifierCF,
    CrossScalePyramid,
    CSFBlock,
    GatedAttention,
    MFEBlock,
    MultiscaleConsistency,
    QueryAttention,
    SHISRCLoss,
    SHISRCNet,
    SHISRCOutput,
    SKConv,
    SKUnit,
    SRResNetMFE,
    Subsample,
    TransMIL,
    attention_entropy,
    correct_labels,
    degrade,
    enlarge,
    multiscale_forward,
    multiscale_probabilities,
)

MASK_IS_READ = "that every bag has an instance is read off the mask, which a fake tensor does not have"


def mask(_generator: torch.Generator) -> torch.Tensor:
    """The second of two bags of six instances has four."""
    return torch.arange(6) < torch.tensor([[6], [4]])


AEM = (
    Sample(
        name="aem/loss",
        build=lambda: AttentionEntropyLoss(0.7),
        inputs=lambda generator: (randn(generator, 2, 3, 6),),
    ),
    Sample(
        name="aem/loss_masked",
        build=lambda: AttentionEntropyLoss(0.7),
        inputs=lambda generator: (randn(generator, 2, 3, 6), mask(generator)),
        fake_cuda=False,
        reason=MASK_IS_READ,
    ),
    Sample(
        name="aem/loss_annealed_sum",
        build=lambda: AttentionEntropyLoss(0.7, annealing="cosine", total_steps=10, reduction="sum"),
        inputs=lambda generator: (randn(generator, 2, 6),),
    ),
    Sample(
        name="aem/entropy_relative",
        build=lambda: partial(attention_entropy, normalize=True),
        inputs=lambda generator: (randn(generator, 2, 3, 6), mask(generator)),
        fake_cuda=False,
        reason=MASK_IS_READ,
    ),
    Sample(
        name="aem/gated_attention",
        build=lambda: GatedAttention(4, 5, branches=2).double(),
        inputs=lambda generator: (randn(generator, 2, 6, 4),),
        parameters=True,
    ),
    Sample(
        name="aem/query_attention",
        build=lambda: QueryAttention(4, heads=2, dropout=0.0).double(),
        inputs=lambda generator: (randn(generator, 2, 6, 4), mask(generator)),
        parameters=True,
        fake_cuda=False,
        reason=MASK_IS_READ,
    ),
    Sample(
        name="aem/abmil",
        build=lambda: ABMIL(4, 6, 2, att_dim=5).double(),
        inputs=lambda generator: (randn(generator, 2, 6, 4),),
        parameters=True,
    ),
    Sample(
        name="aem/abmil_in_chunks",
        build=lambda: ABMIL(4, 6, 2, "plain", att_dim=5, chunk=4).double(),
        inputs=lambda generator: (randn(generator, 2, 6, 4),),
        parameters=True,
        compile=False,
        reason="chunks are found out by running out of memory, which is caught as an error",
    ),
    Sample(
        name="aem/abmil_multihead_attention",
        build=lambda: partial(ABMIL(4, 6, 2, "multihead", heads=2, dropout=0.0).double(), return_attention=True),
        inputs=lambda generator: (randn(generator, 2, 6, 4),),
    ),
    Sample(
        name="aem/dsmil",
        build=lambda: partial(DSMIL(4, 2, att_dim=5).double(), return_attention=True),
        inputs=lambda generator: (randn(generator, 2, 6, 4),),
    ),
    Sample(
        name="aem/transmil",
        build=lambda: partial(TransMIL(4, 8, 2, heads=2, dropout=0.0).double(), return_attention=True),
        inputs=lambda generator: (randn(generator, 2, 6, 4),),
        atol=1e-5,
    ),
    Sample(
        name="aem/subsample",
        build=lambda: Subsample(0.5),
        inputs=lambda generator: (randn(generator, 2, 6, 4),),
    ),
)


class OfThreeScales(torch.nn.Module):
    """A criterion of a list of logits, as a function of the three tensors in it."""

    def __init__(self, criterion: torch.nn.Module) -> None:
        super().__init__()
        self.criterion = criterion

    def forward(
        self, small: torch.Tensor, base: torch.Tensor, large: torch.Tensor, *labels: torch.Tensor
    ) -> torch.Tensor:
        return self.criterion([small, base, large], *labels)


def three_logits(generator: torch.Generator, *labels: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Logits of two images of 3 x 4 pixels at three scales."""
    return (*(randn(generator, 2, 3, 3, 4) for _ in range(3)), *labels)


def masks(generator: torch.Generator) -> torch.Tensor:
    """Labels of three classes, and an ignored pixel."""
    labels = torch.randint(0, 3, (2, 3, 4), generator=generator)
    labels[0, 0, 0] = 255
    return labels


ADELE = (
    Sample(
        name="adele/consistency",
        build=lambda: OfThreeScales(MultiscaleConsistency(0.7, gate=0.0)),
        inputs=three_logits,
        differentiable=(0, 1, 2),
    ),
    Sample(
        name="adele/loss",
        build=lambda: OfThreeScales(AdeleLoss(0.7, gate=0.5)),
        inputs=lambda generator: three_logits(generator, masks(generator)),
        differentiable=(0, 1, 2),
    ),
    Sample(
        name="adele/loss_learned_weights",
        build=lambda: OfThreeScales(AdeleLoss(0.7, gate=0.0, learn_weights=True, average=False)).double(),
        inputs=lambda generator: three_logits(generator, masks(generator)),
        differentiable=(0, 1, 2),
        parameters=True,
    ),
    Sample(
        name="adele/forward",
        build=lambda: partial(multiscale_forward, torch.nn.Conv2d(1, 3, 3, padding=1).double()),
        inputs=lambda generator: (randn(generator, 2, 1, 10, 8),),
    ),
    Sample(
        name="adele/forward_of_volumes",
        build=lambda: partial(multiscale_forward, torch.nn.Conv3d(1, 2, 3, padding=1).double(), divisor=2),
        inputs=lambda generator: (randn(generator, 1, 1, 4, 6, 4),),
    ),
    Sample(
        name="adele/probabilities",
        build=lambda: partial(multiscale_probabilities, torch.nn.Conv2d(1, 3, 3, padding=1).double(), flip=True),
        inputs=lambda generator: (randn(generator, 2, 1, 8, 8),),
        differentiable=(),
        reason="predictions are made without gradients",
    ),
    Sample(
        name="adele/correction",
        build=lambda: partial(correct_labels, tau_fg=0.4, tau_bg=0.4),
        inputs=lambda generator: (
            masks(generator),
            randn(generator, 2, 3, 3, 4).softmax(1),
            torch.tensor([False, True, True]),
        ),
        differentiable=(),
        fake_cuda=False,
        reason="labels are integers, and that they are in range is read off them, which a fake tensor does not have",
    ),
)


def smooth(module: nn.Module) -> nn.Module:
    """Without the kinks of ReLU, which finite differences would step over; dropout is off, batch statistics stay in use."""
    for parent in module.modules():
        for name, child in parent.named_children():
            if isinstance(child, nn.ReLU | nn.LeakyReLU):
                setattr(parent, name, nn.Softplus())
            elif isinstance(child, nn.Dropout):
                child.p = 0.0
    return module.double()


def small_network(joint_batch: bool = False) -> nn.Module:
    """Super-resolution by two, and a classifier of one convolution."""
    backbone = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.ReLU())
    classifier = ClassifierCF(2, backbone, channels=4, hidden=3)
    upscaler = SRResNetMFE(2, width=4, blocks=1, bicubic_skip=True)
    return smooth(SHISRCNet(2, upscaler=upscaler, classifier=classifier, joint_batch=joint_batch))


def terms_of(criterion: SHISRCLoss, sr: Tensor, logits: Tensor, features: Tensor, hr: Tensor) -> dict[str, Tensor]:
    """The loss of an output whose second view is the first one, turned round."""
    output = SHISRCOutput(sr, logits, features, logits.flip(-1), features.flip(0))
    return criterion(output, hr, torch.arange(len(logits), device=logits.device) % 2)


SHISRCNET = (
    Sample(
        name="shisrcnet/mfe_block",
        build=lambda: smooth(MFEBlock(4, dilations=(1, 2))),
        inputs=lambda generator: (randn(generator, 2, 4, 5, 4),),
        parameters=True,
    ),
    Sample(
        name="shisrcnet/mfe_block_released",
        build=lambda: smooth(MFEBlock(4, score_norm=True)),
        inputs=lambda generator: (randn(generator, 3, 4, 5, 4),),
        parameters=True,
    ),
    Sample(
        name="shisrcnet/super_resolution",
        build=lambda: smooth(SRResNetMFE(4, width=4, blocks=1)),
        inputs=lambda generator: (randn(generator, 2, 3, 4, 3),),
        parameters=True,
    ),
    Sample(
        name="shisrcnet/sk_conv",
        build=lambda: smooth(SKConv(8, groups=4, least=4)),
        inputs=lambda generator: (randn(generator, 3, 8, 5, 4),),
        parameters=True,
    ),
    Sample(
        name="shisrcnet/sk_unit",
        build=lambda: smooth(SKUnit(4, 32, 8, stride=2)),
        inputs=lambda generator: (randn(generator, 3, 4, 6, 5),),
        parameters=True,
    ),
    Sample(
        name="shisrcnet/csf_block",
        build=lambda: smooth(CSFBlock(4, 3)),
        inputs=lambda generator: (randn(generator, 3, 4, 5, 6), randn(generator, 3, 4, 3, 3)),
        differentiable=(0, 1),
        parameters=True,
    ),
    Sample(
        name="shisrcnet/pyramid",
        build=lambda: smooth(CrossScalePyramid(4, 3)),
        inputs=lambda generator: (randn(generator, 3, 4, 9, 8),),
        parameters=True,
    ),
    Sample(
        name="shisrcnet/network",
        build=small_network,
        inputs=lambda generator: (randn(generator, 3, 3, 8, 8), randn(generator, 3, 3, 16, 16)),
        differentiable=(0, 1),
        parameters=True,
    ),
    Sample(
        name="shisrcnet/network_joint_batch",
        build=lambda: small_network(joint_batch=True),
        inputs=lambda generator: (randn(generator, 3, 3, 8, 8), randn(generator, 3, 3, 16, 16)),
        differentiable=(0, 1),
        parameters=True,
    ),
    Sample(
        name="shisrcnet/loss",
        build=lambda: partial(terms_of, SHISRCLoss()),
        inputs=lambda generator: (
            randn(generator, 3, 3, 4, 4),
            randn(generator, 3, 2),
            randn(generator, 3, 5),
            randn(generator, 3, 3, 4, 4),
        ),
        differentiable=(0, 1, 2),
    ),
    Sample(
        name="shisrcnet/degrade",
        build=lambda: partial(degrade, scale=2),
        inputs=lambda generator: (randn(generator, 2, 3, 8, 6).sigmoid(),),
    ),
    Sample(
        name="shisrcnet/enlarge",
        build=lambda: partial(enlarge, scale=2),
        inputs=lambda generator: (randn(generator, 2, 3, 4, 3).sigmoid(),),
    ),
)

SAMPLES: tuple[Sample, ...] = AEM + ADELE + SHISRCNET
