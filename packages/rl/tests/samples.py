"""Sample inputs that put every method of poise.rl under the workspace contract."""

from functools import partial

import torch
from torch import Tensor, nn

from poise.core.testing import Sample, randn
from poise.rl.agents.pixel_networks import Actor, Critic, Encoder
from poise.rl.agents.truncated_normal import TruncatedNormal
from poise.rl.augment.random_shifts import RandomShiftsAug, shift_images, shift_images_by_grid
from poise.rl.offline.normalizer import StateNormalizer
from poise.rl.offline.prdc import DatasetConstraint, dataset_constraint_loss
from poise.rl.plasticity.fau import FAUMonitor
from poise.rl.plasticity.injection import plasticity_injection
from poise.rl.plasticity.l2_init import L2Init
from poise.rl.plasticity.redo import dormant_scores
from poise.rl.plasticity.surgery import CReLU
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

COUNTED = "a count of positive numbers"


class Counted(nn.Module):
    """A critic and the fractions of its active units in one call."""

    def __init__(self) -> None:
        super().__init__()
        self.critic = Critic(6, 2, feature_dim=4, hidden=8)

    def forward(self, z: Tensor, action: Tensor) -> list[Tensor]:
        monitor = FAUMonitor({"critic": self.critic})
        with monitor.counting():
            self.critic(z, action)
        return [*monitor.fractions().values(), *monitor.layers().values()]


def _injected() -> nn.Module:
    torch.manual_seed(0)
    injected = plasticity_injection(Critic(6, 2, feature_dim=4, hidden=8), torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in injected.fresh.parameters():
            parameter.add_(0.1)  # as after some training
    return injected


def _pixels(generator: torch.Generator) -> tuple[Tensor, ...]:
    return (255 * torch.rand(2, 3, 17, 17, generator=generator, dtype=torch.float64),)


def _sampled(mean: Tensor, eps: Tensor) -> Tensor:
    return TruncatedNormal(mean.tanh(), 0.4).sample(0.3, eps=eps)


def _density(mean: Tensor, action: Tensor) -> Tensor:
    return TruncatedNormal(mean, 0.4).log_prob(action)


ADAPTIVE_RR: tuple[Sample, ...] = (
    Sample(
        name="adaptive_rr/fau",
        build=Counted,
        inputs=lambda g: (randn(g, 5, 6), randn(g, 5, 2)),
        differentiable=(),
        compile=False,
        reason=f"{COUNTED}; making the monitor inside of the call leaves nothing for the compiler",
    ),
    Sample(name="adaptive_rr/encoder", build=lambda: Encoder((3, 17, 17), channels=2), inputs=_pixels, parameters=True),
    Sample(
        name="adaptive_rr/actor",
        build=lambda: Actor(6, 2, feature_dim=4, hidden=8),
        inputs=lambda g: (randn(g, 5, 6),),
        parameters=True,
    ),
    Sample(
        name="adaptive_rr/critic",
        build=lambda: Critic(6, 2, feature_dim=4, hidden=8),
        inputs=lambda g: (randn(g, 5, 6), randn(g, 5, 2)),
        differentiable=(0, 1),
        parameters=True,
    ),
    Sample(
        name="adaptive_rr/injected_critic",
        build=_injected,
        inputs=lambda g: (randn(g, 5, 6), randn(g, 5, 2)),
        differentiable=(0, 1),
        parameters=True,
    ),
    Sample(
        name="adaptive_rr/random_shifts",
        build=lambda: RandomShiftsAug(2),
        inputs=lambda g: (_pixels(g)[0], None, g),
    ),
    Sample(
        name="adaptive_rr/shift",
        build=lambda: partial(shift_images, pad=2),
        inputs=lambda g: (*_pixels(g), torch.randint(5, (2, 2), generator=g)),
    ),
    Sample(
        name="adaptive_rr/shift_by_grid",
        build=lambda: partial(shift_images_by_grid, pad=2),
        inputs=lambda g: (*_pixels(g), torch.randint(5, (2, 2), generator=g)),
    ),
    Sample(
        name="adaptive_rr/truncated_normal",
        build=lambda: _sampled,
        inputs=lambda g: (0.3 * randn(g, 5, 2), randn(g, 5, 2)),
        # within the range, where the straight-through gradient is that of finite differences
    ),
    Sample(
        name="adaptive_rr/log_prob",
        build=lambda: _density,
        inputs=lambda g: (0.3 * randn(g, 5, 2), 0.3 * randn(g, 5, 2)),
        differentiable=(0, 1),
    ),
    Sample(
        name="adaptive_rr/l2_init",
        build=lambda: L2Init(nn.Linear(3, 2), 0.5),
        inputs=lambda g: (nn.Linear(3, 2),),
        differentiable=(),
        reason="its gradient is that of the network it is given; test_adaptive_rr_plasticity.py checks it",
    ),
    Sample(name="adaptive_rr/crelu", build=CReLU, inputs=lambda g: (randn(g, 5, 4),)),
    Sample(
        name="adaptive_rr/dormant_scores",
        build=lambda: dormant_scores,
        inputs=lambda g: (randn(g, 6, 4, 3).relu(),),
        differentiable=(),
        reason="a measure, taken without gradient",
    ),
)

SAMPLES += ADAPTIVE_RR
