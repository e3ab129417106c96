"""Laws of poise.core.functional.divergences."""

import inspect
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor
from torch.autograd import gradcheck
from torch.distributions import Categorical
from torch.distributions import kl_divergence as reference_kl

from poise.core.functional import entropy, js_divergence, kl_divergence

law = settings(deadline=None, max_examples=50)
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def pairs(count: int) -> st.SearchStrategy[list[Tensor]]:
    """That many logit vectors of one length."""
    return st.integers(1, 6).flatmap(
        lambda size: st.lists(
            arrays(np.float64, size, elements=st.floats(-20, 20)).map(torch.from_numpy), min_size=count, max_size=count
        )
    )


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


@law
@given(logits=pairs(2))
def test_values_are_those_of_torch_distributions(logits: list[Tensor]) -> None:
    p, q = (Categorical(logits=each) for each in logits)
    torch.testing.assert_close(entropy(logits[0]), p.entropy(), **CLOSE)
    torch.testing.assert_close(kl_divergence(*logits), reference_kl(p, q), **CLOSE)
    mean = Categorical(probs=(p.probs + q.probs) / 2)
    torch.testing.assert_close(js_divergence(*logits), (reference_kl(p, mean) + reference_kl(q, mean)) / 2, **CLOSE)


@law
@given(logits=pairs(1), shift=st.floats(-50, 50))
def test_entropy_lies_between_zero_and_log_n_and_ignores_shifts_and_order(logits: list[Tensor], shift: float) -> None:
    value = entropy(logits[0])
    assert -1e-12 <= value <= math.log(len(logits[0])) + 1e-12
    torch.testing.assert_close(entropy(logits[0].flip(0) + shift), value, **CLOSE)


def test_entropy_is_log_n_with_gradient_zero_for_equal_logits() -> None:
    logits = torch.full((2, 7), 3.0, dtype=torch.float64, requires_grad=True)
    value = entropy(logits)
    torch.testing.assert_close(value, torch.full((2,), math.log(7), dtype=torch.float64), rtol=1e-12, atol=0)
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    torch.testing.assert_close(gradient, torch.zeros_like(logits), rtol=0, atol=1e-15)


def test_the_gradient_of_entropy_is_its_closed_form() -> None:
    logits = randn(3, 5)
    (gradient,) = torch.autograd.grad(entropy(logits).sum(), logits)
    p = logits.softmax(-1)
    torch.testing.assert_close(gradient, -p * (p.log() + entropy(logits)[:, None]))


