r"""The convex conjugate of a potential, many points at once, by L-BFGS.

``f*(y) = max_x <x, y> - f(x)``. The maximiser is the point whose image under ``grad f`` is ``y``: the inverse of the transport map.
Amos, "On Amortizing Convex Conjugates for Optimal Transport", ICLR 2023, arXiv 2210.12153, refines a network's prediction of it this
way.

>>> import torch
>>> from poise.ot import conjugate_point
>>> y = torch.randn(8, 3)
>>> found = conjugate_point(lambda x: x.square().sum(-1), y, torch.zeros_like(y))   # f = |x|^2, so x = y / 2
>>> torch.allclose(found.point, y / 2, atol=1e-3)
True
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

SUFFICIENT_DECREASE = 1e-4
"""Armijo's constant, the usual choice (Nocedal and Wright, Numerical Optimization, section 3.1)."""


@dataclass(frozen=True)
class Conjugate:
    """What :func:`conjugate_point` found.

    Attributes:
        point: the maximisers.
        value: ``f*(y)``, a lower bound where not converged.
        residual: ``|grad f(point) - y|``.
        converged: where the residual is below the tolerance.
        iterations: number of iterations that the slowest point took.
    """

    point: Float[Tensor, "n d"]
    value: Float[Tensor, " n"]
    residual: Float[Tensor, " n"]
    converged: Bool[Tensor, " n"]
    iterations: int


@torch.no_grad()
def conjugate_point(
    potential: Callable[[Tensor], Tensor],
    y: Float[Tensor, "n d"],
    start: Float[Tensor, "..."],
    *,
    tol: float = 1e-3,
    max_iter: int = 20,
    history: int = 5,
    max_halvings: int = 10,
) -> Conjugate:
    r"""Maximise ``<x, y> - f(x)`` for each row of ``y``, all rows in step.

    Every row has its own curvature pairs, its own step length by backtracking, and stops by itself; ``f`` and its gradient are
    evaluated for the whole batch. The result carries no gradient: by the envelope theorem the gradient of ``f*(y)`` in the
    parameters of ``f`` is that of ``-f`` at the fixed point.

    Args:
        potential: a convex ``f``, maps ``(n, d)`` to ``(n,)`` point by point.
        y: where to conjugate.
        start: first guesses of the maximisers.
        tol: a row has converged when ``|grad f(x) - y|`` is at most this.
        max_iter: iterations at most; a ``max_iter`` of 0 evaluates the start.
        history: curvature pairs kept.
        max_halvings: halvings of a step before a row keeps its point.

    Returns:
        Points, values and the state of convergence; no gradient.

    Raises:
        ValueError: the shapes of ``y`` and ``start`` differ, or a setting is outside its range.
    """
    if y.shape != start.shape:
        raise ValueError(f"y and start must have the same shape, got {tuple(y.shape)} and {tuple(start.shape)}")
    if not tol > 0 or min(max_iter, history - 1, max_halvings) < 0:
        raise ValueError(
            "expected tol > 0, max_iter >= 0, history >= 1 and max_halvings >= 0, "
            f"got {tol}, {max_iter}, {history} and {max_halvings}"
        )

    def objective(points: Tensor) -> Tensor:
        return potential(points) - (points * y).sum(-1)

    point = start.detach()
    value, gradient = _value_and_gradient(objective, point)
    scale = 1 / gradient.norm(dim=-1).clamp(min=1.0)  # the first step is never longer than 1
    pairs: list[tuple[Tensor, Tensor, Tensor]] = []  # s, u and 1 / <s, u> of each row, 0 where a row skips the pair
    moving = gradient.norm(dim=-1) > tol
    stalled = torch.zeros_like(moving)
    iterations = 0
    while iterations < max_iter and bool(moving.any()):
        direction = -_inverse_hessian_product(gradient, pairs, scale)
        trial = _backtrack(objective, point, value, gradient, direction, moving, max_halvings)
        trial_value, trial_gradient = _value_and_gradient(objective, trial)
        better = _improves(trial_value, trial_gradient, value, gradient)
        keep = better[:, None]
        pairs = [
            (step, change, weight * better) for step, change, weight in pairs
        ]  # after a failure, try the plain gradient
        step, change = torch.where(keep, trial - point, 0), torch.where(keep, trial_gradient - gradient, 0)
        curvature, squared_change = (step * change).sum(-1), change.square().sum(-1)
        usable = curvature > torch.finfo(point.dtype).eps * squared_change
        pairs = [*pairs, (step, change, torch.where(usable, 1 / curvature, 0))][-history:]
        scale = torch.where(usable, curvature / squared_change, scale)
        point, gradient = torch.where(keep, trial, point), torch.where(keep, trial_gradient, gradient)
        value = torch.where(better, trial_value, value)
        moving = (better | ~stalled) & (gradient.norm(dim=-1) > tol)
        stalled = ~better
        iterations += 1
    residual = gradient.norm(dim=-1)
    return Conjugate(point, -value, residual, residual <= tol, iterations)


def _value_and_gradient(objective: Callable[[Tensor], Tensor], points: Tensor) -> tuple[Tensor, Tensor]:
    def summed(points: Tensor) -> tuple[Tensor, Tensor]:
        values = objective(points)
        return values.sum(), values

    gradient, (_, values) = torch.func.grad_and_value(summed, has_aux=True)(points)
    return values, gradient


def _backtrack(
    objective: Callable[[Tensor], Tensor],
    point: Tensor,
    value: Tensor,
    gradient: Tensor,
    direction: Tensor,
    moving: Tensor,
    max_halvings: int,
) -> Tensor:
    """The end of a step that decreases the objective enough, from length 1 down, row by row; rows that rest stay."""
    slope = (direction * gradient).sum(-1)
    length = moving.to(point.dtype)
    for _ in range(max_halvings):
        allowed = value + SUFFICIENT_DECREASE * length * slope + _rounding(value)
        too_long = objective(point + length[:, None] * direction) > allowed
        if not bool(too_long.any()):
            break
        length = torch.where(too_long, length / 2, length)
    return point + length[:, None] * direction


def _improves(trial_value: Tensor, trial_gradient: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
    """Where the objective falls; where it is level up to rounding, the smaller gradient decides."""
    level = (trial_value - value).abs() <= _rounding(value)
    return torch.where(level, trial_gradient.norm(dim=-1) < gradient.norm(dim=-1), trial_value < value)


def _inverse_hessian_product(gradient: Tensor, pairs: list[tuple[Tensor, Tensor, Tensor]], scale: Tensor) -> Tensor:
    """The two-loop recursion, row by row (Nocedal and Wright, algorithm 7.4)."""
    product = gradient
    coefficients = []
    for step, change, weight in reversed(pairs):
        coefficient = weight * (step * product).sum(-1)
        product = product - coefficient[:, None] * change
        coefficients.append(coefficient)
    product = scale[:, None] * product
    for (step, change, weight), coefficient in zip(pairs, reversed(coefficients), strict=True):
        product = product + (coefficient - weight * (change * product).sum(-1))[:, None] * step
    return product


def _rounding(value: Tensor) -> Tensor:
    """Differences of the objective that are noise."""
    return 10 * torch.finfo(value.dtype).eps * value.abs().clamp(min=1.0)
