"""BEER: the bound is a theorem, the penalty touches only what exceeds it, and only the representation that is trained."""

import math

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from poise.rl import (
    Batch,
    BEERRegularizer,
    CriticRegularizer,
    DissimilarityRegularizer,
    DPGAgent,
    DQNAgent,
    DR3Regularizer,
    InFeRRegularizer,
    Representation,
    TD3Agent,
    beer_loss,
    bellman_cosine_bound,
    representation_rank,
)

GAMMA = 0.99


def draw(seed, count=32, width=8):
    generator = torch.Generator().manual_seed(seed)
    shapes = (count, width), (count, width), (count,), (1, width)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]


def draw_some_above():
    """Some samples are above their bound, others not."""
    features, following, reward, weight = draw(1)
    return features, following, 6 * reward, weight


def cosine(features, following):
    return torch.nn.functional.cosine_similarity(features, following, dim=-1)


# The bound


@settings(deadline=None)
@given(seed=st.integers(0, 10**6), gamma=st.floats(0.05, 1), scale=st.floats(1e-2, 1e2))
def test_bound_holds_wherever_the_bellman_equation_does(seed, gamma, scale):
    features, following, reward, weight = draw(seed, 1_000)
    reward = scale * reward
    # Move phi along w until w^T (phi - gamma phi') = r.
    residual = reward - (features - gamma * following) @ weight[0]
    features = features + residual[:, None] * weight / weight.square().sum()
    assert (
        cosine(features, following) <= bellman_cosine_bound(features, following, reward, weight, gamma) + 1e-10
    ).all()
    # Equality where phi - gamma phi' is parallel to w.
    tight = gamma * following + reward[:, None] * weight / weight.square().sum()
    bound = bellman_cosine_bound(tight, following, reward, weight, gamma)
    torch.testing.assert_close(cosine(tight, following), bound, rtol=1e-8, atol=1e-8)


@settings(deadline=None)
@given(seed=st.integers(0, 10**6), factor=st.floats(0.01, 100))
def test_bound_does_not_depend_on_how_scale_is_shared_between_features_and_head(seed, factor):
    features, following, reward, weight = draw(seed)
    expected = bellman_cosine_bound(features, following, reward, weight, GAMMA)
    scaled = bellman_cosine_bound(factor * features, factor * following, reward, weight / factor, GAMMA)
    torch.testing.assert_close(scaled, expected, rtol=1e-9, atol=1e-9)


def test_bound_without_reward_allows_every_cosine():
    features, following, reward, weight = draw(0)
    assert (bellman_cosine_bound(features, following, 0 * reward, weight, GAMMA) >= 1).all()


def test_bound_takes_a_discount_and_a_row_of_the_head_per_sample():
    features, following, reward, _ = draw(0)
    gamma = torch.linspace(0.5, 1, 32, dtype=torch.float64)
    weight = torch.randn(32, 8, dtype=torch.float64)
    expected = [
        bellman_cosine_bound(features[i : i + 1], following[i : i + 1], reward[i : i + 1], weight[i], float(gamma[i]))
        for i in range(32)
    ]
    torch.testing.assert_close(bellman_cosine_bound(features, following, reward, weight, gamma), torch.cat(expected))


def test_bound_holds_for_every_transition_of_a_solved_grid_world():
    size, gamma = 5, 0.9
    moves = [(0, 1), (0, -1), (1, 0), (-1, 0)]
    states = [(row, column) for row in range(size) for column in range(size)]

    def step(state, move):
        after = tuple(int(np.clip(place + by, 0, size - 1)) for place, by in zip(state, move, strict=True))
        return states.index(after), 1.0 if after == (4, 4) else -0.1

    outcomes = [[step(state, move) for move in moves] for state in states]
    q = np.zeros((25, 4))
    for _ in range(2_000):
        q = np.array([[reward + gamma * q[after].max() for after, reward in row] for row in outcomes])
    # Features of any width in which Q = phi w is exact.
    flat, rng = torch.from_numpy(q.reshape(-1)), torch.Generator().manual_seed(0)
    for width in (2, 8, 64):
        weight = torch.randn(1, width, generator=rng, dtype=torch.float64)
        features = torch.randn(100, width, generator=rng, dtype=torch.float64)
        features += (flat - features @ weight[0])[:, None] * weight / weight.square().sum()
        following = torch.tensor([after * 4 + int(q[after].argmax()) for row in outcomes for after, _ in row])
        reward = torch.tensor([reward for row in outcomes for _, reward in row], dtype=torch.float64)
        bound = bellman_cosine_bound(features, features[following], reward, weight, gamma)
        assert (cosine(features, features[following]) <= bound + 1e-10).all()
        assert beer_loss(features, features[following], reward, weight, gamma) < 1e-10


