"""Laws of poise.core.penalty."""

import copy
import inspect
import io
import math
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from poise.core import Penalties, Penalty
from poise.core.schedule import Linear, Piecewise

set_weight = inspect.unwrap(Penalty.weight.fset)


class Energy(Penalty):
    def penalty(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return scale * x.square().sum()


class Flat(Penalty):
    """Takes its tensors in containers, or none at all."""

    def penalty(self, *given: Any, **named: Any) -> Tensor:
        return torch.tensor(1.0)


class Point(NamedTuple):
    x: Tensor


def test_forward_is_weight_times_penalty_and_value_is_without_weight() -> None:
    penalty, x = Energy(weight=0.5), torch.ones(4, requires_grad=True)
    loss = penalty(x, scale=3.0)
    assert loss == 6
    assert penalty.value == 12
    assert not penalty.value.requires_grad
    loss.backward()
    assert torch.equal(x.grad, torch.full((4,), 3.0))


def test_a_schedule_is_advanced_by_step_only() -> None:
    penalty, x = Energy(Linear(0.0, 1.0, steps=4)), torch.ones(1)
    seen = []
    for _ in range(6):
        assert penalty(x) == penalty(x) == penalty.weight
        seen.append(penalty.weight)
        penalty.step()
    assert seen == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]


def test_the_weight_can_be_replaced_and_keeps_the_step() -> None:
    penalty = Energy()
    penalty.step()
    penalty.weight = 0.25
    assert penalty(torch.ones(2)) == 0.5
    penalty.weight = Linear(0.0, 1.0, steps=2)
    assert penalty.weight == 0.5
    penalty.step()
    assert penalty.weight == 1.0


def test_at_weight_zero_nothing_is_computed() -> None:
    class Never(Penalty):
        def penalty(self, x: Tensor) -> Tensor:
            raise AssertionError("computed")

    penalty, x = Never(Piecewise((1,), (0.0, 1.0))), torch.ones(3, requires_grad=True)
    zero = penalty(x)
    assert zero == 0
    assert not zero.requires_grad
    assert penalty.value is None
    penalty.step()
    with pytest.raises(AssertionError, match="computed"):
        penalty(x)


def test_an_old_value_does_not_survive_weight_zero() -> None:
    penalty = Energy(Piecewise((1,), (1.0, 0.0)))
    penalty(torch.ones(1))
    assert penalty.value == 1
    penalty.step()
    penalty(torch.ones(1))
    assert penalty.value is None


