"""SHISRCNet: what the authors' code computes, and the laws of its blocks, losses and networks."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import nn

from poise.core.functional import focal_loss
from poise.medical import (
    ClassifierCF,
    CrossScalePyramid,
    CSFBlock,
    MFEBlock,
    SHISRCLoss,
    SHISRCNet,
    SHISRCOutput,
    SKConv,
    SKNet26,
    SKUnit,
    SRResNetMFE,
    WithFeatures,
)
from poise.medical.histopathology.shisrcnet.blocks import branch_weights, weigh_branches

GOLDEN = Path(__file__).parent / "golden" / "shisrcnet"
EXACT = {"rtol": 1e-9, "atol": 1e-9}

MFE = (
    (r"^layer(\d)\.", lambda found: f"links.{int(found[1]) - 1}."),
    (r"^SE(\d)\.conv\.", lambda found: f"scorers.{int(found[1]) - 1}."),
)
CSF = (
    (r"^Up\.", lambda _: "up."),
    (r"^layer1\.(\d)\.conv\.", lambda found: f"squeeze.{found[1]}."),
    (r"^SE(\d)\.conv\.", lambda found: f"scorers.{int(found[1]) - 1}."),
)
SK = ((r"^convs\.", lambda _: "branches."), (r"^fcs\.", lambda _: "scorers."), (r"^fc\.", lambda _: "squeeze."))
SR = (
    (r"^backbone\.0\.", lambda _: "head."),
    (r"^backbone\.1\.sub\.1\.", lambda _: "body.1."),
    (r"^backbone\.1\.sub\.0\.layer(\d)\.", lambda found: f"body.0.links.{int(found[1]) - 1}."),
    (r"^backbone\.1\.sub\.0\.SE(\d)\.conv\.", lambda found: f"body.0.scorers.{int(found[1]) - 1}."),
    (r"^backbone\.1\.sub\.0\.project\.", lambda _: "body.0.project."),
)
"""Names of the authors' tensors, and what they are called here."""


def golden(name):
    with np.load(GOLDEN / f"{name}.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file}


def loaded(module, stored, prefix, names):
    """The module with the authors' weights, in evaluation mode; every one of them has a place."""
    state = {}
    for key, value in stored.items():
        if key.startswith(f"{prefix}."):
            renamed = key.removeprefix(f"{prefix}.")
            for pattern, replacement in names:
                renamed = re.sub(pattern, replacement, renamed)
            state[renamed] = value
    missing, unexpected = module.double().load_state_dict(state, strict=False)
    assert not unexpected
    assert all(name.endswith("num_batches_tracked") for name in missing)
    return module.eval()


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def uniform(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


def output_of(seed=0, with_hr=True):
    sr = uniform(3, 3, 8, 8, seed=seed)
    logits, features = normal(3, 2, seed=seed), normal(3, 5, seed=seed + 1)
    if not with_hr:
        return SHISRCOutput(sr, logits, features)
    return SHISRCOutput(sr, logits, features, normal(3, 2, seed=seed + 2), normal(3, 5, seed=seed + 3))


# What the authors' code computes


def test_mfe_block_is_that_of_the_authors():
    stored = golden("blocks")
    block = loaded(MFEBlock(6, score_norm=True), stored, "mfe", MFE)
    torch.testing.assert_close(block(stored["mfe_in"]), stored["mfe_out"], **EXACT)


def test_csf_block_is_that_of_the_authors():
    stored = golden("blocks")
    block = loaded(CSFBlock(6, 3), stored, "csf", CSF)
    torch.testing.assert_close(block(stored["csf_high"], stored["csf_low"]), stored["csf_out"], **EXACT)


def test_selective_kernel_convolution_is_that_of_the_authors():
    stored = golden("skconv")
    block = loaded(SKConv(16, groups=int(stored["groups"]), reduction=4, least=8), stored, "sk", SK)
    torch.testing.assert_close(block(stored["sk_in"]), stored["sk_out"], **EXACT)


def test_super_resolution_is_that_of_the_authors():
    stored = golden("sr_x2")
    network = loaded(SRResNetMFE(2, width=4, blocks=1, score_norm=True), stored, "sr", SR)
    torch.testing.assert_close(network.features(stored["lr"]), stored["sr_feature"], **EXACT)
    torch.testing.assert_close(network(stored["lr"]), stored["sr"], **EXACT)


def test_focal_loss_and_its_gradient_are_those_of_the_authors():
    stored = golden("focal")
    logits, labels, gamma = stored["logits"].requires_grad_(), stored["labels"], float(stored["gamma"])
    loss = focal_loss(logits, labels, gamma)
    torch.testing.assert_close(loss, stored["loss"], **EXACT)
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], stored["grad_logits"], **EXACT)
    weighted = focal_loss(logits, labels, gamma, stored["alpha"][:, 0])
    torch.testing.assert_close(weighted, stored["loss_alpha"], **EXACT)


