"""Laws of poise.core.functional.focal."""

import inspect
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn.functional import cross_entropy

from poise.core.functional import focal_loss

law = settings(deadline=None, max_examples=50)
logit_tables = arrays(
    np.float64, st.tuples(st.integers(1, 6), st.integers(2, 4)), elements=st.floats(-20, 20, width=32)
).map(torch.from_numpy)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


def labels_of(logits: Tensor) -> Tensor:
    return torch.arange(len(logits)) % logits.shape[1]


@law
@given(logits=logit_tables)
def test_without_focus_it_is_the_cross_entropy(logits: Tensor) -> None:
    labels = labels_of(logits)
    for reduction in ("mean", "sum", "none"):
        expected = cross_entropy(logits, labels, reduction=reduction)
        torch.testing.assert_close(focal_loss(logits, labels, gamma=0, reduction=reduction), expected)


@law
@given(logits=logit_tables, gamma=st.floats(0.0, 6.0))
def test_it_is_the_formula(logits: Tensor, gamma: float) -> None:
    labels = labels_of(logits)
    p = logits.softmax(1).gather(1, labels[:, None])[:, 0]
    alpha = torch.linspace(0.5, 2, logits.shape[1], dtype=torch.float64)
    expected = -alpha[labels] * (1 - p) ** gamma * p.log()
    torch.testing.assert_close(
        focal_loss(logits, labels, gamma, alpha, reduction="none"), expected, rtol=1e-6, atol=1e-9
    )


@law
@given(logits=logit_tables, gamma=st.floats(0.0, 6.0), more=st.floats(0.0, 3.0))
def test_more_focus_never_costs_more(logits: Tensor, gamma: float, more: float) -> None:
    labels = labels_of(logits)
    less = focal_loss(logits, labels, gamma + more, reduction="none")
    assert (less <= focal_loss(logits, labels, gamma, reduction="none") + 1e-12).all()
    assert (less >= 0).all()


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0, 2.0, 5.0])
def test_gradient_is_that_of_the_closed_form(gamma: float) -> None:
    logits, labels = randn(9, 3), torch.arange(9) % 3
    assert gradcheck(lambda x: focal_loss(x, labels, gamma), (logits,))
    (gradient,) = torch.autograd.grad(focal_loss(logits, labels, gamma, reduction="sum"), logits)
    p = logits.detach().softmax(1)
    true = p.gather(1, labels[:, None])
    slope = (gamma * true * (1 - true).pow(gamma - 1) * true.log() - (1 - true).pow(gamma)) if gamma else -1.0
    one_hot = torch.nn.functional.one_hot(labels, 3)
    torch.testing.assert_close(gradient, slope * (one_hot - p))


@pytest.mark.parametrize("gamma", [0.0, 0.1, 0.5, 1.0, 5.0])
@pytest.mark.parametrize("confidence", [5.0, 20.0, 200.0])
def test_sure_and_right_costs_nothing_and_keeps_a_finite_gradient(gamma: float, confidence: float) -> None:
    logits = torch.tensor([[confidence, 0.0]], requires_grad=True)
    loss = focal_loss(logits, torch.tensor([0]), gamma)
    loss.backward()
    assert 0 <= loss.item() < 0.01
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert logits.grad.abs().max() < 0.01


def test_positions_are_losses_of_their_own() -> None:
    logits = randn(2, 3, 4, 5).detach()
    labels = torch.randint(3, (2, 4, 5), generator=torch.Generator().manual_seed(0))
    each = focal_loss(logits, labels, 2.0, reduction="none")
    assert each.shape == (2, 4, 5)
    flat = focal_loss(logits.movedim(1, -1).reshape(-1, 3), labels.reshape(-1), 2.0, reduction="none")
    torch.testing.assert_close(each.reshape(-1), flat)
    torch.testing.assert_close(focal_loss(logits, labels, 2.0), each.mean())


def test_one_weight_for_all_classes_scales_the_loss() -> None:
    logits, labels = randn(6, 3).detach(), torch.arange(6) % 3
    torch.testing.assert_close(focal_loss(logits, labels, alpha=0.25), 0.25 * focal_loss(logits, labels))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    logits, labels = randn(6, 4).detach().to(dtype), torch.arange(6) % 4
    value = focal_loss(logits, labels)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, focal_loss(logits.float(), labels))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: inspect.unwrap(focal_loss)(torch.ones(2, 3), torch.zeros(3).long()),
            ValueError,
            r"got \(3,\) for \(2, 3\)",
        ),
        (lambda: focal_loss(torch.ones(2, 3), torch.zeros(2).long(), -1.0), ValueError, "gamma must not be negative"),
        (
            lambda: inspect.unwrap(focal_loss)(torch.ones(2, 3), torch.zeros(2).long(), 2.0, torch.ones(2)),
            ValueError,
            "alpha must hold 3 weights",
        ),
        (
            lambda: focal_loss(torch.ones(2, 3), torch.zeros(2).long(), reduction="max"),
            ValueError,
            "reduction must be",
        ),
        (
            lambda: inspect.unwrap(focal_loss)(torch.ones(2, 3).long(), torch.zeros(2).long()),
            TypeError,
            "logits must be floating-point",
        ),
    ],
)
def test_bad_input_is_refused(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
