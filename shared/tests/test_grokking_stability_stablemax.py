"""StableMax against its authors' code, and its laws."""

import inspect
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from poise.core import StableMaxCrossEntropy, log_stablemax, stablemax, stablemax_cross_entropy
from poise.core.dynamics.grokking_stability.stablemax import log_s

law = settings(deadline=None, max_examples=50)

GOLDEN = Path(__file__).parent / "golden" / "grokking-stability" / "stablemax_small.npz"
EXACT: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-14}

logits = st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=8)


@pytest.fixture
def golden() -> dict[str, torch.Tensor]:
    with np.load(GOLDEN) as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


def test_agrees_with_the_authors_code(golden: dict[str, torch.Tensor]) -> None:
    z, y = golden["logits"].requires_grad_(), golden["labels"]
    torch.testing.assert_close(log_s(z).exp(), golden["s"], **EXACT)
    torch.testing.assert_close(log_stablemax(z), golden["log_stablemax"], **EXACT)
    torch.testing.assert_close(stablemax_cross_entropy(z, y, reduction="none"), golden["loss_none"], **EXACT)
    loss = stablemax_cross_entropy(z, y)
    loss.backward()
    torch.testing.assert_close(loss, golden["loss_mean"], **EXACT)
    torch.testing.assert_close(z.grad, golden["grad_logits"], **EXACT)


def test_golden_softmax_losses_are_those_of_pytorch(golden: dict[str, torch.Tensor]) -> None:
    z, y = golden["logits"], golden["labels"]
    torch.testing.assert_close(F.cross_entropy(z.float(), y), golden["ce32"], rtol=1e-6, atol=0)
    torch.testing.assert_close(F.cross_entropy(z, y), golden["ce64"], rtol=1e-6, atol=0)


@law
@given(logits)
def test_probabilities_are_those_of_the_definition_and_sum_to_one(values: list[float]) -> None:
    z = torch.tensor(values, dtype=torch.float64)
    s = torch.tensor([x + 1 if x >= 0 else 1 / (1 - x) for x in values], dtype=torch.float64)
    torch.testing.assert_close(stablemax(z), s / s.sum(), rtol=1e-9, atol=0)
    torch.testing.assert_close(log_stablemax(z).exp(), stablemax(z), rtol=1e-9, atol=0)
    assert math.isclose(stablemax(z).sum().item(), 1, rel_tol=1e-12)


@law
@given(logits)
def test_stablemax_is_the_softmax_of_squashed_logits(values: list[float]) -> None:
    z = torch.tensor(values, dtype=torch.float64)
    torch.testing.assert_close(log_stablemax(z), log_s(z).log_softmax(-1), rtol=0, atol=0)


@law
@given(st.floats(-1e300, 1e300))
def test_s_of_opposite_logits_are_reciprocal(x: float) -> None:
    pair = log_s(torch.tensor([x, -x], dtype=torch.float64))
    assert pair.sum() == 0


@law
@given(logits, st.data())
def test_gradient_is_the_closed_form(values: list[float], data: st.DataObject) -> None:
    z = torch.tensor([values], dtype=torch.float64, requires_grad=True)
    y = torch.tensor([data.draw(st.integers(0, len(values) - 1))])
    stablemax_cross_entropy(z, y).backward()
    expected = (stablemax(z) - F.one_hot(y, len(values))) / (1 + z.abs())
    torch.testing.assert_close(z.grad, expected.detach(), rtol=1e-9, atol=1e-15)


def test_gradient_passes_finite_differences_at_zero_and_one_to_second_order() -> None:
    z = torch.tensor([[0.0, 1.0, -1.0, 2.5], [0.0, 0.0, -3.0, 0.5]], dtype=torch.float64, requires_grad=True)
    y = torch.tensor([1, 0])
    assert torch.autograd.gradcheck(lambda z: stablemax_cross_entropy(z, y), z)
    away = (z.detach() + 0.3).requires_grad_()  # the second derivative jumps at 0
    assert torch.autograd.gradgradcheck(lambda z: stablemax_cross_entropy(z, y), away)