# The penalty


def test_penalty_is_zero_without_gradient_below_the_bound():
    features, following, reward, weight = draw(0)
    features.requires_grad_()
    loss = beer_loss(features, following, 0 * reward, weight, GAMMA)
    loss.backward()
    assert loss == 0
    assert not features.grad.any()


def test_each_sample_is_compared_with_its_own_bound():
    features, following, reward, weight = draw_some_above()
    features.requires_grad_()
    excess = cosine(features, following) - bellman_cosine_bound(features, following, reward, weight, GAMMA)
    assert 0 < (excess > 0).sum() < 32
    loss = beer_loss(features, following, reward, weight, GAMMA, beta=0.5)
    torch.testing.assert_close(loss, 0.5 * excess.relu().mean())
    loss.backward()
    assert torch.equal(features.grad.abs().sum(1) > 0, excess > 0)


def test_only_the_features_that_are_trained_get_a_gradient():
    features, following, reward, weight = (each.detach().requires_grad_() for each in draw_some_above())
    beer_loss(features, following, reward, weight, GAMMA).backward()
    assert features.grad.any()
    assert following.grad is reward.grad is weight.grad is None
    # That gradient is the one of the cosine: none flows through the bound, whose norm of phi the network could raise.
    expected = features.detach().clone().requires_grad_()
    bound = bellman_cosine_bound(features, following, reward, weight, GAMMA).detach()
    (cosine(expected, following.detach()) - bound).relu().mean().backward()
    torch.testing.assert_close(features.grad, expected.grad)


