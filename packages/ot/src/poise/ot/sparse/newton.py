r"""Semismooth Newton on a batch of duals with a piecewise linear gradient, which ends at the exact minimiser.

With second derivatives :math:`J_j` per column, the Hessian in :math:`(\alpha, \beta)` has a diagonal block for :math:`\beta`, so every
step solves its Schur complement :math:`\sum_j J_j - J_j 1 1^\top J_j / 1^\top J_j 1` by Cholesky, an m by m system per problem. The
system is singular where parts of the plan are not connected; Levenberg and Marquardt's damping, proportional to what is missing in the
marginals, bounds the step there and vanishes at the end.

Qi and Sun, "A nonsmooth version of Newton's method", Mathematical Programming 58, 1993; for quadratically regularised transport:
Lorenz, Manns and Meyer, "Quadratically Regularized Optimal Transport", Applied Mathematics and Optimization 83, 2021, arXiv
1903.01112.
"""

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from poise.ot.sparse.lbfgs import SUFFICIENT_DECREASE, Minimum
from poise.ot.sparse.regularizers import Entries
from poise.ot.sparse.smoothing import Curvature, Piece

LOOSEN, TIGHTEN = 0.2, 8.0  # factors of the damping after a good and a bad step
LEAST_DAMPING = 1e-7  # relative to second derivatives times the share of mass that is missing
LARGEST_RIDGE = 1e2  # relative to second derivatives; a step that is still bad at this one is rounding


@runtime_checkable
class CurvedObjective(Protocol):
    """A batch of dual objectives in ``[alpha, beta]`` with piecewise linear gradients."""

    def evaluate(
        self, p: Float[Tensor, "batch d"], /
    ) -> tuple[Float[Tensor, " batch"], Float[Tensor, "batch d"], Piece]:
        """Value, gradient, and the piece of the gradient that ``p`` is on."""
        ...

    def select(self, keep: Int[Tensor, " kept"], /) -> "CurvedObjective":
        """The objectives at the places ``keep``."""
        ...

    def curvature(self, piece: Piece, /) -> Curvature:
        """The second derivatives on a piece."""
        ...


def newton(
    objective: CurvedObjective,
    start: Float[Tensor, "batch d"],
    *,
    rows: int,
    mass: Float[Tensor, " batch"],
    stiffness: Float[Tensor, " batch"],
    damping: Float[Tensor, " batch"],
    tol: Float[Tensor, " batch"],
    max_iter: int,
) -> tuple[Minimum, Float[Tensor, " batch"]]:
    """Minimise every function of the batch from its row of ``start``.

    Args:
        objective: the functions; their gradients are missing masses.
        start: starting points.
        rows: how many of the variables are alpha.
        mass: total masses.
        stiffness: the size of second derivatives.
        damping: where the damping begins, relative to stiffness times the share of mass that is missing.
        tol: L1 norm of the gradient at which a problem is done.
        max_iter: steps, good and bad, after which it is given up.

    Returns:
        The minimum, and the damping to go on with.
    """
    point, error = start.clone(), torch.zeros_like(tol)
    damping, n_iter = damping.clone(), torch.zeros_like(tol, dtype=torch.long)
    place = torch.arange(len(start), device=start.device)
    p, d = start, damping
    f, g, piece = objective.evaluate(p)
    missing = g.abs().sum(-1)
    error[place] = missing
    for _ in range(max_iter):
        running = (missing > tol[place]) & (d * missing < LARGEST_RIDGE * mass[place])
        alive = running.nonzero()[:, 0]
        if alive.numel() == 0:
            break
        if 2 * alive.numel() <= running.numel():
            objective, place, piece = objective.select(alive), place[alive], piece.select(alive)
            p, f, g, d, missing, running = (each[alive] for each in (p, f, g, d, missing, running))
        direction = newton_direction(objective.curvature(piece), g, rows, d * missing * (stiffness / mass)[place])
        trial = p + direction
        f_trial, g_trial, piece_trial = objective.evaluate(trial)
        missing_trial = g_trial.abs().sum(-1)
        slope, slope_trial = (direction * g).sum(-1), (direction * g_trial).sum(-1)
        rounding = 64 * torch.finfo(f.dtype).eps * f.abs()
        level = (f_trial <= f + rounding) & (slope_trial <= (2 * SUFFICIENT_DECREASE - 1) * slope)
        good = (f_trial <= f + SUFFICIENT_DECREASE * slope) | level
        good &= running
        n_iter[place] += running
        d = torch.where(running, torch.where(good, LOOSEN * d, TIGHTEN * d).clamp_min(LEAST_DAMPING), d)
        p, g = torch.where(good[:, None], trial, p), torch.where(good[:, None], g_trial, g)
        f, missing = torch.where(good, f_trial, f), torch.where(good, missing_trial, missing)
        piece = piece_trial.where(good, piece)
        point[place], error[place], damping[place] = p, missing, d
    return Minimum(point, error, n_iter, error <= tol), damping


def newton_direction(
    curvature: Curvature, gradient: Float[Tensor, "batch d"], rows: int, ridge: Float[Tensor, " batch"]
) -> Float[Tensor, "batch d"]:
    """The damped Newton step of every problem, through the Schur complement in alpha."""
    index, diagonal, tied, weight = curvature.index, curvature.diagonal, curvature.tied, curvature.weight
    g_alpha, g_beta = gradient[:, :rows], gradient[:, rows:]
    column = diagonal - weight * tied * tied.sum(-1, keepdim=True)  # J_j 1
    total = column.sum(-1) + ridge[:, None]
    system = _schur_complement(curvature, column, total, rows)
    system.diagonal(dim1=-2, dim2=-1).add_(ridge[:, None])
    right = g_alpha - Entries(column * (g_beta / total)[..., None], index, rows).row_sums()
    factor, _ = torch.linalg.cholesky_ex(system)
    alpha = torch.cholesky_solve(right[..., None], factor)[..., 0]
    at_entries = alpha.gather(-1, index.flatten(1)).view_as(column)
    beta = (g_beta - (column * at_entries).sum(-1)) / total
    return -torch.cat([alpha, beta], dim=-1).nan_to_num(0.0, 0.0, 0.0)  # a failed factorisation is a bad step


def _schur_complement(
    curvature: Curvature, column: Float[Tensor, "batch n s"], total: Float[Tensor, "batch n"], rows: int
) -> Float[Tensor, "batch m m"]:
    index, diagonal, tied, weight = curvature.index, curvature.diagonal, curvature.tied, curvature.weight
    batch, _, width = index.shape
    if width * width <= 4 * rows:  # few entries per column: place every product where it belongs
        shrunk = column / total[..., None]
        products = shrunk[..., :, None] * column[..., None, :]
        products.addcmul_((weight * tied)[..., :, None], tied[..., None, :])
        where = index[..., :, None] * rows + index[..., None, :]
        flat = diagonal.new_zeros((batch, rows * rows)).scatter_add_(-1, where.flatten(1), products.flatten(1))
        system = -flat.view(batch, rows, rows)
    else:
        factors = torch.cat([tied * weight.sqrt(), column * total.rsqrt()[..., None]], dim=1)
        dense = Entries(factors, torch.cat([index, index], dim=1), rows).dense()
        system = -dense.mT @ dense
    system.diagonal(dim1=-2, dim2=-1).add_(Entries(diagonal, index, rows).row_sums())
    return system
