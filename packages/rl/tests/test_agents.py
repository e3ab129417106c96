"""Agents: they act within bounds, update as their equations say, learn, and continue bit-identically from a checkpoint."""

import copy

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete

from poise.rl import Batch, BEERRegularizer, DPGAgent, DQNAgent, EpisodeStream, InFeRRegularizer, ReplayBuffer, TD3Agent

STATE = Box(-np.inf, np.inf, (3,))
ACTION = Box(np.array([-2.0, 0.0], np.float32), np.array([2.0, 1.0], np.float32))
CONTINUOUS = pytest.mark.parametrize("kind", [DPGAgent, TD3Agent])
EVERY = pytest.mark.parametrize("kind", [DPGAgent, TD3Agent, DQNAgent])


def agent_of(kind, seed=0, **arguments):
    torch.manual_seed(seed)
    return kind(STATE, Discrete(2) if kind is DQNAgent else ACTION, hidden=(16, 16), **arguments)


def batch_of(kind, seed=0, count=32):
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    action = torch.randint(2, (count,), generator=generator) if kind is DQNAgent else randn(count, 2).clamp(0, 1)
    return Batch(
        randn(count, 3),
        action,
        randn(count),
        torch.full((count,), 0.9),
        randn(count, 3),
        torch.arange(count) % 4 == 0,
        torch.arange(count),
    )


def parameters(agent):
    return torch.cat([value.flatten() for part in agent._parts().values() for value in tensors(part.state_dict())])


def tensors(state):
    if isinstance(state, torch.Tensor):
        yield state.float()
    for value in state.values() if isinstance(state, dict) else state if isinstance(state, list) else ():
        yield from tensors(value)


@CONTINUOUS
def test_actions_stay_within_their_bounds(kind):
    agent = agent_of(kind, exploration_noise=2.0)
    states = np.random.default_rng(0).normal(0, 100, (500, 3)).astype(np.float32)
    for action in (agent.act(states), agent.act(states, torch.Generator().manual_seed(0))):
        assert action.shape == (500, 2)
        assert (action >= ACTION.low).all()
        assert (action <= ACTION.high).all()
    assert agent.act(states[0]).shape == (2,)
    np.testing.assert_allclose(agent.act(states[:1]), agent.act(states)[:1], rtol=1e-5)


@CONTINUOUS
def test_exploration_noise_is_in_half_ranges_of_the_action(kind):
    agent = agent_of(kind, exploration_noise=0.01)
    states = np.zeros((20_000, 3), np.float32)
    noise = agent.act(states, torch.Generator().manual_seed(0)) - agent.act(states)
    np.testing.assert_allclose(noise.std(0), [0.02, 0.005], rtol=0.05)


def test_dqn_takes_the_best_action_or_explores():
    agent = agent_of(DQNAgent)
    states = np.random.default_rng(0).normal(size=(4_000, 3)).astype(np.float32)
    both = np.stack([agent.value(states, np.full(4_000, action)) for action in (0, 1)])
    np.testing.assert_array_equal(agent.act(states), both.argmax(0))
    explored = agent.act(states, torch.Generator().manual_seed(0), epsilon=0.3)
    assert (explored != agent.act(states)).mean() == pytest.approx(0.15, abs=0.02)


@EVERY
def test_terminal_transitions_do_not_bootstrap_and_others_do(kind):
    batch = batch_of(kind)
    changed = batch._replace(next_observation=batch.next_observation * torch.where(batch.terminated, 5.0, 1.0)[:, None])
    noise = () if kind is not TD3Agent else (torch.zeros(32, 2),)
    one, two = agent_of(kind), agent_of(kind)
    one.update(batch, *noise)
    two.update(changed, *noise)
    assert torch.equal(parameters(one), parameters(two))
    other = agent_of(kind)
    other.update(batch._replace(next_observation=5 * batch.next_observation), *noise)
    assert not torch.equal(parameters(one), parameters(other))


def test_td3_takes_the_lesser_value_of_a_smoothed_action():
    agent, batch = agent_of(TD3Agent), batch_of(TD3Agent)
    noise = 5 * torch.randn(32, 2, generator=torch.Generator().manual_seed(3))
    half = torch.tensor([2.0, 0.5])
    with torch.no_grad():
        action = agent.actor_target(batch.next_observation) + half * (0.2 * noise).clamp(-0.5, 0.5)
        action = action.clamp(torch.tensor([-2.0, 0.0]), torch.tensor([2.0, 1.0]))
        least = torch.minimum(*(critic(batch.next_observation, action) for critic in agent.critic_targets))
        target = batch.reward + 0.9 * torch.where(batch.terminated, 0, 1) * least
        losses = [(critic(batch.observation, batch.action) - target).square().mean() for critic in agent.critics]
    torch.testing.assert_close(agent.update(batch, noise)["td_loss"], sum(losses))


def test_td3_moves_the_policy_and_the_slow_copies_at_every_second_update():
    agent, batch = agent_of(TD3Agent), batch_of(TD3Agent)
    before = copy.deepcopy(agent.state_dict())
    assert "actor_loss" not in agent.update(batch)
    for name in ("actor", "actor_target", "critic_targets"):
        assert all(
            torch.equal(old, new)
            for old, new in zip(*map(tensors, (before[name], agent.state_dict()[name])), strict=True)
        )
    assert "actor_loss" in agent.update(batch)
    for name in ("actor", "actor_target", "critic_targets"):
        assert any(
            not torch.equal(old, new)
            for old, new in zip(*map(tensors, (before[name], agent.state_dict()[name])), strict=True)
        )


