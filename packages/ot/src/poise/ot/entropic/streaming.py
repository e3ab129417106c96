r"""Entropic optimal transport between large point clouds, in memory linear in their size.

The cost matrix is never stored. A half-step of Sinkhorn's algorithm in the log domain needs a ``logsumexp`` of every row,
so the costs of a few rows are computed, reduced and forgotten; the gradient of the value with respect to the points, by the
envelope theorem :math:`\sum_{ij} P_{ij} \nabla c(x_i, y_j)`, passes over the same blocks once more. An iteration costs one
evaluation of all costs, which a stored kernel matrix saves: worth it only where that matrix does not fit.

>>> import torch
>>> from poise.ot import SqEuclidean, sinkhorn_points
>>> x, y = torch.randn(500, 3), torch.randn(400, 3, requires_grad=True)
>>> result = sinkhorn_points(x, y, 0.5, SqEuclidean(), method="streaming")
>>> result.value.backward()
>>> y.grad.shape
torch.Size([400, 3])
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from poise.core.eager import eager
from poise.ot.arrays import full_precision, widen
from poise.ot.costs.cost import Cost
from poise.ot.entropic.epsilon import RelativeEpsilon
from poise.ot.entropic.fixed_point import annealing_factors, cost_spread, solve, stride
from poise.ot.entropic.kernels import LOG2_E, log_sum_
from poise.ot.entropic.result import (
    Potentials,
    SinkhornResult,
    absolute,
    check_stopping,
    judge,
    regularization,
    starting_potentials,
)
from poise.ot.entropic.sinkhorn import plan

TILE = 1 << 20
"""Costs held at a time: a few megabytes, which stay in the cache."""


@eager
def streaming_sinkhorn(
    x: Float[Tensor, "*B n d"],
    y: Float[Tensor, "*B m d"],
    reg: float | Tensor | RelativeEpsilon,
    cost: Cost,
    a: Float[Tensor, "*B n"],
    b: Float[Tensor, "*B m"],
    *,
    tol: float = 1e-3,
    max_iter: int = 2000,
    init: Potentials | None = None,
    symmetric: bool = False,
) -> SinkhornResult[Tensor]:
    """Solve the problem of :func:`poise.ot.sinkhorn` with ``M = cost.pairwise(x, y)`` without storing ``M``.

    :func:`poise.ot.sinkhorn_points` chooses between this and a stored matrix, and checks its arguments.

    Args:
        x: source points.
        y: target points.
        reg: ε > 0: a number, one number per problem (B,), or relative to the cost.
        cost: the ground cost.
        a: source masses.
        b: target masses of the same total.
        tol: marginal error at which to stop.
        max_iter: iterations after which to give up, with a :class:`ConvergenceWarning`.
        init: potentials ``(f, g)`` of a similar problem; they replace the annealing of ε.
        symmetric: ``y`` is ``x``, ``b`` is ``a`` and the cost is symmetric.

    Returns:
        As :func:`poise.ot.sinkhorn`; the value is differentiable in ``x``, ``y``, ``a`` and ``b``, in bounded memory too.
        Only ``plan()`` makes a full matrix.

    Source:
        Feydy, Geometric Data Analysis, Beyond Convolutions, PhD thesis 2020, section 3.3 (sums without stored matrices).
    """
    check_stopping(tol, max_iter)
    points, others = widen(x.detach()), widen(y.detach())
    source, target = widen(a.detach()), widen(b.detach())
    target = target * (source.sum(-1, keepdim=True) / target.sum(-1, keepdim=True))
    if isinstance(reg, RelativeEpsilon):
        reg = reg.of_points(points, others, cost, source, target)
    epsilon = regularization(reg, points[..., 0, 0])
    with torch.no_grad(), full_precision(points):
        few = (cloud[..., :: stride(cloud.shape[-2]), :] for cloud in (points, others))
        spread = 0.0 if symmetric or init else cost_spread(cost.pairwise(*few), epsilon)
        found = solve(
            _StreamingKernel(points, others, cost, source, target),
            epsilon,
            source,
            *starting_potentials(init, source, target, epsilon),
            factors=annealing_factors(spread),
            tol=tol,
            max_iter=max_iter,
            symmetric=symmetric,
        )
        f, g, value = absolute(found, source, target, epsilon)
        converged = judge(found, tol)
    return SinkhornResult(
        f=f,
        g=g,
        value=_PointEnvelope.apply(value, x, y, a, b, f, g, epsilon, cost),
        reg=epsilon,
        marginal_error=found.error,
        converged=converged,
        n_iter=found.iterations,
        _plan=lambda: plan(f, g, cost.pairwise(points, others), epsilon),
    )


class _StreamingKernel:
    """Half-steps by ``logsumexp`` over costs that are computed in blocks; the base is 0."""

    def __init__(self, x: Tensor, y: Tensor, cost: Cost, a: Tensor, b: Tensor) -> None:
        self._x, self._y, self._cost = x, y, cost
        self._log_a, self._log_b = a.log(), b.log()

    def start(self, epsilon: Tensor, phi: Tensor, psi: Tensor) -> Potentials:
        self._scale = -LOG2_E / epsilon[..., None, None]
        return phi, psi

    def rows(self, psi: Tensor) -> Tensor:
        shift = LOG2_E * (psi + self._log_b).unsqueeze(-2)
        costs = (self._cost.pairwise(part, self._y) for part in _blocks(self._x, self._y))
        return -torch.cat([log_sum_(cost.mul_(self._scale).add_(shift), -1) for cost in costs], -1)

    def columns(self, phi: Tensor) -> Tensor:
        shift = LOG2_E * (phi + self._log_a).unsqueeze(-1)
        costs = (self._cost.pairwise(self._x, part) for part in _blocks(self._y, self._x))
        return -torch.cat([log_sum_(cost.mul_(self._scale).add_(shift), -2) for cost in costs], -1)

    def total(self, phi: Tensor, psi: Tensor) -> Potentials:
        return phi, psi

    def strain(self, phi: Tensor, psi: Tensor) -> Tensor:
        return phi.new_zeros(())


def _blocks(points: Tensor, others: Tensor) -> tuple[Tensor, ...]:
    """``points`` in parts such that a part and all ``others`` have at most ``TILE`` pairs."""
    return points.split(max(1, TILE // others[..., 0].numel()), -2)


class _PointEnvelope(torch.autograd.Function):
    """The optimal value with the gradients of the envelope theorem, the plan passing by in blocks."""

    @staticmethod
    def forward(
        ctx: Any,
        value: Tensor,
        x: Tensor,
        y: Tensor,
        a: Tensor,
        b: Tensor,
        f: Tensor,
        g: Tensor,
        epsilon: Tensor,
        cost: Cost,
    ) -> Tensor:
        ctx.save_for_backward(x, y, a, b, f, g, epsilon)
        ctx.cost = cost
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, y, a, b, f, g, epsilon = ctx.saved_tensors
        _, for_x, for_y, for_a, for_b, *_ = ctx.needs_input_grad
        grad_x: Tensor | None = None
        grad_y: Tensor | None = None
        if for_x or for_y:
            grad_x, grad_y = _point_gradients(widen(x), widen(y), f, g, epsilon, ctx.cost, grad)
            grad_x, grad_y = grad_x.to(x.dtype), grad_y.to(y.dtype)
        return (
            None,
            grad_x,
            grad_y,
            (grad.unsqueeze(-1) * f).to(a.dtype) if for_a else None,
            (grad.unsqueeze(-1) * g).to(b.dtype) if for_b else None,
            None,
            None,
            None,
            None,
        )


def _point_gradients(
    x: Tensor, y: Tensor, f: Tensor, g: Tensor, epsilon: Tensor, cost: Cost, grad: Tensor
) -> tuple[Tensor, Tensor]:
    """``sum_j P_ij d1 c(x_i, y_j)`` for every i and ``sum_i P_ij d2 c(x_i, y_j)`` for every j, times ``grad``."""
    columns = y.detach().requires_grad_()
    grad_x, grad_y = [], torch.zeros_like(y)
    size = _blocks(x, y)[0].shape[-2]
    for part, potential in zip(x.split(size, -2), f.split(size, -1), strict=True):
        rows = part.detach().requires_grad_()
        with torch.enable_grad(), full_precision(rows):
            costs = cost.pairwise(rows, columns)
        weights = plan(potential, g, costs.detach(), epsilon).mul_(grad[..., None, None])
        grad_rows, grad_columns = torch.autograd.grad(costs, (rows, columns), weights)
        grad_x.append(grad_rows)
        grad_y += grad_columns
    return torch.cat(grad_x, -2), grad_y
