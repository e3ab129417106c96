r"""Semismooth Newton on a batch of duals with a piecewise linear gradient, which ends at the exact minimiser.

With second derivatives :math:`J_j` per column, the Hessian in :math:`(\alpha, \beta)` has a diagonal block for :math:`\beta`, so every
step solves its Schur complement :math:`\sum_j J_j - J_j 1 1^\top J_j / 1^\top J_j 1` by Cholesky, an m by m system per problem. The
system is singular where parts of the plan are not connected; Levenberg and Marquardt's damping, proportional to what is missing in the
marginals, bounds the step there and vanishes at the end.

Qi and Sun, A nonsmooth version of Newton's method, Mathematical Programming 58, 1993; for quadratically regularised transport: Lorenz,
Manns and Meyer, Quadratically Regularized Optimal Transport, Applied Mathematics and Optimization 83, 2021, arXiv 1903.01112.
"""

from typing import Protocol, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor

from poise.ot.sparse.lbfgs import Minimum
from poise.ot.sparse.regularizers import Entries
from poise.ot.sparse.smoothing import Curvature

LOOSEN, TIGHTEN = 0.2, 8.0  # factors of the damping after a good and a bad step
DAMPING = (1e-7, 1e6)  # its range, in units of `scale` times the missing mass


class CurvedObjective(Protocol):
    """A batch of dual objectives in ``[alpha, beta]`` with second derivatives."""

    def __call__(self, p: Float[Tensor, "batch d"], /) -> tuple[Float[Tensor, " batch"], Float[Tensor, "batch d"]]: ...

    def select(self, keep: Int[Tensor, " kept"], /) -> Self: ...

    def curvature(self, p: Float[Tensor, "batch d"], /) -> Curvature: ...


def newton(
    objective: CurvedObjective,
    start: Float[Tensor, "batch d"],
    *,
    rows: int,
    scale: Float[Tensor, " batch"],
    damping: Float[Tensor, " batch"],
    tol: Float[Tensor, " batch"],
    max_iter: int,
) -> tuple[Minimum, Float[Tensor, " batch"]]:
    """Minimise every function of the batch from its row of ``start``.

    Args:
        objective: the functions; their gradients are missing masses.
        start: starting points.
        rows: how many of the variables are alpha.
        scale: the size of second derivatives, per problem, to which the damping is relative.
        damping: where it begins.
        tol: L1 norm of the gradient at which a problem is done.
        max_iter: steps, good and bad, after which it is given up.

    Returns:
        The minimum, and the damping to go on with.
    """
    point, error = start.clone(), torch.zeros_like(tol)
    damping, n_iter = damping.clone(), torch.zeros_like(tol, dtype=torch.long)
    place = torch.arange(len(start), device=start.device)
    p, d = start, damping
    f, g = objective(p)
    missing = g.abs().sum(-1)
    error[place] = missing
    for _ in range(max_iter):
        running = (missing > tol[place]) & (d < DAMPING[1])
        alive = running.nonzero()[:, 0]
        if alive.numel() == 0:
            break
        if 2 * alive.numel() <= running.numel():
            objective, place = objective.select(alive), place[alive]
            p, f, g, d, missing, running = (each[alive] for each in (p, f, g, d, missing, running))
        direction = newton_direction(objective.curvature(p), g, rows, d * scale[place] * missing)
        trial = p + direction
        f_trial, g_trial = objective(trial)
        missing_trial = g_trial.abs().sum(-1)
        rounding = 64 * torch.finfo(f.dtype).eps * f.abs()
        good = (f_trial <= f + 1e-4 * (direction * g).sum(-1)) | (
            (missing_trial < 0.9 * missing) & (f_trial <= f + rounding)
        )
        good &= running
        n_iter[place] += running
        d = torch.where(running, torch.where(good, LOOSEN * d, TIGHTEN * d).clamp(*DAMPING), d)
        p, g = torch.where(good[:, None], trial, p), torch.where(good[:, None], g_trial, g)
        f, missing = torch.where(good, f_trial, f), torch.where(good, missing_trial, missing)
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
        products = torch.diag_embed(diagonal)
        products = products - weight[..., None] * tied[..., :, None] * tied[..., None, :]
        products = products - column[..., :, None] * column[..., None, :] / total[..., None, None]
        where = index[..., :, None] * rows + index[..., None, :]
        flat = diagonal.new_zeros((batch, rows * rows)).scatter_add_(-1, where.flatten(1), products.flatten(1))
        return flat.view(batch, rows, rows)
    factors = torch.cat([tied * weight.sqrt(), column * total.rsqrt()[..., None]], dim=1)
    dense = Entries(factors, torch.cat([index, index], dim=1), rows).dense()
    system = -dense.mT @ dense
    system.diagonal(dim1=-2, dim2=-1).add_(Entries(diagonal, index, rows).row_sums())
    return system