def test_slope_is_one_at_zero_eager_and_compiled() -> None:
    for function in (log_s, torch.compile(inspect.unwrap(log_s), backend="aot_eager", fullgraph=True)):
        x = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        function(x).sum().backward()
        assert x.grad is not None
        assert x.grad.item() == 1


def test_function_transforms_agree_with_autograd() -> None:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    v, y = torch.randn(4, 3, generator=generator, dtype=torch.float64), torch.tensor([0, 2, 1, 1])

    def loss(z: torch.Tensor) -> torch.Tensor:
        return stablemax_cross_entropy(z, y)

    hessian = torch.autograd.functional.hessian(loss, z).reshape(12, 12)
    _, forward_over_reverse = torch.func.jvp(torch.func.grad(loss), (z,), (v,))
    torch.testing.assert_close(forward_over_reverse.flatten(), hessian @ v.flatten())
    per_sample = torch.func.vmap(lambda z, y: stablemax_cross_entropy(z, y, reduction="sum"))(z, y)
    torch.testing.assert_close(per_sample, stablemax_cross_entropy(z, y, reduction="none"))


@pytest.mark.parametrize("size", [1e6, 1e30])
def test_huge_logits_have_a_finite_loss_and_a_gradient(size: float) -> None:
    z = torch.tensor([[size, 0.0, -size], [-size, size, 1.0]], requires_grad=True)
    loss = stablemax_cross_entropy(z, torch.tensor([0, 0]), reduction="none")
    loss.sum().backward()
    assert z.grad is not None
    assert loss.isfinite().all()
    assert z.grad.isfinite().all()
    assert (z.grad.abs().amax(1) > 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_give_a_finite_float32(dtype: torch.dtype) -> None:
    z = torch.tensor([[6e4, -6e4, 0.0]], dtype=dtype, requires_grad=True)
    for result in (stablemax(z), log_stablemax(z), stablemax_cross_entropy(z, torch.tensor([1]))):
        assert result.dtype == torch.float32
        assert result.isfinite().all()


def test_softmax_loss_vanishes_beyond_a_margin_of_17_and_stablemax_still_learns() -> None:
    y = torch.tensor([0])
    for margin, vanished in ((16.0, False), (17.0, True), (100.0, True)):
        assert (F.cross_entropy(torch.tensor([[margin, 0.0]]), y).item() == 0) is vanished
    z = torch.tensor([[1e6, 0.0]], requires_grad=True)
    loss = stablemax_cross_entropy(z, y)
    loss.backward()
    assert z.grad is not None
    assert loss > 0
    assert (z.grad != 0).all()


def test_loss_takes_what_cross_entropy_takes() -> None:
    generator = torch.Generator().manual_seed(0)
    z, y = torch.randn(5, 4, 2, generator=generator), torch.randint(4, (5, 2), generator=generator)
    y[0, 0] = -1
    ours = stablemax_cross_entropy(z, y, "sum", label_smoothing=0.1, ignore_index=-1)
    assert ours == F.cross_entropy(log_s(z), y, reduction="sum", label_smoothing=0.1, ignore_index=-1)
    assert StableMaxCrossEntropy("sum", 0.1, -1)(z, y) == ours
    assert stablemax_cross_entropy(z[:, :, 0], z[:, :, 1].softmax(1)).isfinite()
    assert stablemax(z, dim=1).sum(1).allclose(torch.ones(5, 2))


@pytest.mark.parametrize(
    "make",
    [StableMaxCrossEntropy, lambda **given: stablemax_cross_entropy(torch.zeros(1, 2), torch.zeros(1).long(), **given)],
)
def test_bad_settings_are_refused(make: object) -> None:
    assert callable(make)
    with pytest.raises(ValueError, match="label_smoothing must lie in"):
        make(label_smoothing=1.5)
    with pytest.raises(ValueError, match="median"):
        make(reduction="median")


def test_integer_logits_are_refused() -> None:
    with pytest.raises(TypeError):
        stablemax_cross_entropy(torch.zeros(1, 2).long(), torch.zeros(1).long())


def test_module_says_how_it_is_set_up() -> None:
    assert "label_smoothing=0.2" in repr(StableMaxCrossEntropy(label_smoothing=0.2))
