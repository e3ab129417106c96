"""The authors' networks, policy, schedules, replay and replay-ratio loop, in float64."""

from pathlib import Path

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box

from poise.rl import AdaptiveReplayRatio, FAUMonitor, NStepReplayBuffer, RandomShiftsAug, TruncatedNormal, schedule
from poise.rl.agents.pixel_networks import Actor, Critic
from poise.rl.augment.random_shifts import shift_images_by_grid

GOLDEN = Path(__file__).parent / "golden" / "adaptive-rr"
EXACT = {"rtol": 0, "atol": 1e-10}


@pytest.fixture(scope="module")
def nets():
    return np.load(GOLDEN / "nets_a.npz")


def tensor(data, name):
    return torch.from_numpy(data[name])


def load(network, data, prefix):
    names = {f"{prefix}.{name}": name.replace("Q1", "q1").replace("Q2", "q2") for name in parameters(data, prefix)}
    network.double().load_state_dict({ours: tensor(data, theirs) for theirs, ours in names.items()})
    return network


def parameters(data, prefix):
    return [name.removeprefix(f"{prefix}.") for name in data.files if name.startswith(f"{prefix}.")]


def test_critic_values_and_fraction_of_active_units(nets):
    critic = load(Critic(20, 2, feature_dim=8, hidden=16), nets, "critic")
    monitor = FAUMonitor({"critic": critic})
    with monitor.counting():
        q1, q2 = critic(tensor(nets, "repr"), tensor(nets, "action"))
    np.testing.assert_allclose(q1.detach(), nets["q1"][:, 0], **EXACT)
    np.testing.assert_allclose(q2.detach(), nets["q2"][:, 0], **EXACT)
    np.testing.assert_allclose(monitor.fractions()["critic"], nets["fau_critic"], **EXACT)


def test_policy_samples_gradient_and_density(nets):
    actor = load(Actor(20, 2, feature_dim=8, hidden=16), nets, "actor")
    monitor = FAUMonitor({"actor": actor})
    with monitor.counting():
        mean = actor(tensor(nets, "repr")).tanh()
    np.testing.assert_allclose(mean.detach(), nets["mu"], **EXACT)
    np.testing.assert_allclose(monitor.fractions()["actor"], nets["fau_actor"], **EXACT)
    policy, eps = TruncatedNormal(mean, 0.3), tensor(nets, "eps")
    clipped = policy.sample(clip=0.3, eps=eps)
    np.testing.assert_allclose(clipped.detach(), nets["sample_clip03"], **EXACT)
    np.testing.assert_allclose(policy.sample(eps=eps).detach(), nets["sample_noclip"], **EXACT)
    np.testing.assert_allclose(policy.log_prob(clipped).detach(), nets["logprob_clip03"], **EXACT)
    (gradient,) = torch.autograd.grad(clipped.sum(), actor.policy[-1].bias)
    np.testing.assert_allclose(gradient, nets["grad_sample_sum_wrt_last_bias"], **EXACT)


def test_shifted_images(nets):
    images, shift, pad = tensor(nets, "aug_x"), tensor(nets, "aug_shift").long(), int(nets["aug_pad"])
    np.testing.assert_allclose(RandomShiftsAug(pad)(images, shift), nets["aug_y"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(shift_images_by_grid(images.double(), shift, pad), nets["aug_y"], rtol=0, atol=1e-4)


def test_schedules(nets):
    expressions = {
        "sched_easy": "linear(1.0,0.1,100000)",
        "sched_medium": "linear(1.0,0.1,500000)",
        "sched_step_linear": "step_linear(1.0,0.5,1000,0.1,100000)",
    }
    for name, expression in expressions.items():
        values = [schedule(expression, int(step)) for step in nets["sched_steps"]]
        np.testing.assert_allclose(values, nets[name], rtol=0, atol=1e-12)


def test_n_step_transitions(nets):
    episode = {name: nets[f"ep_{name}"] for name in ("observation", "action", "reward", "discount")}
    buffer = NStepReplayBuffer(50, Box(0, 255, (2,), np.uint8), Box(-3, 3, (2,)), steps=3, gamma=0.99)
    buffer.add_episode(episode)
    batch = buffer.gather(torch.arange(10))
    np.testing.assert_array_equal(batch.observation, nets["ns_obs"])
    np.testing.assert_array_equal(batch.action, nets["ns_action"])
    np.testing.assert_array_equal(batch.next_observation, nets["ns_next_obs"])
    np.testing.assert_allclose(batch.reward, nets["ns_reward"][:, 0], rtol=0, atol=1e-6)
    np.testing.assert_allclose(batch.discount * ~batch.terminated, nets["ns_discount"][:, 0], rtol=0, atol=1e-6)
    starts = buffer.sample(2_000, torch.Generator().manual_seed(0)).row
    assert set(starts.tolist()) == set(range(10)), "the starts from which three steps fit, and no other"


def test_controller_replays_the_authors_loop():
    golden = np.load(GOLDEN / "controller_a.npz")
    controller = AdaptiveReplayRatio(check_freq=int(golden["check_freq"]), phi_gap=float(golden["phi_gap"]))
    fau, length = iter(golden["fau_per_update"]), int(golden["episode_len"])
    taken, ratios = [], [controller.replay_ratio]
    for step in range(length * int(golden["n_episodes"])):
        if step and step % length == 0:
            controller.on_episode_end()
            ratios.append(controller.replay_ratio)
        updates = controller.updates_for_step(step) if step >= golden["seed_steps"] else 0
        for _ in range(updates):
            controller.on_update(float(next(fau)))
        taken.append(updates)
    assert taken == golden["updates_per_env_step"].tolist()
    assert ratios == golden["rr_at_episode_start"].tolist()
    assert ratios.index(2.0) == golden["first_episode_at_rr2"]
    assert float(controller.previous) == golden["final_last_average_Phi"]
    assert next(fau, None) is None, "every update of the authors' run was taken"
