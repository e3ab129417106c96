"""Laws of the diagnostics of softmax collapse and of naive loss minimisation."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from poise.core import algorithmic_mlp, nlm_cosine, perp_grad_, softmax_collapse_fraction, zero_loss_fraction

law = settings(deadline=None, max_examples=50)

TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.mark.parametrize("dtype", TYPES)
def test_equal_logits_have_not_collapsed_and_far_apart_ones_have(dtype: torch.dtype) -> None:
    assert softmax_collapse_fraction(torch.zeros(4, 5), dtype) == 0
    assert softmax_collapse_fraction(100 * torch.eye(5), dtype) == 1
    assert softmax_collapse_fraction(torch.cat([100 * torch.eye(3), torch.zeros(1, 3)])[None], dtype) == 0.75


@pytest.mark.parametrize("dtype", TYPES)
def test_a_single_rival_vanishes_beyond_half_the_spacing_at_one(dtype: torch.dtype) -> None:
    threshold = -math.log(torch.finfo(dtype).eps / 2)
    for margin, collapsed in ((threshold - 0.1, 0), (threshold + 0.1, 1)):
        assert softmax_collapse_fraction(torch.tensor([[margin, 0.0]], dtype=torch.float64), dtype) == collapsed


@law
@given(st.floats(0, 40), st.integers(2, 6))
def test_collapse_and_a_loss_of_zero_come_together(margin: float, classes: int) -> None:
    logits = margin * F.one_hot(torch.tensor([0]), classes).float()
    loss = F.cross_entropy(logits, torch.tensor([0]), reduction="none")
    assert softmax_collapse_fraction(logits) == zero_loss_fraction(loss)


@pytest.mark.parametrize("logits", [torch.zeros(3, 1), torch.zeros(0, 3), torch.tensor(1.0)])
def test_logits_of_no_sample_or_one_class_are_refused(logits: Tensor) -> None:
    with pytest.raises((ValueError, TypeError)):
        softmax_collapse_fraction(logits)


def test_types_without_fractions_are_refused() -> None:
    with pytest.raises(TypeError, match="floating-point"):
        softmax_collapse_fraction(torch.zeros(2, 2), torch.int32)


def test_zero_losses_are_counted_exactly() -> None:
    assert zero_loss_fraction(torch.tensor([0.0, 1e-38, -0.0, 2.0])) == 0.5
    with pytest.raises(ValueError, match="losses of samples"):
        zero_loss_fraction(torch.zeros(0))


@law
@given(st.integers(0, 2**31))
def test_cosine_is_that_of_all_entries_together(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    params = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((3, 2), (4,))]
    grads = [torch.randn(param.shape, generator=generator, dtype=torch.float64) for param in params]
    w, g = (torch.cat([part.flatten() for part in side]) for side in (params, grads))
    torch.testing.assert_close(nlm_cosine(params, grads), F.cosine_similarity(-g, w, dim=0))
    each = torch.stack(
        [F.cosine_similarity(-g.flatten(), w.flatten(), dim=0) for w, g in zip(params, grads, strict=True)]
    )
    torch.testing.assert_close(nlm_cosine(params, grads, per_layer=True), each)


def test_gradient_against_the_weights_has_cosine_one_and_perp_grad_zero() -> None:
    weight = nn.Parameter(torch.tensor([3.0, -4.0]))
    weight.grad = -0.1 * weight.detach()
    assert nlm_cosine([weight]) == 1
    weight.grad = torch.tensor([1.0, 2.0])
    perp_grad_([weight])
    assert nlm_cosine([weight]).abs() < 1e-6


def test_scaling_the_weights_of_a_classifier_without_biases_is_naive_loss_minimisation() -> None:
    """Once all samples are classified, the loss falls along the weights, by Euler's theorem for homogeneous functions."""
    torch.manual_seed(0)
    model = algorithmic_mlp(4, 3, hidden=(16,)).double()
    x = torch.randn(8, 4, dtype=torch.float64)
    labels = model(x).argmax(-1)
    F.cross_entropy(model(x), labels).backward()
    weights = list(model.parameters())
    along = -sum((w * w.grad).sum() for w in weights if w.grad is not None)
    logits = model(x).detach().requires_grad_()
    F.cross_entropy(logits, labels).backward()
    assert logits.grad is not None
    torch.testing.assert_close(along, -2 * (logits * logits.grad).sum())
    assert nlm_cosine(weights) > 0


def test_zero_weights_or_gradients_have_cosine_zero() -> None:
    zero, one = torch.zeros(2), torch.ones(2)
    assert nlm_cosine([zero], [one]) == 0
    assert nlm_cosine([one], [zero]) == 0
    assert nlm_cosine([one, zero], [-one, one], per_layer=True).tolist() == pytest.approx([1, 0])


def test_tiny_gradients_do_not_underflow() -> None:
    weight, gradient = torch.full((4,), 1e-3), torch.full((4,), -1e-18)
    assert nlm_cosine([weight], [gradient]).item() == pytest.approx(1)


def test_parameters_without_a_gradient_do_not_count() -> None:
    one = torch.ones(2)
    assert nlm_cosine([one, 5 * one], [-one, None]).item() == pytest.approx(1)
    assert nlm_cosine([one, one], [-one, None], per_layer=True).shape == (1,)


@pytest.mark.parametrize(
    ("params", "grads", "message"),
    [
        ([torch.ones(2)], None, "no parameter has a gradient"),
        ([torch.ones(2)], [], "one gradient per parameter"),
        ([torch.ones(2)], [torch.ones(3)], "size of their parameters"),
    ],
)
def test_gradients_that_do_not_fit_are_refused(params: Any, grads: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        nlm_cosine(params, grads)
