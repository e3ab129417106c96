"""Each law of the contract can fail: a method that breaks it, and only then, is caught."""

import functools
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.gradcheck import GradcheckError
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from poise.core.contract import laws, modules
from poise.core.contract.laws import BrokenLawError
from poise.core.penalty import Penalty
from poise.core.schedule import Linear
from poise.core.testing import Sample, randn

ALL_LAWS = (
    laws.gradients_match_finite_differences,
    laws.finite_in_reduced_precision,
    laws.same_under_the_same_seed,
    laws.inputs_stay_untouched,
    laws.copies_are_equal_and_independent,
    laws.compiled_equals_eager,
    laws.runs_on_fake_cuda,
    laws.runs_on_a_device_of_its_own,
    modules.twice_the_weight_gives_twice_the_penalty,
    modules.no_weight_costs_nothing,
    modules.state_survives_a_round_trip,
)
ON_A_GPU = pytest.param(
    laws.runs_on_cuda,
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")],
)


def sample(build: Callable[[], Callable[..., Any]], **settings: Any) -> Sample:
    defaults: dict[str, Any] = {"inputs": lambda generator: (randn(generator, 4, 3),), "reason": "a toy"}
    return Sample(name="toy/case", build=build, **(defaults | settings))


def function(f: Callable[..., Any], **settings: Any) -> Sample:
    return sample(lambda: f, **settings)


class Energy(Penalty):
    """A penalty that keeps every law, with a parameter, a buffer that remembers, and a draw."""

    def __init__(self, weight: float | Callable[[int], float] = 0.5) -> None:
        super().__init__(weight)
        self.scale = nn.Parameter(torch.rand(3))
        self.mean: Tensor
        self.register_buffer("mean", torch.zeros(3))

    def penalty(self, x: Tensor) -> Tensor:
        centred = x - self.mean
        self.mean = (0.9 * self.mean + 0.1 * x.mean(0)).detach()
        return (self.scale * centred.square() + 0.01 * torch.randn_like(x) * x).mean()


def input_gradient(x: Tensor) -> Tensor:
    x = x if x.requires_grad else x.detach().requires_grad_()
    return torch.autograd.grad(x.sin().sum(), x, create_graph=True)[0]


def in_full_precision(x: Tensor) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return x @ x.T


@dataclass
class Pair:
    """A result that is no tensor."""

    total: Tensor
    count: int


@pytest.mark.parametrize("law", [*ALL_LAWS, ON_A_GPU])
def test_a_lawful_penalty_keeps_every_law(law: Callable[[Sample], None]) -> None:
    law(sample(Energy, parameters=True))


@pytest.mark.parametrize("law", [*ALL_LAWS[:8], ON_A_GPU])
@pytest.mark.parametrize(
    "lawful",
    [
        function(lambda x: x.sin()),
        function(lambda x: Pair(x.exp().sum(), x.shape[0])),
        sample(lambda: functools.partial(lambda model, x: {"features": model(x)}, nn.Linear(3, 2))),
        function(
            lambda model, x, generator: (
                model(x) + torch.randn(4, 2, generator=generator, dtype=x.dtype).to(x.device),
            ),
            inputs=lambda generator: (nn.Linear(3, 2), randn(generator, 4, 3), generator),
            differentiable=(1,),
        ),
        function(in_full_precision),
        function(lambda x: x * torch.as_tensor([1.0, 2.0, 3.0], dtype=x.dtype, device=x.device)),
        function(lambda x: checkpoint(lambda part: F.dropout(part.sin()), x, use_reentrant=False)),
        function(
            lambda x: input_gradient(x).square().sum(),
            compile=False,
            fake_cuda=False,
        ),
    ],
    ids=["function", "dataclass", "partial", "generator", "autocast", "as-tensor", "checkpoint", "gradient-inside"],
)
def test_lawful_functions_keep_the_laws(law: Callable[[Sample], None], lawful: Sample) -> None:
    law(lawful)


def test_a_wrong_gradient_is_caught() -> None:
    with pytest.raises(GradcheckError):
        laws.gradients_match_finite_differences(function(lambda x: (x * x.detach()).sum()))


def test_a_wrong_gradient_of_a_parameter_is_caught() -> None:
    class Detached(Energy):
        def penalty(self, x: Tensor) -> Tensor:
            return (self.scale * self.scale.detach() * x).sum()

    laws.gradients_match_finite_differences(sample(Detached))
    with pytest.raises(GradcheckError):
        laws.gradients_match_finite_differences(sample(Detached, parameters=True))


