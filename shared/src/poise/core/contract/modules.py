"""What modules and penalties must obey on top of :mod:`poise.core.contract.laws`."""

import io
from typing import Any
from unittest import SkipTest

import torch
from torch import Tensor, nn

from poise.core.contract.laws import RTOL, BrokenLawError, call, case
from poise.core.contract.objects import difference, floats
from poise.core.penalty import Penalty
from poise.core.schedule import Linear
from poise.core.testing import Sample


def twice_the_weight_gives_twice_the_penalty(sample: Sample) -> None:
    """``forward`` at weight 2w is 2 times ``forward`` at w, and ``value`` is the penalty without its weight."""
    results, values = [], []
    for weight in (0.75, 1.5):
        penalty, arguments = _penalty(sample, weight)
        results.append(call(penalty, arguments, memo={id(penalty): penalty}))
        values.append(penalty.value)
    if results[0].dim() != 0:
        raise BrokenLawError(f"{sample.name}: forward gives a tensor of shape {tuple(results[0].shape)}, not a scalar")
    if found := difference(2 * results[0], results[1], rtol=RTOL, atol=sample.atol):
        raise BrokenLawError(f"{sample.name}: twice the weight is not twice the penalty: {found}")
    if found := difference(values, [results[0] / 0.75, results[1] / 1.5], rtol=RTOL, atol=sample.atol):
        raise BrokenLawError(f"{sample.name}: `value` is not the penalty without its weight: {found}")


def no_weight_costs_nothing(sample: Sample) -> None:
    """At weight 0, ``forward`` gives the zero of the dtype it would have had, computes nothing and adds no gradient."""
    for dtype in (torch.float64, *sample.dtypes):
        penalty, arguments = _penalty(sample, 1.0, dtype)
        usual = call(penalty, arguments)
        penalty.weight = 0.0
        _forbid_computation(penalty)
        variables = [tensor.requires_grad_() for tensor in floats(arguments) if tensor.is_leaf]
        zero = penalty(*arguments)
        if not isinstance(zero, Tensor) or zero.shape != () or zero.item() != 0:
            raise BrokenLawError(f"{sample.name}: weight 0 gives {zero!r}")
        if (zero.dtype, zero.device) != (usual.dtype, usual.device):
            raise BrokenLawError(
                f"{sample.name}: weight 0 gives a zero of {zero.dtype} on {zero.device}, weight 1 {usual.dtype} on {usual.device}"
            )
        if penalty.value is not None:
            raise BrokenLawError(f"{sample.name}: weight 0 leaves an old `value` behind")
        loss = sum((variable.sum() for variable in variables), start=zero)
        gradients = torch.autograd.grad(loss, variables) if variables else ()  # a penalty may take no arguments
        if any((gradient != 1).any() for gradient in gradients):
            raise BrokenLawError(f"{sample.name}: weight 0 changes the gradient of the rest of the loss")


def state_survives_a_round_trip(sample: Sample) -> None:
    """After use, ``state_dict`` goes through a file that unpickles nothing, and a fresh build that loads it goes on alike."""
    used, arguments = case(sample)
    fresh, _ = case(sample, seed=1)
    if not (isinstance(used, nn.Module) and isinstance(fresh, nn.Module)):
        raise SkipTest("not a module")
    torch.manual_seed(0)
    used(*arguments)
    if isinstance(used, Penalty):
        for _ in range(3):
            used.step()
    file = io.BytesIO()
    torch.save(used.state_dict(), file)
    file.seek(0)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    if found := difference(used.state_dict(), fresh.state_dict()):
        raise BrokenLawError(f"{sample.name}: a state that was loaded differs from the one that was saved: {found}")
    ramp = Linear(1.0, 2.0, steps=10)
    for penalty in (used, fresh):
        if isinstance(penalty, Penalty):
            penalty.weight = ramp
    if found := difference(call(used, arguments), call(fresh, arguments), rtol=RTOL, atol=sample.atol):
        raise BrokenLawError(f"{sample.name}: after loading the state the next call differs: {found}")


def _penalty(sample: Sample, weight: float, dtype: torch.dtype = torch.float64) -> tuple[Penalty, tuple[Any, ...]]:
    penalty, arguments = case(sample, dtype)
    if not isinstance(penalty, Penalty):
        raise SkipTest("not a Penalty")
    penalty.weight = weight
    return penalty, arguments


def _forbid_computation(penalty: Penalty) -> None:
    def compute(*_: Any, **__: Any) -> Tensor:
        raise BrokenLawError(f"{type(penalty).__name__}: weight 0 computes the penalty")

    object.__setattr__(penalty, "penalty", compute)
