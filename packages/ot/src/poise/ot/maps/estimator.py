r"""Learn a transport map from samples: fit the target, and stay optimal for a cost of your choice.

    min over T of  Delta(T#mu, nu) + lambda M(T on rho)

with a fitting loss ``Delta`` (:class:`SinkhornLoss` by default), the Monge gap ``M`` or any other regularizer of pairs
``(x, T(x))``, and a reference measure ``rho`` that is ``mu`` unless another is given. Uscidda and Cuturi, The Monge Gap: A
Regularizer to Learn All Transport Maps, ICML 2023, arXiv 2302.04953.

>>> import torch
>>> from poise.ot import Euclidean, MongeGapLoss, MongeMapEstimator
>>> net = torch.nn.Sequential(torch.nn.Linear(2, 32), torch.nn.GELU(), torch.nn.Linear(32, 2))
>>> x, y = torch.randn(256, 2), torch.randn(256, 2) + 1
>>> estimator = MongeMapEstimator(net, regularizer=MongeGapLoss(Euclidean()), strength=2.0)
>>> estimator.fit(x.split(64), y.split(64), steps=5).transform(x).shape
torch.Size([256, 2])
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from poise.core.penalty import Penalty
from poise.core.schedule import Schedule
from poise.ot.costs.cost import Cost
from poise.ot.entropic.divergence import TENTH_OF_MEAN, sinkhorn_divergence
from poise.ot.entropic.epsilon import RelativeEpsilon
from poise.ot.entropic.points import SQUARED_EUCLIDEAN, PointSolver, sinkhorn_points
from poise.ot.maps.batches import cycled, to_module

FittingLoss = Callable[[Tensor, Tensor], Tensor]
Regularizer = Callable[[Tensor, Tensor], Tensor]
OptimizerFactory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]

ADAM: OptimizerFactory = partial(torch.optim.Adam, lr=1e-3)
"""The paper's optimizer."""


class SinkhornLoss(nn.Module):
    r"""The paper's fitting loss: the Sinkhorn divergence between mapped samples and targets.

    Its ground cost has nothing to do with the cost of the gap.

    Args:
        eps: ε, a number or relative to the cost between the targets of the batch; by default 0.1 of its mean.
        cost: the ground cost.
        static_b: leave out the term of the targets alone, which no map changes: the same gradient for less work, and a value that is
            no longer 0 at a perfect fit.
        solver: solves one problem; ``functools.partial(sinkhorn_points, tol=1e-6)`` changes its settings.
    """

    def __init__(
        self,
        eps: float | RelativeEpsilon = TENTH_OF_MEAN,
        cost: Cost = SQUARED_EUCLIDEAN,
        *,
        static_b: bool = False,
        solver: PointSolver = sinkhorn_points,
    ) -> None:
        super().__init__()
        self.eps, self.cost, self.static_b, self.solver = eps, cost, static_b, solver

    def forward(self, t: Float[Tensor, "*batch n d"], y: Float[Tensor, "*batch m d"]) -> Float[Tensor, ""]:
        """The divergence between ``t = T(x)`` and ``y``, averaged over the problems of a batch."""
        return sinkhorn_divergence(t, y, self.eps, self.cost, self.static_b, solver=self.solver).mean()


@dataclass(frozen=True)
class Terms:
    """The parts of the objective at one batch; ``total`` is the loss, the others are detached, and absent where not computed."""

    total: Tensor
    fitting: Tensor
    regularizer: Tensor | None = None
    conservative: Tensor | None = None


