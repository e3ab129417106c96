r"""Entropic optimal transport between point clouds, for a ground cost of your choice.

.. math:: W_\varepsilon(x, y) = \min_{P \in U(a, b)} \sum_{ij} P_{ij}\, c(x_i, y_j) - \varepsilon H(P)

>>> import torch
>>> from poise.ot import Euclidean, RelativeEpsilon, sinkhorn_points
>>> x, y = torch.zeros(4, 2), torch.ones(4, 2).requires_grad_()
>>> result = sinkhorn_points(x, y, RelativeEpsilon(0.05), Euclidean())
>>> result.value.backward()
>>> bool(result.converged), tuple(y.grad.shape)
(True, (4, 2))
"""

from typing import Literal, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from poise.core.eager import eager
from poise.ot.arrays import as_tensors, check_masses, full_precision, widen
from poise.ot.costs.cost import Cost
from poise.ot.costs.norms import SqEuclidean
from poise.ot.entropic.epsilon import RelativeEpsilon
from poise.ot.entropic.result import Potentials, SinkhornResult
from poise.ot.entropic.sinkhorn import solve_matrix, uniform
from poise.ot.entropic.streaming import streaming_sinkhorn

SQUARED_EUCLIDEAN = SqEuclidean()
"""The default ground cost."""
STREAM_ABOVE = 4096**2
"""Pairs per problem from which ``method="auto"`` no longer stores the costs."""


@runtime_checkable
class PointSolver(Protocol):
    """Anything that solves entropic transport between two point clouds, like :func:`sinkhorn_points`.

    ``functools.partial(sinkhorn_points, method="streaming")`` is another.
    """

    def __call__(
        self,
        x: Tensor,
        y: Tensor | None,
        reg: float | Tensor | RelativeEpsilon,
        cost: Cost,
        a: Tensor | None = None,
        b: Tensor | None = None,
        /,
        *,
        tol: float,
        max_iter: int,
    ) -> SinkhornResult[Tensor]:
        """Solve for points ``y``, or for ``x`` itself when it is ``None``."""
        ...


@eager
def sinkhorn_points(
    x: Float[Tensor, "..."],
    y: Float[Tensor, "..."] | None,
    reg: float | Tensor | RelativeEpsilon,
    cost: Cost = SQUARED_EUCLIDEAN,
    a: Float[Tensor, "..."] | None = None,
    b: Float[Tensor, "..."] | None = None,
    *,
    method: Literal["auto", "log", "absorption", "streaming"] = "auto",
    tol: float = 1e-3,
    max_iter: int = 2000,
    init: Potentials | None = None,
) -> SinkhornResult[Tensor]:
    """Entropic transport from points ``x`` to points ``y``.

    Args:
        x: source points (n, d), or (B, n, d) for a batch of problems. Half precision is computed in float32,
            and so are the results.
        y: target points (m, d) or (B, m, d); ``None`` for ``x`` itself, which takes a few symmetric iterations only
            (the cost must be symmetric).
        reg: ε > 0: a number, one number per problem (B,), or relative to the cost.
        cost: the ground cost.
        a: source masses (n,) or (B, n); uniform when left out. Masses may be 0, so that padding has no effect.
        b: target masses (m,) or (B, m); must be left out if ``y`` is.
        method: ``"streaming"`` never stores the costs, in memory linear in the number of points; ``"log"`` and
            ``"absorption"`` store them, see :func:`poise.ot.sinkhorn`; ``"auto"`` streams above 4,096 x 4,096 pairs.
        tol: marginal error at which to stop; 1e-3 is enough for training.
        max_iter: iterations after which to give up, with a :class:`ConvergenceWarning`.
        init: potentials ``(f, g)`` of a similar problem; they replace the annealing of ε.

    Returns:
        As :func:`poise.ot.sinkhorn`; the value is differentiable in points and masses (and, where the costs are stored, in
        whatever else they depend on).

    Raises:
        TypeError: the points or masses are not floating-point tensors of one dtype.
        ValueError: shapes do not fit, entries are NaN or infinite, masses are negative or their totals differ, or ``reg``,
            ``tol`` or ``max_iter`` is not positive.
    """
    symmetric = y is None
    if symmetric and b is not None:
        raise ValueError("b must be left out when y is: both measures are x with the masses a")
    y, b = (x, a) if y is None else (y, b)
    check_points(x, y, *(mass for mass in (a, b) if mass is not None))
    source, target = (uniform(widen(points[..., 0])) if mass is None else mass for points, mass in ((x, a), (y, b)))
    if (source.shape, target.shape) != (x.shape[:-1], y.shape[:-1]):
        raise ValueError(
            f"masses must have shape {tuple(x.shape[:-1])} and {tuple(y.shape[:-1])}, "
            f"got {tuple(source.shape)} and {tuple(target.shape)}"
        )
    if a is not None or b is not None:
        check_masses(source, target)
    if method == "streaming" or (method == "auto" and x.shape[-2] * y.shape[-2] > STREAM_ABOVE):
        return streaming_sinkhorn(
            x, y, reg, cost, source, target, tol=tol, max_iter=max_iter, init=init, symmetric=symmetric
        )
    if isinstance(reg, RelativeEpsilon) and reg.cost is not None:
        reg = reg.of_points(x, y, cost, source, target)
    with full_precision(x):
        M = cost.pairwise(widen(x), widen(y))
    return solve_matrix(
        source,
        target,
        M,
        reg,
        method=method,
        tol=tol,
        max_iter=max_iter,
        init=init,
        symmetric=symmetric,
    )


def check_points(x: Tensor, y: Tensor, *others: Tensor) -> None:
    """Check that ``x`` and ``y`` are point clouds of the same space, and all arguments finite and of one dtype.

    Raises:
        TypeError: not floating-point tensors of one dtype.
        ValueError: shapes do not fit, or entries are NaN or infinite.
    """
    as_tensors(x, y, *others)
    if (
        x.ndim not in (2, 3)
        or x.ndim != y.ndim
        or x.shape[:-2] != y.shape[:-2]
        or x.shape[-1] != y.shape[-1]
        or 0 in (*x.shape, *y.shape)
    ):
        raise ValueError(
            "expected x of shape (n, d) and y of shape (m, d), or (B, n, d) and (B, m, d), none of them 0, "
            f"got {tuple(x.shape)} and {tuple(y.shape)}"
        )
