"""Laws of poise.core.gates."""

import inspect
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from torch import Tensor
from torch.autograd import gradcheck

from poise.core import gates

law = settings(deadline=None, max_examples=50)
# Few different values, so that ties are the rule.
tied = arrays(np.float64, array_shapes(min_dims=1, max_dims=3, max_side=6), elements=st.sampled_from([-1.0, 0.0, 2.0]))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64).requires_grad_()


def gradient(value: Tensor, of: Tensor, weights: Tensor) -> Tensor:
    return torch.autograd.grad((value * weights).sum(), of)[0]


def test_straight_through_has_exactly_the_hard_value_and_the_soft_gradient() -> None:
    hard, scores, weights = randn(1000), randn(1000, seed=1), randn(1000, seed=2).detach()
    value = gates.straight_through(hard, 1e3 * scores.sigmoid())
    assert torch.equal(value, hard)
    expected = gradient(1e3 * scores.sigmoid(), scores, weights)
    torch.testing.assert_close(gradient(value, scores, weights), expected)
    assert torch.autograd.grad(gates.straight_through(hard, scores).sum(), hard, allow_unused=True) == (None,)


def test_binarize_is_strict_and_has_the_gradient_of_the_identity() -> None:
    scores = torch.tensor([0.2, 0.5, 0.7], requires_grad=True)
    weights = torch.tensor([1.0, -2.0, 3.0])
    assert gates.binarize(scores).tolist() == [0.0, 0.0, 1.0]
    assert gates.binarize(scores, threshold=0.1).tolist() == [1.0, 1.0, 1.0]
    assert torch.equal(gradient(gates.binarize(scores), scores, weights), weights)


def test_binarize_after_a_clamp_is_the_clipped_estimator() -> None:
    scores = torch.tensor([-0.5, 0.4, 1.5], requires_grad=True)
    assert torch.equal(
        gradient(gates.binarize(scores.clamp(0, 1)), scores, torch.ones(3)), torch.tensor([0.0, 1.0, 0.0])
    )


def test_rounding_and_clamping_have_the_gradient_of_the_identity_everywhere() -> None:
    x = torch.tensor([-1.7, -0.5, 0.5, 1.5, 2.4], requires_grad=True)
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    rounded, clamped = gates.round_through(x), gates.clamp_through(x, -1.0, 1.0)
    assert rounded.tolist() == [-2.0, 0.0, 0.0, 2.0, 2.0]
    assert clamped.tolist() == [-1.0, -0.5, 0.5, 1.0, 1.0]
    for value in (rounded, clamped):
        assert torch.equal(gradient(value, x, weights), weights)


def test_a_quantizer_that_clips_has_no_gradient_outside() -> None:
    x = torch.tensor([-2.0, 0.3, 2.0], requires_grad=True)
    value = gates.round_through(x.clamp(-1, 1) / 0.5) * 0.5
    torch.testing.assert_close(value, torch.tensor([-1.0, 0.5, 1.0]))
    torch.testing.assert_close(gradient(value, x, torch.ones(3)), torch.tensor([0.0, 1.0, 0.0]))


def test_gumbel_softmax_is_its_formula_and_sums_to_one() -> None:
    logits, noise = randn(4, 3), randn(4, 3, seed=1)
    value = gates.gumbel_softmax(logits, 0.7, noise=noise)
    torch.testing.assert_close(value, ((logits + noise) / 0.7).softmax(-1))
    torch.testing.assert_close(gates.gumbel_softmax(logits, 0.7, noise=noise, dim=0).sum(0), torch.ones(3).double())
    assert gradcheck(lambda logits: gates.gumbel_softmax(logits, 0.7, noise=noise.detach()), logits)


def test_without_noise_gumbel_softmax_is_the_softmax_and_its_hard_form_the_first_largest() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0], [2.0, 2.0, 2.0]])
    zeros = torch.zeros(2, 3)
    torch.testing.assert_close(gates.gumbel_softmax(logits, noise=zeros), logits.softmax(-1))
    assert gates.gumbel_softmax(logits, noise=zeros, hard=True).tolist() == [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]
    cold = gates.gumbel_softmax(logits[:, :2], 1e-3, noise=zeros[:, :2])
    torch.testing.assert_close(cold, torch.tensor([[0.0, 1.0], [0.5, 0.5]]))


