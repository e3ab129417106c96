"""Resets, injection, recycling, regularizers and the probe: each does to a network what it says, and nothing else."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from poise.rl import (
    CReLU,
    L2Init,
    dormant_units,
    heavy_priming,
    plasticity_injection,
    recycle_dormant,
    reset_last_layers,
    reset_module,
    shrink_and_perturb,
    target_fitting_loss,
    with_crelu,
    with_layer_norm,
    with_spectral_norm,
)
from poise.rl.agents.pixel_networks import Actor, Critic


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def perceptron(seed=0, hidden=16):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 1))


def vector(module):
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


# Resets


def test_a_reset_is_a_fresh_network_of_the_same_seed():
    one = reset_module(perceptron(0), seeded(5))
    other = reset_module(perceptron(1), seeded(5))
    assert torch.equal(vector(one), vector(other))
    assert not torch.equal(vector(one), vector(reset_module(perceptron(0), seeded(6))))


def test_resets_of_the_agents_networks_are_orthogonal():
    critic = reset_module(Critic(30, 2, 8, 16), seeded())
    weight = critic.q1[2].weight
    torch.testing.assert_close(weight @ weight.T, torch.eye(16), atol=1e-5, rtol=0)
    assert not critic.q1[2].bias.any()


def test_a_reset_with_a_generator_leaves_the_global_one_alone():
    network = perceptron()
    before = torch.get_rng_state()
    reset_module(network, seeded())
    assert torch.equal(before, torch.get_rng_state())


def test_a_reset_forgets_the_optimizers_moments_and_no_others():
    network = perceptron()
    optimizer = torch.optim.Adam(network.parameters())
    network(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    reset_module(network[0], optimizer=optimizer)
    assert len(optimizer.state) == 4
    assert network[0].weight not in optimizer.state


def test_last_layers_are_reset_and_the_others_kept():
    network = perceptron()
    before = copy.deepcopy(network)
    reset_last_layers(network, 2, seeded())
    assert torch.equal(network[0].weight, before[0].weight)
    assert not torch.equal(network[2].weight, before[2].weight)
    assert not torch.equal(network[4].weight, before[4].weight)
    with pytest.raises(ValueError, match="from 1 to the 3 layers"):
        reset_last_layers(network, 4)


def test_parameters_that_nobody_can_reset_are_named():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(2))

    with pytest.raises(TypeError, match="Bare 'inner'"):
        reset_module(nn.ModuleDict({"inner": Bare()}))
    given = reset_module(Bare(), initialize=lambda module: module.scale.data.fill_(3.0))
    assert given.scale.tolist() == [3.0, 3.0]


@given(shrink=st.floats(0, 1), perturb=st.one_of(st.none(), st.floats(0, 2)))
@settings(deadline=None, max_examples=20)
def test_shrink_and_perturb_mixes_with_fresh_parameters(shrink, perturb):
    network = perceptron()
    before, fresh = vector(network), vector(reset_module(perceptron(), seeded(3)))
    shrink_and_perturb(network, shrink, perturb, seeded(3))
    expected = shrink * before + (1 - shrink if perturb is None else perturb) * fresh
    torch.testing.assert_close(vector(network), expected)


def test_shrink_and_perturb_refuses_to_grow():
    with pytest.raises(ValueError, match="shrink in"):
        shrink_and_perturb(perceptron(), 1.5)


# Injection


@given(seed=st.integers(0, 50))
@settings(deadline=None, max_examples=15)
def test_injection_leaves_outputs_unchanged(seed):
    critic = Critic(20, 2, 8, 16)
    z, action = torch.randn(7, 20), torch.randn(7, 2)
    injected = plasticity_injection(critic, seeded(seed))
    for before, after in zip(critic(z, action), injected(z, action), strict=True):
        torch.testing.assert_close(after, before, atol=1e-6, rtol=0)


def test_injection_trains_the_fresh_network_alone():
    critic = Critic(20, 2, 8, 16)
    injected = plasticity_injection(critic, seeded())
    assert all(parameter.requires_grad for parameter in injected.fresh.parameters())
    frozen = [*injected.frozen.parameters(), *injected.anchor.parameters()]
    assert not any(parameter.requires_grad for parameter in frozen)
    assert torch.equal(vector(injected.fresh), vector(injected.anchor))
    assert torch.equal(vector(injected.frozen), vector(critic))
    assert not torch.equal(vector(injected.fresh), vector(critic))
    before = [vector(part) for part in (injected.frozen, injected.anchor, injected.fresh, critic)]
    optimizer = torch.optim.SGD([each for each in injected.parameters() if each.requires_grad], 0.1)
    sum(injected(torch.randn(5, 20), torch.randn(5, 2))).sum().backward()
    optimizer.step()
    after = [vector(part) for part in (injected.frozen, injected.anchor, injected.fresh, critic)]
    assert [torch.equal(*pair) for pair in zip(before, after, strict=True)] == [True, True, False, True]


def test_an_injected_network_can_be_injected_again_and_reset():
    actor, z = Actor(20, 2, 8, 16), torch.randn(7, 20)
    once = plasticity_injection(actor, seeded(0))
    twice = plasticity_injection(once, seeded(1))
    torch.testing.assert_close(twice(z), actor(z), atol=1e-6, rtol=0)
    assert sum(each.numel() for each in twice.parameters() if each.requires_grad) == vector(actor).numel()
    reset_module(once, seeded(4))
    torch.testing.assert_close(once(z), actor(z), atol=1e-6, rtol=0)


# Recycling


def test_dead_units_are_found_and_recycled_without_changing_the_output():
    network, x = perceptron(), torch.randn(128, 3)
    with torch.no_grad():
        network[0].bias[:5] = -100.0
        network[2].bias[3] = -100.0
    expected = network(x)
    found = dormant_units(network, x, threshold=0.0)
    assert found["0"].tolist()[:5] == [True] * 5
    assert found["2"][3]
    optimizer = torch.optim.Adam(network.parameters())
    network(x).sum().backward()
    optimizer.step()
    network.load_state_dict(network.state_dict())
    before = copy.deepcopy(network)
    masks = recycle_dormant(network, x, threshold=0.0, generator=seeded(), optimizer=optimizer)
    dormant = masks["0"]
    torch.testing.assert_close(network(x), before(x))
    assert expected.shape == network(x).shape
    assert not torch.equal(network[0].weight[dormant], before[0].weight[dormant])
    assert torch.equal(network[0].weight[~dormant], before[0].weight[~dormant])
    assert not network[2].weight[:, dormant].any()
    assert not optimizer.state[network[0].weight]["exp_avg_sq"][dormant].any()
    assert optimizer.state[network[2].weight]["exp_avg_sq"][:, ~dormant].any()
    assert sum(mask.sum() for mask in dormant_units(network, x, threshold=0.0).values()) < dormant.sum()


def test_channels_of_convolutions_are_units_also_before_a_flattened_layer():
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 2)
    )
    x = torch.randn(16, 1, 6, 6)
    with torch.no_grad():
        network[0].bias[1] = -100.0
        network[2].bias[2] = -100.0
    before = network(x)
    found = recycle_dormant(network, x, threshold=0.0, generator=seeded())
    assert {name: mask.nonzero().flatten().tolist() for name, mask in found.items()} == {"0": [1], "2": [2]}
    torch.testing.assert_close(network(x), before)
    assert network[5].weight.any(0).tolist() == [True] * 8 + [False] * 4 + [True] * 12


def test_recycling_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="threshold"):
        dormant_units(perceptron(), torch.ones(1, 3), threshold=-1.0)
    with pytest.raises(ValueError, match="found no Linear"):
        dormant_units(nn.Sequential(nn.Linear(3, 1)), torch.ones(1, 3))


# Regularizers and layers


def test_l2_init_pulls_towards_the_beginning():
    network = perceptron()
    decay = L2Init(network, weight=0.5)
    assert decay(network).item() == 0
    start = vector(network)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1)
    loss = decay(network)
    assert loss.item() == pytest.approx(0.5 * 0.01 * start.numel(), rel=1e-4)
    loss.backward()
    torch.testing.assert_close(network[0].weight.grad, torch.full_like(network[0].weight, 0.1), atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="parameters of the network"):
        decay(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="no parameters"):
        L2Init(nn.ReLU())


def test_crelu_always_has_one_half_that_responds():
    x = torch.randn(20, 6)
    doubled = CReLU()(x)
    torch.testing.assert_close(doubled[:, :6] - doubled[:, 6:], x)
    assert (doubled > 0).double().mean() == 0.5
    network = with_crelu(perceptron())
    assert network(torch.ones(4, 3)).shape == (4, 1)
    assert [layer.in_features for layer in network if isinstance(layer, nn.Linear)] == [3, 32, 32]


def test_layer_norm_stands_before_each_relu_and_spectral_norm_on_each_hidden_layer():
    normed = with_layer_norm(perceptron())
    assert [type(layer) for layer in normed[:3]] == [nn.Linear, nn.LayerNorm, nn.ReLU]
    assert sum(isinstance(layer, nn.LayerNorm) for layer in normed) == 2
    network = with_spectral_norm(perceptron()).train()
    for _ in range(50):
        network(torch.ones(1, 3))
    for index in (0, 2):
        assert float(torch.linalg.matrix_norm(network[index].weight, 2)) == pytest.approx(1, abs=0.02)
    assert not hasattr(network[4], "parametrizations")
    for change in (with_crelu, with_layer_norm, with_spectral_norm):
        with pytest.raises(ValueError, match="found no linear layer"):
            change(nn.Sequential(nn.Linear(2, 2)))


# The probe


def test_the_probe_tells_a_network_that_can_learn_from_one_that_cannot():
    network, x = perceptron(hidden=32), torch.randn(200, 3, generator=seeded())
    before = vector(network)
    able = target_fitting_loss(network, (x,), seed=0, targets=3, steps=150)
    assert torch.equal(vector(network), before)
    dead = copy.deepcopy(network)
    with torch.no_grad():
        dead[2].bias.fill_(-100.0)
    unable = target_fitting_loss(dead, (x,), seed=0, targets=3, steps=150)
    assert (able < 0.6).all()
    torch.testing.assert_close(unable, torch.ones(3), atol=0.05, rtol=0)
    again = target_fitting_loss(network, (x,), seed=0, targets=3, steps=150)
    assert torch.equal(able, again), "the same targets and batches for the same seed"


def test_the_probe_of_an_injected_network_takes_its_targets_from_the_original():
    network, x = perceptron(), torch.randn(100, 3, generator=seeded())
    injected = plasticity_injection(network, seeded())
    loss = target_fitting_loss(injected, (x,), seed=0, template=network, targets=2, steps=100)
    assert (loss < 1).all()


def test_probe_and_priming_refuse_numbers_that_mean_nothing():
    with pytest.raises(ValueError, match="one length"):
        target_fitting_loss(perceptron(), (torch.ones(3, 3), torch.ones(2, 1)), seed=0)
    with pytest.raises(ValueError, match="at least one target"):
        target_fitting_loss(perceptron(), (torch.ones(3, 3),), seed=0, steps=0)

    class Learner:
        def update(self, batch, step=0, generator=None):
            return {}

    with pytest.raises(ValueError, match="updates"):
        heavy_priming(Learner(), lambda generator: None, 0, generator=seeded())
