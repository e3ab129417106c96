r"""Entropic optimal transport between histograms.

Cuturi, "Sinkhorn Distances: Lightspeed Computation of Optimal Transport", NeurIPS 2013, arXiv 1306.0895.

.. math:: W_\varepsilon(a, b) = \min_{P \ge 0,\ P 1 = a,\ P^\top 1 = b} \langle P, M\rangle - \varepsilon H(P),
          \qquad H(P) = -\sum_{ij} P_{ij} \log P_{ij}.

The optimal plan is :math:`P_{ij} = \exp((f_i + g_j - M_{ij})/\varepsilon)`, and the value is what the potentials say,
:math:`W_\varepsilon = \langle f, a\rangle + \langle g, b\rangle`: a lower bound of the objective of every plan, converged or
not. With this sign of the entropy :math:`W_\varepsilon \le W_0`. Others take the entropy relative to :math:`a b^\top` (then the
value is larger by :math:`\varepsilon H(a) + \varepsilon H(b)`) or report :math:`\langle P, M\rangle`, ``(plan * M).sum()``.

Gradients come from the envelope theorem, never through the iterations: :math:`\partial W/\partial M = P`,
:math:`\partial W/\partial a = f`, :math:`\partial W/\partial b = g` (the last two up to constants, which a change of masses
that keeps the totals does not see).

>>> import torch
>>> a, b = torch.full((2,), 0.5), torch.full((3,), 1 / 3)
>>> M = torch.tensor([[0.0, 1.0, 2.0], [2.0, 1.0, 0.0]], requires_grad=True)
>>> result = sinkhorn(a, b, M, 0.1)
>>> result.value.backward()
>>> bool(result.converged), torch.allclose(result.plan(), M.grad)
(True, True)
"""

from typing import Any, Literal, cast, overload

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from poise.core.eager import eager
from poise.ot.arrays import Array, as_tensors, check_histograms, full_precision, widen
from poise.ot.entropic.epsilon import RelativeEpsilon
from poise.ot.entropic.fixed_point import annealing_factors, cost_spread, solve
from poise.ot.entropic.kernels import LOG2_E, LogKernel, StabilizedKernel
from poise.ot.entropic.result import (
    Potentials,
    SinkhornResult,
    absolute,
    check_stopping,
    judge,
    regularization,
    starting_potentials,
    to_numpy,
)

Method = Literal["auto", "log", "absorption"]


@overload
def sinkhorn(
    a: Tensor | None,
    b: Tensor | None,
    M: Tensor,
    reg: float | Tensor | RelativeEpsilon,
    *,
    method: Method = "auto",
    tol: float = 1e-3,
    max_iter: int = 2000,
    init: tuple[Tensor, Tensor] | None = None,
) -> SinkhornResult[Tensor]: ...
@overload
def sinkhorn(
    a: np.ndarray | None,
    b: np.ndarray | None,
    M: np.ndarray,
    reg: float | RelativeEpsilon,
    *,
    method: Method = "auto",
    tol: float = 1e-3,
    max_iter: int = 2000,
    init: tuple[np.ndarray, np.ndarray] | None = None,
) -> SinkhornResult[np.ndarray]: ...
@eager
def sinkhorn(
    a: Array | None,
    b: Array | None,
    M: Array,
    reg: float | Tensor | RelativeEpsilon,
    *,
    method: Method = "auto",
    tol: float = 1e-3,
    max_iter: int = 2000,
    init: tuple[Array, Array] | None = None,
) -> SinkhornResult[Tensor] | SinkhornResult[np.ndarray]:
    r"""Solve :math:`\min_P \langle P, M\rangle - \varepsilon H(P)` over plans with marginals ``a`` and ``b``.

    Args:
        a: source masses (n,) or (B, n); uniform when ``None``. Masses may be 0, so that padding has no effect.
        b: target masses (m,) or (B, m) of the same total; uniform when ``None``.
        M: cost matrix (n, m), or (B, n, m) for a batch of problems. Half precision is computed in float32,
            and so are the results.
        reg: ε > 0: a number, one number per problem (B,), or relative to the cost.
        method: ``"log"`` computes in the log domain throughout. ``"absorption"`` iterates with a stabilised kernel matrix,
            several times faster. ``"auto"`` does the latter and goes on in the log domain if numbers overflow.
        tol: marginal error at which to stop; 1e-3 is enough for training.
        max_iter: iterations after which to give up, with a :class:`ConvergenceWarning`.
        init: potentials ``(f, g)`` of a similar problem; they replace the annealing of ε.

    Returns:
        Potentials, value, plan on demand, and how far the iteration got.

    Raises:
        TypeError: not torch or NumPy floating-point arrays of one kind and dtype.
        ValueError: shapes do not fit, entries are NaN or infinite, masses are negative or their totals differ, or ``reg``,
            ``tol`` or ``max_iter`` is not positive.

    Source:
        Peyré and Cuturi, "Computational Optimal Transport", 2019, sections 4.1 and 4.4.
    """
    cost, *masses = as_tensors(M, *(array for array in (a, b) if array is not None))
    if cost.ndim not in (2, 3):
        raise ValueError(f"M must be (n, m) or (B, n, m), got {tuple(cost.shape)}")
    source = uniform(widen(cost[..., 0])) if a is None else masses.pop(0)
    target = uniform(widen(cost[..., 0, :])) if b is None else masses.pop(0)
    check_histograms(source, target, cost)
    potentials = None if init is None else cast(Potentials, tuple(as_tensors(*init)))
    result = solve_matrix(source, target, cost, reg, method=method, tol=tol, max_iter=max_iter, init=potentials)
    return to_numpy(result, M) if isinstance(M, np.ndarray) else result


