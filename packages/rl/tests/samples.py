"""Sample inputs that put every method of poise.rl under the workspace contract."""

from functools import partial

import torch
from torch import Tensor, nn

from poise.core.testing import Sample, randn
from poise.rl.offline.normalizer import StateNormalizer
from poise.rl.offline.prdc import DatasetConstraint, dataset_constraint_loss
from poise.rl.representation.beer import BEERRegularizer, beer_loss, bellman_cosine_bound
from poise.rl.representation.dissimilarity import DissimilarityRegularizer
from poise.rl.representation.dr3 import DR3Regularizer
from poise.rl.representation.infer import InFeRRegularizer
from poise.rl.representation.rank import representation_rank

STOPPED = "the bound is a constant for the gradient, but not for finite differences; test_beer.py compares the gradient"
A_NUMBER = "an integer"
SEARCHED = "whether a search has proven its answer depends on the data"


def _constraint(power: int) -> DatasetConstraint:
    states, actions = (randn(torch.Generator().manual_seed(1), 40, width) for width in (3, 2))
    return DatasetConstraint(states, actions.tanh(), 0.5, weight=0.5, power=power)


class Features(nn.Module):
    """A value network that shows its representation."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(3, 4)

    def features(self, observation: Tensor) -> Tensor:
        return self.body(observation).tanh()


def _transitions(generator: torch.Generator, rows: int = 1) -> tuple[Tensor, ...]:
    """Some cosines are above their bound, others below."""
    return randn(generator, 6, 4), randn(generator, 6, 4), 2 * randn(generator, 6), randn(generator, rows, 4)


def _of_terminals(beer: BEERRegularizer, features: Tensor, *others: Tensor) -> Tensor:
    return beer(features, *others, 0.9, torch.arange(len(features), device=features.device) % 2 == 0)


SAMPLES: tuple[Sample, ...] = (
    Sample(
        name="beer/bound",
        build=lambda: partial(bellman_cosine_bound, gamma=0.9),
        inputs=_transitions,
        differentiable=(0, 1, 2, 3),
    ),
    Sample(
        name="beer/bound_per_sample",
        build=lambda: bellman_cosine_bound,
        inputs=lambda g: (*_transitions(g, rows=6), randn(g, 6).sigmoid()),
        differentiable=(0, 1, 2, 3, 4),
    ),
    Sample(
        name="beer/loss",
        build=lambda: partial(beer_loss, gamma=0.9, beta=0.5),
        inputs=_transitions,
        differentiable=(),
        reason=STOPPED,
    ),
    Sample(
        name="beer/regularizer",
        build=lambda: partial(BEERRegularizer(0.5), gamma=0.9),
        inputs=_transitions,
        differentiable=(),
        reason=STOPPED,
    ),
    Sample(
        name="beer/regularizer_of_terminals",
        build=lambda: partial(_of_terminals, BEERRegularizer(0.5)),
        inputs=_transitions,
        differentiable=(),
        reason=STOPPED,
    ),
    Sample(
        name="beer/official",
        build=lambda: lambda beer, *given: beer(*given[:4], 0.9, norm_from=given[4]),
        inputs=lambda g: (BEERRegularizer(0.5, official=True), *_transitions(g), randn(g, 6, 4)),
        differentiable=(),
        reason=STOPPED,
    ),
    Sample(
        name="beer/dissimilarity", build=lambda: DissimilarityRegularizer(0.5), inputs=lambda g: _transitions(g)[:2]
    ),
    Sample(name="beer/dr3", build=lambda: DR3Regularizer(0.5), inputs=lambda g: _transitions(g)[:2]),
    Sample(
        name="beer/infer",
        build=lambda: InFeRRegularizer(Features(), 4, weight=0.5, heads=3, scale=2.0),
        inputs=lambda g: (randn(g, 6, 4), randn(g, 6, 3)),
        parameters=True,
    ),
    Sample(
        name="beer/rank",
        build=lambda: representation_rank,
        inputs=lambda g: (randn(g, 9, 4),),
        differentiable=(),
        reason=A_NUMBER,
    ),
    Sample(
        name="beer/rank_gram",
        build=lambda: partial(representation_rank, method="gram"),
        inputs=lambda g: (randn(g, 9, 4),),
        differentiable=(),
        reason=A_NUMBER,
    ),
    Sample(
        name="prdc/constraint",
        build=lambda: _constraint(power=2),
        inputs=lambda g: (randn(g, 6, 3), randn(g, 6, 2).tanh()),
        differentiable=(1,),
        fake_cuda=False,
        reason=SEARCHED,
    ),
    Sample(
        name="prdc/constraint_distance",
        build=lambda: _constraint(power=1),
        inputs=lambda g: (randn(g, 6, 3), randn(g, 6, 2).tanh()),
        differentiable=(1,),
        fake_cuda=False,
        reason=SEARCHED,
    ),
    Sample(
        name="prdc/loss",
        build=lambda: partial(dataset_constraint_loss, k=2, mode="mean"),
        inputs=lambda g: (randn(g, 6, 3), randn(g, 6, 2).tanh(), randn(g, 40, 3), randn(g, 40, 2).tanh()),
        differentiable=(1,),
        fake_cuda=False,
        reason=SEARCHED,
    ),
    Sample(
        name="prdc/normalizer",
        build=lambda: StateNormalizer(3 * randn(torch.Generator().manual_seed(1), 40, 3) + 1),
        inputs=lambda g: (randn(g, 6, 3),),
    ),
)
