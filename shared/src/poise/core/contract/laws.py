"""What every method must obey, as functions of its :class:`~poise.core.testing.Sample`.

A law returns when it is kept, raises :class:`BrokenLawError` (or lets the method's own error through) when it is not, and
``unittest.SkipTest`` when the sample switches it off or it says nothing about this kind of method. The workspace's
``tests/test_contract.py`` puts every sample of every member under all of them; a package of your own can do the same:

>>> import torch
>>> from poise.core.testing import Sample, randn
>>> sample = Sample(name="energy", build=lambda: torch.square, inputs=lambda generator: (randn(generator, 3),))
>>> gradients_match_finite_differences(sample)
>>> runs_on_fake_cuda(sample)
"""

import copy
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest import SkipTest

import jaxtyping
import torch
from numpy.random import mtrand
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode

from poise.core.contract.objects import cast, converted, difference, floats, leaves, tensors
from poise.core.contract.stand_in import StandIn, back_on_cpu
from poise.core.testing import Sample

RTOL = 1e-6
"""Relative tolerance of the comparisons in float64; the absolute one is the sample's."""

# Up to this many numbers every partial derivative is checked, above it a random projection of them (gradcheck's fast mode).
_FULL_GRADCHECK = 200

Call = Callable[..., Any]
Arguments = tuple[Any, ...]


class BrokenLawError(AssertionError):
    """A method does not obey a law of the contract."""


def gradients_match_finite_differences(sample: Sample) -> None:
    """In float64, the gradient of every declared input, and of the parameters if declared, is that of finite differences."""
    if not sample.differentiable and not sample.parameters:
        raise SkipTest(sample.reason)
    function, arguments = case(sample)
    variables = _variables(sample, function, arguments)

    def outputs(*values: Tensor) -> tuple[Tensor, ...]:
        memo = dict(zip(map(id, variables), values, strict=True))
        return tuple(out for out in floats(call(function, arguments, memo=memo)) if out.requires_grad)

    if not outputs(*variables):
        raise BrokenLawError(f"{sample.name}: no result depends on the declared inputs in a way that autograd sees")
    fast = sum(variable.numel() for variable in variables) > _FULL_GRADCHECK
    torch.autograd.gradcheck(outputs, tuple(variables), atol=max(1e-5, sample.atol), rtol=1e-3, fast_mode=fast)


def finite_in_reduced_precision(sample: Sample) -> None:
    """In each of ``sample.dtypes``, every number of the result and of its gradient is finite."""
    if not sample.dtypes:
        raise SkipTest(sample.reason)
    for dtype in sample.dtypes:
        result, gradients = with_gradients(sample, *case(sample, dtype))
        for what, holder in (("result", result), ("gradient", gradients)):
            for path, leaf in leaves(holder):
                if isinstance(leaf, Tensor) and not leaf.isfinite().all():
                    raise BrokenLawError(f"{sample.name}: in {dtype} the {what}{path} has entries that are not finite")


def same_under_the_same_seed(sample: Sample) -> None:
    """Two builds and calls under one seed agree to the bit, and the call leaves the seeding of the process to its user."""
    with _as_users_run_it():
        outside = _other_generators()
        first, second = call(*case(sample)), call(*case(sample))
        changed_outside = outside != _other_generators()
    if found := difference(first, second):
        raise BrokenLawError(f"{sample.name}: two calls under the same seed differ: {found}")
    if changed_outside:
        raise BrokenLawError(f"{sample.name}: the call draws from the global generator of numpy or of random")
    call(*case(sample), seed=1)
    after_one = torch.get_rng_state()
    call(*case(sample), seed=2)
    if torch.equal(after_one, torch.get_rng_state()):
        raise BrokenLawError(f"{sample.name}: the call seeds PyTorch's global generator")


def inputs_stay_untouched(sample: Sample) -> None:
    """The call changes no argument: neither numbers, nor gradients, nor the mode of a module."""
    function, arguments = case(sample)
    before = copy.deepcopy(arguments)
    versions = [tensor._version for tensor in tensors(arguments)]
    torch.manual_seed(0)
    copy.deepcopy(function)(*arguments)
    if found := difference(before, arguments):
        raise BrokenLawError(f"{sample.name}: the call changes its arguments: {found}")
    if versions != [tensor._version for tensor in tensors(arguments)]:
        raise BrokenLawError(f"{sample.name}: the call writes to its arguments in place, if only to restore them")
    if found := difference(_settings(before), _settings(arguments)):
        raise BrokenLawError(f"{sample.name}: the call changes how its arguments are set up: {found}")


