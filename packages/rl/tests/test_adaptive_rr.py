"""The replay-ratio controller and the fraction of active units: the laws they obey."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from poise.rl import AdaptiveReplayRatio, FAUMonitor, reset_module
from poise.rl.agents.pixel_networks import Actor, Critic, Encoder
from poise.rl.plasticity.adaptive_rr import updates_at

# The controller


def drive(controller, fau, episodes, length):
    """Run the loop; the replay ratio at the beginning of every episode, and the updates of every step."""
    ratios, updates = [], []
    values = iter(fau)
    for step in range(episodes * length):
        if step and step % length == 0:
            controller.on_episode_end()
        if step % length == 0:
            ratios.append(controller.replay_ratio)
        updates.append(controller.updates_for_step(step))
        for _ in range(updates[-1]):
            controller.on_update(next(values))
    return ratios, updates


@given(n=st.integers(1, 400))
def test_updates_per_step_are_exactly_the_replay_ratio(n):
    assert sum(updates_at(0.5, step) for step in range(2 * n)) == n
    assert sum(updates_at(2.0, step) for step in range(n)) == 2 * n
    assert [updates_at(0.5, step) for step in range(4)] == [1, 0, 1, 0], "odd steps are skipped"


@given(ratio=st.fractions(min_value="1/50", max_value=8, max_denominator=50), n=st.integers(1, 300))
def test_any_ratio_is_kept_over_any_stretch_from_the_start(ratio, n):
    taken = sum(updates_at(float(ratio), step) for step in range(n))
    assert 0 <= taken - ratio * n < 1


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 1_000), gap=st.floats(0, 0.05), freq=st.integers(2, 6), scale=st.floats(0, 0.1))
def test_the_switch_is_for_good_and_where_the_rule_says(seed, gap, freq, scale):
    rng = np.random.default_rng(seed)
    fau = 0.5 + scale * rng.normal(size=4_000)
    length, episodes = 6, 40
    controller = AdaptiveReplayRatio(check_freq=freq, phi_gap=gap)
    ratios, updates = drive(controller, fau, episodes, length)
    assert ratios == sorted(ratios)
    assert set(ratios) <= {0.5, 2.0}
    done = np.concatenate([[0], np.cumsum(updates)])
    previous, expected = fau[0], 0.5
    for episode in range(freq, episodes, freq):  # the average is that of the last episode before the check
        mean = fau[done[(episode - 1) * length] : done[episode * length]].mean()
        if abs(abs(mean - previous) - gap) < 1e-12:
            return  # too close to call in floating point
        expected = 2.0 if abs(mean - previous) <= gap else expected
        assert ratios[episode] == expected
        previous = mean


def test_a_gap_of_zero_never_switches_on_noise():
    rng = np.random.default_rng(0)
    controller = AdaptiveReplayRatio(check_freq=2, phi_gap=0.0)
    ratios, updates = drive(controller, rng.uniform(size=9_000), 60, 20)
    assert set(ratios) == {0.5}
    assert sum(updates) == 600
    assert not controller.switched


def test_a_tiny_gap_does_not_switch_before_the_second_check():
    controller = AdaptiveReplayRatio(check_freq=3, phi_gap=1e-9)
    settled = [0.4, *[0.6] * 10_000]  # the first update is what the first check compares with
    ratios, _ = drive(controller, settled, 20, 4)
    assert ratios.index(2.0) == 6


def test_nothing_is_checked_before_there_was_an_update():
    controller = AdaptiveReplayRatio(check_freq=2)
    for _ in range(10):
        controller.on_episode_end()
    assert controller.checks == []
    assert controller.replay_ratio == 0.5


def test_steps_as_the_unit_do_what_episodes_of_that_length_do():
    fau = 0.5 + 0.01 * np.random.default_rng(3).normal(size=20_000)
    length = 20
    by_episode = AdaptiveReplayRatio(check_freq=5, phi_gap=1e-3)
    by_step = AdaptiveReplayRatio(check_freq=5 * length, phi_gap=1e-3, window=length, unit="step")
    _, expected = drive(by_episode, fau, 100, length)
    _, found = drive(by_step, fau, 100, length)
    assert found == expected
    assert by_step.switched
    assert [check[1:] for check in by_step.checks] == [check[1:] for check in by_episode.checks]


def test_a_resumed_controller_answers_the_same():
    fau = torch.tensor(0.5 + 0.002 * np.random.default_rng(1).normal(size=4_000))
    one, other = (AdaptiveReplayRatio(check_freq=3, phi_gap=1e-3) for _ in range(2))
    drive(one, fau, 10, 7)
    other.load_state_dict(one.state_dict())
    assert drive(one, fau[500:], 40, 7) == drive(other, fau[500:], 40, 7)
    assert other.checks == one.checks


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"low": 0.0}, "0 < low"),
        ({"low": 3.0}, "low <= high"),
        ({"phi_gap": -1.0}, "phi_gap"),
        ({"check_freq": 1}, "window < check_freq"),
        ({"unit": "frame"}, "unit"),
    ],
)
def test_controllers_refuse_settings_that_mean_nothing(given, match):
    with pytest.raises(ValueError, match=match):
        AdaptiveReplayRatio(**given)
    with pytest.raises(ValueError, match="scalar"):
        AdaptiveReplayRatio().on_update(torch.zeros(2))


# The monitor


def fraction(network, *inputs, **arguments):
    monitor = FAUMonitor({"net": network}, **arguments)
    with monitor.counting("net"):
        network(*inputs)
    return float(monitor.fractions()["net"])


def test_half_of_standard_normal_preactivations_are_active():
    x = torch.randn(2_000, 50, generator=torch.Generator().manual_seed(0))
    assert fraction(nn.Sequential(nn.ReLU()), x) == pytest.approx(0.5, abs=0.01)
    assert fraction(nn.Sequential(nn.ReLU()), -x.abs()) == 0


@pytest.mark.parametrize("inplace", [False, True])
def test_in_place_activations_count_the_same(inplace):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(5, 40), nn.ReLU(inplace), nn.Linear(40, 30), nn.ReLU(inplace), nn.Linear(30, 1))
    x = torch.randn(64, 5)
    with torch.no_grad():
        first = network[0](x).relu()
        expected = float((first > 0).sum() + (network[2](first) > 0).sum()) / (64 * 70)
    assert fraction(network, x) == expected


@given(scale=st.floats(0.01, 100))
@settings(deadline=None, max_examples=20)
def test_positive_scaling_changes_nothing(scale):
    x = torch.randn(32, 20, generator=torch.Generator().manual_seed(1))
    network = nn.Sequential(nn.ReLU(), nn.ReLU())
    assert fraction(network, scale * x) == fraction(network, x)


def test_layers_weigh_by_their_number_of_units():
    torch.manual_seed(0)
    encoder = Encoder((3, 21, 21), channels=4)
    monitor = FAUMonitor({"encoder": encoder})
    with monitor.counting():
        encoder(torch.randint(0, 256, (5, 3, 21, 21), dtype=torch.uint8))
    layers = {name: float(value) for name, value in monitor.layers().items()}
    units = {f"encoder.body.{2 * index + 1}": 4 * side**2 for index, side in enumerate((10, 8, 6, 4))}
    assert layers.keys() == units.keys(), "four convolutions"
    weighted = sum(layers[name] * units[name] for name in units) / sum(units.values())
    assert float(monitor.fractions()["encoder"]) == pytest.approx(weighted, abs=1e-12)


def test_trunks_and_output_layers_do_not_count():
    watched = FAUMonitor({"actor": Actor(20, 2, 8, 16), "critic": Critic(20, 2, 8, 16)})
    with watched.counting():
        pass
    assert watched.fractions() == {}
    assert [sorted(counters) for counters in watched._counters.values()] == [
        ["policy.1", "policy.3"],
        ["q1.1", "q1.3", "q2.1", "q2.3"],
    ]


def test_only_the_passes_of_a_block_count_and_all_of_them():
    network, x = nn.Sequential(nn.ReLU()), torch.tensor([[1.0, -1.0]])
    monitor = FAUMonitor({"one": network, "two": nn.Sequential(nn.ReLU())})
    network(x)
    with monitor.counting("one"):
        network(x)
        network(x.abs())
    network(-x.abs())
    assert {name: float(value) for name, value in monitor.fractions().items()} == {"one": 0.75}
    monitor.clear()
    assert monitor.fractions() == {}
    assert not network._forward_hooks
    assert not network._forward_pre_hooks


def test_a_fraction_read_before_does_not_change_later():
    network = nn.Sequential(nn.ReLU())
    monitor = FAUMonitor(network)
    with monitor.counting():
        network(torch.ones(4))
    before = monitor.fractions()["model"]
    with monitor.counting():
        network(-torch.ones(4))
    assert (float(before), float(monitor.fractions()["model"])) == (1.0, 0.5)


def test_other_activations_are_named_or_given_by_type():
    network = nn.Sequential(nn.Linear(3, 8), nn.GELU(), nn.Linear(8, 2), nn.Softplus())
    x = torch.randn(10, 3)
    with torch.no_grad():
        expected = float((network[:2](x) > 0).double().mean())
    assert fraction(network, x, activation_types=(nn.GELU,)) == expected
    assert fraction(network, x, layers={"net": ["1"]}) == expected
    with pytest.raises(ValueError, match="no layer of type ReLU"):
        FAUMonitor(network)
    with pytest.raises(ValueError, match="at least one module"):
        FAUMonitor({})
    with pytest.raises(ValueError, match=r"layers of \['b'\]"):
        FAUMonitor({"a": network}, layers={"b": ["1"]})
    with (
        pytest.raises(KeyError, match="no module 'critic'"),
        FAUMonitor(nn.Sequential(nn.ReLU())).counting("critic"),
    ):
        pass


def test_a_dead_critic_reads_zero_and_comes_back_when_it_is_reset():
    torch.manual_seed(0)
    critic = Critic(30, 2, 8, 32)
    inputs = torch.randn(64, 30), torch.randn(64, 2)
    alive = fraction(critic, *inputs)
    with torch.no_grad():
        for head in (critic.q1, critic.q2):
            head[0].bias.fill_(-100.0)
            head[2].bias.fill_(-100.0)
    assert fraction(critic, *inputs) == 0
    reset_module(critic, torch.Generator().manual_seed(0))
    assert fraction(critic, *inputs) == pytest.approx(alive, abs=0.15)