# Sizes


@pytest.mark.parametrize(("scale", "count"), [(2, 733_120), (4, 880_832), (8, 1_028_544)])
def test_super_resolution_has_the_published_number_of_parameters(scale, count):
    assert parameters(SRResNetMFE(scale, score_norm=True)) == count
    assert parameters(SRResNetMFE(scale)) == count - 3 * 4 * 3 * 64  # without bias and batch norm of the scores


def test_classifier_has_the_published_number_of_parameters():
    assert parameters(ClassifierCF(2)) == 615_778


@given(st.sampled_from([2, 4, 8]), st.integers(1, 9), st.integers(1, 9), st.booleans())
@settings(max_examples=15, deadline=None)
def test_output_is_exactly_scale_times_as_large(scale, height, width, skip):
    network = SRResNetMFE(scale, width=4, blocks=1, bicubic_skip=skip).eval()
    assert network(torch.zeros(1, 3, height, width)).shape == (1, 3, scale * height, scale * width)


@pytest.mark.parametrize("side", [32, 33, 40, 64, 100])
def test_classifier_takes_images_of_any_size(side):
    features, logits = ClassifierCF(3).eval()(uniform(2, 3, side, side))
    assert features.shape == (2, 384)
    assert logits.shape == (2, 3)


def test_backbone_has_128_channels_at_an_eighth_of_the_size():
    assert SKNet26().eval()(uniform(1, 3, 96, 64)).shape == (1, 128, 12, 8)


def test_bilinear_resizing_of_the_small_map_has_no_effect_where_sizes_fit():
    block = CSFBlock(4, 2).eval()
    low = normal(2, 4, 3, 2)
    assert torch.equal(block.up(low), nn.functional.interpolate(block.up(low), size=(6, 4), mode="bilinear"))
    assert block(normal(2, 4, 5, 5), low).shape == (2, 4, 5, 5)


# Branches


@given(
    arrays(np.float64, st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(1, 4)), elements=st.floats(-30, 30))
)
@settings(max_examples=50, deadline=None)
def test_weights_of_branches_sum_to_one_and_equal_branches_give_back_the_branch(values):
    scores = list(torch.from_numpy(values)[..., None, None])
    weights = branch_weights(scores)
    torch.testing.assert_close(weights.sum(0), torch.ones_like(scores[0]))
    branch = normal(*scores[0].shape[:2], 3, 2, dtype=torch.float64)
    torch.testing.assert_close(weigh_branches([branch] * len(scores), scores), branch)


def test_every_block_weighs_its_branches_like_that(monkeypatch):
    seen = []

    def watched(scores):
        weights = branch_weights(scores)
        seen.append(weights)
        return weights

    monkeypatch.setattr("poise.medical.histopathology.shisrcnet.blocks.branch_weights", watched)
    with torch.no_grad():
        MFEBlock(8)(normal(2, 8, 6, 6))
        SKConv(32)(normal(2, 32, 6, 6))
        CSFBlock(8, 4)(normal(2, 8, 6, 6), normal(2, 8, 3, 3))
    assert [len(weights) for weights in seen] == [4, 2, 2]
    for weights in seen:
        torch.testing.assert_close(weights.sum(0), torch.ones_like(weights[0]))


def test_chain_of_dilated_convolutions_sees_31_pixels():
    block = MFEBlock(2).double().eval()
    x = torch.zeros(1, 2, 41, 41, dtype=torch.float64, requires_grad=True)
    links = [link[0] for link in block.links]
    with torch.no_grad():
        for convolution in links:  # positive weights: nothing cancels and no ReLU is closed
            convolution.weight.abs_()
    branches = []
    for link in block.links:
        branches.append(link(branches[-1] + x + 1 if branches else x + 1))
    (gradient,) = torch.autograd.grad(branches[-1][0, 0, 20, 20], x)
    rows = gradient[0].abs().sum((0, 2)).nonzero().flatten()
    assert (rows.min().item(), rows.max().item()) == (5, 35)


def test_released_scores_are_never_below_one_half():
    block = MFEBlock(6, score_norm=True).eval()
    scores = torch.stack([scorer(normal(4, 6, 1, 1)).sigmoid() for scorer in block.scorers])
    assert scores.min() >= 0.5
    plain = torch.stack([scorer(normal(4, 6, 1, 1)).sigmoid() for scorer in MFEBlock(6).scorers])
    assert plain.min() < 0.5


