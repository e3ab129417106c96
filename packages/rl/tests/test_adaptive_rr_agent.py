"""DrQ-v2: shifts, policy, updates, interventions and checkpoints."""

import copy

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.rl import (
    Batch,
    DrQV2Agent,
    L2Init,
    RandomShiftsAug,
    TruncatedNormal,
    schedule,
    with_crelu,
    with_layer_norm,
    with_spectral_norm,
)
from poise.rl.augment.random_shifts import shift_images, shift_images_by_grid

PIXELS, ACTION = Box(0, 255, (9, 21, 21), np.uint8), Box(-1, 1, (2,))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def agent_of(seed=0, **arguments):
    torch.manual_seed(seed)
    return DrQV2Agent(PIXELS, ACTION, **{"channels": 4, "feature_dim": 8, "hidden": 16, "pad": 2} | arguments)


def batch_of(seed=0, count=16):
    g = seeded(seed)
    return Batch(
        torch.randint(0, 256, (count, 9, 21, 21), generator=g, dtype=torch.uint8),
        torch.rand(count, 2, generator=g) * 2 - 1,
        torch.randn(count, generator=g),
        torch.full((count,), 0.97),
        torch.randint(0, 256, (count, 9, 21, 21), generator=g, dtype=torch.uint8),
        torch.arange(count) % 4 == 0,
        torch.arange(count),
    )


def vector(*modules):
    return torch.cat([each.detach().flatten() for module in modules for each in module.parameters()])


# Random shifts


@settings(deadline=None, max_examples=30)
@given(pad=st.integers(0, 5), size=st.integers(1, 9), seed=st.integers(0, 99))
def test_the_crop_equals_the_interpolated_grid(pad, size, seed):
    images = torch.randint(0, 256, (6, 3, size, size), generator=seeded(seed), dtype=torch.uint8)
    shift = RandomShiftsAug(pad).draw(6, seeded(seed))
    expected = shift_images_by_grid(images.double(), shift, pad)
    torch.testing.assert_close(shift_images(images, shift, pad).double(), expected, atol=1e-8, rtol=0)


def test_the_centre_moves_nothing_and_bytes_stay_bytes():
    images = torch.randint(0, 256, (4, 9, 7, 5), generator=seeded(), dtype=torch.uint8)
    assert torch.equal(RandomShiftsAug(3)(images, torch.full((4, 2), 3)), images)
    assert torch.equal(RandomShiftsAug(0)(images), images)


def test_offsets_are_uniform_and_each_image_has_its_own():
    drawn = RandomShiftsAug(2).draw(50_000, seeded())
    counts = torch.bincount(drawn[:, 0] * 5 + drawn[:, 1], minlength=25)
    assert len(counts) == 25
    assert ((counts - 2_000).abs() < 5 * 2_000**0.5).all()


def test_all_channels_of_an_image_move_together():
    one = torch.randint(0, 256, (8, 1, 10, 10), generator=seeded(), dtype=torch.uint8)
    moved = RandomShiftsAug(4)(one.expand(-1, 9, -1, -1), generator=seeded(1))
    assert (moved == moved[:, :1]).all()
    assert len({moved[index].numpy().tobytes() for index in range(8)}) == 8


def test_shifts_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match="pad"):
        RandomShiftsAug(-1)
    with pytest.raises(ValueError, match="images must have shape"):
        RandomShiftsAug(1)(torch.zeros(3, 4, 4))
    with pytest.raises(ValueError, match=r"shift must have shape \(2, 2\)"):
        RandomShiftsAug(1)(torch.zeros(2, 1, 4, 4), torch.zeros(3, 2))
    with pytest.raises(ValueError, match="square"):
        shift_images_by_grid(torch.zeros(1, 1, 3, 4), torch.zeros(1, 2), 1)


# The policy


