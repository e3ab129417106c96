"""What a member declares so that the workspace contract tests its methods: one :class:`Sample` per case, in ``tests/samples.py``."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One call that the contract repeats under every law (:mod:`poise.core.contract.laws`).

    The contract copies, casts and moves what it finds in the callable and in its arguments: tensors, modules (parameters and
    buffers, as ``Module.to`` does), generators, and these inside tuples, lists, dicts, dataclasses and ``functools.partial``.
    It cannot see into a closure: bind a model or a tensor with ``functools.partial``, or make it an argument.

    Results may be tensors or such containers of tensors and numbers; every number in them is compared.

    Attributes:
        name: the method's slug with underscores, then a slash and the case: ``"monge_gap/sqeuclidean"``.
        build: makes the callable under test, a function or a module. Called after ``torch.manual_seed``.
        inputs: makes its positional arguments from a CPU generator, floats in float64; the contract casts and moves them. A method
            that draws may be given the generator itself; each call then starts from the same state of it.
        differentiable: positions of the arguments whose gradient is checked against finite differences in float64 (and those of a
            module's parameters, if ``parameters``); an empty sequence for a method without gradients.
        parameters: check gradients with respect to the module's parameters too.
        dtypes: reduced precisions in which the result must be finite.
        compile: whether ``torch.compile`` must give the same result.
        fake_cuda: whether the call must run on fake CUDA tensors. Reasons to say no are control flow that depends on the data (a
            convergence test), and ``torch.autograd.grad`` inside the call, for which PyTorch asks the driver even there. A device of
            its own is found out all the same: every sample also runs on :mod:`poise.core.contract.stand_in`.
        atol: absolute tolerance of the comparisons in float64.
        reason: why a law is switched off; required when one is.
    """

    name: str
    build: Callable[[], Callable[..., Any]]
    inputs: Callable[[torch.Generator], tuple[Any, ...]]
    differentiable: Sequence[int] = (0,)
    parameters: bool = False
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16)
    compile: bool = True
    fake_cuda: bool = True
    atol: float = 1e-6
    reason: str = ""

    def __post_init__(self) -> None:
        without_gradient = not self.differentiable and not self.parameters
        off = without_gradient or len(self.dtypes) < 2 or not self.compile or not self.fake_cuda
        if off and not self.reason:
            raise ValueError(f"sample {self.name!r} switches a law off: say why in `reason`")


@dataclass(frozen=True)
class Fuzz:
    """How a public name is called, for :mod:`poise.core.contract.robustness`, in ``FUZZ`` of the member's ``tests/fuzz.py``.

    Attributes:
        sample: the name of a sample of the member, or a valid call of its own; numbers among the arguments are changed too.
        but: the changes under which its law does not hold, each with the reason.
    """

    sample: Sample | str
    but: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Exempt:
    """A public name that is not called with changed arguments.

    Attributes:
        reason: why not.
    """

    reason: str


def sampled(name: str, **but: str) -> Fuzz:
    """The valid call that a sample of the contract makes.

    Args:
        name: of the sample.
        but: see :class:`Fuzz`.
    """
    return Fuzz(name, but)


def valid(
    build: Callable[[], Callable[..., Any]],
    inputs: Callable[[torch.Generator], tuple[Any, ...]],
    differentiable: Sequence[int] = (),
    **but: str,
) -> Fuzz:
    """A valid call that no sample of the contract makes.

    Args:
        build: makes the callable, as in a :class:`Sample`.
        inputs: makes its arguments, as in a :class:`Sample`.
        differentiable: positions of the arguments of which gradients are taken.
        but: see :class:`Fuzz`.
    """
    sample = Sample(name="", build=build, inputs=inputs, differentiable=differentiable, reason="called to be changed")
    return Fuzz(sample, but)


def randn(generator: torch.Generator, *shape: int) -> Tensor:
    """Standard normal float64 numbers from ``generator``."""
    return torch.randn(*shape, generator=generator, dtype=torch.float64)