def copies_are_equal_and_independent(sample: Sample) -> None:
    """``copy.deepcopy`` of the callable computes the same and shares no memory with the original."""
    function, arguments = case(sample)
    twin = copy.deepcopy(function)
    if twin is function:
        raise SkipTest("a plain function")
    if found := difference(call(function, arguments), call(twin, arguments), rtol=RTOL, atol=sample.atol):
        raise BrokenLawError(f"{sample.name}: a deep copy computes something else: {found}")
    shared = {tensor.data_ptr() for tensor in tensors(function)} & {tensor.data_ptr() for tensor in tensors(twin)} - {0}
    if shared:
        raise BrokenLawError(f"{sample.name}: a deep copy shares {len(shared)} tensors with the original")


def compiled_equals_eager(sample: Sample) -> None:
    """``torch.compile`` with the backend aot_eager gives the same result and the same gradient."""
    if not sample.compile:
        raise SkipTest(sample.reason)
    function, arguments = case(sample)
    torch._dynamo.reset()
    counters.clear()
    with _as_users_run_it():
        expected = with_gradients(sample, function, arguments)
        compiled = with_gradients(sample, function, arguments, wrap=_compiled)
    if not counters["stats"]["unique_graphs"]:
        raise BrokenLawError(f"{sample.name}: torch.compile finds nothing to compile")
    if found := difference(expected, compiled, rtol=RTOL, atol=sample.atol):
        raise BrokenLawError(f"{sample.name}: compiled (0: result, 1: gradient) differs from eager: {found}")


def runs_on_fake_cuda(sample: Sample) -> None:
    """On fake CUDA tensors the call runs, and gives CUDA tensors of the shapes and types that it gives on the CPU."""
    if not sample.fake_cuda:
        raise SkipTest(sample.reason)
    function, arguments = case(sample)
    expected = tensors(call(function, arguments))

    def fake(tensor: Tensor) -> Tensor:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda")

    with FakeTensorMode(allow_non_fake_inputs=False):
        on_cuda = converted(function, fake)
        result = tensors(on_cuda(*converted(arguments, fake)))
    _require_device(sample, result, "cuda")
    if [(t.shape, t.dtype) for t in result] != [(t.shape, t.dtype) for t in expected]:
        raise BrokenLawError(f"{sample.name}: shapes or types on CUDA differ from those on the CPU")


def runs_on_a_device_of_its_own(sample: Sample) -> None:
    """On the stand-in device, result and gradient stay on the device and equal those on the CPU."""
    expected = with_gradients(sample, *case(sample))
    with StandIn() as device:
        result = converted(_elsewhere(sample, device, torch.Generator.clone_state), back_on_cpu)
    if found := difference(expected, result, rtol=RTOL, atol=sample.atol):
        raise BrokenLawError(f"{sample.name}: (0: result, 1: gradient) on another device differs from the CPU: {found}")


def runs_on_cuda(sample: Sample) -> None:
    """On a GPU, result and gradient stay there and equal those on the CPU; of a method that draws, they are finite."""
    function, arguments = case(sample)
    expected = with_gradients(sample, function, arguments)
    draws = bool(difference(expected, with_gradients(sample, function, arguments, seed=1)))
    draws |= any(isinstance(leaf, torch.Generator) for _, leaf in leaves((function, arguments)))
    device = torch.device("cuda")
    result = converted(_elsewhere(sample, device, lambda _: torch.Generator(device).manual_seed(0)), Tensor.cpu)
    if draws and not all(number.isfinite().all() for number in floats(result)):
        raise BrokenLawError(f"{sample.name}: on CUDA the result or the gradient has entries that are not finite")
    if not draws and (found := difference(expected, result, rtol=RTOL, atol=sample.atol)):
        raise BrokenLawError(f"{sample.name}: (0: result, 1: gradient) on CUDA differs from the CPU: {found}")


