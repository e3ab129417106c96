r"""Transport plans with at most k nonzeros in every column, and their relatives without a cap.

Liu, Puigcerver and Blondel, "Sparsity-Constrained Optimal Transport", ICLR 2023, arXiv 2209.15466.

.. math:: \min_{T \ge 0,\ T 1 = a,\ T^\top 1 = b} \langle T, M\rangle + \sum_j \Omega(t_j), \qquad
          \Omega(t) = \tfrac\gamma2 \|t\|^2 \text{ if } \|t\|_0 \le k, \text{ else } \infty

with :math:`t_j` the columns of T. Two concave problems give the value and a plan:

.. math::

    D(\alpha, \beta) &= \langle\alpha, a\rangle + \langle\beta, b\rangle - \sum_j \delta(\alpha + \beta_j - m_j), \\
    S(\alpha) &= \langle\alpha, a\rangle - \sum_j b_j \max{}_{b_j}(\alpha - m_j).

They have the same optimum. For k below the support of the quadratic plan it is that of the convex relaxation, on ties of the k-th
place: the capped plan read off there keeps the cap and, from S, the column sums, but its rows are only approximate
(``row_error``). :func:`~poise.ot.sparse.recovery.recover_plan` gives a plan with both marginals.

>>> import torch
>>> from poise.ot import sparsity_constrained_ot
>>> a, b = torch.full((4,), 0.25), torch.tensor([0.5, 0.5])
>>> M = torch.tensor([[0.0, 1.0], [0.1, 0.9], [0.9, 0.2], [1.0, 0.0]])
>>> result = sparsity_constrained_ot(a, b, M, k=2)
>>> result.plan, bool(result.converged)
(tensor([[0.2500, 0.0000],
        [0.2500, 0.0000],
        [0.0000, 0.2500],
        [0.0000, 0.2500]]), True)
"""

from dataclasses import dataclass, replace
from typing import Any, Generic, Literal, TypeVar, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from poise.ot.arrays import Array, as_tensors, check_histograms, like
from poise.ot.sparse.duals import Dual, SemiDual, capped_plan, column_potentials
from poise.ot.sparse.firstorder import adam, averaged_subgradient
from poise.ot.sparse.lbfgs import lbfgs
from poise.ot.sparse.projection import wide
from poise.ot.sparse.proximal import proximal_point
from poise.ot.sparse.regularizers import ColumnRegularizer, NegEntropy, SparsityConstrained

A = TypeVar("A", bound=Array)
Solver = Literal["auto", "proximal", "lbfgs", "adam", "subgradient"] | str
Form = Literal["semi_dual", "dual"] | str

ROW_TOL = 1e-3
"""Share of the mass by which rows may be off in a plan that counts as a solution."""


@dataclass(frozen=True, eq=False)
class OTResult(Generic[A]):
    """What a solver found; NumPy arrays if it was given NumPy arrays.

    Attributes:
        plan: the plan (m, n) or (B, m, n) that the potentials give; it keeps the cap.
        alpha: row potentials (m,) or (B, m).
        beta: column potentials (n,) or (B, n).
        value: the dual value, a lower bound of the objective of every plan; differentiable in ``a``, ``b`` and ``M``.
        row_error: L1 norm of what is missing in the rows of ``plan``.
        col_error: the same of the columns; 0 up to rounding for the semi-dual.
        gap: what the relaxed objective of a plan with both marginals exceeds ``value`` by: no value, and no such plan, can be further
            from the optimum. It tells whether the problem is solved where the cap leaves the rows of ``plan`` wrong.
        n_iter: iterations.
        converged: whether the solver met its tolerance and ``plan`` has both marginals to a thousandth of the mass.
        relaxed: the plan of the convex relaxation, with both marginals; ``None`` from a solver that has none.
        a: the problem that was solved.
        b: see ``a``.
        M: see ``a``.
        reg: the regularizer; it refers to the rows of ``plan`` if ``by_row``.
        by_row: whether rows and columns have changed places.
    """

    plan: A
    alpha: A
    beta: A
    value: A
    row_error: A
    col_error: A
    gap: A
    n_iter: A
    converged: A
    relaxed: A | None
    a: A
    b: A
    M: A
    reg: ColumnRegularizer
    by_row: bool = False


