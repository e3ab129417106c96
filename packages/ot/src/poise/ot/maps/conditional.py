r"""One map for many tasks: ``T(x, context)``, with a Monge gap in each context and never across contexts.

Driessen et al., "Towards generalizable single-cell perturbation modeling via the Conditional Monge Gap", arXiv 2504.08328, after
Uscidda and Cuturi, ICML 2023, arXiv 2302.04953.

    min over T of  E over contexts c of  [ Delta(T(., c)#mu_c, nu_c) + lambda M(T(., c) on mu_c) ]

A context is whatever tells the tasks apart: a class (:class:`OneHotContext`), a dose (:class:`DoseContext`), a descriptor such as a
molecule's fingerprint (:class:`EmbeddingContext`), or several of them (:class:`JoinedContext`). It is encoded and concatenated to
the point.

>>> import torch
>>> from poise.ot import ConditionalMongeMap, ConditionalMongeMapEstimator, MongeGapLoss, OneHotContext, SqEuclidean
>>> encoder = OneHotContext(classes=3)
>>> net = torch.nn.Sequential(torch.nn.Linear(2 + encoder.width, 32), torch.nn.GELU(), torch.nn.Linear(32, 2))
>>> transport = ConditionalMongeMap(net, encoder)
>>> x, y = torch.randn(3, 64, 2), torch.randn(3, 64, 2) + torch.arange(3)[:, None, None]
>>> tasks = {drug: (torch.tensor(drug), x[drug].split(32), y[drug].split(32)) for drug in range(3)}
>>> estimator = ConditionalMongeMapEstimator(transport, regularizer=MongeGapLoss(SqEuclidean()))
>>> _ = estimator.fit(tasks, steps=5)
>>> transport(x, torch.arange(3)).shape                        # three contexts at once
torch.Size([3, 64, 2])
"""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from poise.core.penalty import Penalty
from poise.core.schedule import Schedule
from poise.ot.maps.batches import cycled, to_module
from poise.ot.maps.estimator import ADAM, FittingLoss, MongeMapObjective, OptimizerFactory, Regularizer, Terms, descend

Task = tuple[Tensor, Iterable[Any], Iterable[Any]]
"""A context, a loader of its source and a loader of its target."""


class ContextEncoder(nn.Module):
    """A module that turns contexts into features, to be subclassed: ``(..., *context)`` to ``(..., width)``.

    Attributes:
        width: number of features.
        rank: number of axes of one context: 0 for scalars, 1 for vectors.
    """

    width: int
    rank: int = 0