def test_the_hard_draw_is_exactly_one_hot_with_the_soft_gradient() -> None:
    logits, noise, weights = randn(50, 4), randn(50, 4, seed=1).detach(), randn(50, 4, seed=2).detach()
    hard = gates.gumbel_softmax(logits, 0.7, hard=True, noise=noise)
    soft = gates.gumbel_softmax(logits, 0.7, noise=noise)
    assert torch.equal(hard, torch.nn.functional.one_hot(soft.argmax(-1), 4).double())
    torch.testing.assert_close(gradient(hard, logits, weights), gradient(soft, logits, weights))


def test_under_one_seed_gumbel_softmax_draws_what_torch_draws() -> None:
    logits = randn(5, 4).detach()
    torch.manual_seed(3)
    expected = torch.nn.functional.gumbel_softmax(logits, 0.7)
    torch.manual_seed(3)
    torch.testing.assert_close(gates.gumbel_softmax(logits, 0.7), expected)


def test_hard_draws_have_the_probabilities_of_the_softmax() -> None:
    logits = torch.tensor([0.0, 1.0, -1.0])
    draws = gates.gumbel_softmax(logits.expand(40_000, 3), 0.5, hard=True, generator=seeded())
    torch.testing.assert_close(draws.mean(0), logits.softmax(0), rtol=0, atol=0.01)


def test_gumbel_sigmoid_is_its_formula() -> None:
    logits, noise = randn(4, 3), randn(4, 3, seed=1).detach()
    torch.testing.assert_close(gates.gumbel_sigmoid(logits, 0.7, noise=noise), ((logits + noise) / 0.7).sigmoid())
    torch.testing.assert_close(gates.gumbel_sigmoid(logits, noise=torch.zeros_like(noise)), logits.sigmoid())
    assert gradcheck(lambda logits: gates.gumbel_sigmoid(logits, 0.7, noise=noise), logits)


def test_gumbel_sigmoid_is_gumbel_softmax_over_two_classes() -> None:
    logits, noise = randn(6).detach(), randn(6, 2, seed=1).detach()
    two = gates.gumbel_softmax(torch.stack([logits, torch.zeros(6)], -1), 0.7, noise=noise)[:, 0]
    torch.testing.assert_close(gates.gumbel_sigmoid(logits, 0.7, noise=noise[:, 0] - noise[:, 1]), two)


def test_hard_binary_draws_are_zero_or_one_with_the_probability_of_the_sigmoid_and_the_soft_gradient() -> None:
    logits = torch.full((40_000,), 0.8, requires_grad=True)
    noise = gates.logistic_noise(logits, seeded())
    hard, soft = (gates.gumbel_sigmoid(logits, 0.5, hard=hard, noise=noise) for hard in (True, False))
    assert set(hard.unique().tolist()) == {0.0, 1.0}
    assert hard.mean().item() == pytest.approx(torch.sigmoid(torch.tensor(0.8)).item(), abs=0.01)
    weights = torch.linspace(0, 1, 40_000)
    torch.testing.assert_close(gradient(hard, logits, weights), gradient(soft, logits, weights))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_noise_is_finite_and_has_the_moments_of_its_distribution(dtype: torch.dtype) -> None:
    like = torch.zeros(200_000, dtype=dtype)
    gumbel, logistic = gates.gumbel_noise(like, seeded()), gates.logistic_noise(like, seeded())
    assert gumbel.dtype == logistic.dtype == torch.promote_types(dtype, torch.float32)
    assert gumbel.isfinite().all()
    assert logistic.isfinite().all()
    assert gumbel.mean().item() == pytest.approx(0.5772, abs=0.02)
    assert gumbel.var().item() == pytest.approx(math.pi**2 / 6, rel=0.03)
    assert logistic.mean().item() == pytest.approx(0.0, abs=0.02)
    assert logistic.var().item() == pytest.approx(math.pi**2 / 3, rel=0.03)


@pytest.mark.parametrize("draw", [gates.gumbel_softmax, gates.gumbel_sigmoid])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_relaxed_draws_keep_a_half_dtype(draw: Any, dtype: torch.dtype) -> None:
    logits = torch.zeros(100, 3, dtype=dtype, requires_grad=True)
    value = draw(logits, 0.1, hard=True, generator=seeded())
    assert value.dtype == dtype
    assert set(value.unique().tolist()) == {0.0, 1.0}
    assert torch.autograd.grad(value.sum(), logits)[0].isfinite().all()