def solve_semi_dual(
    a: A,
    b: A,
    M: A,
    reg: ColumnRegularizer,
    solver: Solver = "auto",
    tol: float | None = None,
    max_iter: int = 3_000,
    learning_rate: float = 1e-2,
) -> OTResult[A]:
    r"""Maximise :math:`S(\alpha)` and read the plan off it: its column sums are exact.

    Args:
        a: row masses (m,) or (B, m), positive.
        b: column masses (n,) or (B, n), positive, of the same total.
        M: costs (m, n) or (B, m, n). Half precision is computed in float32. NumPy arrays give a result in NumPy.
        reg: the regularizer of the columns.
        solver: ``"proximal"`` finds the optimum also where it is not differentiable; ``"lbfgs"`` may stall there;
            ``"adam"`` takes exactly ``max_iter`` steps from zero, as the published router does; ``"subgradient"`` averages
            over its iterates. ``"auto"`` is L-BFGS for :class:`NegEntropy`, else proximal.
        tol: missing mass, relative to the total, at which to stop; default 1e-9 in float64, 1e-5 in float32.
        max_iter: iterations at most.
        learning_rate: of Adam; the other solvers have no use for it.

    Returns:
        The result. Where ``converged`` is false because of the rows, see :func:`recover_plan`.

    Raises:
        TypeError: not floating-point tensors or arrays of one kind and dtype.
        ValueError: shapes do not fit; entries are NaN or infinite; a mass is not positive; totals differ; or an option is unknown
            or out of range.

    Source:
        Liu et al. 2023, section 3; Blondel, Seguy and Rolet 2018, equation 10.
    """
    return _solve(a, b, M, reg, solver, "semi_dual", tol, max_iter, learning_rate)


def solve_dual(
    a: A,
    b: A,
    M: A,
    reg: ColumnRegularizer,
    solver: Solver = "auto",
    tol: float | None = None,
    max_iter: int = 3_000,
    learning_rate: float = 1e-2,
) -> OTResult[A]:
    r"""Maximise :math:`D(\alpha, \beta)` and read the plan off it; rows and columns are approximate alike.

    Arguments, result and errors are those of :func:`solve_semi_dual`.

    Source:
        Liu et al. 2023, section 3; Blondel, Seguy and Rolet 2018, equation 7.
    """
    return _solve(a, b, M, reg, solver, "dual", tol, max_iter, learning_rate)


def sparsity_constrained_ot(
    a: A,
    b: A,
    M: A,
    k: int,
    gamma: float = 1.0,
    axis: Literal["col", "row"] | str = "col",
    form: Form = "semi_dual",
    solver: Solver = "auto",
    tol: float | None = None,
    max_iter: int = 3_000,
) -> OTResult[A]:
    """Transport with at most ``k`` nonzeros in every column, or in every row.

    Args:
        a: row masses (m,) or (B, m), positive.
        b: column masses (n,) or (B, n), positive, of the same total.
        M: costs (m, n) or (B, m, n).
        k: the cap, at least 1; more than the length of a column means none.
        gamma: strength of the quadratic term.
        axis: what the cap is for: ``"col"`` or ``"row"``.
        form: which problem to maximise, ``"semi_dual"`` or ``"dual"``.
        solver: see :func:`solve_semi_dual`.
        tol: see there.
        max_iter: see there.

    Returns:
        The result.

    Raises:
        TypeError, ValueError: as :func:`solve_semi_dual`; or ``k`` is no integer or below 1, ``gamma`` not positive, or ``axis`` or
            ``form`` unknown.

    Source:
        Liu et al. 2023, equation 9.
    """
    if axis not in ("col", "row"):
        raise ValueError(f"axis must be 'col' or 'row', got {axis!r}")
    if form not in ("semi_dual", "dual"):
        raise ValueError(f"form must be 'semi_dual' or 'dual', got {form!r}")
    solve = solve_semi_dual if form == "semi_dual" else solve_dual
    reg = SparsityConstrained(k, gamma)
    if axis == "col":
        return solve(a, b, M, reg, solver, tol, max_iter)
    as_tensors(a, b, M)  # before it is transposed, so that errors speak of what was given
    return swapped(solve(b, a, _transposed(M), reg, solver, tol, max_iter))


