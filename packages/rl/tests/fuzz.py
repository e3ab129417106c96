"""How every public name of poise.rl is called under changed arguments, or why it is not."""

from typing import Any

import torch
from torch import Tensor, nn

from poise.core.testing import Exempt, Fuzz, randn, sampled, valid
from poise.rl import (
    BEERRegularizer,
    StateNormalizer,
    TruncatedNormal,
    beer_loss,
    bellman_cosine_bound,
    dataset_constraint_loss,
    dormant_units,
    representation_rank,
    schedule,
    shrink_and_perturb,
)

RECORD = Exempt("a record of what was found; it computes nothing")
FILE = Exempt("reads a file")
BASE = Exempt("a protocol; what implements it is called")
AGENT = Exempt("acts and learns in an environment; the losses in it are called by themselves")
ENVIRONMENT = Exempt("is about environments, not about tensors")
BUFFER = Exempt("stores what an environment gives, in the types of its spaces")
SURGERY = Exempt("takes a network and settings, no tensors")
SCORES = Exempt("takes scores as an array; test_evaluation.py tests what it refuses")

RANK = "a count, which has no entry that is not a number"
STEPS = "a step function: what is not a number lies on neither side of the step"


def _transitions(generator: torch.Generator) -> tuple[Any, ...]:
    return randn(generator, 6, 4), randn(generator, 6, 4), randn(generator, 6), randn(generator, 1, 4), 0.9


def _data(generator: torch.Generator) -> tuple[Any, ...]:
    logged = randn(generator, 20, 3), randn(generator, 20, 2).tanh()
    return randn(generator, 6, 3), randn(generator, 6, 2).tanh(), *logged, 2.0


def _log_prob(mean: Tensor, action: Tensor, stddev: float) -> Tensor:
    return TruncatedNormal(mean, stddev).log_prob(action)


def _dormant(x: Tensor) -> dict[str, Tensor]:
    network = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).to(
        torch.promote_types(x.dtype, torch.bfloat16)
    )
    return dormant_units(network, x)


FUZZ: dict[str, Fuzz | Exempt] = {
    "DPGAgent": AGENT,
    "DQNAgent": AGENT,
    "DrQV2Agent": AGENT,
    "TD3Agent": AGENT,
    "schedule": valid(lambda: schedule, lambda g: (0.5, 3)),
    "TruncatedNormal": valid(lambda: _log_prob, lambda g: (0.3 * randn(g, 5, 2), 0.3 * randn(g, 5, 2), 0.4), (0, 1)),
    "RandomShiftsAug": sampled("adaptive_rr/random_shifts", nan="a shift may move the pixel out of the image"),
    "DMControl": ENVIRONMENT,
    "EpisodeStream": ENVIRONMENT,
    "PixelFrameStack": ENVIRONMENT,
    "make_dmc_pixels": ENVIRONMENT,
    "restore_state": ENVIRONMENT,
    "save_state": ENVIRONMENT,
    "bootstrap_interval": SCORES,
    "interquartile_mean": SCORES,
    "evaluate": ENVIRONMENT,
    "q_value_bias": ENVIRONMENT,
    "visited_states": ENVIRONMENT,
    "OfflineDataset": RECORD,
    "StateNormalizer": valid(
        lambda: lambda seen, x: StateNormalizer(seen)(x), lambda g: (randn(g, 9, 3), randn(g, 6, 3)), (1,)
    ),
    "PRDC": AGENT,
    "Constrained": RECORD,
    "DatasetConstraint": sampled("prdc/constraint"),
    "dataset_constraint_loss": valid(lambda: dataset_constraint_loss, _data, (1,)),
    "d4rl_normalized_score": SCORES,
    "TD3": AGENT,
    "TD3BC": AGENT,
    "BehaviorCloning": AGENT,
    "PolicyRegularizer": BASE,
    "TD3BackboneConfig": RECORD,
    "AdaptiveReplayRatio": Exempt("takes a number for each episode; test_adaptive_rr.py tests what it refuses"),
    "FAUMonitor": sampled("adaptive_rr/fau", nan=STEPS),
    "Injected": sampled("adaptive_rr/injected_critic"),
    "plasticity_injection": SURGERY,
    "L2Init": sampled("adaptive_rr/l2_init"),
    "heavy_priming": AGENT,
    "target_fitting_loss": Exempt("trains a copy of a network; test_adaptive_rr_plasticity.py tests what it refuses"),
    "dormant_units": valid(lambda: _dormant, lambda g: (randn(g, 6, 3),)),
    "recycle_dormant": SURGERY,
    "reset_last_layers": SURGERY,
    "reset_module": SURGERY,
    "shrink_and_perturb": valid(
        lambda: lambda shrink, perturb: shrink_and_perturb(nn.Linear(3, 2), shrink, perturb).weight,
        lambda g: (0.8, 0.2),
    ),
    "CReLU": sampled("adaptive_rr/crelu"),
    "with_crelu": SURGERY,
    "with_layer_norm": SURGERY,
    "with_spectral_norm": SURGERY,
    "Batch": RECORD,
    "ReplayBuffer": BUFFER,
    "NStepReplayBuffer": BUFFER,
    "read_episode": FILE,
    "BEERRegularizer": valid(lambda: BEERRegularizer(0.5), _transitions, (0,)),
    "beer_loss": valid(lambda: beer_loss, _transitions, (0,)),
    "bellman_cosine_bound": valid(lambda: bellman_cosine_bound, _transitions, (0, 1)),
    "CriticRegularizer": BASE,
    "CriticStep": RECORD,
    "DissimilarityRegularizer": sampled("beer/dissimilarity"),
    "DR3Regularizer": sampled("beer/dr3"),
    "Representation": SURGERY,
    "InFeRRegularizer": sampled("beer/infer"),
    "representation_rank": valid(lambda: representation_rank, lambda g: (randn(g, 9, 4), 0.01), nan=RANK),
}
