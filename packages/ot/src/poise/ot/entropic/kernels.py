r"""One half-step of Sinkhorn's algorithm on a stored cost matrix, in two ways.

Potentials are dimensionless and relative to the masses, so that they are finite where a mass is 0; the plan is

.. math:: P_{ij} = a_i\, b_j \exp(\varphi_i + \psi_j - C_{ij}/\varepsilon).

A half-step gives the plan one of its marginals exactly, the other potential held fixed:

.. math:: \varphi_i = -\log \sum_j b_j\, e^{\psi_j - C_{ij}/\varepsilon}.

:class:`LogKernel` takes that logarithm of a sum literally, safe for every ε. :class:`StabilizedKernel` stores the matrix
:math:`e^{\varphi + \psi - C/\varepsilon}` at some potentials, the *base*, and iterates on the difference from it: a
half-step is one product with the matrix, several times cheaper, and the differences, being small, keep digits that
the potentials themselves would lose. When they grow too large they move into the base ("absorption", Schmitzer, Stabilized
Sparse Scaling Algorithms for Entropy Regularized Transport Problems, SIAM J. Sci. Comput. 2019, arXiv 1610.06519).
"""

import math
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

Potentials = tuple[Tensor, Tensor]
LOG2_E = math.log2(math.e)


@runtime_checkable
class Kernel(Protocol):
    """The half-steps of one problem; potentials passed to and from them are differences from the kernel's base."""

    def start(self, epsilon: Tensor, phi: Tensor, psi: Tensor, /) -> Potentials:
        """Choose a base near the given potentials for a regularization (one per problem); returns the rest of them."""
        ...

    def rows(self, psi: Tensor, /) -> Tensor:
        """The ``phi`` that gives the plan its row sums."""
        ...

    def columns(self, phi: Tensor, /) -> Tensor:
        """The ``psi`` that gives the plan its column sums."""
        ...

    def total(self, phi: Tensor, psi: Tensor, /) -> Potentials:
        """Base and difference together."""
        ...

    def strain(self, phi: Tensor, psi: Tensor, /) -> Tensor:
        """The size of the differences; above 1 the half-steps lose accuracy and the kernel must be started again."""
        ...


class LogKernel:
    """Half-steps by logarithms of sums; the base is 0.

    Args:
        cost: (..., n, m).
        a: row masses (..., n).
        b: column masses (..., m).
    """

    def __init__(self, cost: Float[Tensor, "*B n m"], a: Float[Tensor, "*B n"], b: Float[Tensor, "*B m"]) -> None:
        self._cost = cost
        self._scores = torch.empty_like(cost)
        self._log_a, self._log_b = a.log(), b.log()

    def start(self, epsilon: Tensor, phi: Tensor, psi: Tensor) -> Potentials:
        self._scale = -LOG2_E / epsilon[..., None, None]
        return phi, psi

    def rows(self, psi: Tensor) -> Tensor:
        return -self._log_sum((psi + self._log_b).unsqueeze(-2), -1)

    def columns(self, phi: Tensor) -> Tensor:
        return -self._log_sum((phi + self._log_a).unsqueeze(-1), -2)

    def total(self, phi: Tensor, psi: Tensor) -> Potentials:
        return phi, psi

    def strain(self, phi: Tensor, psi: Tensor) -> Tensor:
        return phi.new_zeros(())

    def _log_sum(self, shift: Tensor, dim: int) -> Tensor:
        return log_sum_(torch.addcmul(LOG2_E * shift, self._cost, self._scale, out=self._scores), dim)


class StabilizedKernel:
    """Half-steps by products with ``exp(phi + psi - C / epsilon) b`` at the base, where ``phi`` makes row maxima 1.

    Args:
        cost: (..., n, m).
        a: row masses (..., n).
        b: column masses (..., m).
    """

    def __init__(self, cost: Float[Tensor, "*B n m"], a: Float[Tensor, "*B n"], b: Float[Tensor, "*B m"]) -> None:
        self._cost, self._a = cost, a
        self._kernel = torch.empty_like(cost, memory_format=torch.contiguous_format)
        self._tiny = torch.finfo(cost.dtype).tiny
        self._log_b, self._log_b_tiny = b.log(), (b + self._tiny).log()
        # Entries below `tiny` are dropped. While neither difference exceeds a quarter of its logarithm, what was dropped
        # stays below the rounding of what was kept.
        self._reach = -math.log(self._tiny) / 4

    def start(self, epsilon: Tensor, phi: Tensor, psi: Tensor) -> Potentials:
        shift, scale = LOG2_E * (psi + self._log_b).unsqueeze(-2), -LOG2_E / epsilon[..., None, None]
        torch.addcmul(shift, self._cost, scale, out=self._kernel)
        maximum = self._kernel.amax(-1, keepdim=True)
        self._base = maximum.squeeze(-1) / -LOG2_E, psi
        self._kernel.sub_(maximum).exp2_()
        # subnormal numbers would slow every product down by an order of magnitude
        torch.threshold_(self._kernel, self._tiny, 0.0)
        return phi - self._base[0], torch.zeros_like(psi)

    def rows(self, psi: Tensor) -> Tensor:
        return -(_product(self._kernel, psi.exp()) + self._tiny).log()

    def columns(self, phi: Tensor) -> Tensor:
        return self._log_b_tiny - (_product(self._kernel.mT, self._a * phi.exp()) + self._tiny).log()

    def total(self, phi: Tensor, psi: Tensor) -> Potentials:
        return self._base[0] + phi, self._base[1] + psi

    def strain(self, phi: Tensor, psi: Tensor) -> Tensor:
        return torch.maximum(phi.abs().max(), psi.abs().max()) / self._reach


def log_sum_(scores: Tensor, dim: int) -> Tensor:
    """``log(sum(2 ** scores))`` along ``dim``, with the maximum taken out; the scores are overwritten.

    Scores are in base 2 because ``exp2`` is several times faster than ``exp`` on CPUs, and never slow where it underflows.
    """
    maximum = scores.amax(dim, keepdim=True)
    return (scores.sub_(maximum).exp2_().sum(dim).log2() + maximum.squeeze(dim)) / LOG2_E


def _product(matrix: Tensor, vector: Tensor) -> Tensor:
    """Matrix times vector; a batch as row vectors from the left, which BLAS handles several times faster."""
    if matrix.ndim == 2:
        return torch.mv(matrix, vector)
    return torch.bmm(vector.unsqueeze(1), matrix.mT).squeeze(1)