def case(sample: Sample, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Call, Arguments]:
    """The sample's callable and arguments, built under ``seed`` and cast to ``dtype``."""
    torch.manual_seed(seed)
    function = sample.build()
    arguments = sample.inputs(torch.Generator().manual_seed(0))
    return cast(function, dtype), cast(arguments, dtype)


def call(
    function: Call,
    arguments: Arguments,
    *,
    seed: int = 0,
    memo: Mapping[int, Any] | None = None,
    wrap: Callable[[Call], Call] = lambda function: function,
) -> Any:
    """One call under a seed and on copies, so that no call sees what another left behind.

    Args:
        function: the callable under test, perhaps with a memory.
        arguments: its arguments.
        seed: of PyTorch's global generator.
        memo: what to put in the place of which object (by ``id``) in the copies.
        wrap: turns the copied callable into the one that is called.
    """
    function, arguments = copy.deepcopy((function, arguments), dict(memo or {}))
    torch.manual_seed(seed)
    return wrap(function)(*arguments)


@contextmanager
def _as_users_run_it() -> Iterator[None]:
    """Without the checks of shapes that tests add: they draw random numbers, and torch.compile cannot trace them."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)


def _other_generators() -> tuple[Any, ...]:
    numpy_state = mtrand.get_state(legacy=False)["state"]
    return random.getstate(), numpy_state["key"].tobytes(), numpy_state["pos"]


def _compiled(function: Call) -> Call:
    return torch.compile(lambda *arguments: function(*arguments), backend="aot_eager")


def _variables(sample: Sample, function: Call, arguments: Arguments) -> list[Tensor]:
    """What the gradient is taken of, switched to require it."""
    declared = [arguments[position] for position in sample.differentiable]
    if not all(isinstance(argument, Tensor) and argument.dtype.is_floating_point for argument in declared):
        raise BrokenLawError(f"{sample.name}: `differentiable` must give positions of floating point tensors")
    if sample.parameters:
        if not isinstance(function, nn.Module):
            raise BrokenLawError(f"{sample.name}: `parameters` is set but build() gives no module")
        declared += [parameter for parameter in function.parameters() if parameter.requires_grad]
    return [variable.requires_grad_() for variable in declared]


def _elsewhere(
    sample: Sample, device: torch.device, generator: Callable[[torch.Generator], torch.Generator]
) -> tuple[Any, list[Tensor]]:
    """Result and gradients of the sample moved to a device; all of them must be there."""
    function, arguments = converted(case(sample), lambda tensor: tensor.to(device), generator)
    found = with_gradients(sample, function, arguments)
    _require_device(sample, tensors(found), device.type)
    return found


def with_gradients(
    sample: Sample,
    function: Call,
    arguments: Arguments,
    *,
    seed: int = 0,
    wrap: Callable[[Call], Call] = lambda function: function,
) -> tuple[Any, list[Tensor]]:
    """The result and the gradients of a fixed weighted sum of its numbers with respect to the declared variables."""
    variables = _variables(sample, function, arguments)
    result = call(function, arguments, seed=seed, memo={id(variable): variable for variable in variables}, wrap=wrap)
    terms = [_weighted_sum(out) for out in floats(result) if out.requires_grad]
    if not variables or not terms:
        return result, []
    return result, list(
        torch.autograd.grad(sum(terms[1:], terms[0]), variables, allow_unused=True, materialize_grads=True)
    )


def _weighted_sum(tensor: Tensor) -> Tensor:
    # Unequal weights: the plain sum of a softmax has no gradient.
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return (real * torch.linspace(0.5, 1.5, real.numel(), dtype=real.dtype, device=real.device).view(real.shape)).sum()


def _settings(arguments: Arguments) -> list[Any]:
    """What a call could change on its arguments besides their numbers."""
    modules = [module for argument in arguments if isinstance(argument, nn.Module) for module in argument.modules()]
    flags = [(tensor.requires_grad, tensor.grad) for tensor in tensors(arguments)]
    return [flags, [module.training for module in modules]]


def _require_device(sample: Sample, found: list[Tensor], device: str) -> None:
    for tensor in found:
        if tensor.device.type != device:
            raise BrokenLawError(f"{sample.name}: inputs on {device!r} give a tensor on {str(tensor.device)!r}")