@pytest.mark.parametrize(
    "wrap", [lambda x: x, lambda x: [x], lambda x: {"a": (None, [x])}, Point, lambda x: nn.ParameterList([x])]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_zero_has_the_dtype_and_device_of_the_first_float_tensor_however_nested(
    wrap: Any, dtype: torch.dtype
) -> None:
    zero = Flat(weight=0.0)(torch.arange(3), wrap(torch.ones(2, dtype=dtype, device="meta")))
    assert zero.dtype == dtype
    assert zero.device.type == "meta"
    named = Flat(weight=0.0)(given=wrap(torch.ones(2, dtype=dtype)))
    assert named.dtype == dtype


def test_without_tensors_the_zero_is_that_of_the_penalty_itself_or_the_default() -> None:
    penalty = Flat(weight=0.0)
    assert penalty().dtype == torch.float32
    penalty.register_buffer("mean", torch.zeros(2, dtype=torch.float64))
    assert penalty(torch.arange(2)).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_scalar_of_a_half_type_is_float32_at_any_weight(dtype: torch.dtype) -> None:
    x = torch.ones(3, dtype=dtype)
    for weight in (0.0, 0.1):
        assert Energy(weight)(x).dtype == torch.float32
    assert Energy(0.1)(x).item() == pytest.approx(0.3)


@pytest.mark.parametrize("weight", [1, 0.5, np.float32(0.5), np.int64(2)])
def test_any_real_number_is_a_weight(weight: Any) -> None:
    penalty = Energy()
    set_weight(penalty, weight)
    assert penalty.weight == float(weight)


@pytest.mark.parametrize("weight", [True, "1", None, torch.tensor(1.0)])
def test_what_is_no_number_and_no_schedule_is_no_weight(weight: Any) -> None:
    with pytest.raises(TypeError, match=f"number or a schedule, got {type(weight).__name__}"):
        set_weight(Energy(), weight)
    with pytest.raises(TypeError):
        Energy(weight)


@pytest.mark.parametrize("weight", [-0.1, math.inf, math.nan, lambda step: -1.0])
def test_weights_out_of_range_are_refused_at_once(weight: Any) -> None:
    with pytest.raises(ValueError, match="finite and not negative"):
        Energy(weight)
    with pytest.raises(ValueError, match="finite and not negative"):
        Energy().weight = weight


def test_a_schedule_that_leaves_the_range_says_at_which_step_and_the_step_is_not_taken() -> None:
    penalty = Energy(lambda step: 1.0 - step)
    penalty.step()
    with pytest.raises(ValueError, match=r"got -1\.0 at step 2"):
        penalty.step()
    assert penalty.weight == 0.0


def test_a_penalty_without_its_method_says_so() -> None:
    with pytest.raises(NotImplementedError, match=r"Penalty must define penalty\(\)"):
        Penalty()(torch.ones(1))


def test_the_step_goes_through_files_that_hold_tensors_only() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    model.decay = Energy(Linear(0.0, 1.0, steps=10))
    for _ in range(3):
        model.decay.step()
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    for state in (load(save(model.state_dict())), torch.load(buffer, weights_only=True)):
        fresh = nn.Sequential(nn.Linear(2, 2))
        fresh.decay = Energy(Linear(0.0, 1.0, steps=10))
        fresh.load_state_dict(state)
        assert fresh.decay.weight == model.decay.weight == pytest.approx(0.3)


def test_a_copy_goes_its_own_way() -> None:
    penalty = Energy(Linear(0.0, 1.0, steps=2))
    penalty.step()
    penalty(torch.ones(1))
    twin = copy.deepcopy(penalty)
    twin.step()
    assert (penalty.weight, twin.weight, twin.value) == (0.5, 1.0, 1.0)


def test_compiled_once_for_all_steps_of_a_schedule() -> None:
    graphs = 0

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    penalty = Energy(Linear(0.5, 1.0, steps=20))
    compiled = torch.compile(penalty, backend=backend)
    for _ in range(15):
        assert compiled(torch.ones(2)).item() == pytest.approx(2 * penalty.weight)
        penalty.step()
    assert graphs <= 2  # the first weight as a constant, then one graph for all others


def test_repr_shows_the_weight_or_its_schedule() -> None:
    assert repr(Energy(0.5)) == "Energy(weight=0.5)"
    assert repr(Energy(Linear(0.0, 1.0, steps=3))) == "Energy(weight=Linear(start=0.0, end=1.0, steps=3, delay=0))"


def test_penalties_add_up_and_each_term_gets_its_own_arguments() -> None:
    both = Penalties(a=Energy(0.5), b=Energy(2.0), c=Energy(0.0))
    x = torch.ones(2, requires_grad=True)
    loss = both(a=(x, 3.0), b={"x": x, "scale": 0.5}, c=x)
    assert loss == 0.5 * 6 + 2.0 * 1
    assert both.values == {"a": 6, "b": 1}
    (gradient,) = torch.autograd.grad(loss, x)
    assert torch.equal(gradient, torch.full((2,), 5.0))


def test_penalties_step_together_and_keep_their_state() -> None:
    def make() -> Penalties:
        return Penalties(ramp=Energy(Linear(0.0, 1.0, steps=4)), fixed=Energy(2.0))

    both = make()
    both.step()
    assert both(ramp=torch.ones(1), fixed=torch.ones(1)) == 2.25
    fresh = make()
    fresh.load_state_dict(load(save(both.state_dict())))
    assert fresh(ramp=torch.ones(1), fixed=torch.ones(1)) == 2.25


def test_a_term_of_weight_zero_without_tensors_does_not_pull_the_sum_to_the_cpu() -> None:
    both = Penalties(off=Flat(0.0), on=Energy())
    assert both(off=(), on=torch.ones(2, device="meta")).device.type == "meta"


def test_penalties_refuse_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="at least one named penalty"):
        Penalties()
    with pytest.raises(TypeError, match="term 'a' must be a Penalty, got ReLU"):
        inspect.unwrap(Penalties.__init__)(Penalties(a=Energy()), a=nn.ReLU())
    with pytest.raises(ValueError, match=r"for the terms \['a', 'b'\], got \['a', 'z'\]"):
        Penalties(a=Energy(), b=Energy())(a=torch.ones(1), z=torch.ones(1))