@given(
    mean=st.floats(-1, 1), stddev=st.floats(0, 3), clip=st.one_of(st.none(), st.floats(0, 1)), seed=st.integers(0, 9)
)
@settings(deadline=None, max_examples=50)
def test_sampled_actions_stay_in_range_and_the_gradient_is_one(mean, stddev, clip, seed):
    mu = torch.full((50, 2), mean, dtype=torch.float64, requires_grad=True)
    action = TruncatedNormal(mu, stddev).sample(clip, generator=seeded(seed))
    assert (action.abs() <= 1 - 1e-6).all()
    if clip is not None:
        assert ((action - mu).abs() <= clip + 2e-6).all()
    (gradient,) = torch.autograd.grad(action.sum(), mu)
    assert (gradient == 1).all(), "outside the clamp too"


def test_schedules_are_read_from_strings():
    assert schedule("linear(1.0,0.1,100)", 1_000) == 0.1
    assert schedule(0.3, 5) == 0.3
    steps = [schedule("step_linear(1,0.5,10,0.1,20)", step) for step in (0, 5, 10, 20, 30, 99)]
    assert steps == pytest.approx([1, 0.75, 0.5, 0.3, 0.1, 0.1])
    for bad in ("linear(1,2)", "cosine(1,2,3)", "linear(1,2,0)", "linear(a,b,c)", "linear(1,2,2.5)"):
        with pytest.raises(ValueError, match=r"expected 'linear|whole number"):
            schedule(bad, 0)


def test_acting_explores_first_uniformly_then_with_unclipped_noise():
    agent = agent_of(exploration_steps=10, stddev=0.8)
    pixels = np.zeros((2_000, 9, 21, 21), np.uint8)
    mean = agent.act(pixels)
    early, late = agent.act(pixels, seeded(), step=9), agent.act(pixels, seeded(), step=10)
    assert early.std() == pytest.approx(3**-0.5, abs=0.02)
    assert np.abs(late).max() <= 1
    assert np.abs(late - mean).max() > 0.3, "noise is clipped in updates only"
    assert agent.act(pixels[0]).shape == (2,)
    np.testing.assert_allclose(agent.act(pixels[0]), mean[0], rtol=1e-4)


# Updates


def test_an_update_is_what_the_equations_say():
    agent, batch = agent_of(stddev=0.2), batch_of()
    twin = copy.deepcopy(agent)
    noise, draws = seeded(3), seeded(3)
    agent.update(batch, 7, noise)
    seen, following = (
        twin.augment(batch.observation, generator=draws),
        twin.augment(batch.next_observation, generator=draws),
    )
    z = twin.encoder(seen)
    with torch.no_grad():
        next_z = twin.encoder(following)
        eps = torch.randn(16, 2, generator=draws)
        next_action = twin.actor(next_z).tanh() + (0.2 * eps).clamp(-0.3, 0.3)
        least = torch.minimum(*twin.critic_target(next_z, next_action.clamp(-1 + 1e-6, 1 - 1e-6)))
        goal = batch.reward + 0.97 * torch.where(batch.terminated, 0, 1) * least
    loss = sum((q - goal).square().mean() for q in twin.critic(z, batch.action))
    critic, encoder = (torch.optim.Adam(each.parameters(), 1e-4) for each in (twin.critic, twin.encoder))
    loss.backward()
    critic.step()
    encoder.step()
    torch.testing.assert_close(
        vector(agent.critic, agent.encoder), vector(twin.critic, twin.encoder), atol=1e-6, rtol=0
    )
    z = z.detach()
    eps = torch.randn(16, 2, generator=draws)
    action = twin.actor(z).tanh() + (0.2 * eps).clamp(-0.3, 0.3)
    actor = torch.optim.Adam(twin.actor.parameters(), 1e-4)
    (-torch.minimum(*twin.critic(z, action)).mean()).backward()
    actor.step()
    torch.testing.assert_close(vector(agent.actor), vector(twin.actor), atol=1e-6, rtol=0)
    expected = 0.99 * vector(twin.critic_target) + 0.01 * vector(agent.critic)
    torch.testing.assert_close(vector(agent.critic_target), expected, atol=1e-6, rtol=0)


