"""What a Sinkhorn solver returns, and the way from the iteration's potentials to it."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from poise.ot.arrays import Array, like
from poise.ot.entropic.fixed_point import FixedPoint

A = TypeVar("A", bound=Array)
Potentials = tuple[Tensor, Tensor]


class ConvergenceWarning(UserWarning):
    """Sinkhorn's algorithm was stopped before its marginals were right."""


@dataclass(frozen=True, eq=False)
class SinkhornResult(Generic[A]):
    """Potentials, value, and how far the iteration got; NumPy arrays if the solver was given NumPy arrays.

    Attributes:
        f: potential of the rows (..., n), not relative to ``a``: the plan is ``exp((f + g - C) / reg)``. Minus infinity
            where ``a`` is 0. Carries no gradient.
        g: potential of the columns (..., m).
        value: the optimal value (...), differentiable.
        reg: the regularization that was used (...), of interest if it was given relative to the cost.
        marginal_error: sum over the rows of the absolute violation of ``a``, as a share of the total mass (...); the
            columns are exact.
        converged: whether that is at most the tolerance (...).
        n_iter: iterations; a batch iterates until all its problems have converged.
    """

    f: A
    g: A
    value: A
    reg: A
    marginal_error: A
    converged: A
    n_iter: int
    _plan: Callable[[], A] = field(repr=False)

    def plan(self) -> A:
        """The transport plan (..., n, m), computed when asked for and without gradient."""
        return self._plan()


def to_numpy(result: SinkhornResult[Tensor], reference: np.ndarray) -> SinkhornResult[np.ndarray]:
    """The same result in NumPy arrays."""
    arrays = {
        entry.name: like(value, reference)
        for entry in fields(result)
        if isinstance(value := getattr(result, entry.name), Tensor)
    }
    return SinkhornResult(**arrays, n_iter=result.n_iter, _plan=lambda: like(result.plan(), reference))


def regularization(reg: float | Tensor, batch: Tensor) -> Tensor:
    """A given ε as one number per problem, of dtype and shape of ``batch``.

    Raises:
        ValueError: it is not positive and finite, or its shape is not that of the batch.
    """
    epsilon = reg.detach().to(batch) if isinstance(reg, Tensor) else batch.new_full((), reg)
    if epsilon.ndim and epsilon.shape != batch.shape:
        raise ValueError(f"reg must be one number or of shape {tuple(batch.shape)}, got shape {tuple(epsilon.shape)}")
    if not bool(((epsilon > 0) & epsilon.isfinite()).all()):
        raise ValueError(f"reg must be positive and finite, got {reg}")
    return epsilon.expand_as(batch)


def check_stopping(tol: float, max_iter: int) -> None:
    """Check when to stop.

    Raises:
        ValueError: the tolerance or the number of iterations is not positive.
    """
    if not (tol > 0 and max_iter >= 1):
        raise ValueError(f"tol must be positive and max_iter at least 1, got {tol} and {max_iter}")


def starting_potentials(init: Potentials | None, a: Tensor, b: Tensor, epsilon: Tensor) -> Potentials:
    """Relative, dimensionless potentials to start from.

    Raises:
        ValueError: the given potentials have not the shape of the masses.
    """
    if init is None:
        return torch.zeros_like(a), torch.zeros_like(b)
    f, g = init
    if (f.shape, g.shape) != (a.shape, b.shape):
        raise ValueError(
            f"init must hold potentials of shape {tuple(a.shape)} and {tuple(b.shape)}, "
            f"got {tuple(f.shape)} and {tuple(g.shape)}"
        )
    phi, psi = (
        torch.where(mass > 0, potential.detach().to(mass) / epsilon.unsqueeze(-1) - mass.log(), 0.0)
        for potential, mass in ((f, a), (g, b))
    )
    return phi, psi


def absolute(found: FixedPoint, a: Tensor, b: Tensor, epsilon: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``f``, ``g`` and ``<f, a> + <g, b>``, in which a potential of minus infinity at mass 0 counts nothing."""
    f, g = (epsilon.unsqueeze(-1) * (potential + mass.log()) for potential, mass in ((found.phi, a), (found.psi, b)))
    value = sum(
        epsilon * (mass * potential + torch.xlogy(mass, mass)).sum(-1)
        for potential, mass in ((found.phi, a), (found.psi, b))
    )
    assert isinstance(value, Tensor)
    return f, g, value


def judge(found: FixedPoint, tol: float) -> Tensor:
    """Whether each problem has converged; warns if one has not."""
    converged = found.error <= tol
    if not bool(converged.all()):
        warnings.warn(
            f"Sinkhorn stopped after {found.iterations} iterations at a marginal error of {float(found.error.max()):.2g} "
            f"> tol={tol:.2g}; a larger reg or max_iter would help, or float64 if the error no longer falls",
            ConvergenceWarning,
            stacklevel=5,
        )
    return converged
