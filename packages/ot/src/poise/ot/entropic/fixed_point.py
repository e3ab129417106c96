r"""Sinkhorn's iteration, whatever computes its half-steps: annealed in ε, over-relaxed, and symmetric for self-transport.

- *Annealing* (ε-scaling): the first iterations run at a larger ε, where potentials travel far in a few steps, and hand their
  result to the next smaller ε.
- *Over-relaxation*: near the solution the error shrinks by a constant factor λ per iteration, 1 - λ being tiny for small
  ε. A step ω times as long, :math:`\omega = 2/(1 + \sqrt{1-\lambda})`, shrinks it by ω - 1 instead, as in successive
  over-relaxation of a linear system with two blocks (Young 1954; Thibault, Chizat, Dossal and Papadakis, "Overrelaxed
  Sinkhorn-Knopp Algorithm for Regularized Optimal Transport", Algorithms 2021, arXiv 1711.01851). λ is read off the
  decrease ρ of the error that the present ω produces, :math:`\lambda = (\rho + \omega - 1)^2 / (\rho\,\omega^2)`.
- *Symmetric updates*: for equal measures and a symmetric cost both potentials are the same, and averaging a potential with
  its update converges in a dozen steps (Feydy et al., Interpolating between Optimal Transport and MMD using Sinkhorn
  Divergences, AISTATS 2019, arXiv 1810.08278).

The error is the sum of absolute violations of the row marginal, as a share of the total mass; the column marginal is exact.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from poise.ot.entropic.kernels import Kernel

LOOKS, LOOK_EVERY = (1, 5), 10
"""Iterations of one ε at which the error is looked at, and then every so many; each look waits for the device."""
ANNEALING_STEP = 4.0
"""Ratio of successive ε; anything from 2 to 10 takes about the same time."""
ANNEALING_SPREAD = 0.3
"""Annealing starts at this share of the standard deviation of the cost, from where plain iterations find their way."""
SAMPLE = 256
"""Rows and columns from which that standard deviation is estimated."""
STAGE_TOL, STAGE_ITERATIONS = 0.1, 10
"""An intermediate ε is left at this error, or after so many iterations."""
RELAX_BELOW = 0.3
"""Over-relaxation starts below this error; earlier the iteration is not yet near its linear regime."""
OMEGA_MAX = 1.95
"""Longer steps amplify rounding more than they speed up anything."""


@dataclass(frozen=True)
class FixedPoint:
    """Relative, dimensionless potentials, and how well they solve the problem."""

    phi: Tensor
    psi: Tensor
    error: Tensor
    iterations: int


def stride(size: int) -> int:
    """The step that leaves at most ``SAMPLE`` of ``size`` points."""
    return -(-size // SAMPLE)


def cost_spread(cost: Tensor, epsilon: Tensor) -> float:
    """The standard deviation of the cost in units of ε, the largest of the batch, estimated from some rows and columns."""
    few = cost[..., :: stride(cost.shape[-2]), :: stride(cost.shape[-1])]
    return float((few.std((-2, -1), correction=0) / epsilon).max())


def annealing_factors(spread: float) -> list[float]:
    """Multiples of ε to run through, ending in 1, for a cost whose standard deviation is ``spread`` times ε."""
    stages = max(0, math.floor(math.log(max(spread * ANNEALING_SPREAD, 1.0), ANNEALING_STEP)))
    return [ANNEALING_STEP**stage for stage in range(stages, -1, -1)]


def solve(
    kernel: Kernel,
    epsilon: Tensor,
    a: Tensor,
    phi: Tensor,
    psi: Tensor,
    *,
    factors: list[float],
    tol: float,
    max_iter: int,
    symmetric: bool = False,
    fallback: Callable[[], Kernel] | None = None,
) -> FixedPoint:
    """Iterate until every problem of the batch has an error of at most ``tol``, or ``max_iter`` is reached.

    Args:
        kernel: the half-steps.
        epsilon: regularization, shape of the batch.
        a: row masses.
        phi: starting potential of the rows at the first of ``factors``.
        psi: starting potential of the columns.
        factors: multiples of ``epsilon`` to run through, ending in 1; each gets one iteration at least.
        tol: error at which to stop.
        max_iter: iterations over all factors together.
        symmetric: both measures are equal and so is the cost in both directions.
        fallback: makes the kernel that takes over, from the last sound potentials, when numbers overflow.
    """
    make_stage = _SymmetricStage if symmetric else _Stage
    iterations, previous = 0, factors[0]
    for factor in factors:
        phi, psi = phi * (previous / factor), psi * (previous / factor)
        stage = make_stage(kernel, epsilon * factor, a, phi, psi)
        final = factor == factors[-1]
        while True:
            stage.iterate()
            iterations += 1
            exhausted = iterations >= max_iter
            if not (stage.iterations in LOOKS or stage.iterations % LOOK_EVERY == 0 or exhausted):
                continue
            worst, strain = stage.look()
            if not math.isfinite(worst):
                if fallback is None:
                    phi, psi = (factor * potential for potential in stage.sound)
                    return FixedPoint(phi, psi, torch.full_like(stage.error, math.inf), iterations)
                kernel, fallback = fallback(), None
                stage = make_stage(kernel, epsilon * factor, a, *stage.sound)
                continue
            if final and (worst <= tol or exhausted) and (stage.finish(worst) <= tol or exhausted):
                break
            if not final and (worst <= STAGE_TOL or stage.iterations >= STAGE_ITERATIONS or exhausted):
                break
            if strain > 1:
                stage.recentre()
            elif final and stage.iterations > 1:
                stage.relax()
        phi, psi = stage.total()
        previous = factor
    return FixedPoint(phi, psi, stage.error, iterations)


class _Stage:
    """The iteration at one ε. After :meth:`iterate`, ``update`` is what the rows would be given next."""

    def __init__(self, kernel: Kernel, epsilon: Tensor, a: Tensor, phi: Tensor, psi: Tensor) -> None:
        self._kernel, self._epsilon, self._a = kernel, epsilon, a
        self._mass = a.sum(-1)
        self._omega: Tensor | None = None
        self._previous: tuple[Tensor, int] | None = None
        self.iterations = 0
        self._begin(phi, psi)

    def _begin(self, phi: Tensor, psi: Tensor) -> None:
        self.sound = (phi, psi)
        _, self._psi = self._kernel.start(self._epsilon, phi, psi)
        self._update = self._kernel.rows(self._psi)
        self._phi = self._update

    def iterate(self) -> None:
        if self._omega is None:
            self._phi = self._update
            self._psi = self._kernel.columns(self._phi)
        else:
            self._phi = torch.lerp(self._phi, self._update, self._omega)
            self._psi = torch.lerp(self._psi, self._kernel.columns(self._phi), self._omega)
        self._update = self._kernel.rows(self._psi)
        self.iterations += 1

    def look(self) -> tuple[float, float]:
        """The largest error of the batch and the strain of the kernel, in one transfer."""
        self.error = row_error(self._a, self._phi, self._update, self._mass)
        worst, strain = torch.stack([self.error.max(), self._kernel.strain(self._phi, self._psi)]).cpu()
        return float(worst), float(strain)

    def finish(self, worst: float) -> float:
        """Make the columns exact, which over-relaxation leaves open, and look again."""
        if self._omega is None:
            return worst
        self._psi = self._kernel.columns(self._phi)
        self._update = self._kernel.rows(self._psi)
        return self.look()[0]

    def recentre(self) -> None:
        """Absorb the potentials into the kernel."""
        self._begin(*self.total())
        self._previous = None

    def relax(self) -> None:
        """Choose the step length from the decrease of the error since the last look."""
        omega = torch.ones_like(self.error) if self._omega is None else self._omega.squeeze(-1)
        if self._previous is not None:
            error, iteration = self._previous
            rho = (self.error / error) ** (1 / (self.iterations - iteration))
            rate = (rho + omega - 1) ** 2 / (rho * omega**2)
            best = 2 / (1 + (1 - rate).clamp_min(0).sqrt())
            linear = (self.error < RELAX_BELOW) & (rho < 1) & (rho > omega - 1) & (rate < 1)
            omega = torch.where(linear, torch.maximum(omega, best), torch.where(rho > 1.05, (1 + omega) / 2, omega))
            self._omega = omega.clamp_max(OMEGA_MAX).unsqueeze(-1)
        self._previous = self.error, self.iterations

    def total(self) -> tuple[Tensor, Tensor]:
        return self._kernel.total(self._phi, self._psi)


class _SymmetricStage(_Stage):
    """Both potentials are one: it is averaged with its update."""

    def _begin(self, phi: Tensor, psi: Tensor) -> None:
        super()._begin(phi, psi)
        row_base, column_base = self._kernel.total(torch.zeros_like(phi), torch.zeros_like(psi))
        self._offset = row_base - column_base
        self._phi = self._psi - self._offset

    def iterate(self) -> None:
        self._phi = (self._phi + self._update) / 2
        self._psi = self._phi + self._offset
        self._update = self._kernel.rows(self._psi)
        self.iterations += 1

    def relax(self) -> None:
        """Averaging is all this iteration needs."""

    def total(self) -> tuple[Tensor, Tensor]:
        """With the constant that gives the plan its mass, which an exact half-step would have."""
        plan_mass = (self._a * (self._phi - self._update).exp()).sum(-1)
        excess = ((plan_mass / self._mass).log() / 2).unsqueeze(-1)
        return self._kernel.total(self._phi - excess, self._psi - excess)


def row_error(a: Tensor, phi: Tensor, update: Tensor, mass: Tensor) -> Tensor:
    """The plan of ``phi`` has row sums ``a exp(phi - update)``, ``update`` being the potential that would make them ``a``."""
    return (a * torch.expm1(phi - update).abs()).sum(-1) / mass
