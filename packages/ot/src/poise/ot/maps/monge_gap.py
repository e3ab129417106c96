r"""The Monge gap: how much more a map costs than the best way to move its inputs to its outputs.

Uscidda and Cuturi, "The Monge Gap: A Regularizer to Learn All Transport Maps", ICML 2023, arXiv 2302.04953.

For samples :math:`x_i` of a reference measure ρ, a map T, and a ground cost c of your choice,

.. math:: \mathcal M_\varepsilon(T) = \frac1n \sum_i c(x_i, T(x_i)) - W_\varepsilon(\rho_n, T_\sharp \rho_n), \qquad
          W_\varepsilon = \min_{P \in U} \sum_{ij} P_{ij}\, c(x_i, T(x_j)) - \varepsilon H(P).

It is 0 in the limit :math:`\varepsilon \to 0` iff T is c-optimal onto its own image, whatever that image is: added to a
loss that fits the image to a target, it makes any network learn the optimal map. Since the plan that pairs every point
with its own image has entropy log n, :math:`\mathcal M_\varepsilon \ge \varepsilon \log n \ge 0`.

>>> import torch
>>> from poise.ot import Euclidean, MongeGapLoss, sinkhorn_divergence
>>> net = torch.nn.Sequential(torch.nn.Linear(2, 32), torch.nn.GELU(), torch.nn.Linear(32, 2))
>>> gap = MongeGapLoss(Euclidean(), weight=1.0)
>>> x, y = torch.randn(64, 2), torch.randn(64, 2) + 1
>>> t = net(x)
>>> loss = sinkhorn_divergence(t, y, static_b=True) + gap(x, t)
>>> loss.backward()
>>> gap.value.item() > 0
True
"""

from collections.abc import Callable
from functools import partial
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from poise.core.penalty import Penalty
from poise.core.schedule import Schedule
from poise.ot.arrays import full_precision, widen
from poise.ot.costs.cost import Cost
from poise.ot.costs.norms import SqEuclidean
from poise.ot.entropic.epsilon import RelativeEpsilon
from poise.ot.entropic.points import SQUARED_EUCLIDEAN, PointSolver, check_points, sinkhorn_points
from poise.ot.entropic.result import SinkhornResult

Relative = float | Literal["mean", "std"]
Scale = Literal["cost", "sqeuclidean"]


def monge_gap(
    map_fn: Callable[[Tensor], Tensor],
    x: Float[Tensor, "..."],
    cost: Cost = SQUARED_EUCLIDEAN,
    epsilon: float | Tensor | None = None,
    relative_epsilon: Relative | None = None,
    *,
    epsilon_scale: Scale = "cost",
    tol: float = 1e-3,
    max_iter: int = 2000,
    solver: PointSolver = sinkhorn_points,
) -> Float[Tensor, "*B"]:
    """The Monge gap of a map on reference samples.

    Args:
        map_fn: the map, from (n, d) to (n, d), or (B, n, d) to (B, n, d).
        x: reference samples; in a batch every problem (a context, say) has its own gap.
        cost: the ground cost for which the map should be optimal.
        epsilon: see :func:`monge_gap_from_samples`.
        relative_epsilon: see there.
        epsilon_scale: see there.
        tol: marginal error at which the transport problem counts as solved.
        max_iter: iterations after which to give up on it, with a :class:`ConvergenceWarning`.
        solver: solves the transport problem.

    Returns:
        The gap, one number per problem.

    Raises:
        TypeError: not floating-point tensors of one dtype.
        ValueError: as :func:`monge_gap_from_samples`.

    Source:
        Uscidda and Cuturi 2023, equation 8.
    """
    regularization = _regularization(epsilon, relative_epsilon, epsilon_scale)
    return _gap(x, map_fn(x), cost, regularization, partial(solver, tol=tol, max_iter=max_iter))[0]


def monge_gap_from_samples(
    x: Float[Tensor, "..."],
    t: Float[Tensor, "..."],
    cost: Cost = SQUARED_EUCLIDEAN,
    epsilon: float | Tensor | None = None,
    relative_epsilon: Relative | None = None,
    *,
    epsilon_scale: Scale = "cost",
    tol: float = 1e-3,
    max_iter: int = 2000,
    solver: PointSolver = sinkhorn_points,
) -> tuple[Float[Tensor, "*B"], SinkhornResult[Tensor]]:
    r"""The Monge gap of any map that sends ``x[i]`` to ``t[i]``.

    ========== ================== ====================================================================
    epsilon    relative_epsilon   ε
    ========== ================== ====================================================================
    None       None               0.01 times the mean cost over all pairs of x and t
    number     None               that number
    None       number r           r times the mean cost
    None or e  "mean" or "std"    e (or 0.05) times the mean or the standard deviation, as in OTT
    ========== ================== ====================================================================

    Args:
        x: samples of the reference measure (n, d), or (B, n, d) for a batch of problems.
        t: their images, of the same shape.
        cost: the ground cost.
        epsilon: the regularization as a number or one number per problem, or a factor, see the table. Fix it before training
            (``RelativeEpsilon(0.01).of_points(x, y, cost)`` on source and target) or let it follow the batch.
        relative_epsilon: what ``epsilon`` is relative to, see the table.
        epsilon_scale: whose mean or standard deviation: ``"cost"``, or ``"sqeuclidean"`` as in the authors' tutorial, which
            takes it from the squared distances whatever the cost.
        tol: marginal error at which the transport problem counts as solved.
        max_iter: iterations after which to give up on it, with a :class:`ConvergenceWarning`.
        solver: solves the transport problem.

    Returns:
        The gap, one number per problem, differentiable in ``x`` and ``t``; and the solution of the transport problem, with the
        ε that was used (``reg``) and whether it converged.

    Raises:
        TypeError: not floating-point tensors of one dtype.
        ValueError: ``x`` and ``t`` differ in shape, have NaN or infinite entries, ε is not positive, or the rules for it
            contradict each other.

    Source:
        Uscidda and Cuturi 2023, equation 8; the gradient is that of the envelope theorem.
    """
    regularization = _regularization(epsilon, relative_epsilon, epsilon_scale)
    return _gap(x, t, cost, regularization, partial(solver, tol=tol, max_iter=max_iter))


