"""A plan with both marginals from the potentials of a capped problem."""

from typing import cast

import numpy as np
import torch
from torch import Tensor

from poise.ot.arrays import Array, as_tensors, like
from poise.ot.sparse.regularizers import NegEntropy, SparsityConstrained
from poise.ot.sparse.sparse_ot import ROW_TOL, A, OTResult, swapped


def recover_plan(result: OTResult[A], slack: float | None = None) -> A:
    r"""A plan that has both marginals, as near to the optimum of the relaxation as the potentials are.

    A capped plan follows one entry of several that tie, and so misses row sums. The optimum of the relaxation splits mass among the
    ties: the result has more than k nonzeros in the columns where that is necessary. At k = 1 it is a vertex of the polytope of plans,
    with m + n - 1 nonzeros at most.

    >>> import torch
    >>> from poise.ot import sparsity_constrained_ot
    >>> a, b, M = torch.tensor([0.6, 0.4]), torch.tensor([0.5, 0.5]), torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    >>> recover_plan(sparsity_constrained_ot(a, b, M, k=1))
    tensor([[0.5000, 0.1000],
            [0.0000, 0.4000]])

    Args:
        result: of a solver of this folder.
        slack: how far below the level of the k-th place an entry may lie to count as tied with it; default a hundredth of the spread
            of the costs. Needed only after solvers other than the proximal one.

    Returns:
        The plan, shaped like ``result.plan``.

    Raises:
        ValueError: ``slack`` is negative.
    """
    if slack is not None and not slack >= 0:
        raise ValueError(f"slack must not be negative, got {slack}")
    if result.by_row:
        return cast(A, recover_plan(swapped(result), slack).swapaxes(-1, -2))
    plan, alpha, beta, a, b, cost = as_tensors(result.plan, result.alpha, result.beta, result.a, result.b, result.M)
    single = cost.ndim == 2
    if single:
        plan, alpha, beta, a, b, cost = (each.unsqueeze(0) for each in (plan, alpha, beta, a, b, cost))
    if isinstance(result.reg, SparsityConstrained) and result.reg.k == 1:
        recovered = torch.stack([_vertex(*problem) for problem in zip(a, b, cost, strict=True)])
    elif result.relaxed is not None and _is_feasible(relaxed := _tensor(result.relaxed, single), a, b):
        recovered = relaxed
    elif isinstance(result.reg, NegEntropy) or _is_feasible(plan, a, b):
        recovered = plan
    else:
        tie = 0.01 * cost.flatten(1).std(-1) if slack is None else torch.full_like(a[:, 0], slack)
        recovered = torch.stack(
            [_least_squares(*problem) for problem in zip(plan, alpha, beta, a, b, cost, tie, strict=True)]
        )
    recovered = recovered.squeeze(0) if single else recovered
    return cast(A, recovered if isinstance(result.plan, Tensor) else like(recovered, result.plan))


def _tensor(plan: Array, single: bool) -> Tensor:
    (tensor,) = as_tensors(plan)
    return tensor.unsqueeze(0) if single else tensor


def _is_feasible(plan: Tensor, a: Tensor, b: Tensor) -> bool:
    missing = (plan.sum(-1) - a).abs().sum(-1) + (plan.sum(-2) - b).abs().sum(-1)
    return bool((missing <= ROW_TOL * a.sum(-1)).all())


def _vertex(a: Tensor, b: Tensor, cost: Tensor) -> Tensor:
    """At k = 1 the relaxation is unregularised transport, which POT solves exactly."""
    import ot

    mass = a.double().sum()
    plan = ot.emd(*(each.double().cpu().numpy() for each in (a / mass, b / b.sum(), cost)))
    return torch.from_numpy(plan).to(cost) * mass.to(cost)


def _least_squares(
    plan: Tensor, alpha: Tensor, beta: Tensor, a: Tensor, b: Tensor, cost: Tensor, tie: Tensor
) -> Tensor:
    """Non-negative least squares for the marginals on the entries that have mass or nearly have, starting from the plan itself."""
    from scipy.optimize import lsq_linear
    from scipy.sparse import coo_array, vstack

    x = alpha[:, None] + beta[None, :] - cost
    level = torch.where(plan > 0, x, torch.inf).amin(0)  # the least of what is in the plan, per column
    rows, columns = (places.cpu().numpy() for places in ((plan > 0) | (x >= level - tie)).nonzero(as_tuple=True))
    count = len(rows)
    ones, order = np.ones(count), np.arange(count)
    marginals = vstack(
        [coo_array((ones, (rows, order)), (len(a), count)), coo_array((ones, (columns, order)), (len(b), count))]
    )
    near = plan[rows, columns].double().cpu().numpy()
    missing = torch.cat([a - plan.sum(1), b - plan.sum(0)]).double().cpu().numpy()
    change = lsq_linear(marginals.tocsr(), missing, bounds=(-near - 1e-300, np.inf), tol=1e-12, lsmr_tol="auto").x
    recovered = torch.zeros_like(plan)
    recovered[rows, columns] = torch.from_numpy(np.maximum(near + change, 0)).to(plan)
    return recovered