def solve_matrix(
    a: Tensor,
    b: Tensor,
    M: Tensor,
    reg: float | Tensor | RelativeEpsilon,
    *,
    method: Method,
    tol: float,
    max_iter: int,
    init: Potentials | None,
    symmetric: bool = False,
) -> SinkhornResult[Tensor]:
    """:func:`sinkhorn` on checked tensors; ``symmetric`` says that ``M`` is symmetric and ``a`` equals ``b``."""
    if method not in ("auto", "log", "absorption"):
        raise ValueError(f"method must be 'auto', 'log' or 'absorption', got {method!r}")
    check_stopping(tol, max_iter)
    cost, source, target = (widen(tensor.detach()) for tensor in (M, a, b))
    target = target * (source.sum(-1, keepdim=True) / target.sum(-1, keepdim=True))  # equal up to rounding, now exactly
    if isinstance(reg, RelativeEpsilon):
        reg = reg.of_matrix(cost, source, target)
    epsilon = regularization(reg, cost[..., 0, 0])

    def log_kernel() -> LogKernel:
        return LogKernel(cost, source, target)

    with torch.no_grad(), full_precision(cost):
        # a warm start and the symmetric iteration need no annealing
        spread = 0.0 if symmetric or init else cost_spread(cost, epsilon)
        found = solve(
            log_kernel() if method == "log" else StabilizedKernel(cost, source, target),
            epsilon,
            source,
            *starting_potentials(init, source, target, epsilon),
            factors=annealing_factors(spread),
            tol=tol,
            max_iter=max_iter,
            symmetric=symmetric,
            fallback=log_kernel if method == "auto" else None,
        )
        f, g, value = absolute(found, source, target, epsilon)
        converged = judge(found, tol)
    return SinkhornResult(
        f=f,
        g=g,
        value=_Envelope.apply(value, a, b, M, f, g, epsilon),
        reg=epsilon,
        marginal_error=found.error,
        converged=converged,
        n_iter=found.iterations,
        _plan=lambda: plan(f, g, cost, epsilon),
    )


def plan(f: Tensor, g: Tensor, cost: Tensor, epsilon: Tensor) -> Tensor:
    """``exp((f + g - C) / epsilon)``, (..., n, m)."""
    return (f.unsqueeze(-1) + g.unsqueeze(-2) - cost).mul_(LOG2_E / epsilon[..., None, None]).exp2_()


def uniform(like: Tensor) -> Tensor:
    """Equal masses that sum to 1 along the last axis."""
    return torch.full_like(like, 1 / like.shape[-1], requires_grad=False)


class _Envelope(torch.autograd.Function):
    """The optimal value with the gradients of the envelope theorem; the plan is computed in the backward pass only."""

    @staticmethod
    def forward(
        ctx: Any, value: Tensor, a: Tensor, b: Tensor, M: Tensor, f: Tensor, g: Tensor, epsilon: Tensor
    ) -> Tensor:
        ctx.save_for_backward(a, b, M, f, g, epsilon)
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        a, b, M, f, g, epsilon = ctx.saved_tensors
        _, for_a, for_b, for_M, *_ = ctx.needs_input_grad
        return (
            None,
            (grad.unsqueeze(-1) * f).to(a.dtype) if for_a else None,
            (grad.unsqueeze(-1) * g).to(b.dtype) if for_b else None,
            plan(f, g, widen(M), epsilon).mul_(grad[..., None, None]).to(M.dtype) if for_M else None,
            None,
            None,
            None,
        )