def test_terminal_transitions_do_not_bootstrap_and_others_do():
    batch = batch_of()
    mask = batch.terminated[:, None, None, None]
    one, two, three = agent_of(), agent_of(), agent_of()
    one.update(batch, 0, seeded())
    two.update(batch._replace(next_observation=torch.where(mask, 0, batch.next_observation)), 0, seeded())
    assert torch.equal(vector(one.critic), vector(two.critic))
    three.update(batch._replace(next_observation=torch.where(mask, batch.next_observation, 0)), 0, seeded())
    assert not torch.equal(vector(one.critic), vector(three.critic))


def test_the_reported_fraction_is_that_of_the_pass_that_trains_the_critic():
    agent, batch = agent_of(monitor=("encoder", "actor", "critic"), pad=0), batch_of()
    with torch.no_grad():
        hidden = torch.cat([agent.critic.trunk(agent.encoder(batch.observation)), batch.action], -1)
        units = [head[:2](hidden) for head in (agent.critic.q1, agent.critic.q2)]
        units += [head[2:4](first) for head, first in zip((agent.critic.q1, agent.critic.q2), list(units), strict=True)]
    expected = float((torch.cat(units) > 0).double().mean())
    metrics = agent.update(batch, 0, seeded())
    assert float(metrics["critic_fau"]) == pytest.approx(expected, abs=1e-9)
    assert 0 < metrics["actor_fau"] < 1
    assert 0 < metrics["encoder_fau"] < 1
    assert "critic_fau" not in agent_of(monitor=()).update(batch)


def test_monitoring_changes_no_update():
    with_it, without = agent_of(), agent_of(monitor=())
    for each in (with_it, without):
        each.update(batch_of(), 0, seeded())
    assert torch.equal(vector(with_it.critic, with_it.actor), vector(without.critic, without.actor))


def test_augmentation_can_be_switched_on_and_off():
    agent, batch = agent_of(), batch_of()
    augment, agent.augment = agent.augment, None
    state = copy.deepcopy(agent.state_dict())
    first = agent.update(batch, 0, seeded())["td_loss"]
    agent.load_state_dict(state)
    agent.augment = augment
    assert agent.update(batch, 0, seeded())["td_loss"] != first


def test_the_agent_learns_the_values_of_one_batch():
    agent, generator = agent_of(learning_rate=3e-3, pad=0), seeded()
    batch = batch_of()._replace(terminated=torch.ones(16, dtype=torch.bool))
    losses = [float(agent.update(batch, 10**6, generator)["td_loss"]) for _ in range(150)]
    assert losses[-1] < 0.2 * losses[0]
    error = agent.value(batch.observation.numpy(), batch.action.numpy()) - batch.reward.numpy()
    assert np.square(error).mean() < 0.2 * batch.reward.var()


@pytest.mark.parametrize("change", [with_layer_norm, with_spectral_norm, with_crelu])
def test_heads_with_other_layers_train(change):
    agent = agent_of(heads=change, weight_decay=1e-4)
    metrics = agent.update(batch_of(), 0, seeded())
    assert all(value.isfinite() for value in metrics.values())
    assert 0 < metrics["critic_fau"] < 1


def test_penalties_are_part_of_the_critics_loss():
    agent = agent_of()
    agent.penalties.append(L2Init(agent.value_network, 10.0))
    agent.update(batch_of(), 0, seeded())
    metrics = agent.update(batch_of(1), 0, seeded())
    assert metrics["penalty"] > 0
    assert metrics["critic_loss"] == metrics["td_loss"] + metrics["penalty"]


def test_the_encoder_may_compute_in_half_precision():
    agent = agent_of(encoder_dtype=torch.bfloat16)
    full = agent_of().update(batch_of(), 0, seeded())
    half = agent.update(batch_of(), 0, seeded())
    assert half["td_loss"] != full["td_loss"]
    torch.testing.assert_close(half["td_loss"], full["td_loss"], rtol=0.05, atol=0.05)