@EVERY
def test_slow_copies_follow_by_tau(kind):
    agent = agent_of(kind, tau=0.25, **({"policy_delay": 1} if kind is TD3Agent else {}))
    pairs = (
        [(agent.target, agent.network)]
        if kind is DQNAgent
        else [*zip(agent.critic_targets, agent.critics, strict=True), (agent.actor_target, agent.actor)]
    )
    before = [[parameter.clone() for parameter in target.parameters()] for target, _ in pairs]
    agent.update(batch_of(kind))
    for old, (target, source) in zip(before, pairs, strict=True):
        for was, now, goal in zip(old, target.parameters(), source.parameters(), strict=True):
            torch.testing.assert_close(now, 0.75 * was + 0.25 * goal)


@CONTINUOUS
def test_the_policy_step_leaves_the_critic_alone(kind):
    agent = agent_of(kind, learning_rate=1e-2)
    agent.update(batch_of(kind))
    agent.update(batch_of(kind, 1))
    # Its gradient is that of the last critic step: nothing was added to it.
    gradient = [parameter.grad.clone() for parameter in agent.critics[0].parameters()]
    loss = -agent.critics[0](torch.ones(4, 3), agent.actor(torch.ones(4, 3))).mean()
    loss.backward(inputs=list(agent.actor.parameters()))
    assert all(torch.equal(old, new.grad) for old, new in zip(gradient, agent.critics[0].parameters(), strict=True))


@EVERY
@pytest.mark.parametrize("regularized", [False, True])
def test_a_checkpoint_continues_bit_identically(kind, regularized):
    def make(seed):
        agent = agent_of(kind, seed)
        if regularized:
            network = agent.network if kind is DQNAgent else agent.critics[0]
            agent.regularize(BEERRegularizer(0.1), InFeRRegularizer(network, 16))
        return agent

    noise = (torch.zeros(32, 2),) if kind is TD3Agent else ()
    agent = make(0)
    for step in range(3):
        agent.update(batch_of(kind, step), *noise)
    resumed = make(1)
    resumed.load_state_dict(copy.deepcopy(agent.state_dict()))
    for step in range(3, 6):
        one, two = agent.update(batch_of(kind, step), *noise), resumed.update(batch_of(kind, step), *noise)
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one)
    assert torch.equal(parameters(agent), parameters(resumed))


def test_regularizers_with_parameters_are_trained_with_the_critic():
    agent = agent_of(DPGAgent)
    infer = InFeRRegularizer(agent.critics[0], 16)
    agent.regularize(infer)
    before = {name: value.clone() for name, value in infer.state_dict().items() if value.ndim}
    agent.update(batch_of(DPGAgent))
    moved = {name for name, value in before.items() if not torch.equal(value, infer.state_dict()[name])}
    assert moved == {"heads.weight"}


@pytest.mark.parametrize(
    ("kind", "spaces", "words"),
    [
        (DPGAgent, (STATE, Discrete(3)), "DQNAgent"),
        (TD3Agent, (STATE, Box(-np.inf, np.inf, (2,))), "finite bounds"),
        (TD3Agent, (STATE, Box(1, 1, (2,))), "the lower below the upper"),
        (TD3Agent, (Discrete(3), ACTION), "FlattenObservation"),
        (TD3Agent, (Box(0, 1, (3, 4)), ACTION), "FlattenObservation"),
        (DQNAgent, (STATE, ACTION), "TD3Agent"),
        (DQNAgent, (STATE, Discrete(3, start=1)), "counted from 0"),
    ],
)
def test_spaces_that_do_not_fit_are_refused(kind, spaces, words):
    with pytest.raises((TypeError, ValueError), match=words):
        kind(*spaces)


@EVERY
@pytest.mark.parametrize("bad", [{"tau": 0.0}, {"learning_rate": -1.0}, {"hidden": ()}])
def test_numbers_out_of_range_are_refused(kind, bad):
    with pytest.raises(ValueError, match="tau in"):
        kind(STATE, Discrete(2) if kind is DQNAgent else ACTION, **bad)
    if kind is TD3Agent:
        with pytest.raises(ValueError, match="policy_delay"):
            TD3Agent(STATE, ACTION, policy_delay=0)


@pytest.mark.slow
def test_td3_learns_the_pendulum_as_well_as_that_of_stable_baselines():
    baselines = pytest.importorskip("stable_baselines3", reason="the group bench is not installed")
    from stable_baselines3.common.noise import NormalActionNoise

    from poise.rl import evaluate

    def make_env():
        return gymnasium.make("Pendulum-v1")

    steps, start, env = 8_000, 500, make_env()
    torch.manual_seed(0)
    agent = TD3Agent(env.observation_space, env.action_space, learning_rate=1e-3)
    buffer, generator = ReplayBuffer(10_000, env.observation_space, env.action_space), torch.Generator().manual_seed(0)
    stream = EpisodeStream(env, seed=0)
    for step in range(steps):
        action = agent.act(stream.observation, generator)
        if step < start:
            action = agent.actor.scale.numpy() * (2 * torch.rand(1, generator=generator).numpy() - 1)
        taken = stream.step(action)
        buffer.add(*taken[:4], terminated=taken.terminated, truncated=taken.truncated)
        if step >= start:
            agent.update(buffer.sample(128, generator), generator)

    theirs = baselines.TD3(
        "MlpPolicy",
        make_env(),
        learning_rate=1e-3,
        batch_size=128,
        learning_starts=start,
        action_noise=NormalActionNoise(np.zeros(1), 0.2 * np.ones(1)),
        policy_kwargs={"net_arch": [256, 256]},
        seed=0,
        device="cpu",
    )
    theirs.learn(steps)
    theirs.act = lambda observation: theirs.predict(observation, deterministic=True)[0]
    ours, reached = (evaluate(each, make_env, episodes=20, seed=1).mean() for each in (agent, theirs))
    assert ours > reached - 50
    assert ours > -250
