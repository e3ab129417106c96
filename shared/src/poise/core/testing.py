"""What a member declares so that the workspace contract tests its methods: one :class:`Sample` per case, in ``tests/samples.py``."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One call that the contract repeats under every law (see the workspace's ``tests/test_contract.py``).

    Attributes:
        name: the method's slug with underscores, then a slash and the case: ``"monge_gap/sqeuclidean"``.
        build: makes the callable under test, a function or a module. Called after ``torch.manual_seed``.
        inputs: makes its positional arguments from a CPU generator, floats in float64; the contract casts and moves them.
        differentiable: positions of the arguments whose gradient is checked against finite differences in float64 (and those of a
            module's parameters, if ``parameters``); an empty sequence for a method without gradients.
        parameters: check gradients with respect to the module's parameters too.
        dtypes: reduced precisions in which the result must be finite.
        compile: whether ``torch.compile`` must give the same result.
        fake_cuda: whether the call must run on fake CUDA tensors; only data-dependent control flow is a reason to say no.
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
        off = not self.differentiable or len(self.dtypes) < 2 or not self.compile or not self.fake_cuda
        if off and not self.reason:
            raise ValueError(f"sample {self.name!r} switches a law off: say why in `reason`")


def randn(generator: torch.Generator, *shape: int) -> Tensor:
    """Standard normal float64 numbers from ``generator``."""
    return torch.randn(*shape, generator=generator, dtype=torch.float64)