def test_a_missing_gradient_is_caught() -> None:
    with pytest.raises(BrokenLawError, match="no result depends"):
        laws.gradients_match_finite_differences(function(lambda x: x.detach().sum()))


def test_a_position_without_floats_is_caught() -> None:
    with pytest.raises(BrokenLawError, match="positions of floating point tensors"):
        laws.gradients_match_finite_differences(function(torch.sum, inputs=lambda generator: (torch.arange(3),)))


def test_overflow_in_half_precision_is_caught() -> None:
    with pytest.raises(BrokenLawError, match="float16 the result"):
        laws.finite_in_reduced_precision(function(lambda x: (x.abs() + 300).square(), dtypes=(torch.float16,)))


def test_an_infinite_gradient_is_caught() -> None:
    with pytest.raises(BrokenLawError, match="the gradient"):
        laws.finite_in_reduced_precision(function(lambda x: (x - x.detach()).abs().sqrt().sum()))


def test_a_draw_that_no_seed_reaches_is_caught() -> None:
    with pytest.raises(BrokenLawError, match="under the same seed differ"):
        laws.same_under_the_same_seed(function(lambda x: x * torch.rand(1, generator=_unseeded(), dtype=x.dtype)))


def _unseeded() -> torch.Generator:
    generator = torch.Generator()
    generator.seed()
    return generator


def test_a_draw_from_the_generator_of_the_standard_library_is_caught() -> None:
    def draws(x: Tensor) -> Tensor:
        random.random()
        return x

    with pytest.raises(BrokenLawError, match="global generator of numpy or of random"):
        laws.same_under_the_same_seed(function(draws))


def test_seeding_the_process_is_caught() -> None:
    def seeds(x: Tensor) -> Tensor:
        torch.manual_seed(0)
        return x + torch.randn_like(x)

    with pytest.raises(BrokenLawError, match="seeds PyTorch's global generator"):
        laws.same_under_the_same_seed(function(seeds))


def test_a_mutated_input_is_caught() -> None:
    with pytest.raises(BrokenLawError, match=r"changes its arguments: \[0\]"):
        laws.inputs_stay_untouched(function(lambda x: x.clamp_(min=0)))


def test_a_restored_input_is_caught() -> None:
    with pytest.raises(BrokenLawError, match="if only to restore them"):
        laws.inputs_stay_untouched(function(lambda x: x.mul_(2.0).mul_(0.5).sum()))


def test_a_model_left_in_another_mode_is_caught() -> None:
    with pytest.raises(BrokenLawError, match="how its arguments are set up"):
        laws.inputs_stay_untouched(
            function(
                lambda model, x: model.eval()(x),
                inputs=lambda generator: (nn.Linear(3, 2), randn(generator, 4, 3)),
                differentiable=(1,),
            )
        )


def test_a_gradient_left_behind_is_caught() -> None:
    def backward_inside(model: nn.Module, x: Tensor) -> Tensor:
        model(x).sum().backward()
        return x

    with pytest.raises(BrokenLawError, match="how its arguments are set up"):
        laws.inputs_stay_untouched(
            function(
                backward_inside,
                inputs=lambda generator: (nn.Linear(3, 2), randn(generator, 4, 3)),
                differentiable=(1,),
            )
        )


def test_a_copy_that_shares_memory_is_caught() -> None:
    class Shares(Energy):
        def __deepcopy__(self, memo: dict[int, Any]) -> "Shares":
            twin = type(self)()
            twin.__dict__.update(self.__dict__)
            twin._buffers = dict(self._buffers)
            return twin

    with pytest.raises(BrokenLawError, match="shares 2 tensors"):
        laws.copies_are_equal_and_independent(sample(Shares))


def test_a_copy_that_forgets_is_caught() -> None:
    class Forgets(Energy):
        def __deepcopy__(self, memo: dict[int, Any]) -> "Forgets":
            return type(self)().double()

    with pytest.raises(BrokenLawError, match="computes something else"):
        laws.copies_are_equal_and_independent(sample(Forgets))


def test_a_different_value_when_compiled_is_caught() -> None:
    with pytest.raises(BrokenLawError, match="differs from eager"):
        laws.compiled_equals_eager(function(lambda x: x * (2.0 if torch.compiler.is_compiling() else 1.0)))


def test_a_different_gradient_when_compiled_is_caught() -> None:
    with pytest.raises(BrokenLawError, match=r"differs from eager: \[1\]"):
        laws.compiled_equals_eager(
            function(lambda x: (x.detach() * x if torch.compiler.is_compiling() else x * x).sum())
        )