class OneHotContext(ContextEncoder):
    """Classes ``0..classes - 1`` as unit vectors.

    Args:
        classes: number of classes.
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        if classes < 1:
            raise ValueError(f"classes must be at least 1, got {classes}")
        self.width = classes
        self.register_buffer("vectors", torch.eye(classes))

    def forward(self, context: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch width"]:
        return self.get_buffer("vectors")[context]


class DoseContext(ContextEncoder):
    r"""A dose as ``log(1 + dose) / log(1 + largest)``: doses that grow by factors are spaced evenly, and no dose is 0.

    Args:
        largest: the dose that maps to 1.
    """

    width = 1

    def __init__(self, largest: float = 1.0) -> None:
        super().__init__()
        if not largest > 0:
            raise ValueError(f"the largest dose must be positive, got {largest}")
        self.largest = largest

    def forward(self, context: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch 1"]:
        scale = torch.log1p(torch.as_tensor(self.largest, dtype=context.dtype, device=context.device))
        return (torch.log1p(context) / scale)[..., None]


class EmbeddingContext(ContextEncoder):
    """A descriptor through one layer: ``gelu(W e + b)``.

    Args:
        features: length of the descriptor.
        width: number of features it becomes.
    """

    rank = 1

    def __init__(self, features: int, width: int = 50) -> None:
        super().__init__()
        self.width = width
        self.layer = nn.Linear(features, width)

    def forward(self, context: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch width"]:
        return functional.gelu(self.layer(context))


class JoinedContext(ContextEncoder):
    """Several contexts in one vector, each through its own encoder: a drug and a dose as ``[drug, dose]``.

    Args:
        encoders: encoders, in order.
        sizes: how many entries of the vector each takes; an encoder of scalars takes 1, rounded to a class for
            :class:`OneHotContext`.
    """

    rank = 1

    def __init__(self, encoders: Sequence[ContextEncoder], sizes: Sequence[int]) -> None:
        super().__init__()
        if len(encoders) != len(sizes):
            raise ValueError(f"expected a size for each encoder, got {len(encoders)} encoders and {len(sizes)} sizes")
        self.encoders = nn.ModuleList(encoders)
        self.sizes = tuple(sizes)
        self.width = sum(encoder.width for encoder in encoders)

    def forward(self, context: Float[Tensor, "*batch entries"]) -> Float[Tensor, "*batch width"]:
        if context.shape[-1] != sum(self.sizes):
            raise ValueError(f"context must have {sum(self.sizes)} entries, got shape {tuple(context.shape)}")
        parts = context.split(self.sizes, dim=-1)
        return torch.cat(
            [self._encode(encoder, part) for encoder, part in zip(self.encoders, parts, strict=True)], dim=-1
        )

    @staticmethod
    def _encode(encoder: nn.Module, part: Tensor) -> Tensor:
        if isinstance(encoder, OneHotContext):
            return encoder(part[..., 0].round().long())
        return encoder(part[..., 0] if isinstance(encoder, DoseContext) else part)


class ConditionalMongeMap(nn.Module):
    """``T(x, c) = net([x, encoder(c)])``, or ``x`` plus that.

    Args:
        net: maps ``(..., d + width)`` to ``(..., d)``.
        encoder: maps contexts to ``(..., width)``.
        residual: whether the net gives the displacement. The authors' conditional map does; the map of the Monge gap does not.
    """

    def __init__(self, net: nn.Module, encoder: ContextEncoder, *, residual: bool = False) -> None:
        super().__init__()
        self.net, self.encoder, self.residual = net, encoder, residual

    def forward(self, x: Float[Tensor, "*batch n d"], context: Tensor) -> Float[Tensor, "*batch n d"]:
        """Map samples under one context, or under one context each, or batches of samples under a context per batch.

        Args:
            x: ``(n, d)`` or ``(B, n, d)``.
            context: one context; or one per leading entry of ``x``, that is per sample of ``(n, d)``, per batch of ``(B, n, d)``.
        """
        features = self.encoder(context)
        leading = context.ndim - self.encoder.rank
        if leading > 1 or (leading == 1 and context.shape[0] != x.shape[0]):
            raise ValueError(
                f"expected one context or {x.shape[0]}, one for each leading entry of x {tuple(x.shape)}, got {tuple(context.shape)}"
            )
        between = x.ndim - 1 - leading  # axes of x over which a context is repeated
        features = features.reshape(*features.shape[:-1], *[1] * between, features.shape[-1]).expand(*x.shape[:-1], -1)
        image = self.net(torch.cat([x, features.to(x.dtype)], dim=-1))
        return x + image if self.residual else image

    def at(self, context: Tensor) -> Callable[[Tensor], Tensor]:
        """The map under one context, ``x -> T(x, context)``."""

        def transport(x: Tensor) -> Tensor:
            return self(x, context)

        return transport


class ConditionalMongeMapEstimator:
    """Fits one :class:`ConditionalMongeMap` to many tasks.

    Args:
        transport: the map.
        fitting_loss: see ``MongeMapObjective``.
        regularizer: see ``MongeMapObjective``; it only ever sees samples of one context.
        strength: see ``MongeMapObjective``.
        conservative: see ``MongeMapObjective``.
        optimizer: makes the optimizer from the parameters.

    Attributes:
        history: the objective's terms at each step, means over its contexts.
    """

    def __init__(
        self,
        transport: ConditionalMongeMap,
        fitting_loss: FittingLoss | None = None,
        regularizer: Regularizer | None = None,
        strength: float | Schedule = 1.0,
        *,
        conservative: Penalty | None = None,
        optimizer: OptimizerFactory = ADAM,
    ) -> None:
        self.transport = transport
        self.objective = MongeMapObjective(fitting_loss, regularizer, strength, conservative=conservative)
        self.optimizer = optimizer(transport.parameters())
        self.history: list[Terms] = []

    def update(self, batches: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Terms:
        """One optimizer step on the mean of the objective over ``(context, x, y)``."""
        step = len(self.history)
        terms = [self.objective(self.transport.at(context), x, y, step=step) for context, x, y in batches]
        return descend(_mean(terms), self.optimizer, self.objective, self.history)

    def fit(
        self,
        tasks: Mapping[Hashable, Task],
        *,
        steps: int = 10_000,
        contexts_per_step: int | None = None,
        generator: torch.Generator | None = None,
    ) -> "ConditionalMongeMapEstimator":
        """Train on all tasks.

        Args:
            tasks: a context with loaders of its source and target, by name.
            steps: optimizer steps.
            contexts_per_step: how many tasks, drawn without repetition, a step averages over; all when left out.
            generator: draws them.

        Raises:
            ValueError: no task, or fewer than ``contexts_per_step``.
        """
        count = len(tasks) if contexts_per_step is None else contexts_per_step
        if not 1 <= count <= len(tasks):
            raise ValueError(f"contexts_per_step must lie in 1..{len(tasks)}, the number of tasks, got {count}")
        device = next(self.transport.parameters()).device
        contexts = [context.to(device) for context, _, _ in tasks.values()]
        loaders = [[to_module(cycled(loader), self.transport) for loader in task[1:]] for task in tasks.values()]
        for _ in range(steps):
            chosen = (
                range(count)
                if count == len(tasks)
                else torch.randperm(len(tasks), generator=generator)[:count].tolist()
            )
            self.update([(contexts[i], next(loaders[i][0]), next(loaders[i][1])) for i in chosen])
        return self

    @torch.no_grad()
    def transform(self, x: Float[Tensor, "*batch n d"], context: Tensor) -> Float[Tensor, "*batch n d"]:
        """Images under the map, in evaluation mode."""
        training = self.transport.training
        try:
            return self.transport.eval()(x, context)
        finally:
            self.transport.train(training)


def _mean(terms: Sequence[Terms]) -> Terms:
    def average(values: list[Tensor | None]) -> Tensor | None:
        present = [value for value in values if value is not None]
        return torch.stack(present).mean() if present else None

    total, fitting = (torch.stack([getattr(term, name) for term in terms]).mean() for name in ("total", "fitting"))
    return Terms(
        total, fitting, average([term.regularizer for term in terms]), average([term.conservative for term in terms])
    )
