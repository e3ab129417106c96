"""Three updates of the authors' agent, in float64: losses, bounds and all parameters."""

from pathlib import Path

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box

from poise.rl import Batch, BEERRegularizer, DPGAgent, bellman_cosine_bound

GOLDEN = Path(__file__).parent / "golden" / "beer"
LAYERS = {"l1": "body.0", "l2": "body.2", "l3": "head"}
TOLERANCE = {"case_a": 1e-9, "case_b_active": 1e-8}


@pytest.fixture(params=TOLERANCE)
def case(request):
    return request.param, np.load(GOLDEN / f"{request.param}.npz")


def networks(agent):
    return {
        "actor": agent.actor,
        "critic": agent.critics[0],
        "actor_target": agent.actor_target,
        "critic_target": agent.critic_targets[0],
    }


def official_agent(data):
    bounds = np.full(data["action"].shape[-1], data["max_action"])
    agent = DPGAgent(
        Box(-np.inf, np.inf, (data["state"].shape[-1],)),
        Box(-bounds, bounds, dtype=np.float64),
        tau=float(data["tau"]),
        learning_rate=float(data["lr"]),
        hidden=(16, 16),
        regularizers=[BEERRegularizer(float(data["beta"]), official=True)],
        dtype=torch.float64,
    )
    for name, network in networks(agent).items():
        own = network.state_dict()
        for theirs, ours in LAYERS.items():
            for part in ("weight", "bias"):
                own[f"{ours}.{part}"].copy_(torch.from_numpy(data[f"init_{name}.{theirs}.{part}"]))
    return agent


def batch(data, step):
    rows = {
        name: torch.from_numpy(data[name][step]) for name in ("state", "action", "next_state", "reward", "not_done")
    }
    count = len(rows["state"])
    return Batch(
        rows["state"],
        rows["action"],
        rows["reward"].squeeze(1),
        torch.full((count,), float(data["discount"]), dtype=torch.float64),
        rows["next_state"],
        rows["not_done"].squeeze(1) == 0,
        torch.arange(count),
    )


def test_updates_are_those_of_the_authors(case):
    name, data = case
    agent = official_agent(data)
    for step in range(3):
        given = batch(data, step)
        critic, target = agent.critics[0], agent.critic_targets[0]
        with torch.no_grad():
            features = critic.features(given.observation, given.action)
            following = target.features(given.next_observation, agent.actor_target(given.next_observation))
            online = critic.features(given.next_observation, agent.actor(given.next_observation))
            bound = bellman_cosine_bound(
                features, following, given.reward, critic.head.weight, float(data["discount"]), norm_from=online
            )
            cosine = torch.nn.functional.cosine_similarity(features, following, eps=1e-6)
        np.testing.assert_allclose(bound, data["upper_bound"][step], rtol=1e-9)
        np.testing.assert_allclose(cosine, data["cosine"][step], rtol=1e-9)
        metrics = agent.update(given)
        np.testing.assert_allclose(metrics["td_loss"], data["td_loss"][step], rtol=1e-9)
        np.testing.assert_allclose(metrics["regularizer"], data["beer_loss"][step], rtol=1e-9)
    for part, network in networks(agent).items():
        own = network.state_dict()
        for theirs, ours in LAYERS.items():
            for kind in ("weight", "bias"):
                expected = data[f"final_{part}.{theirs}.{kind}"]
                np.testing.assert_allclose(own[f"{ours}.{kind}"], expected, rtol=0, atol=TOLERANCE[name])


def test_the_active_case_is_active(case):
    name, data = case
    share = (data["cosine"] > data["upper_bound"]).mean()
    assert share > 0.9 if name == "case_b_active" else share < 1