def test_code_that_opts_out_of_compiling_is_caught() -> None:
    with pytest.raises(BrokenLawError, match="nothing to compile"):
        laws.compiled_equals_eager(function(torch.compiler.disable(lambda x: x.sin())))


@pytest.mark.parametrize("law", [laws.runs_on_fake_cuda, laws.runs_on_a_device_of_its_own])
@pytest.mark.parametrize(
    "hard_coded",
    [
        lambda x: x + torch.linspace(0, 1, 3, dtype=x.dtype),
        lambda x: x @ torch.tensor([1.0, 2.0, 3.0], dtype=x.dtype),
        lambda x: torch.cat([x, torch.zeros(1, 3, dtype=x.dtype)]),
        lambda x: torch.zeros(4, 3, dtype=x.dtype) + 1,
        lambda x: x.cpu().sum(),
        lambda x: nn.Linear(3, 2, dtype=x.dtype)(x),
    ],
    ids=["added", "from-numbers", "concatenated", "returned", "moved", "layer"],
)
def test_a_hard_coded_device_is_caught(law: Callable[[Sample], None], hard_coded: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises((BrokenLawError, RuntimeError)):
        law(function(hard_coded))


@pytest.mark.parametrize("law", [laws.runs_on_fake_cuda, laws.runs_on_a_device_of_its_own])
def test_a_tensor_that_is_no_buffer_is_caught(law: Callable[[Sample], None]) -> None:
    class Plain(Energy):
        def __init__(self) -> None:
            super().__init__()
            self.shift = torch.zeros(3)

        def penalty(self, x: Tensor) -> Tensor:
            return (x + self.shift).square().sum()

    with pytest.raises((RuntimeError, AssertionError)):
        law(sample(Plain))


def test_a_hard_coded_device_behind_a_branch_on_the_data_is_caught() -> None:
    def branches(x: Tensor) -> Tensor:
        return x + torch.ones(3, dtype=x.dtype) if x.sum() > -1e9 else x

    with pytest.raises(RuntimeError, match="mixes a tensor on 'lazy:0'"):
        laws.runs_on_a_device_of_its_own(function(branches))


def test_penalties_are_measured_at_the_weight_given() -> None:
    class Quadratic(Energy):
        def penalty(self, x: Tensor) -> Tensor:
            return self.weight * x.square().sum()

    with pytest.raises(BrokenLawError, match="twice the weight is not twice the penalty"):
        modules.twice_the_weight_gives_twice_the_penalty(sample(Quadratic))


def test_a_penalty_that_is_no_scalar_is_caught() -> None:
    class Vector(Energy):
        def penalty(self, x: Tensor) -> Tensor:
            return x.square().sum(0)

    with pytest.raises(BrokenLawError, match="not a scalar"):
        modules.twice_the_weight_gives_twice_the_penalty(sample(Vector))


def test_a_penalty_in_a_dtype_of_its_own_is_caught() -> None:
    class Double(Energy):
        def penalty(self, x: Tensor) -> Tensor:
            return x.double().square().sum()

    with pytest.raises(BrokenLawError, match="weight 0 gives a zero of"):
        modules.no_weight_costs_nothing(sample(Double))


def test_a_forward_of_its_own_is_caught_at_weight_zero() -> None:
    computing = type(
        "Computing",
        (Energy,),
        {"forward": lambda self, x: self.weight * self.penalty(x), "__doc__": "Ignores weight 0."},
    )
    with pytest.raises(BrokenLawError, match="weight 0 computes the penalty"):
        modules.no_weight_costs_nothing(sample(computing))


def test_state_that_is_not_saved_is_caught() -> None:
    class Counts(Energy):
        def __init__(self) -> None:
            super().__init__()
            self.calls = 0

        def penalty(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.calls * x.square().sum()

    with pytest.raises(BrokenLawError, match="after loading the state the next call differs"):
        modules.state_survives_a_round_trip(sample(Counts))


def test_a_schedule_whose_step_is_not_saved_is_caught() -> None:
    class Forgetful(Energy):
        def set_extra_state(self, state: dict[str, int]) -> None:
            self._step = 0

    with pytest.raises(BrokenLawError, match="loaded differs from the one that was saved"):
        modules.state_survives_a_round_trip(sample(lambda: Forgetful(Linear(0.0, 1.0, steps=5))))


def test_fake_cuda_needs_no_gpu() -> None:
    with FakeTensorMode(allow_non_fake_inputs=False):
        assert torch.ones(2, device="cuda").device.type == "cuda"