# Training and evaluation


@pytest.mark.parametrize(
    ("module", "inputs"),
    [
        (SKConv(32), (3, 32, 6, 6)),
        (SKUnit(32, 32, 64), (3, 32, 6, 6)),
        (SKNet26(), (3, 3, 32, 32)),
        (CrossScalePyramid(8, 4), (3, 8, 8, 8)),
        (ClassifierCF(2), (3, 3, 32, 32)),
        (MFEBlock(4, score_norm=True), (3, 4, 6, 6)),
        (SRResNetMFE(2, width=4, blocks=1, score_norm=True), (3, 3, 6, 6)),
    ],
)
def test_a_batch_of_one_is_refused_in_training_and_fine_in_evaluation(module, inputs):
    module.train()
    with pytest.raises(ValueError, match="a batch of at least 2 images, got 1"):
        module(normal(*inputs)[:1])
    module.eval()
    module(normal(*inputs)[:1])


def test_without_normalized_scores_super_resolution_trains_on_one_image():
    network = SRResNetMFE(2, width=4, blocks=1)
    network(uniform(1, 3, 6, 6)).mean().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def small(**arguments):
    torch.manual_seed(0)
    return SHISRCNet(2, upscaler=SRResNetMFE(2, width=8, blocks=1), **arguments)


def test_evaluation_is_deterministic_and_batches_do_not_mix():
    model, lr = small().eval(), uniform(3, 3, 16, 16)
    first, second = model(lr), model(lr)
    assert torch.equal(first.logits, second.logits)
    torch.testing.assert_close(model(lr[1:2]).logits, first.logits[1:2])


@pytest.mark.parametrize("training", [True, False])
def test_the_high_resolution_branch_changes_nothing_of_the_other(training):
    lr, hr = uniform(3, 3, 16, 16), uniform(3, 3, 32, 32, seed=1)
    model = small().train(training)
    torch.manual_seed(0)  # of dropout
    alone = model(lr)
    torch.manual_seed(0)
    both = model(lr, hr)
    assert alone.hr_logits is None
    assert alone.hr_features is None
    assert torch.equal(alone.sr, both.sr)
    assert torch.equal(alone.logits, both.logits)
    assert torch.equal(alone.features, both.features)
    torch.manual_seed(0)
    if not training:
        assert torch.equal(both.hr_logits, model.classifier(hr)[1])


def test_one_joint_batch_shares_its_statistics_and_is_the_same_in_evaluation():
    lr, hr = uniform(3, 3, 16, 16), uniform(3, 3, 32, 32, seed=1)
    separate, joint = small(), small(joint_batch=True)
    for training, same in ((True, False), (False, True)):
        first, second = (model.train(training)(lr, hr) for model in (separate, joint))
        assert torch.equal(first.sr, second.sr)
        assert torch.allclose(first.features, second.features, atol=1e-5) is same
        assert second.hr_features.shape == first.hr_features.shape
        separate.load_state_dict(joint.state_dict())


@pytest.mark.parametrize("detach", [False, True])
def test_gradient_of_the_classification_reaches_the_super_resolution_unless_cut(detach):
    model, criterion = small(detach_sr=detach), SHISRCLoss()
    hr, labels = uniform(4, 3, 32, 32), torch.tensor([0, 1, 1, 0])
    terms = criterion(model(uniform(4, 3, 16, 16), hr), hr, labels)
    weights = list(model.upscaler.parameters())
    for name in ("classification", "contrastive"):
        found = torch.autograd.grad(terms[name], weights, retain_graph=True, allow_unused=True)
        if detach:
            assert all(gradient is None for gradient in found)
        else:
            assert sum(gradient.abs().sum() for gradient in found if gradient is not None) > 0
    assert torch.autograd.grad(terms["sr"], weights)[0].abs().sum() > 0


def test_skip_starts_near_the_bicubic_image():
    torch.manual_seed(0)
    network = SRResNetMFE(2, width=8, blocks=1, bicubic_skip=True).eval()
    nn.init.zeros_(network.up[-1].weight)
    lr = uniform(1, 3, 8, 8)
    assert torch.equal(network(lr), nn.functional.interpolate(lr, scale_factor=2, mode="bicubic"))


# Other libraries


