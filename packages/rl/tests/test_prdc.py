"""PRDC: the nearest logged pair is exact, the constraint is softer than cloning, and only the policy feels it."""

import copy
import importlib.util

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from poise.rl import (
    PRDC,
    TD3,
    TD3BC,
    BehaviorCloning,
    DatasetConstraint,
    OfflineDataset,
    PolicyRegularizer,
    TD3Agent,
    TD3BackboneConfig,
    dataset_constraint_loss,
    evaluate,
)

needs_faiss = pytest.mark.skipif(importlib.util.find_spec("faiss") is None, reason="faiss is not installed")
BACKENDS = pytest.mark.parametrize(
    "backend", ["auto", "matmul", "boxes", "kdtree", pytest.param("faiss", marks=needs_faiss)]
)
SMALL = TD3BackboneConfig(hidden=(16, 16), batch_size=32)


def randn(seed, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def logged(seed=0, count=300, states=4, actions=2):
    return randn(seed, count, states), randn(seed + 1, count, actions).tanh()


def log_of(seed=0, count=200):
    states, actions = logged(seed, count)
    arrays = states.numpy(), actions.numpy(), randn(seed + 2, count).numpy(), randn(seed + 3, count, 4).numpy()
    return OfflineDataset.from_arrays(*arrays, np.arange(count) % 5 == 0)


def brute_force(states, actions, pairs, beta, k=1):
    """Sorted distances and rows by a loop in float64."""
    found = []
    for state, action in zip(states.double(), actions.double(), strict=True):
        squared = (beta * (pairs[0].double() - state)).square().sum(1) + (pairs[1].double() - action).square().sum(1)
        squared, order = squared.sort(stable=True)
        found.append((squared[:k].sqrt(), order[:k]))
    return tuple(torch.stack(each) for each in zip(*found, strict=True))


# The search


@BACKENDS
@pytest.mark.parametrize(
    ("count", "batch", "k"), [(1, 1, 1), (7, 1, 1), (7, 1, 3), (300, 5, 1), (300, 5, 3), (1_001, 33, 1), (1_001, 33, 3)]
)
def test_every_backend_finds_what_a_loop_in_float64_finds(backend, count, batch, k):
    pairs = logged(0, count)
    pairs = tuple(torch.cat([each, each[: count // 3]]) for each in pairs)  # duplicate rows: the first counts
    states, actions = randn(5, batch, 4), randn(6, batch, 2).tanh()
    distances, rows = brute_force(states, actions, pairs, 2.0, k)
    found = DatasetConstraint(*pairs, backend=backend, k=k).query(states, actions)
    assert torch.equal(found.row, rows[:, -1])
    torch.testing.assert_close(found.distance, distances[:, -1])
    assert torch.equal(found.action, pairs[1][rows[:, -1]])
    mean = DatasetConstraint(*pairs, backend=backend, k=k, mode="mean").query(states, actions)
    torch.testing.assert_close(mean.action, pairs[1][rows].mean(1))


@pytest.mark.parametrize("backend", ["matmul", "boxes"])
@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    count=st.integers(1, 2_000),
    beta=st.sampled_from([0.0, 0.5, 2.0, 100.0]),
    noise=st.floats(0, 2),
)
def test_the_batch_row_bounds_the_search_and_never_changes_it(backend, seed, count, beta, noise):
    pairs = logged(seed, count)
    rows = torch.randint(count, (16,), generator=torch.Generator().manual_seed(seed))
    states, actions = pairs[0][rows], pairs[1][rows] + noise * randn(seed + 7, 16, 2)
    constraint = DatasetConstraint(*pairs, beta, backend=backend)
    with_rows, without = constraint.query(states, actions, rows), constraint.query(states, actions)
    distances, expected = brute_force(states, actions, pairs, beta)
    for found in (with_rows, without):
        assert torch.equal(found.row, expected[:, 0])
        torch.testing.assert_close(found.distance, distances[:, 0], rtol=1e-9, atol=1e-12)
    # softer than cloning: never farther than the action that was logged in this state
    assert (with_rows.distance <= (actions - pairs[1][rows]).norm(dim=1) * (1 + 1e-12) + 1e-12).all()


@BACKENDS
def test_a_logged_pair_is_its_own_neighbour(backend):
    pairs = logged()
    found = DatasetConstraint(*pairs, backend=backend).query(pairs[0][::7], pairs[1][::7])
    assert torch.equal(found.row, torch.arange(0, 300, 7))
    assert found.distance.count_nonzero() == 0
    assert torch.equal(found.action, pairs[1][::7])


def test_a_large_beta_is_behaviour_cloning():
    pairs, policy = logged(), randn(9, 40, 2).tanh().requires_grad_()
    constraint = DatasetConstraint(*pairs, beta=1e6)
    assert torch.equal(constraint.query(pairs[0][:40], policy).action, pairs[1][:40])
    torch.testing.assert_close(constraint(pairs[0][:40], policy), (policy - pairs[1][:40]).square().mean())


def test_beta_zero_is_the_nearest_action_of_all():
    pairs, states, actions = logged(), randn(3, 40, 4), randn(4, 40, 2)
    nearest = torch.cdist(actions, pairs[1]).argmin(1)
    assert torch.equal(DatasetConstraint(*pairs, beta=0.0).query(states, actions).row, nearest)


def test_states_are_weighted_on_both_sides():
    """With the query alone scaled, the answer would be the other pair."""
    states, actions = torch.tensor([[1.0], [2.0]]), torch.tensor([[0.5], [0.0]])
    found = DatasetConstraint(states, actions, beta=2.0).query(torch.tensor([[1.0]]), torch.tensor([[0.0]]))
    assert (found.row.item(), found.distance.item()) == (0, 0.5)


def test_actions_count_in_the_search():
    """The pair of the nearest state is not the nearest pair."""
    states, actions = torch.tensor([[0.0], [0.1]]), torch.tensor([[1.0], [-1.0]])
    assert DatasetConstraint(states, actions, beta=1.0).query(torch.zeros(1, 1), -torch.ones(1, 1)).row.item() == 1


def test_the_index_follows_the_module_to_another_type():
    constraint = DatasetConstraint(*logged())
    expected = constraint.query(randn(1, 9, 4), randn(2, 9, 2))
    found = constraint.float().query(randn(1, 9, 4).float(), randn(2, 9, 2).float())
    assert torch.equal(found.row, expected.row)
    assert found.action.dtype == torch.float32
    assert torch.equal(
        copy.deepcopy(constraint).query(randn(1, 9, 4).float(), randn(2, 9, 2).float()).row, expected.row
    )
    assert constraint.query(randn(1, 0, 4).float(), randn(2, 0, 2).float()).row.shape == (0,)


# The loss


def test_the_gradient_is_that_of_the_squared_difference_and_leaves_states_alone():
    pairs, states, policy = logged(), randn(1, 9, 4).requires_grad_(), randn(2, 9, 2).requires_grad_()
    constraint = DatasetConstraint(*pairs)
    constraint(states, policy).backward()
    expected = 2 * (policy - constraint.query(states, policy).action) / policy.numel()
    torch.testing.assert_close(policy.grad, expected.detach())
    assert states.grad is None


def test_power_one_is_the_mean_distance():
    pairs, states, policy = logged(), randn(1, 9, 4).requires_grad_(), randn(2, 9, 2).requires_grad_()
    constraint = DatasetConstraint(*pairs, power=1)
    found = constraint.query(states, policy)
    loss = constraint(states, policy)
    torch.testing.assert_close(loss, found.distance.mean())
    loss.backward()
    torch.testing.assert_close(policy.grad, ((policy - found.action) / found.distance[:, None] / 9).detach())
    assert states.grad is None
    at_pair = pairs[1][:3].clone().requires_grad_()
    constraint(pairs[0][:3], at_pair).backward()
    assert at_pair.grad.count_nonzero() == 0, "the gradient at distance zero is finite"


def test_power_one_with_the_mean_is_the_mean_of_the_k_distances():
    pairs, states, policy = logged(), randn(1, 9, 4), randn(2, 9, 2)
    loss = DatasetConstraint(*pairs, power=1, k=3, mode="mean")(states, policy)
    torch.testing.assert_close(loss, brute_force(states, policy, pairs, 2.0, 3)[0].mean())


@pytest.mark.parametrize("options", [{}, {"k": 2}, {"k": 3, "mode": "mean"}, {"power": 1}])
def test_the_function_computes_what_the_module_does(options):
    pairs, states, policy = logged(), randn(1, 9, 4), randn(2, 9, 2)
    expected = DatasetConstraint(*pairs, 0.7, **options)(states, policy)
    torch.testing.assert_close(dataset_constraint_loss(states, policy, *pairs, 0.7, **options), expected)


# The update


def flat(module):
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


def same_start(kind, log, config=SMALL, **options):
    torch.manual_seed(0)
    return kind(log, config, **options)


def test_a_constraint_of_huge_beta_updates_as_behaviour_cloning_does():
    log = log_of()
    one, two = same_start(TD3BC, log), same_start(PRDC, log, beta=1e6)
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    for _ in range(4):
        first, second = (agent.learn(own) for agent, own in zip((one, two), generators, strict=True))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(flat(one.actor), flat(two.actor))


def test_without_a_regularizer_it_is_td3():
    log = log_of()
    ours = same_start(TD3, log)
    torch.manual_seed(0)
    plain = TD3Agent(log.observation_space, log.action_space, hidden=(16, 16))
    for step in range(4):
        batch = ours.data.sample(32, torch.Generator().manual_seed(step))
        noise = randn(step, 32, 2).float()
        first, second = ours.update(batch, noise), plain.update(batch, noise)
        assert all(torch.equal(first[name], second[name]) for name in first | second)
    assert ours.value_weight is None


def test_the_gradient_of_the_policy_does_not_depend_on_the_scale_of_the_values():
    log = log_of()
    gradients = []
    for factor in (1.0, 1_000.0):
        agent = same_start(PRDC, log)
        for parameter in agent.critics[0].head.parameters():
            parameter.data *= factor
        batch = agent.data.sample(32, torch.Generator().manual_seed(0))
        loss = agent.actor_loss(batch)
        gradients.append(torch.autograd.grad(loss, list(agent.actor.parameters())))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


def test_a_critic_of_zeros_gives_no_infinity():
    agent = same_start(PRDC, log_of())
    for parameter in agent.critics[0].head.parameters():
        parameter.data.zero_()
    loss = agent.actor_loss(agent.data.sample(32, torch.Generator().manual_seed(0)))
    torch.testing.assert_close(loss.detach(), agent.constraint.value)
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(loss, list(agent.actor.parameters())))


def test_lambda_is_of_the_policys_actions_and_of_the_first_critic():
    agent = same_start(PRDC, log_of())
    batch = agent.data.sample(32, torch.Generator().manual_seed(0))
    loss = agent.actor_loss(batch)
    with torch.no_grad():
        value = agent.critics[0](batch.observation, agent.actor(batch.observation))
        weight = SMALL.alpha / value.abs().mean()
    torch.testing.assert_close(agent.value_weight, weight)
    torch.testing.assert_close(loss.detach(), agent.constraint.value - weight * value.mean())
    assert not agent.value_weight.requires_grad


def test_the_policy_step_leaves_the_critics_alone():
    agent = same_start(PRDC, log_of(), TD3BackboneConfig(hidden=(16, 16), batch_size=32, policy_delay=1))
    batch = agent.data.sample(32, torch.Generator().manual_seed(0))
    moved = same_start(TD3, log_of(), TD3BackboneConfig(hidden=(16, 16), batch_size=32, policy_delay=1))
    for each in (agent, moved):
        each.update(batch, torch.zeros(32, 2))
    assert torch.equal(flat(nn.ModuleList(agent.critics)), flat(nn.ModuleList(moved.critics)))
    assert not torch.equal(flat(agent.actor), flat(moved.actor))


def test_terminal_rows_do_not_bootstrap_and_others_do():
    log = log_of()
    agents = [same_start(PRDC, log) for _ in range(3)]
    batch = agents[0].data.gather(torch.arange(32))
    far = batch.next_observation * torch.where(batch.terminated, 5.0, 1.0)[:, None]
    changed = batch._replace(next_observation=far), batch._replace(next_observation=5 * batch.next_observation)
    for agent, given_batch in zip(agents, (batch, *changed), strict=True):
        agent.update(given_batch, torch.zeros(32, 2))
    critics = [flat(nn.ModuleList(agent.critics)) for agent in agents]
    assert torch.equal(critics[0], critics[1])
    assert not torch.equal(critics[0], critics[2])


def test_any_policy_regularizer_plugs_in():
    class TowardsZero:
        def policy_loss(self, batch, action):
            return 1e4 * action.square().mean()

    assert isinstance(TowardsZero(), PolicyRegularizer)
    assert isinstance(BehaviorCloning(), PolicyRegularizer)
    agent = same_start(TD3, log_of(), policy_regularizer=TowardsZero())
    before = np.abs(agent.act(np.ones((50, 4), np.float32))).mean()
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        agent.learn(generator)
    assert np.abs(agent.act(np.ones((50, 4), np.float32))).mean() < before


def test_two_agents_have_indices_of_their_own():
    one, two = PRDC(log_of(0), SMALL), PRDC(log_of(50), SMALL)
    assert one.constraint.query(one.data.observations[:5], one.data.actions[:5]).distance.count_nonzero() == 0
    assert two.constraint.query(two.data.observations[:5], two.data.actions[:5]).distance.count_nonzero() == 0


# Acting and saving


def test_one_observation_and_a_batch_are_normalised_by_the_statistics_of_the_log():
    log = log_of()
    agent = PRDC(log, SMALL)
    raw = log.observations[:6].numpy()
    expected = agent.actor(agent.data.observations[:6]).detach().numpy()
    np.testing.assert_allclose(agent.act(raw), expected, rtol=1e-5)
    np.testing.assert_allclose(agent.act(raw[0]), expected[0], rtol=1e-5)
    value = agent.critics[0](agent.data.observations[:6], torch.from_numpy(expected)).detach().numpy()
    np.testing.assert_allclose(agent.value(raw, expected), value, rtol=1e-5)


def test_it_acts_in_a_vector_env_and_is_evaluated():
    env = gymnasium.make("Pendulum-v1")
    generator = np.random.default_rng(0)
    log = OfflineDataset.from_env_rollout(env, lambda _: generator.uniform(-2, 2, 1).astype(np.float32), 300)
    agent = PRDC(log, SMALL)
    vector = gymnasium.make_vec("Pendulum-v1", num_envs=3)
    observations, _ = vector.reset(seed=0)
    assert vector.action_space.contains(agent.act(observations))
    assert evaluate(agent, lambda: gymnasium.make("Pendulum-v1"), episodes=2).shape == (2,)


@pytest.mark.parametrize("kind", [TD3, TD3BC, PRDC])
def test_a_checkpoint_continues_bit_identically(kind):
    log, other = log_of(), log_of(77)
    agent, generator = same_start(kind, log), torch.Generator().manual_seed(3)
    for _ in range(3):
        agent.learn(generator)
    state, at = copy.deepcopy(agent.state_dict()), generator.get_state()
    assert "normalizer" in state
    resumed = kind(log, SMALL)
    resumed.normalizer.mean += 1  # what it holds comes from the state
    resumed.load_state_dict(state)
    generator_two = torch.Generator()
    generator_two.set_state(at)
    for _ in range(3):
        one, two = agent.learn(generator), resumed.learn(generator_two)
        assert all(torch.equal(one[name], two[name]) for name in one)
    raw = other.observations[:5].numpy()
    np.testing.assert_array_equal(agent.act(raw), resumed.act(raw))


# Bad input


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        (logged(), {"beta": -1.0}, "beta must be finite and at least 0, got -1"),
        (logged(), {"beta": float("inf")}, "beta must be finite"),
        (logged(), {"k": 0}, r"k must lie in 1\.\.300"),
        (logged(), {"k": 301}, r"k must lie in 1\.\.300"),
        (logged(), {"mode": "median"}, "expected mode 'kth' or 'mean'"),
        (logged(), {"power": 3}, "power 1 or 2, got 'kth' and 3"),
        (logged(), {"backend": "tree"}, "backend must be one of"),
        (logged(), {"weight": -1.0}, "weight must be finite and not negative"),
        ((randn(0, 3, 4), randn(0, 2, 2)), {}, r"of one length, got \(3, 4\) and \(2, 2\)"),
        ((randn(0, 0, 4), randn(0, 0, 2)), {}, "at least one row"),
        ((torch.full((3, 4), torch.nan), randn(0, 3, 2)), {}, "data must be finite"),
    ],
)
def test_bad_constraints_are_refused(arguments, options, words):
    with pytest.raises(ValueError, match=words):
        DatasetConstraint(*arguments, **options)


def test_queries_that_do_not_fit_are_refused():
    constraint = DatasetConstraint(*logged())
    with pytest.raises(ValueError, match=r"of one length, got \(3, 4\) and \(2, 2\)"):
        constraint.query(randn(0, 3, 4), randn(0, 2, 2))
    with pytest.raises(ValueError, match="states of 4 and actions of 2 numbers"):
        constraint.query(randn(0, 3, 5), randn(0, 3, 1))
    with pytest.raises(ValueError, match="queries must be finite"):
        constraint(torch.full((3, 4), torch.nan), randn(0, 3, 2))


@pytest.mark.parametrize(
    "bad", [{"alpha": 0.0}, {"discount": 1.5}, {"batch_size": 0}, {"tau": 0.0}, {"policy_delay": 0}, {"state_eps": 0.0}]
)
def test_settings_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad)).removeprefix("state_")):
        TD3(log_of(), TD3BackboneConfig(**bad))


def test_discrete_and_unbounded_actions_are_refused():
    states, actions = (each.numpy() for each in logged())
    arrays = states, actions, states[:, 0], states, np.zeros(300, bool)
    with pytest.raises(TypeError, match="expected continuous actions in a Box"):
        OfflineDataset.from_arrays(*arrays, action_space=Discrete(2))
    with pytest.raises(ValueError, match="finite bounds"):
        OfflineDataset.from_arrays(*arrays, action_space=Box(-np.inf, np.inf, (2,)))