# Interventions


@pytest.mark.parametrize("name", ["encoder", "actor", "critic"])
def test_injection_changes_no_action_and_no_value(name):
    agent, batch = agent_of(), batch_of()
    agent.update(batch, 0, seeded())
    pixels, action = batch.observation.numpy(), batch.action.numpy()
    acted, valued = agent.act(pixels), agent.value(pixels, action)
    target = agent.critic_target(agent.encoder(batch.observation), batch.action)
    before = vector(getattr(agent, name))
    agent.inject(name, seeded())
    np.testing.assert_allclose(agent.act(pixels), acted, atol=1e-6)
    np.testing.assert_allclose(agent.value(pixels, action), valued, atol=1e-6)
    after = agent.critic_target(agent.encoder(batch.observation), batch.action)
    torch.testing.assert_close(torch.stack(after), torch.stack(target), atol=1e-5, rtol=0)
    metrics = agent.update(batch, 0, seeded())
    assert all(value.isfinite() for value in metrics.values())
    assert torch.equal(vector(getattr(agent, name).frozen), before), "what it knew stays"


@pytest.mark.parametrize("name", ["encoder", "actor", "critic"])
def test_a_reset_changes_one_network(name):
    agent, batch = agent_of(), batch_of()
    agent.update(batch, 0, seeded())
    others = [getattr(agent, each) for each in ("encoder", "actor", "critic") if each != name]
    before, kept = vector(getattr(agent, name)), vector(*others)
    agent.reset(name, seeded())
    assert not torch.equal(vector(getattr(agent, name)), before)
    assert torch.equal(vector(*others), kept)
    assert not agent.optimizers[name].state
    if name == "critic":
        assert torch.equal(vector(agent.critic_target), vector(agent.critic))


def test_the_last_layers_of_every_head_are_reset():
    agent = agent_of()
    before = copy.deepcopy(agent.critic)
    agent.reset("critic", seeded(), last_layers=1)
    for head, old in ((agent.critic.q1, before.q1), (agent.critic.q2, before.q2)):
        assert torch.equal(head[2].weight, old[2].weight)
        assert not torch.equal(head[4].weight, old[4].weight)
        assert head[4].weight.norm().item() == pytest.approx(1, abs=1e-5), "orthogonal, as when it was made"
    with pytest.raises(ValueError, match="networks are"):
        agent.reset("trunk")


def test_a_restored_agent_continues_bit_identically_also_after_an_injection():
    one, other = agent_of(0), agent_of(1)
    one.update(batch_of(), 0, seeded())
    one.inject("critic", seeded())
    one.update(batch_of(1), 1, seeded())
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    for each in (one, other):
        each.update(batch_of(2), 2, seeded(5))
    for name in ("encoder", "actor", "critic", "critic_target"):
        assert torch.equal(vector(getattr(one, name)), vector(getattr(other, name)))
    assert other.updates == one.updates == 3
    assert other.injections == ["critic"]


def test_agents_refuse_what_they_cannot_do():
    with pytest.raises(TypeError, match="images in a Box"):
        DrQV2Agent(Box(0, 1, (3,)), ACTION)
    with pytest.raises(TypeError, match="DQNAgent"):
        DrQV2Agent(PIXELS, Discrete(2))
    with pytest.raises(ValueError, match="RescaleAction"):
        DrQV2Agent(PIXELS, Box(-2, 2, (1,)))
    with pytest.raises(ValueError, match="at least 15 x 15"):
        DrQV2Agent(Box(0, 255, (9, 12, 12), np.uint8), ACTION)
    with pytest.raises(ValueError, match="monitor names"):
        agent_of(monitor=("trunk",))
    with pytest.raises(ValueError, match="tau"):
        agent_of(tau=0.0)
    with pytest.raises(ValueError, match="expected 'linear"):
        agent_of(stddev="constant")