@pytest.mark.parametrize("draw", [gates.gumbel_softmax, gates.gumbel_sigmoid])
def test_a_seed_fixes_the_draw_and_the_global_generator_is_left_alone(draw: Any) -> None:
    logits = torch.zeros(20, 3)
    before = torch.get_rng_state()
    first, again, other = (draw(logits, generator=seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("draw", [gates.gumbel_softmax, gates.gumbel_sigmoid])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": 0.0}, "temperature must be positive, got 0.0"),
        ({"temperature": math.nan}, "temperature must be positive"),
        ({"noise": torch.zeros(2)}, r"shape of the logits \(2, 3\), got \(2,\)"),
        ({"noise": torch.zeros(2, 3), "generator": seeded()}, "not both"),
    ],
)
def test_bad_draws_are_refused(draw: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(draw)(torch.zeros(2, 3), **arguments)


def test_hard_concrete_draws_are_the_stretched_and_clamped_formula() -> None:
    layer = gates.HardConcrete(5, keep=0.6, temperature=0.5, low=-0.2, high=1.3, generator=seeded())
    noise = torch.tensor([-9.0, -1.0, 0.0, 1.0, 9.0])
    s = ((noise + layer.log_alpha) / 0.5).sigmoid()
    torch.testing.assert_close(layer(noise=noise), (s * 1.5 - 0.2).clamp(0, 1))
    assert layer(noise=noise)[[0, 4]].tolist() == [0.0, 1.0]


def test_hard_concrete_is_deterministic_in_evaluation_mode() -> None:
    layer = gates.HardConcrete((2, 3), keep=0.9, generator=seeded()).eval()
    expected = (layer.log_alpha.sigmoid() * 1.2 - 0.1).clamp(0, 1)
    assert torch.equal(layer(), expected)
    assert torch.equal(layer((4,)), expected.expand(4, 2, 3))


def test_the_expected_number_of_open_gates_is_what_draws_show() -> None:
    layer = gates.HardConcrete(3, generator=seeded())
    with torch.no_grad():
        layer.log_alpha.copy_(torch.tensor([-2.0, 0.0, 1.5]))
    draws = layer((40_000,), generator=seeded(1))
    assert draws.shape == (40_000, 3)
    torch.testing.assert_close((draws != 0).float().mean(0), layer.open_probability(), rtol=0, atol=0.01)
    torch.testing.assert_close(layer.expected_l0(), layer.open_probability().sum())
    assert (draws == 1).any(0).all()  # the upper end has mass of its own, too
    assert ((draws > 0) & (draws < 1)).any(0).all()


def test_hard_concrete_gradients_match_finite_differences() -> None:
    layer = gates.HardConcrete(6, generator=seeded()).double()
    noise = torch.linspace(-1.5, 1.5, 6, dtype=torch.float64)

    def outputs(log_alpha: Tensor) -> tuple[Tensor, ...]:
        call = torch.func.functional_call
        return call(layer, {"log_alpha": log_alpha}, (), {"noise": noise}), layer.expected_l0()

    assert gradcheck(lambda log_alpha: outputs(log_alpha)[0], randn(6))
    expected = layer.open_probability()
    (slope,) = torch.autograd.grad(layer.expected_l0(), layer.log_alpha)
    torch.testing.assert_close(slope, expected * (1 - expected))


def test_the_penalty_of_hard_concrete_closes_gates() -> None:
    layer = gates.HardConcrete(8, keep=0.9, generator=seeded())
    optimizer = torch.optim.SGD(layer.parameters(), lr=5.0)
    for _ in range(60):
        optimizer.zero_grad()
        layer.expected_l0().backward()
        optimizer.step()
    assert torch.equal(layer.eval()(), torch.zeros(8))


def test_hard_concrete_starts_at_keep_and_says_what_it_is() -> None:
    layer = gates.HardConcrete(10_000, keep=0.7, generator=seeded())
    assert layer.log_alpha.sigmoid().mean().item() == pytest.approx(0.7, abs=1e-3)
    assert layer.log_alpha.std().item() == pytest.approx(0.01, rel=0.05)
    assert torch.equal(layer.log_alpha, gates.HardConcrete((10_000,), keep=0.7, generator=seeded()).log_alpha)
    assert repr(layer) == "HardConcrete((10000,), temperature=0.6667, low=-0.1, high=1.1)"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"keep": 1.0}, r"keep must lie in \(0, 1\), got 1\.0"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"low": 0.0}, "inside the stretched interval"),
        ({"high": 1.0}, "inside the stretched interval"),
    ],
)
def test_hard_concrete_refuses_bad_settings(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gates.HardConcrete(3, **arguments)


def test_hard_concrete_refuses_noise_of_another_shape() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\), got \(3,\)"):
        gates.HardConcrete(3)((2,), noise=torch.zeros(3))


