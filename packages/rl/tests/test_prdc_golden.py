"""Updates of the authors' agent, in float64: losses, weights, neighbours and all parameters."""

from pathlib import Path

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box

from poise.rl import PRDC, Batch, OfflineDataset, StateNormalizer, TD3BackboneConfig

GOLDEN = Path(__file__).parent / "golden" / "prdc"
LAYERS = {"l1": "body.0", "l2": "body.2", "l3": "head", "l4": "body.0", "l5": "body.2", "l6": "head"}
TOLERANCE = {"case_a": 1e-9, "case_b_antmaze_reward": 1e-7}


@pytest.fixture(params=TOLERANCE)
def case(request):
    return request.param, np.load(GOLDEN / f"{request.param}.npz")


def networks(agent):
    """Each network with the layers that are its own in the authors' module, where both critics are one."""
    first, second = ("l1", "l2", "l3"), ("l4", "l5", "l6")
    return [
        ("actor", agent.actor, first),
        ("critic", agent.critics[0], first),
        ("critic", agent.critics[1], second),
        ("actor_target", agent.actor_target, first),
        ("critic_target", agent.critic_targets[0], first),
        ("critic_target", agent.critic_targets[1], second),
    ]


def official_agent(data, backend):
    count, width = data["actions"].shape
    bounds = np.full(width, float(data["max_action"]))
    log = OfflineDataset.from_arrays(
        data["raw_states"],
        data["actions"],
        np.zeros(count),
        data["raw_states"],
        np.zeros(count, bool),
        action_space=Box(-bounds, bounds, dtype=np.float64),
        dtype=torch.float64,
    )
    config = TD3BackboneConfig(
        alpha=float(data["alpha"]),
        discount=float(data["discount"]),
        tau=float(data["tau"]),
        learning_rate=float(data["lr"]),
        hidden=(16, 16),
        target_noise=float(data["policy_noise"]),
        noise_clip=float(data["noise_clip"]),
        policy_delay=int(data["policy_freq"]),
        reward_scale=float(data["reward_scale"]),
        reward_shift=float(data["reward_shift"]),
    )
    agent = PRDC(log, config, beta=float(data["beta"]), k=int(data["k"]), backend=backend, dtype=torch.float64)
    for name, network, layers in networks(agent):
        own = network.state_dict()
        for theirs in layers:
            for part in ("weight", "bias"):
                own[f"{LAYERS[theirs]}.{part}"].copy_(torch.from_numpy(data[f"init_{name}.{theirs}.{part}"]))
    return agent


def batch(agent, data, step):
    rows = torch.from_numpy(data["batch_index"][step])
    reward = torch.from_numpy(data["batch_reward_raw"][step]).squeeze(1)
    own = agent.data.gather(rows, gamma=float(data["discount"]))
    return Batch(
        own.observation,
        own.action,
        float(data["reward_scale"]) * reward + float(data["reward_shift"]),
        own.discount,
        torch.from_numpy(data["batch_next_state"][step]),
        torch.from_numpy(data["batch_not_done"][step]).squeeze(1) == 0,
        rows,
    )


def test_states_are_normalised_as_by_the_authors(case):
    _, data = case
    normalizer = StateNormalizer(torch.from_numpy(data["raw_states"]))
    np.testing.assert_allclose(normalizer.mean, data["mean"][0], rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(normalizer.scale, data["std"][0], rtol=1e-12)
    np.testing.assert_allclose(normalizer(torch.from_numpy(data["raw_states"])), data["states"], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("backend", ["auto", "matmul", "boxes", "kdtree"])
def test_updates_are_those_of_the_authors(case, backend):
    name, data = case
    agent = official_agent(data, backend)
    moves = 0
    for step in range(len(data["critic_loss"])):
        given = batch(agent, data, step)
        metrics = agent.update(given, torch.from_numpy(data["unit_noise"][step]))
        np.testing.assert_allclose(metrics["critic_loss"], data["critic_loss"][step], rtol=1e-9)
        if "actor_loss" in metrics:
            np.testing.assert_allclose(metrics["actor_loss"], data["combined_loss"][moves], rtol=1e-9)
            np.testing.assert_allclose(agent.constraint.value, data["dc_loss"][moves], rtol=1e-9)
            np.testing.assert_allclose(agent.value_weight, data["lmbda"][moves], rtol=1e-9)
            value = (agent.constraint.value - metrics["actor_loss"]) / agent.value_weight
            np.testing.assert_allclose(value, data["Q_value"][moves], rtol=1e-7)
            key = torch.from_numpy(data["query_key"][moves])
            states, actions = key[:, : data["states"].shape[1]] / float(data["beta"]), key[:, data["states"].shape[1] :]
            found = agent.constraint.query(states, actions, given.row)
            np.testing.assert_array_equal(found.row, data["nn_index"][moves, :, 0])
            np.testing.assert_allclose(found.distance, data["nn_dist"][moves, :, 0], rtol=1e-9)
            moves += 1
    assert moves == len(data["lmbda"])
    for part, network, layers in networks(agent):
        own = network.state_dict()
        for theirs in layers:
            for kind in ("weight", "bias"):
                expected = data[f"final_{part}.{theirs}.{kind}"]
                np.testing.assert_allclose(
                    own[f"{LAYERS[theirs]}.{kind}"], expected, rtol=0, atol=TOLERANCE[name], err_msg=f"{part} {theirs}"
                )