def test_rewards_of_shape_batch_by_one_do_not_broadcast():
    features, following, reward, weight = draw_some_above()
    flat, column = (beer_loss(features, following, each, weight, GAMMA) for each in (reward, reward[:, None]))
    assert torch.equal(flat, column)
    assert bellman_cosine_bound(features, following, reward[:, None], weight, GAMMA).shape == (32,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("zero", ["features", "following", "weight", "reward", "all"])
def test_zeros_give_no_nan(dtype, zero):
    given = {
        name: (0 * each if zero in (name, "all") else each).to(dtype)
        for name, each in zip(("features", "following", "reward", "weight"), draw(0), strict=True)
    }
    given["features"].requires_grad_()
    loss = beer_loss(given["features"], given["following"], given["reward"], given["weight"], GAMMA)
    loss.backward()
    assert loss.isfinite()
    assert given["features"].grad.isfinite().all()


@pytest.mark.parametrize("gamma", [0.0, -0.5, 1.5, math.nan])
def test_without_a_future_there_is_no_bound(gamma):
    with pytest.raises(ValueError, match=r"gamma must lie in \(0, 1\]"):
        bellman_cosine_bound(*draw(0), gamma)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({0: torch.zeros(32, 7)}, "one shape"),
        ({0: torch.zeros(32), 1: torch.zeros(32)}, "one shape"),
        ({2: torch.zeros(31)}, "reward"),
        ({2: torch.zeros(1, 32)}, "reward"),
        ({3: torch.zeros(7)}, "head_weight"),
        ({3: torch.zeros(5, 8)}, "head_weight"),
        ({4: torch.full((3,), 0.9)}, "gamma"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change, words):
    given = [*draw(0), GAMMA]
    for place, value in change.items():
        given[place] = value
    with pytest.raises(ValueError, match=words):
        beer_loss(*given)


def test_masked_samples_contribute_nothing():
    features, following, reward, weight = draw_some_above()
    mask = torch.arange(32) % 2 == 0
    kept = beer_loss(features[mask], following[mask], reward[mask], weight, GAMMA)
    torch.testing.assert_close(beer_loss(features, following, reward, weight, GAMMA, mask=mask), kept / 2)
    assert torch.equal(BEERRegularizer(1.0)(features, following, reward, weight, GAMMA, ~mask), kept / 2)


def test_regularizer_knows_the_share_above_the_bound():
    beer = BEERRegularizer(0.1)
    features, following, reward, weight = draw_some_above()
    assert beer.active is None
    beer(features, following, reward, weight, GAMMA)
    excess = cosine(features, following) - bellman_cosine_bound(features, following, reward, weight, GAMMA)
    assert beer.active == (excess > 0).double().mean()


def test_official_form_takes_one_norm_from_the_online_critic_and_ignores_termination():
    features, following, reward, weight = draw_some_above()
    online = 2 * following
    beer = BEERRegularizer(1.0, official=True)
    everyone = torch.ones(32, dtype=torch.bool)
    found = beer(features, following, reward, weight, GAMMA, everyone, online)
    numerator = features.square().sum(1) + GAMMA**2 * online.square().sum(1) - reward**2 / weight.square().sum()
    bound = numerator / (2 * GAMMA * features.norm(dim=1) * following.norm(dim=1))
    torch.testing.assert_close(found, (cosine(features, following) - bound).relu().mean())
    with pytest.raises(ValueError, match="norm_from"):
        beer(features, following, reward, weight, GAMMA)


# In agents


def batch_for(action, seed=0, count=64):
    generator = torch.Generator().manual_seed(seed)
    state, following = (torch.randn(count, 3, generator=generator) for _ in range(2))
    reward = 3 * torch.randn(count, generator=generator)
    ended = torch.arange(count) % 5 == 0
    return Batch(state, action, reward, torch.full((count,), GAMMA), following, ended, torch.arange(count))


def updated(kind, *regularizers, steps=5):
    torch.manual_seed(0)
    space = Box(-np.inf, np.inf, (3,))
    agent = kind(space, Discrete(2) if kind is DQNAgent else Box(-1, 1, (2,)), hidden=(16, 16))
    agent.regularize(*regularizers)
    action = torch.arange(64) % 2 if kind is DQNAgent else torch.zeros(64, 2)
    metrics = [agent.update(batch_for(action, step)) for step in range(steps)]
    networks = (
        [agent.network, agent.target] if kind is DQNAgent else [agent.actor, *agent.critics, *agent.critic_targets]
    )
    return torch.cat([parameter.flatten() for each in networks for parameter in each.parameters()]), metrics


EVERY = pytest.mark.parametrize("kind", [DPGAgent, TD3Agent, DQNAgent])


@EVERY
@pytest.mark.parametrize("official", [False, True])
def test_weight_zero_is_the_agent_without_it_to_the_bit(kind, official):
    plain, _ = updated(kind)
    zero, _ = updated(kind, BEERRegularizer(0.0, official=official))
    active, metrics = updated(kind, BEERRegularizer(1.0, official=official))
    assert torch.equal(plain, zero)
    assert not torch.equal(plain, active)
    assert metrics[0]["regularizer"] > 0


@EVERY
def test_regularizers_compose(kind):
    both = BEERRegularizer(1.0), DR3Regularizer(0.5), DissimilarityRegularizer(0.1)
    assert all(isinstance(each, CriticRegularizer) for each in both)
    _, metrics = updated(kind, *both, steps=1)
    terms = sum(each.weight * float(each.value) for each in both)
    if kind is not TD3Agent:  # it has two critics, and the value is that of the second
        assert metrics[0]["regularizer"].item() == pytest.approx(terms, rel=1e-5)


def test_dqn_compares_with_the_row_of_the_action_taken():
    torch.manual_seed(0)
    beer = BEERRegularizer(1.0)
    agent = DQNAgent(Box(-np.inf, np.inf, (3,)), Discrete(3), hidden=(16,), regularizers=[beer])
    action = torch.randint(3, (64,))
    batch = batch_for(action)
    with torch.no_grad():
        features, following = agent.network.features(batch.observation), agent.target.features(batch.next_observation)
        rows = agent.network.head.weight[action]
        expected = beer_loss(features, following, batch.reward, rows, GAMMA, mask=~batch.terminated)
    torch.testing.assert_close(agent.update(batch)["regularizer"], expected)


# Reading any critic


class TwoInputs(nn.Module):
    """A critic whose head is not its last attribute."""

    def __init__(self):
        super().__init__()
        self.out = nn.Linear(6, 1)
        self.body = nn.Linear(5, 6)

    def forward(self, state, action):
        return self.out(torch.relu(self.body(torch.cat([state, action], -1))))


def test_representation_reads_any_critic():
    critic = TwoInputs()
    with pytest.raises(ValueError, match=r"'head'.*'out', 'body'"):
        Representation(critic, "head")
    phi = Representation(critic, "out")
    q = critic(torch.randn(4, 3), torch.randn(4, 2))
    torch.testing.assert_close(phi.features @ phi.weight.T + critic.out.bias, q)
    phi.features.sum().backward()
    assert critic.body.weight.grad.any()
    assert Representation(critic).name == "body", "the last linear layer in order of definition, unless told otherwise"
    phi.close()
    with pytest.raises(RuntimeError):
        _ = phi.features


def test_representation_refuses_what_has_no_linear_head():
    with pytest.raises(ValueError, match=r"no nn\.Linear"):
        Representation(nn.Sequential(nn.ReLU()))
    with pytest.raises(TypeError, match="ReLU"):
        Representation(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), "1")