def swapped(result: OTResult[A]) -> OTResult[A]:
    """The same result with rows and columns exchanged."""
    return replace(
        result,
        plan=_transposed(result.plan),
        alpha=result.beta,
        beta=result.alpha,
        row_error=result.col_error,
        col_error=result.row_error,
        relaxed=None if result.relaxed is None else _transposed(result.relaxed),
        a=result.b,
        b=result.a,
        M=_transposed(result.M),
        by_row=not result.by_row,
    )


def _transposed(matrix: A) -> A:
    return cast(A, matrix.swapaxes(-1, -2))


@dataclass(frozen=True)
class _Found:
    """Potentials of a batch of problems."""

    alpha: Float[Tensor, "batch m"]
    beta: Float[Tensor, "batch n"] | None
    relaxed: Float[Tensor, "batch m n"] | None
    n_iter: Int[Tensor, " batch"]
    converged: Bool[Tensor, " batch"]


def _solve(
    a: A,
    b: A,
    M: A,
    reg: ColumnRegularizer,
    solver: Solver,
    form: Form,
    tol: float | None,
    max_iter: int,
    learning_rate: float,
) -> OTResult[A]:
    source, target, cost = as_tensors(a, b, M)
    check_histograms(source, target, cost, positive=True)
    if not isinstance(reg, ColumnRegularizer):
        raise TypeError(f"reg must be a regularizer such as SparsityConstrained(k), got {type(reg).__name__}")
    if max_iter < 1:
        raise ValueError(f"max_iter must be at least 1, got {max_iter}")
    if tol is not None and not tol > 0:
        raise ValueError(f"tol must be positive, got {tol}")
    batched = cost.ndim == 3
    given = tuple(each if batched else each.unsqueeze(0) for each in (source, target, cost))
    with torch.no_grad():
        rows, columns, costs = (wide(each.detach()) for each in given)
        columns = columns * (
            rows.sum(-1, keepdim=True) / columns.sum(-1, keepdim=True)
        )  # equal up to rounding, now exactly
        tolerance = tol if tol is not None else (1e-9 if costs.dtype == torch.float64 else 1e-5)
        found = _potentials(rows, columns, costs, reg, solver, form, tolerance, max_iter, learning_rate)
        plan, beta, value = _read_off(rows, columns, costs, reg, form, found)
        row_error = (plan.sum(-1) - rows).abs().sum(-1)
        col_error = (plan.sum(-2) - columns).abs().sum(-1)
        feasible = (row_error + col_error) <= ROW_TOL * rows.sum(-1)
        transport = plan if found.relaxed is None else found.relaxed
        rounded = rounded_plan(transport, rows, columns)
        gap = (rounded * costs).sum((-2, -1)) + reg.relaxed_value(rounded).sum(-1) - value
    value = _Envelope.apply(*given, value, found.alpha, beta, transport)

    def out(tensor: Tensor) -> A:
        tensor = tensor if batched else tensor.squeeze(0)
        return cast(A, tensor if isinstance(M, Tensor) else like(tensor, M))

    return OTResult(
        plan=out(plan),
        alpha=out(found.alpha),
        beta=out(beta),
        value=out(value),
        row_error=out(row_error),
        col_error=out(col_error),
        gap=out(gap),
        n_iter=out(found.n_iter),
        converged=out(found.converged & feasible),
        relaxed=None if found.relaxed is None else out(found.relaxed),
        a=out(rows),
        b=out(columns),
        M=out(costs),
        reg=reg,
    )