class MongeGapLoss(Penalty):
    r"""``weight`` times the Monge gap of samples and their images, averaged over the problems of a batch.

    >>> import torch
    >>> gap = MongeGapLoss(relative_epsilon=0.05, weight=2.0)
    >>> x = torch.randn(32, 2)
    >>> bool(gap(x, -x) > gap(x, x + 1)), bool(gap.converged)
    (True, True)

    Args:
        cost: the ground cost for which the map should be optimal.
        weight: a number or a schedule.
        epsilon: see :func:`monge_gap_from_samples`.
        relative_epsilon: see there.
        epsilon_scale: see there.
        tol: marginal error at which the transport problem counts as solved.
        max_iter: iterations after which to give up on it, with a :class:`ConvergenceWarning`.
        solver: solves the transport problem.

    Attributes:
        epsilon: the ε of the last call, worth logging when it is relative.
        converged: whether Sinkhorn's algorithm converged in the last call, per problem.
    """

    epsilon: Tensor | None
    converged: Tensor | None

    def __init__(
        self,
        cost: Cost = SQUARED_EUCLIDEAN,
        weight: float | Schedule = 1.0,
        *,
        epsilon: float | Tensor | None = None,
        relative_epsilon: Relative | None = None,
        epsilon_scale: Scale = "cost",
        tol: float = 1e-3,
        max_iter: int = 2000,
        solver: PointSolver = sinkhorn_points,
    ) -> None:
        super().__init__(weight)
        self.cost = cost
        self.regularization = _regularization(epsilon, relative_epsilon, epsilon_scale)
        self.solver = partial(solver, tol=tol, max_iter=max_iter)
        self.epsilon = self.converged = None

    def penalty(self, x: Float[Tensor, "..."], t: Float[Tensor, "..."]) -> Float[Tensor, ""]:
        """The mean gap.

        Args:
            x: samples of the reference measure (n, d) or (B, n, d).
            t: their images under the map in training.
        """
        gap, result = _gap(x, t, self.cost, self.regularization, self.solver)
        self.epsilon, self.converged = result.reg, result.converged
        return gap.mean()

    def extra_repr(self) -> str:
        return f"{self.cost}, regularization={self.regularization}, {super().extra_repr()}"


def _gap(
    x: Tensor,
    t: Tensor,
    cost: Cost,
    regularization: float | Tensor | RelativeEpsilon,
    solve: Callable[..., SinkhornResult[Tensor]],
) -> tuple[Tensor, SinkhornResult[Tensor]]:
    check_points(x, t)
    if x.shape != t.shape:
        raise ValueError(
            f"every sample needs one image, got x of shape {tuple(x.shape)} and t of shape {tuple(t.shape)}"
        )
    result = solve(x, t, regularization, cost)
    with full_precision(x):
        displacement = cost.elementwise(widen(x), widen(t))
    return displacement.mean(-1) - result.value, result


def _regularization(
    epsilon: float | Tensor | None, relative: Relative | None, scale: Scale
) -> float | Tensor | RelativeEpsilon:
    """The table of :func:`monge_gap_from_samples`."""
    if scale not in ("cost", "sqeuclidean"):
        raise ValueError(f"epsilon_scale must be 'cost' or 'sqeuclidean', got {scale!r}")
    cost = SqEuclidean() if scale == "sqeuclidean" else None
    if relative is None and epsilon is not None:
        if cost is not None:
            raise ValueError(f"epsilon={epsilon} is absolute and has no scale: epsilon_scale needs relative_epsilon")
        return epsilon
    if relative is None:
        return RelativeEpsilon(0.01, "mean", cost)
    if isinstance(relative, str):
        if isinstance(epsilon, Tensor):
            raise ValueError(f"relative_epsilon={relative!r} needs epsilon as a plain number")
        return RelativeEpsilon(0.05 if epsilon is None else epsilon, relative, cost)
    if epsilon is not None:
        raise ValueError(f"give epsilon or relative_epsilon as a number, not both, got {epsilon} and {relative}")
    return RelativeEpsilon(relative, "mean", cost)