# Its siblings


def test_dissimilarity_is_beer_with_the_bound_at_minus_one():
    features, following, *_ = draw(0)
    torch.testing.assert_close(
        DissimilarityRegularizer(1.0)(features, following), (cosine(features, following) + 1).mean()
    )


def test_infer_vanishes_at_the_beginning_with_scale_one_and_pulls_towards_the_scaled_heads():
    torch.manual_seed(0)
    agent = DPGAgent(Box(-np.inf, np.inf, (3,)), Box(-1, 1, (2,)), hidden=(16, 16))
    critic, state, action = agent.critics[0], torch.randn(8, 3), torch.zeros(8, 2)
    assert InFeRRegularizer(critic, 16, scale=1.0)(critic.features(state, action), state, action) == 0
    infer = InFeRRegularizer(critic, 16, weight=1.0, heads=4, scale=3.0)
    heads = infer.heads(critic.features(state, action))
    torch.testing.assert_close(infer(critic.features(state, action), state, action), (2 * heads).square().mean())
    with pytest.raises(TypeError, match=r"features\(\)"):
        InFeRRegularizer(nn.Linear(3, 1), 3)


# Rank

METHODS = pytest.mark.parametrize("method", ["svd", "gram"])


@METHODS
@pytest.mark.parametrize(("size", "delta"), [(8, 0.01), (200, 0.01), (100, 0.1), (7, 0.0)])
def test_rank_of_the_identity(method, size, delta):
    assert representation_rank(torch.eye(size), delta, method) == math.ceil(round((1 - delta) * size, 9))


@METHODS
@pytest.mark.parametrize("shape", [(100, 20), (20, 100)])
def test_rank_of_one_direction_is_one_and_of_nothing_zero(method, shape):
    one = torch.randn(shape[0], 1) * torch.randn(1, shape[1])
    assert representation_rank(one, method=method) == 1
    assert representation_rank(0 * one, method=method) == 0


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10**6), scale=st.floats(1e-3, 1e3), tall=st.booleans())
def test_rank_does_not_depend_on_order_scale_or_method(seed, scale, tall):
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (120, 30) if tall else (30, 120)
    spectrum = torch.rand(columns, generator=generator, dtype=torch.float64) ** 4
    features = torch.randn(rows, columns, generator=generator, dtype=torch.float64) * spectrum
    rank = representation_rank(features)
    shuffled = scale * features[torch.randperm(rows, generator=generator)]
    assert representation_rank(shuffled) == rank == representation_rank(shuffled, method="gram")


def test_rank_refuses_bad_input():
    for bad in ((torch.zeros(3), 0.01, "svd"), (torch.zeros(3, 3), 1.0, "svd")):
        with pytest.raises(ValueError, match="expected features"):
            representation_rank(*bad)