def test_focal_loss_is_that_of_monai():
    from monai.losses import FocalLoss

    for classes, gamma in ((2, 5.0), (4, 2.0), (3, 0.0)):
        logits = normal(7, classes).requires_grad_()
        labels = torch.arange(7) % classes
        theirs = FocalLoss(to_onehot_y=True, use_softmax=True, gamma=gamma, reduction="none")
        # its own mean is over classes too, and its one-hot labels are float32
        expected = theirs(logits, labels[:, None]).sum(1).mean()
        ours = focal_loss(logits, labels, gamma)
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-7)
        slopes = [torch.autograd.grad(value, logits)[0] for value in (ours, expected)]
        torch.testing.assert_close(*slopes, rtol=1e-5, atol=1e-7)


def test_softmax_form_of_two_classes_is_the_sigmoid_form_of_torchvision():
    from torchvision.ops import sigmoid_focal_loss

    z, labels = 3 * normal(9, dtype=torch.float64), torch.arange(9) % 2
    theirs = sigmoid_focal_loss(z, labels.double(), alpha=-1, gamma=5.0, reduction="mean")
    ours = focal_loss(torch.stack([torch.zeros_like(z), z], 1), labels, 5.0)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_selective_kernel_convolution_is_that_of_timm():
    from timm.layers import SelectiveKernel

    ours = SKConv(16, groups=4, reduction=2, least=8).double().eval()
    theirs = SelectiveKernel(16, groups=4, rd_channels=8, split_input=False).double().eval()
    with torch.no_grad():
        for mine, other in zip(ours.branches, theirs.paths, strict=True):
            other.conv.weight.copy_(mine[0].weight)
            assert other.conv.dilation == mine[0].dilation
        theirs.attn.fc_reduce.weight.copy_(ours.squeeze[0].weight)
        theirs.attn.fc_select.weight.copy_(torch.cat([scorer.weight for scorer in ours.scorers]))
        for scorer in ours.scorers:
            scorer.bias.zero_()  # timm has none
    x = normal(3, 16, 7, 7, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-9, atol=1e-9)


def of_timm():
    import timm

    return WithFeatures(timm.create_model("resnet10t", num_classes=2), "fc"), 512


def of_monai():
    from monai.networks.nets import DenseNet121

    return WithFeatures(DenseNet121(spatial_dims=2, in_channels=3, out_channels=2), "class_layers.out"), 1_024


@pytest.mark.parametrize("build", [of_timm, of_monai])
def test_classifiers_of_other_libraries_take_the_place_of_ours(build):
    classifier, width = build()
    model, criterion = small(classifier=classifier), SHISRCLoss()
    hr, labels = uniform(2, 3, 64, 64), torch.tensor([0, 1])
    output = model(uniform(2, 3, 32, 32), hr)
    assert output.features.shape == (2, width)
    assert output.logits.shape == (2, 2)
    criterion(output, hr, labels)["loss"].backward()
    assert model.upscaler.head.weight.grad.abs().sum() > 0
    head = classifier.network.get_submodule(classifier.head)
    torch.testing.assert_close(head(output.features), output.logits)


# Bad input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SRResNetMFE(3), r"scale must be one of \(2, 4, 8\), got 3"),
        (lambda: SHISRCNet(16), "scale must be one of"),
        (lambda: SRResNetMFE(2, blocks=0), "blocks must be at least 1"),
        (lambda: MFEBlock(4, dilations=()), "dilations must hold"),
        (lambda: MFEBlock(4, dilations=(1, 0)), "dilations must hold"),
        (lambda: SKConv(32, branches=1), "branches must be at least 2"),
        (lambda: SKConv(48), "48 channels and 32 groups"),
        (lambda: ClassifierCF(0), "num_classes must be at least 1"),
        (lambda: SHISRCLoss(w_con=-0.1), "w_con must be finite and not negative"),
        (lambda: SHISRCLoss(w_sr=float("nan")), "w_sr must be finite and not negative"),
        (
            lambda: SHISRCLoss()(output_of(), uniform(3, 3, 8, 6), torch.zeros(3).long()),
            r"\(3, 3, 8, 8\), got \(3, 3, 8, 6\)",
        ),
        (
            lambda: small()(uniform(2, 3, 8, 8), uniform(2, 3, 15, 16)),
            r"expected \(2, 3, 16, 16\).*got \(2, 3, 15, 16\)",
        ),
        (lambda: CSFBlock(4, 2)(normal(2, 4, 6, 6), normal(3, 4, 3, 3)), "same batch and channels"),
        (lambda: WithFeatures(nn.Sequential(nn.Linear(2, 2)), "head"), "no module matches 'head'"),
        (lambda: WithFeatures(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), "*"), "matches"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
