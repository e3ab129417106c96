"""First-order methods on the dual problems: Adam with a fixed number of steps, and subgradients with averaging."""

import torch
from jaxtyping import Float
from torch import Tensor

from poise.ot.sparse.duals import Dual, SemiDual
from poise.ot.sparse.lbfgs import Minimum

FIRST_STEP = 0.1
"""Length of the first subgradient step, in units of the spread of the costs times the square root of the number of variables."""


def adam(
    objective: Dual | SemiDual,
    start: Float[Tensor, "batch d"],
    *,
    learning_rate: float,
    steps: int,
    tol: Float[Tensor, " batch"],
) -> Minimum:
    """:func:`adam_point`, and how far it is from a solution.

    Raises:
        ValueError: ``learning_rate`` is not positive.
    """
    if not learning_rate > 0:
        raise ValueError(f"learning_rate must be positive, got {learning_rate}")
    return _minimum(objective, adam_point(objective, start, learning_rate=learning_rate, steps=steps), steps, tol)


def adam_point(
    objective: Dual | SemiDual,
    start: Float[Tensor, "batch d"],
    *,
    learning_rate: float,
    steps: int,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> Float[Tensor, "batch d"]:
    """Where exactly ``steps`` steps of Adam (Kingma and Ba 2015) lead, every problem by itself."""
    point, mean, square = start, torch.zeros_like(start), torch.zeros_like(start)
    for step in range(1, steps + 1):
        gradient = objective(point)[1]
        mean = mean.lerp(gradient, 1 - betas[0])
        square = square * betas[1] + (1 - betas[1]) * gradient.square()
        corrected = (square / (1 - betas[1] ** step)).sqrt() + eps
        point = point - learning_rate / (1 - betas[0] ** step) * mean / corrected
    return point


def averaged_subgradient(
    objective: Dual | SemiDual, start: Float[Tensor, "batch d"], *, steps: int, tol: Float[Tensor, " batch"]
) -> tuple[Minimum, Float[Tensor, "batch n m"]]:
    """Normalised subgradient steps of length c / sqrt(t); the best point, and the plan averaged over the later half of the steps.

    A single subgradient follows one of several tied entries; the average over steps splits mass among them, as the optimum does.
    """
    point, best = start.clone(), start.clone()
    lowest = torch.full_like(tol, torch.inf)
    spread = objective.cost.flatten(1).std(-1).clamp_min(torch.finfo(start.dtype).tiny)
    length = FIRST_STEP * spread * start.shape[-1] ** 0.5
    average = torch.zeros_like(objective.cost)
    late = steps - steps // 2
    for step in range(1, steps + 1):
        value, gradient = objective(point)
        better = value < lowest
        lowest, best = torch.where(better, value, lowest), torch.where(better[:, None], point, best)
        if step > steps // 2:
            average += objective.entries(point).dense() / late
        norm = gradient.norm(dim=-1).clamp_min(torch.finfo(start.dtype).tiny)
        point = point - (length / step**0.5 / norm)[:, None] * gradient
    return _minimum(objective, best, steps, tol), average


def _minimum(objective: Dual | SemiDual, point: Tensor, steps: int, tol: Float[Tensor, " batch"]) -> Minimum:
    error = objective(point)[1].abs().sum(-1)
    return Minimum(point, error, torch.full_like(tol, steps, dtype=torch.long), error <= tol)
