"""What the BEER experiment measures of a representation."""

import torch
from torch import Tensor

from poise.rl.agents.dpg import DPGAgent
from poise.rl.agents.dqn import DQNAgent
from poise.rl.replay.batch import Batch
from poise.rl.representation.beer import bellman_cosine_bound
from poise.rl.representation.rank import representation_rank

MEASURES = ("rank", "cosine", "target_cosine", "bound", "excess", "own_excess", "above_bound", "head_norm")
"""What :func:`representation` gives."""


@torch.no_grad()
def representation_of(agent: DPGAgent | DQNAgent, batch: Batch) -> dict[str, float]:
    """Measures of the agent's representation, with the next actions of its policy and of the slow copy of that."""
    if isinstance(agent, DQNAgent):
        network, target = agent.network, agent.target
        batch = batch.to(network.head.weight.device)
        after, target_after = (each.features(batch.next_observation) for each in (network, target))
        features, rows = network.features(batch.observation), network.head.weight[batch.action]
        return representation(features, after, target_after, batch, rows)
    critic, slow = agent.critics[0], agent.critic_targets[0]
    batch = batch.to(critic.head.weight.device)
    after = critic.features(batch.next_observation, agent.actor(batch.next_observation))
    target_after = slow.features(batch.next_observation, agent.actor_target(batch.next_observation))
    features = critic.features(batch.observation, batch.action)
    return representation(features, after, target_after, batch, critic.head.weight)


def representation(
    features: Tensor, after: Tensor, target_after: Tensor, batch: Batch, weight: Tensor
) -> dict[str, float]:
    """Rank, cosine and bound of one network at both ends of each transition, and with the slow copy at the far end as in the loss.

    Args:
        features: of the critic, where the transitions begin.
        after: of the critic, where they end.
        target_after: of its slow copy, where they end.
        batch: the transitions.
        weight: of the critic's head.
    """
    going_on = ~batch.terminated
    cosine, target_cosine = (
        torch.nn.functional.cosine_similarity(features, end, dim=-1)[going_on] for end in (after, target_after)
    )
    bound, target_bound = (
        bellman_cosine_bound(features, end, batch.reward, weight, batch.discount)[going_on]
        for end in (after, target_after)
    )
    excess = (target_cosine - target_bound).relu()
    return {
        "rank": float(representation_rank(features, method="gram")),
        "cosine": float(cosine.mean()),
        "target_cosine": float(target_cosine.mean()),
        "bound": float(bound.mean()),
        "excess": float(excess.mean()),
        "own_excess": float((cosine - bound).relu().mean()),
        "above_bound": float((excess > 0).float().mean()),
        "head_norm": float(weight.square().sum(-1).mean().sqrt()),
    }
