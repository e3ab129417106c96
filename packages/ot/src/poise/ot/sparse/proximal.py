r"""The exact optimum of the dual under a cardinality constraint: proximal steps on the plan, each a smooth dual problem.

L-BFGS alone stalls short of the optimum of a dual that is not differentiable there. The proximal point method on the plan (the
method of multipliers on the dual) only ever minimises smoothed duals, and with a growing :math:`\rho` it ends, both of which carries
over to inexact steps:

.. math::

    T^{l+1} = \arg\min_{T 1 = a,\ T^\top 1 = b} \langle T, C\rangle + \sum_j \Omega^{**}(t_j) + \tfrac{1}{2\rho_l}\|T - T^l\|^2

The first step is taken by L-BFGS from zero, the others by semismooth Newton; where the m by m systems of Newton's method would not fit,
L-BFGS takes them all. The plan of the last step meets both marginals, and the distance of its relaxed objective to the dual value
says how far either can be from the optimum.

Rockafellar, "Augmented Lagrangians and applications of the proximal point algorithm in convex programming", Math. Oper. Res. 1, 1976;
Li, Sun and Toh, "A highly efficient semismooth Newton augmented Lagrangian method", SIAM J. Optim. 28, 2018, arXiv 1607.05428.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from poise.ot.sparse.lbfgs import lbfgs
from poise.ot.sparse.newton import newton
from poise.ot.sparse.regularizers import Entries, widen
from poise.ot.sparse.smoothing import SmoothedDual

STIFFNESS = 1.0  # gamma rho of the first step
LOOSENESS = 30.0  # of the first step where gamma is weak: rho in units of mass per entry and spread of costs
FIRST_ERROR, NEXT_ERROR = 0.1, 0.1  # missing mass after the first step, and what each step leaves of it
# rho grows by GROWTH after a step of FAST iterations, by its root up to SLOW, and then stays
GROWTH, FAST, SLOW = 3.0, 15, 35
INNER = 40  # Newton iterations of one step at most
STEPS = 60
NEWTON_LIMIT = 2**27  # numbers in the systems of a batch: 1 GB in float64


@dataclass(frozen=True)
class ProximalPoint:
    """Where the proximal point method ended.

    Attributes:
        point: the dual potentials ``[alpha, beta]``.
        plan: a plan with both marginals, one column per row; it may have more than k entries per column.
        n_iter: iterations of L-BFGS and Newton.
        solved: whether missing mass and duality gap came down to the tolerance.
    """

    point: Float[Tensor, "batch d"]
    plan: Float[Tensor, "batch n m"]
    n_iter: Int[Tensor, " batch"]
    solved: Bool[Tensor, " batch"]


def proximal_point(
    a: Float[Tensor, "batch m"],
    b: Float[Tensor, "batch n"],
    cost: Float[Tensor, "batch n m"],
    gamma: float,
    k: int | None,
    *,
    tol: float,
    max_iter: int,
) -> ProximalPoint:
    """Solve the relaxation of min <T, C> + gamma/2 |T|^2 with at most ``k`` nonzeros per column.

    Computed in float64 whatever comes in: which entries tie is decided by digits that float32 does not have.

    Args:
        a: row masses.
        b: column masses.
        cost: costs, one column per row.
        gamma: strength of the quadratic term.
        k: the cap; ``None`` for none, when a single step without a proximal term does it.
        tol: missing mass relative to the total, and duality gap relative to the primal value, at which a problem is done.
        max_iter: iterations of L-BFGS and Newton per problem at most.
    """
    dtype = cost.dtype
    a, b, cost = a.double(), b.double(), cost.double()
    mass = a.sum(-1)
    place = torch.arange(len(a), device=a.device)
    p = torch.zeros_like(torch.cat([a, b], dim=-1))
    point, plan = p.clone(), torch.zeros_like(cost)
    n_iter, solved = torch.zeros_like(place), torch.zeros_like(mass, dtype=torch.bool)
    rho = floor = _first_rho(mass, cost, gamma)
    if k is None:  # smooth already: a proximal term only helps where costs decide
        rho = torch.where(rho < STIFFNESS / gamma, rho, torch.inf)
    damping, allowed, center = torch.full_like(mass, 1e-4), FIRST_ERROR * mass, None
    direct = a.numel() * a.shape[1] <= NEWTON_LIMIT
    for step in range(STEPS):
        objective = SmoothedDual(a[place], b[place], cost, place, gamma, k, rho, center)
        if direct and step > 0:
            minimum, damping = newton(
                objective,
                objective.lift(p),
                rows=a.shape[1],
                mass=mass[place],
                stiffness=torch.where(rho.isinf(), 1 / gamma, rho),
                damping=damping,
                tol=allowed,
                max_iter=INNER,
            )
            effort = minimum.n_iter
        else:
            minimum = lbfgs(objective, p, tol=allowed, max_iter=max_iter)
            effort = minimum.n_iter // INNER
        columns = objective.columns(minimum.point)
        found = columns.entries(a.shape[1])
        gap, size = objective.gap(minimum.point, columns)
        done = (minimum.error <= tol * mass[place]) & (gap.abs() <= tol * size)
        n_iter[place] += minimum.n_iter
        ended = done | (n_iter[place] >= max_iter) | (step == STEPS - 1)
        where = place[ended]
        point[where], plan[where], solved[where] = minimum.point[ended], found.select(ended).dense(), done[ended]
        if bool(ended.all()):
            break
        damping = damping.clamp_max(1.0)
        held = minimum.converged if center is None else minimum.converged | ~torch.isfinite(rho)
        center = found if center is None else _where(held, found, center)
        growth = torch.where(effort <= FAST, GROWTH, torch.where(effort <= SLOW, GROWTH**0.5, 1.0))
        rho = torch.where(held, rho * growth, torch.where(rho.isinf(), floor, (rho / 2).maximum(floor)))
        allowed = torch.where(held, allowed * NEXT_ERROR, allowed).maximum(0.1 * tol * mass[place])
        alive = (~ended).nonzero()[:, 0]
        place, rho, damping, allowed, floor = (each[alive] for each in (place, rho, damping, allowed, floor))
        p, center = minimum.point[alive], center.select(alive)
    return ProximalPoint(point.to(dtype), plan.to(dtype), n_iter, solved)


def _first_rho(
    mass: Float[Tensor, " batch"], cost: Float[Tensor, "batch n m"], gamma: float
) -> Float[Tensor, " batch"]:
    """Stiff relative to the quadratic term, unless that is so weak that costs decide: then a fraction of a plan's entry per cost."""
    spread = cost.flatten(1).std(-1).clamp_min(torch.finfo(cost.dtype).tiny)
    return (LOOSENESS * mass / (max(cost.shape[1:]) * spread)).clamp_max(STIFFNESS / gamma)


def _where(choose: Bool[Tensor, " batch"], one: Entries, other: Entries) -> Entries:
    """``one`` for the problems chosen, else ``other``; the narrower is padded with zeros."""
    assert one.index is not None
    assert other.index is not None
    width = max(one.values.shape[-1], other.values.shape[-1])

    def merge(new: Tensor, old: Tensor) -> Tensor:
        return torch.where(choose[:, None, None], widen(new, width), widen(old, width))

    return Entries(merge(one.values, other.values), merge(one.index, other.index), one.size)