@law
@given(scores=tied, data=st.data(), largest=st.booleans())
def test_topk_keeps_exactly_k_the_best_and_among_equals_the_first(
    scores: np.ndarray, data: st.DataObject, largest: bool
) -> None:
    dim = data.draw(st.integers(-scores.ndim, scores.ndim - 1))
    k = data.draw(st.integers(0, scores.shape[dim]))
    mask = gates.topk_mask(torch.from_numpy(scores), k, dim=dim, largest=largest).numpy()
    order = np.argsort(-scores if largest else scores, axis=dim, kind="stable")
    expected = np.zeros(scores.shape, dtype=bool)
    np.put_along_axis(expected, np.take(order, range(k), axis=dim), True, axis=dim)
    np.testing.assert_array_equal(mask, expected)


@law
@given(scores=tied, data=st.data())
def test_the_largest_and_the_smallest_without_ties_share_the_entries_out(
    scores: np.ndarray, data: st.DataObject
) -> None:
    distinct = torch.from_numpy(scores).flatten() + torch.arange(scores.size) * 1e-3
    k = data.draw(st.integers(0, scores.size))
    smallest = gates.topk_mask(distinct, scores.size - k, largest=False)
    assert torch.equal(gates.topk_mask(distinct, k), ~smallest)


@law
@given(parts=st.lists(tied, min_size=1, max_size=4), data=st.data(), largest=st.booleans())
def test_topk_over_several_tensors_is_topk_over_their_concatenation(
    parts: list[np.ndarray], data: st.DataObject, largest: bool
) -> None:
    tensors = [torch.from_numpy(part) for part in parts]
    k = data.draw(st.integers(0, sum(part.size for part in parts)))
    masks = gates.topk_masks(tensors, k, largest=largest)
    assert [mask.shape for mask in masks] == [tensor.shape for tensor in tensors]
    whole = gates.topk_mask(torch.cat([tensor.flatten() for tensor in tensors]), k, largest=largest)
    assert torch.equal(torch.cat([mask.flatten() for mask in masks]), whole)


def test_one_choice_over_several_tensors_may_leave_one_without_any() -> None:
    first, second = gates.topk_masks([torch.tensor([0.1, 0.2]), torch.tensor([[5.0], [6.0]])], 2)
    assert not first.any()
    assert second.all()


def test_topk_over_all_entries_and_n_of_m_patterns() -> None:
    scores = torch.tensor([[3.0, 1.0, 2.0, 4.0], [0.0, 5.0, 5.0, 5.0]])
    assert gates.topk_mask(scores, 3, dim=None).tolist() == [[False] * 4, [False, True, True, True]]
    two_of_four = gates.topk_mask(scores, 2)
    assert two_of_four.tolist() == [[True, False, False, True], [False, True, True, False]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_infinities_are_ordinary_and_nan_is_chosen_last(dtype: torch.dtype) -> None:
    scores = torch.tensor([math.nan, math.inf, -math.inf, 0.0, math.nan], dtype=dtype)
    assert gates.topk_mask(scores, 2).tolist() == [False, True, False, True, False]
    assert gates.topk_mask(scores, 2, largest=False).tolist() == [False, False, True, True, False]
    assert gates.topk_mask(scores, 4).sum() == gates.topk_mask(scores, 4, largest=False).sum() == 4


def test_topk_gates_are_zero_or_one_and_let_the_gradient_through_to_all() -> None:
    scores, weights = randn(3, 5), randn(3, 5, seed=1).detach()
    value = gates.topk_gate(scores, 2)
    assert torch.equal(value, gates.topk_mask(scores, 2).double())
    assert torch.equal(gradient(value, scores, weights), weights)


@pytest.mark.parametrize("k", [-1, 4])
def test_more_entries_than_there_are_cannot_be_chosen(k: int) -> None:
    with pytest.raises(ValueError, match=rf"k must lie in 0\.\.3, the size of dimension -1, got {k}"):
        gates.topk_mask(torch.zeros(2, 3), k)
    with pytest.raises(ValueError, match=r"k must lie in 0\.\.3"):
        gates.topk_masks([torch.zeros(2), torch.zeros(1)], k)
    with pytest.raises(ValueError, match="at least one tensor"):
        gates.topk_masks([], 0)


def test_shapes_and_bounds_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"same shape, got \(2,\) and \(3,\)"):
        inspect.unwrap(gates.straight_through)(torch.zeros(2), torch.zeros(3))
    with pytest.raises(ValueError, match=r"low must not be above high, got 1\.0 and 0\.0"):
        gates.clamp_through(torch.zeros(2), 1.0, 0.0)