@law
@given(logits=pairs(2))
def test_divergences_are_not_negative_and_zero_between_equals(logits: list[Tensor]) -> None:
    p, q = logits
    assert kl_divergence(p, q) >= -1e-12
    assert kl_divergence(p, p) == 0
    assert -1e-12 <= js_divergence(p, q) <= math.log(2) + 1e-12
    torch.testing.assert_close(js_divergence(p, p), torch.zeros((), dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(js_divergence(p, q), js_divergence(q, p), **CLOSE)


@law
@given(logits=pairs(3), raw=st.tuples(*[st.floats(0.1, 1)] * 3))
def test_the_general_js_divergence_is_the_gap_of_entropies(logits: list[Tensor], raw: tuple[float, ...]) -> None:
    weights = [weight / sum(raw) for weight in raw]
    mixture = sum(w * each.softmax(0) for w, each in zip(weights, logits, strict=True))
    parts = sum(w * entropy(each) for w, each in zip(weights, logits, strict=True))
    value = js_divergence(*logits, weights=weights)
    torch.testing.assert_close(value, entropy(torch.as_tensor(mixture).log()) - parts, **CLOSE)
    assert value <= -sum(w * math.log(w) for w in weights) + 1e-12


def test_equal_weights_are_the_default() -> None:
    logits = [randn(4, 5, seed=seed) for seed in range(4)]
    torch.testing.assert_close(js_divergence(*logits), js_divergence(*logits, weights=[0.25] * 4))


def test_the_distribution_may_lie_along_any_dimension() -> None:
    p, q = randn(3, 4, 2), randn(3, 4, 2, seed=1)
    mask = torch.arange(4)[:, None] < torch.tensor([2, 3])
    last = (p.transpose(1, 2), q.transpose(1, 2))
    torch.testing.assert_close(entropy(p, mask, dim=1), entropy(last[0], mask.T))
    torch.testing.assert_close(kl_divergence(p, q, mask, dim=-2), kl_divergence(*last, mask.T))
    torch.testing.assert_close(js_divergence(p, q, mask=mask, dim=1), js_divergence(*last, mask=mask.T))


@law
@given(data=st.data(), length=st.integers(1, 4), padding=st.integers(0, 3))
def test_a_padded_row_gives_what_the_row_alone_gives(data: st.DataObject, length: int, padding: int) -> None:
    rows = arrays(np.float64, length + padding, elements=st.floats(-20, 20)).map(torch.from_numpy)
    p, q = data.draw(rows).requires_grad_(), data.draw(rows).requires_grad_()
    mask = torch.arange(length + padding) < length
    for padded, alone in [
        (entropy(p, mask), entropy(p[:length])),
        (kl_divergence(p, q, mask), kl_divergence(p[:length], q[:length])),
        (js_divergence(p, q, mask=mask), js_divergence(p[:length], q[:length])),
    ]:
        torch.testing.assert_close(padded, alone, **CLOSE)
        gradients = torch.autograd.grad(padded, (p, q), allow_unused=True, materialize_grads=True)
        for got, wanted in zip(
            gradients, torch.autograd.grad(alone, (p, q), allow_unused=True, materialize_grads=True), strict=True
        ):
            torch.testing.assert_close(got, wanted, **CLOSE)
            assert torch.equal(got[length:], torch.zeros(padding, dtype=torch.float64))


def test_what_stands_outside_the_mask_is_never_read() -> None:
    clean = randn(2, 4).detach()
    mask = torch.tensor([[True, True, False, True], [True, False, False, True]])
    for poison in (math.nan, math.inf, -math.inf):
        dirty = clean.masked_fill(~mask, poison).requires_grad_()
        value = entropy(dirty, mask)
        torch.testing.assert_close(value, entropy(clean, mask))
        assert torch.autograd.grad(value.sum(), dirty)[0].isfinite().all()


def test_a_logit_of_minus_infinity_is_a_probability_of_zero() -> None:
    p = torch.tensor([0.0, 1.0, -math.inf], dtype=torch.float64, requires_grad=True)
    q = torch.tensor([0.0, -math.inf, -math.inf], dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(entropy(p), entropy(p[:2]))
    torch.testing.assert_close(kl_divergence(q, p), -p.log_softmax(0)[0])
    assert kl_divergence(p, q) == math.inf
    for value in (entropy(p), kl_divergence(q, p), js_divergence(p, q)):
        gradients = torch.autograd.grad(value, (p, q), allow_unused=True, materialize_grads=True)
        assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_logits_far_apart_give_finite_values_and_gradients(dtype: torch.dtype) -> None:
    p = torch.tensor([[1e4, 0.0, -1e4]], dtype=dtype, requires_grad=True)
    q = torch.tensor([[-1e4, 0.0, 1e4]], dtype=dtype, requires_grad=True)
    for value in (entropy(p), kl_divergence(p, q), js_divergence(p, q)):
        assert value.dtype == torch.float32
        assert value.isfinite().all()
        gradients = torch.autograd.grad(value.sum(), (p, q), allow_unused=True, materialize_grads=True)
        assert all(gradient.isfinite().all() and gradient.dtype == dtype for gradient in gradients)
    assert entropy(p) == 0
    assert kl_divergence(p, q).item() == pytest.approx(2e4, rel=1e-2)


def test_one_entry_has_no_entropy() -> None:
    assert torch.equal(entropy(torch.tensor([[3.0], [-5.0]])), torch.zeros(2))


@pytest.mark.parametrize("masked", [False, True])
def test_gradients_match_finite_differences(masked: bool) -> None:
    p, q, r = (randn(3, 4, seed=seed) for seed in range(3))
    mask = torch.tensor([True, True, False, True]) if masked else None
    assert gradcheck(lambda p: entropy(p, mask), p)
    assert gradcheck(lambda p, q: kl_divergence(p, q, mask), (p, q))
    assert gradcheck(lambda *all: js_divergence(*all, weights=(0.2, 0.3, 0.5), mask=mask), (p, q, r))


def test_an_empty_distribution_is_refused() -> None:
    p = torch.zeros(2, 3)
    mask = torch.tensor([[True, False, False], [False, False, False]])
    for call in (entropy, kl_divergence, js_divergence):
        logits = (p,) if call is entropy else (p, p)
        with pytest.raises(ValueError, match="every row needs at least one True"):
            call(*logits, mask=mask)
        with pytest.raises(ValueError, match="at least one entry"):
            call(*(each[:, :0] for each in logits))


def test_inside_a_compiled_graph_an_empty_distribution_gives_nan() -> None:
    compiled = torch.compile(inspect.unwrap(entropy), backend="eager", fullgraph=True)
    values = compiled(torch.zeros(2, 3), torch.tensor([[True, True, False], [False, False, False]]))
    assert values[0] == pytest.approx(math.log(2))
    assert values[1].isnan()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: entropy(torch.zeros(2, 3), torch.ones(4).bool()),
            ValueError,
            r"\(4,\) does not broadcast to \(2, 3\)",
        ),
        (lambda: entropy(torch.zeros(3), torch.ones(2, 3).bool()), ValueError, "does not broadcast"),
        (lambda: inspect.unwrap(entropy)(torch.zeros(3), torch.ones(3)), TypeError, "mask must be boolean"),
        (lambda: inspect.unwrap(entropy)(torch.zeros(3).long()), TypeError, "logits must be floating-point"),
        (lambda: kl_divergence(torch.zeros(3), torch.zeros(1, 3)), ValueError, r"same shape, got \(3,\), \(1, 3\)"),
        (lambda: js_divergence(torch.zeros(3), torch.zeros(4)), ValueError, "same shape"),
        (lambda: js_divergence(torch.zeros(3)), ValueError, "at least two distributions, got 1"),
        (lambda: js_divergence(*[torch.zeros(3)] * 2, weights=[1.0]), ValueError, "got 1 for 2"),
        (lambda: js_divergence(*[torch.zeros(3)] * 2, weights=[0.5, 0.6]), ValueError, "sum to 1"),
        (lambda: js_divergence(*[torch.zeros(3)] * 2, weights=[1.5, -0.5]), ValueError, "positive"),
    ],
)
def test_bad_input_is_refused(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
