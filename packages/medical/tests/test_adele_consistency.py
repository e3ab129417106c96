"""Predictions at several scales, their consistency, and the loss."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.core.functional import js_divergence
from poise.medical import (
    AdeleLoss,
    MultiscaleConsistency,
    multiscale_consistency,
    multiscale_forward,
    multiscale_probabilities,
)

GOLDEN = Path(__file__).parent / "golden" / "adele"
SCALES = ("small", "base", "large")

seeds = st.integers(0, 2**32 - 1)


def golden(name: str) -> tuple[dict, list[torch.Tensor], torch.Tensor]:
    data = dict(np.load(GOLDEN / f"{name}.npz"))
    logits = [torch.tensor(data[f"logits_{scale}"], requires_grad=True) for scale in SCALES]
    return data, logits, torch.tensor(data["labels"])


def three(seed: int, *shape: int, spread: float = 2.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [spread * torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(3)]


@pytest.mark.parametrize("name", ["jsd_multiscale", "jsd_gated"])
def test_consistency_agrees_with_the_authors(name):
    data, logits, labels = golden(name)
    value, divergence, mixture = multiscale_consistency(logits, ignore_mask=labels == 255, gate=float(data["rho"]))
    assert value.item() == pytest.approx(float(data["consistency"]), abs=1e-9)
    assert divergence.detach().numpy() == pytest.approx(data["consistency_map"], abs=1e-9)
    assert mixture.detach().numpy() == pytest.approx(data["mixture"], abs=1e-9)


@pytest.mark.parametrize("name", ["jsd_multiscale", "jsd_gated"])
def test_loss_and_gradient_agree_with_the_authors(name):
    data, logits, labels = golden(name)
    criterion = AdeleLoss(float(data["lam"]), float(data["rho"]))
    loss = criterion(logits, labels)
    loss.backward()
    assert loss.item() == pytest.approx(float(data["loss"]), abs=1e-9)
    assert criterion.cross_entropy.item() == pytest.approx(float(data["ce"]), abs=1e-9)
    assert criterion.consistency.value.item() == pytest.approx(float(data["consistency"]), abs=1e-9)
    for each, scale in zip(logits, SCALES, strict=True):
        assert each.grad.numpy() == pytest.approx(data[f"grad_{scale}"], abs=1e-9)


def test_learned_equal_weights_give_the_same_loss_and_get_a_gradient():
    data, logits, labels = golden("jsd_multiscale")
    criterion = AdeleLoss(float(data["lam"]), float(data["rho"]), learn_weights=True).double()
    loss = criterion(logits, labels)
    assert loss.item() == pytest.approx(float(data["loss"]), abs=1e-9)
    loss.backward()
    assert criterion.weights.grad.abs().max() > 1e-6
    assert criterion.weights.grad.sum().abs() < 1e-12  # a softmax does not change when all its inputs do


def test_without_average_the_loss_is_three_times_as_large():
    data, logits, labels = golden("jsd_gated")
    assert AdeleLoss(average=False)(logits, labels).item() == pytest.approx(3 * float(data["loss"]), abs=1e-9)


def test_untempered_cross_entropy_is_the_plain_one():
    _, logits, labels = golden("jsd_gated")
    expected = sum(
        torch.nn.functional.cross_entropy(each, labels, ignore_index=255, reduction="sum") / labels.numel()
        for each in logits
    )
    criterion = AdeleLoss(0.0, tempered=False)
    assert criterion(logits, labels).item() == pytest.approx(expected.item() / 3)
    assert criterion.cross_entropy.item() == pytest.approx(expected.item())


def test_one_scale_without_consistency_is_cross_entropy_over_all_pixels():
    (logits, *_), labels = three(0, 2, 3, 5, 5), torch.randint(0, 3, (2, 5, 5))
    assert AdeleLoss(0.0, scales=1)([logits], labels).item() == pytest.approx(
        torch.nn.functional.cross_entropy(logits, labels).item()
    )


@settings(deadline=None, max_examples=25)
@given(seeds, st.floats(0.0, 2.0))
def test_equal_predictions_are_consistent_and_have_no_gradient(seed, spread):
    logits = three(seed, 2, 4, 3, 3, spread=spread)[0].requires_grad_()
    assert logits.softmax(1).min() > 1e-3 / 3 or spread > 1
    inside = ((logits.softmax(1) > 1e-3) & (logits.softmax(1) < 1 - 1e-3)).all()
    value, _, _ = multiscale_consistency([logits, logits, logits], gate=0.0)
    (gradient,) = torch.autograd.grad(value, logits)
    if inside:
        assert value.item() == pytest.approx(0, abs=1e-12)
        assert gradient.abs().max() < 1e-12


@settings(deadline=None, max_examples=25)
@given(seeds, st.floats(0.1, 30.0))
def test_consistency_lies_between_zero_and_its_bound(seed, spread):
    _, divergence, _ = multiscale_consistency(three(seed, 2, 4, 3, 3, spread=spread), gate=0.0)
    assert divergence.min() >= -4e-3  # the mixture is clamped and not renormalised, by 1e-3 for each class
    assert divergence.max() <= 3 * np.log(3) + 1e-9


@settings(deadline=None, max_examples=25)
@given(seeds)
def test_consistency_is_three_times_the_jensen_shannon_divergence_inside_the_clamp(seed):
    logits = three(seed, 2, 3, 4, 4, spread=1.0)
    _, divergence, mixture = multiscale_consistency(logits, gate=0.0)
    inside = ((mixture > 1e-3) & (mixture < 1 - 1e-3)).all(1)
    assert inside.any()
    assert divergence[inside].numpy() == pytest.approx(3 * js_divergence(*logits, dim=1)[inside].numpy(), abs=1e-12)


@settings(deadline=None, max_examples=10)
@given(seeds, st.permutations(range(3)))
def test_consistency_does_not_depend_on_the_order_of_scales(seed, order):
    logits = three(seed, 2, 3, 4, 4)
    for one, other in zip(
        multiscale_consistency(logits), multiscale_consistency([logits[place] for place in order]), strict=True
    ):
        assert one.numpy() == pytest.approx(other.numpy(), abs=1e-12)


def test_a_closed_gate_gives_exactly_nothing():
    logits = [each.requires_grad_() for each in three(0, 2, 3, 4, 4)]
    value, divergence, _ = multiscale_consistency(logits, gate=1.0)  # the clamp keeps the mixture below 1
    assert value.item() == 0
    assert not divergence.any()
    assert all(not each.any() for each in torch.autograd.grad(value, logits))


def test_the_gate_is_one_per_image_and_does_not_see_ignored_pixels():
    logits = [each.clone() for each in three(0, 2, 3, 4, 4, spread=0.1)]
    for each in logits:
        each[1, 0, 2, 2] = 9.0  # one confident pixel
    _, divergence, _ = multiscale_consistency(logits, gate=0.8)
    assert not divergence[0].any()
    assert divergence[1].count_nonzero() == 16  # all pixels of that image
    mask = torch.zeros(2, 4, 4, dtype=torch.bool)
    mask[1, 2, 2] = True
    assert not multiscale_consistency(logits, ignore_mask=mask, gate=0.8)[1].any()


def test_the_mixture_is_part_of_the_gradient():
    # With equal weights it makes no difference: the gradient of sum_i p_i log q in q is then the same for all classes.
    logits, weights = [each.requires_grad_() for each in three(1, 1, 3, 2, 2)], torch.tensor([1.0, 0.0, -1.0])
    value, _, mixture = multiscale_consistency(logits, weights, gate=0.0)
    whole = torch.autograd.grad(value, logits, retain_graph=True)[0]
    p = [each.softmax(1) for each in logits]
    detached = sum((q * (q.log() - mixture.detach().log())).sum(1) for q in p).mean()
    assert detached.item() == pytest.approx(value.item())
    assert (whole - torch.autograd.grad(detached, logits)[0]).abs().max() > 1e-4


def test_ignored_pixels_have_no_gradient_in_the_cross_entropy():
    _, logits, labels = golden("jsd_gated")
    AdeleLoss(0.0)(logits, labels).backward()
    for each in logits:
        assert not each.grad.movedim(1, -1)[labels == 255].any()
        assert each.grad.movedim(1, -1)[labels != 255].abs().min() > 0


def test_half_precision_logits_give_a_float32_loss():
    logits, labels = [each.bfloat16() for each in three(0, 2, 3, 4, 4)], torch.randint(0, 3, (2, 4, 4))
    loss = AdeleLoss()(logits, labels)
    assert loss.dtype == torch.float32
    assert loss.isfinite()


def test_volumes_give_the_loss_of_their_slices():
    logits = three(0, 2, 3, 4, 5, 6)
    labels = torch.randint(0, 3, (2, 4, 5, 6))
    flat = [each.flatten(2, 3) for each in logits]
    criterion = AdeleLoss()
    assert criterion(logits, labels).item() == pytest.approx(criterion(flat, labels.flatten(1, 2)).item())


LOGITS, LABELS = three(0, 2, 3, 4, 4), torch.zeros(2, 4, 4, dtype=torch.long)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: multiscale_consistency([]), ValueError, "one shape"),
        (lambda: multiscale_consistency([LOGITS[0], LOGITS[1][..., :3]]), ValueError, "one shape"),
        (lambda: multiscale_consistency([LOGITS[0][0]]), ValueError, "height, width"),
        (lambda: multiscale_consistency(LOGITS, torch.ones(2)), ValueError, "each of 3 scales"),
        (lambda: multiscale_consistency(LOGITS, ignore_mask=LABELS[:, :2] == 1), ValueError, "ignore_mask must have"),
        (lambda: MultiscaleConsistency(gate=2.0), ValueError, "gate must lie"),
        (lambda: AdeleLoss(scales=0), ValueError, "scales must be"),
        (lambda: AdeleLoss()(LOGITS[:2], LABELS), ValueError, "3 scales, got 2"),
        (lambda: AdeleLoss()(LOGITS, LABELS[:, :3]), ValueError, "must have the shape"),
        (lambda: AdeleLoss()(LOGITS, LABELS + 3), ValueError, r"classes 0..2, or 255 to ignore a pixel; got \[3\]"),
        (lambda: AdeleLoss()(LOGITS, LABELS.float()), TypeError, "integer"),
    ],
)
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


# Forward at several scales


def test_the_loss_takes_integer_labels_only():
    assert AdeleLoss()(LOGITS, LABELS.to(torch.uint8)).item() == pytest.approx(AdeleLoss()(LOGITS, LABELS).item())


@pytest.mark.parametrize("dims", [2, 3])
def test_one_scale_of_one_is_the_model(dims):
    convolution = (torch.nn.Conv2d, torch.nn.Conv3d)[dims - 2](1, 3, 3, padding=1)
    x = torch.randn(2, 1, *(8, 10, 6)[:dims])
    (logits,) = multiscale_forward(convolution, x, (1.0,))
    assert torch.equal(logits, convolution(x))


@pytest.mark.parametrize("dims", [2, 3])
def test_scales_are_seen_resized_with_corners_aligned(dims):
    seen = []

    def spy(x):
        seen.append(x)
        return x

    x = torch.randn(2, 3, *(20, 30, 10)[:dims])
    logits = multiscale_forward(spy, x)
    assert [tuple(each.shape[2:]) for each in seen] == [(14, 21, 7)[:dims], (20, 30, 10)[:dims], (30, 45, 15)[:dims]]
    for each in seen:
        for corner in ((..., *[0] * dims), (..., *[-1] * dims)):
            assert (each[corner] - x[corner]).abs().max() < 1e-5
    assert all(each.shape == x.shape for each in logits)


def test_logits_of_a_coarse_network_come_back_to_the_image():
    model = torch.nn.Conv2d(1, 3, 3, stride=2, padding=1)
    assert {each.shape for each in multiscale_forward(model, torch.randn(2, 1, 17, 20))} == {(2, 3, 17, 20)}


@pytest.mark.parametrize("dims", [2, 3])
def test_any_monai_network_goes_through(dims):
    from monai.networks.nets import UNet

    model = UNet(spatial_dims=dims, in_channels=1, out_channels=3, channels=(4, 8, 16), strides=(2, 2))
    x = torch.randn(2, 1, *[20] * dims)
    logits = multiscale_forward(model, x, divisor=4)
    AdeleLoss()(logits, torch.zeros(2, *[20] * dims, dtype=torch.long)).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_probabilities_are_of_evaluation_mode_and_leave_the_model_as_it_was():
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 3, 1), torch.nn.BatchNorm2d(3), torch.nn.Dropout(0.5))
    model.train()
    model[1].eval()  # frozen by its user
    modes = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.randn(2, 1, 8, 8)
    one, two = (multiscale_probabilities(model, x, flip=True) for _ in range(2))
    assert torch.equal(one, two)
    assert not one.requires_grad
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_probabilities_of_a_mirrored_image_are_mirrored():
    model, x = torch.nn.Conv2d(1, 3, 3, padding=1), torch.randn(2, 1, 12, 12)
    mirrored = multiscale_probabilities(model, x.flip(-1), flip=True)
    assert torch.allclose(mirrored.flip(-1), multiscale_probabilities(model, x, flip=True), atol=1e-6)


def test_temperature_divides_the_mean_logits():
    model, x = torch.nn.Conv2d(1, 3, 1), torch.randn(1, 1, 4, 4)
    expected = (model(x) / 3).softmax(1)
    assert torch.allclose(multiscale_probabilities(model, x, (1.0,), temperature=3.0), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: multiscale_forward(torch.square, torch.randn(2, 3, 4)), "height, width"),
        (lambda: multiscale_forward(torch.square, LOGITS[0], ()), "scales must be positive"),
        (lambda: multiscale_forward(torch.square, LOGITS[0], (1.0, -1.0)), "scales must be positive"),
        (lambda: multiscale_forward(torch.square, LOGITS[0], divisor=0), "divisor"),
        (lambda: multiscale_probabilities(torch.square, LOGITS[0], temperature=0.0), "temperature"),
    ],
)
def test_forward_refuses_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