def _potentials(
    a: Tensor,
    b: Tensor,
    cost: Tensor,
    reg: ColumnRegularizer,
    solver: Solver,
    form: Form,
    tol: float,
    max_iter: int,
    learning_rate: float,
) -> _Found:
    if solver == "auto":
        solver = "lbfgs" if isinstance(reg, NegEntropy) else "proximal"
    by_column = cost.mT.contiguous()
    size = a.shape[-1]
    if solver == "proximal":
        if isinstance(reg, NegEntropy):
            raise ValueError(
                "solver='proximal' is for the quadratic regularizers; NegEntropy has 'lbfgs', 'adam' and 'subgradient'"
            )
        cap = reg.k if isinstance(reg, SparsityConstrained) and reg.k < size else None
        end = proximal_point(a, b, by_column, reg.gamma, cap, tol=tol, max_iter=max_iter)
        return _Found(end.point[:, :size], end.point[:, size:], end.plan.mT, end.n_iter, end.solved)
    objective = SemiDual(a, b, by_column, reg) if form == "semi_dual" else Dual(a, b, by_column, reg)
    start = torch.zeros_like(a) if form == "semi_dual" else torch.zeros_like(torch.cat([a, b], dim=-1))
    averaged = None
    if solver == "lbfgs":
        minimum = lbfgs(objective, start, tol=tol * a.sum(-1), max_iter=max_iter)
    elif solver == "adam":
        minimum = adam(objective, start, learning_rate=learning_rate, steps=max_iter, tol=tol * a.sum(-1))
    elif solver == "subgradient":
        minimum, averaged = averaged_subgradient(objective, start, steps=max_iter, tol=tol * a.sum(-1))
    else:
        raise ValueError(f"solver must be 'auto', 'proximal', 'lbfgs', 'adam' or 'subgradient', got {solver!r}")
    beta = minimum.point[:, size:] if form == "dual" else None
    relaxed = None if averaged is None else averaged.mT
    return _Found(minimum.point[:, :size], beta, relaxed, minimum.n_iter, minimum.converged)


def _read_off(
    a: Tensor, b: Tensor, cost: Tensor, reg: ColumnRegularizer, form: Form, found: _Found
) -> tuple[Tensor, Tensor, Tensor]:
    """Plan, column potentials and value that the potentials give in this form."""
    by_column = cost.mT.contiguous()
    if form == "dual" and found.beta is not None:
        objective: Dual | SemiDual = Dual(a, b, by_column, reg)
        point = torch.cat([found.alpha, found.beta], dim=-1)
        entries = objective.entries(point)
        return capped_plan(entries), found.beta, -objective(point)[0]
    objective = SemiDual(a, b, by_column, reg)
    entries = objective.entries(found.alpha)
    beta = column_potentials(entries, found.alpha, by_column, reg)
    return capped_plan(entries), beta, -objective(found.alpha)[0]


def rounded_plan(
    plan: Float[Tensor, "batch m n"], a: Float[Tensor, "batch m"], b: Float[Tensor, "batch n"]
) -> Float[Tensor, "batch m n"]:
    """A plan with exactly these marginals, as near to ``plan`` as its marginals are (Altschuler et al., NeurIPS 2017, algorithm 2)."""
    tiny = torch.finfo(plan.dtype).tiny
    plan = plan * (a / plan.sum(-1).clamp_min(tiny)).clamp_max(1)[..., None]
    plan = plan * (b / plan.sum(-2).clamp_min(tiny)).clamp_max(1)[..., None, :]
    rows, columns = (a - plan.sum(-1)).clamp_min(0), (b - plan.sum(-2)).clamp_min(0)
    return plan + rows[..., None] * columns[..., None, :] / rows.sum(-1)[..., None, None].clamp_min(tiny)


class _Envelope(torch.autograd.Function):
    """The optimal value with the gradient of the envelope theorem: dV/da = alpha, dV/db = beta, dV/dM = T."""

    @staticmethod
    def forward(
        ctx: Any, a: Tensor, b: Tensor, M: Tensor, value: Tensor, alpha: Tensor, beta: Tensor, plan: Tensor
    ) -> Tensor:
        ctx.save_for_backward(alpha, beta, plan)
        ctx.dtypes = a.dtype, b.dtype, M.dtype
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        alpha, beta, plan = ctx.saved_tensors
        parts = (gradient[:, None] * alpha, gradient[:, None] * beta, gradient[:, None, None] * plan)
        return (*(part.to(dtype) for part, dtype in zip(parts, ctx.dtypes, strict=True)), None, None, None, None)
