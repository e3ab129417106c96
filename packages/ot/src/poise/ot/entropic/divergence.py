r"""The Sinkhorn divergence: entropic transport without its bias, a smooth distance between samples.

Genevay, Peyré and Cuturi, "Learning Generative Models with Sinkhorn Divergences", AISTATS 2018, arXiv 1706.00292; Feydy et
al., "Interpolating between Optimal Transport and MMD using Sinkhorn Divergences", AISTATS 2019, arXiv 1810.08278.

.. math:: S_\varepsilon(x, y) = W_\varepsilon(x, y) - \tfrac12 W_\varepsilon(x, x) - \tfrac12 W_\varepsilon(y, y)

is 0 for equal samples and, for costs whose kernel :math:`e^{-c/\varepsilon}` is positive, never negative; the terms in
which conventions for the entropy differ cancel.

>>> import torch
>>> from poise.ot import sinkhorn_divergence
>>> x, y = torch.randn(64, 2), torch.randn(80, 2).requires_grad_()
>>> loss = sinkhorn_divergence(x, y)
>>> loss.backward()
>>> sinkhorn_divergence(x, x).item() < 1e-4 < loss.item()
True
"""

import math
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from poise.ot.costs.cost import Cost
from poise.ot.entropic.epsilon import RelativeEpsilon
from poise.ot.entropic.points import SQUARED_EUCLIDEAN, PointSolver, check_points, sinkhorn_points

TENTH_OF_MEAN = RelativeEpsilon(0.1)
"""The fitting loss of Uscidda and Cuturi: a tenth of the mean cost."""


def sinkhorn_divergence(
    x: Float[Tensor, "..."],
    y: Float[Tensor, "..."],
    eps: float | Tensor | RelativeEpsilon = TENTH_OF_MEAN,
    cost: Cost = SQUARED_EUCLIDEAN,
    static_b: bool = False,
    *,
    a: Float[Tensor, "..."] | None = None,
    b: Float[Tensor, "..."] | None = None,
    tol: float = 1e-3,
    max_iter: int = 2000,
    solver: PointSolver = sinkhorn_points,
) -> Float[Tensor, "*B"]:
    r"""How far two samples are apart, as measured by optimal transport at the scale ``eps``.

    Args:
        x: (n, d), or (B, n, d) for a batch of problems.
        y: (m, d) or (B, m, d).
        eps: ε > 0: a number, one number per problem, or relative to the cost between points of ``y``, the side that
            does not change in training; by default 0.1 of its mean.
        cost: a symmetric ground cost.
        static_b: leave out :math:`W_\varepsilon(y, y)`. For a fixed ``y`` the gradient in ``x`` stays as it is and the
            value moves by a constant (the entropy is then taken relative to the product of the masses, as in OTT).
        a: masses of ``x``, (n,) or (B, n); uniform when left out.
        b: masses of ``y``.
        tol: marginal error at which the transport problems count as solved.
        max_iter: iterations after which to give up on one, with a :class:`ConvergenceWarning`.
        solver: solves one problem.

    Returns:
        One number per problem, differentiable in points and masses.

    Raises:
        TypeError: not floating-point tensors of one dtype.
        ValueError: shapes do not fit, entries are NaN or infinite, masses are no distributions, or ``eps`` is not positive.

    Source:
        Feydy et al. 2019, equation 3.
    """
    check_points(x, y)
    if isinstance(eps, RelativeEpsilon):
        eps = eps.of_points(y, y, cost, b, b)
    solve = partial(solver, tol=tol, max_iter=max_iter)
    cross = solve(x, y, eps, cost, a, b)
    divergence = cross.value - solve(x, None, eps, cost, a).value / 2
    if static_b:
        entropy = -torch.xlogy(b, b).sum(-1) if b is not None else math.log(y.shape[-2])
        return divergence + cross.reg * entropy
    return divergence - solve(y, None, eps, cost, b).value / 2