class MongeMapObjective:
    r"""``Delta(T#mu, nu) + lambda M(T on rho)`` as a function of the map and a batch.

    Args:
        fitting_loss: ``(T(x), y) -> scalar``; :class:`SinkhornLoss` when left out.
        regularizer: ``(x, T(x)) -> scalar``, such as ``MongeGapLoss``; ``None`` to fit only.
        strength: ``lambda``, a number or a schedule of the step. At 0 neither the regularizer nor the map on the reference is
            computed.
        conservative: a ``ConservativePenalty`` of the map's field, for a ``StructuredMap``.

    Raises:
        ValueError: ``strength`` is negative.
    """

    def __init__(
        self,
        fitting_loss: FittingLoss | None = None,
        regularizer: Regularizer | None = None,
        strength: float | Schedule = 1.0,
        *,
        conservative: Penalty | None = None,
    ) -> None:
        self.fitting_loss = fitting_loss or SinkhornLoss()
        self.regularizer = regularizer
        self._strength = strength
        self.conservative = conservative
        self.strength(0)  # a bad number is reported here

    def strength(self, step: int) -> float:
        """``lambda`` at a step."""
        value = float(self._strength(step) if callable(self._strength) else self._strength)
        if not value >= 0:
            raise ValueError(f"strength must not be negative, got {value} at step {step}")
        return value

    def __call__(
        self,
        transport: Callable[[Tensor], Tensor],
        x: Float[Tensor, "*batch n d"],
        y: Float[Tensor, "*batch m d"],
        reference: Float[Tensor, "*batch k d"] | None = None,
        *,
        step: int = 0,
    ) -> Terms:
        """Evaluate at a batch.

        Args:
            transport: the map.
            x: samples of ``mu``.
            y: samples of ``nu``.
            reference: samples of ``rho``; ``x`` when left out.
            step: for schedules.
        """
        t = transport(x)
        fitting = self.fitting_loss(t, y)
        total, regularizer, conservative = fitting, None, None
        strength = self.strength(step)
        if self.regularizer is not None and strength > 0:
            regularizer = (
                self.regularizer(x, t) if reference is None else self.regularizer(reference, transport(reference))
            )
            total = total + strength * regularizer
        if self.conservative is not None:
            conservative = self.conservative(x if reference is None else reference)
            total = total + conservative
        return Terms(total, fitting.detach(), _detached(regularizer), _detached(conservative))

    def advance(self) -> None:
        """Advance the schedules of the penalties by a step."""
        for part in (self.regularizer, self.conservative):
            if isinstance(part, Penalty):
                part.step()


class MongeMapEstimator:
    """Fits a map to samples and applies it, in the manner of scikit-learn.

    Args:
        net: the map, any module ``(n, d) -> (n, d)``.
        fitting_loss: see :class:`MongeMapObjective`.
        regularizer: see :class:`MongeMapObjective`.
        strength: see :class:`MongeMapObjective`.
        conservative: see :class:`MongeMapObjective`.
        optimizer: makes the optimizer from the parameters; Adam at 1e-3 as in the paper.

    Attributes:
        history: the objective's terms at each step, detached tensors on the map's device.
    """

    def __init__(
        self,
        net: nn.Module,
        fitting_loss: FittingLoss | None = None,
        regularizer: Regularizer | None = None,
        strength: float | Schedule = 1.0,
        *,
        conservative: Penalty | None = None,
        optimizer: OptimizerFactory = ADAM,
    ) -> None:
        self.net = net
        self.objective = MongeMapObjective(fitting_loss, regularizer, strength, conservative=conservative)
        self.optimizer = optimizer(net.parameters())
        self.history: list[Terms] = []

    def update(
        self, x: Float[Tensor, "n d"], y: Float[Tensor, "m d"], reference: Float[Tensor, "k d"] | None = None
    ) -> Terms:
        """One optimizer step on a batch."""
        terms = self.objective(self.net, x, y, reference, step=len(self.history))
        return descend(terms, self.optimizer, self.objective, self.history)

    def fit(
        self,
        loader_x: Iterable[Any],
        loader_y: Iterable[Any],
        *,
        reference: Iterable[Any] | None = None,
        steps: int = 5_000,
    ) -> "MongeMapEstimator":
        """Train on batches of both sides, taken in turn and from the start again when a loader ends; call again to go on.

        Args:
            loader_x: batches ``(n, d)`` of ``mu``: tensors, or tuples that start with one.
            loader_y: batches of ``nu``.
            reference: batches of ``rho``, where the gap is measured; the batches of ``mu`` when left out.
            steps: optimizer steps.

        Raises:
            ValueError: a loader is empty.
        """
        self.net.train()
        loaders = [loader_x, loader_y] if reference is None else [loader_x, loader_y, reference]
        batches = [to_module(cycled(loader), self.net) for loader in loaders]
        for _ in range(steps):
            self.update(*(next(batch) for batch in batches))
        return self

    @torch.no_grad()
    def transform(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """Images under the map, in evaluation mode."""
        training = self.net.training
        try:
            return self.net.eval()(x)
        finally:
            self.net.train(training)


def descend(
    terms: Terms, optimizer: torch.optim.Optimizer, objective: MongeMapObjective, history: list[Terms]
) -> Terms:
    """One optimizer step on the objective; returns and keeps the detached terms."""
    optimizer.zero_grad(set_to_none=True)
    terms.total.backward()
    optimizer.step()
    objective.advance()
    detached = replace(terms, total=terms.total.detach())
    history.append(detached)
    return detached


def _detached(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.detach()
