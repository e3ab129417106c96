"""Offline data: what each format means, one clear error for each thing that can be wrong, normalised states, D4RL's scores."""

import sys
from types import SimpleNamespace

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box

from poise.rl import OfflineDataset, StateNormalizer, d4rl_normalized_score

h5py = pytest.importorskip("h5py")


def arrays(count=6, states=3, actions=2):
    rng = np.random.default_rng(0)
    return {
        "observations": rng.normal(size=(count, states)).astype(np.float32),
        "actions": rng.uniform(-1, 1, (count, actions)).astype(np.float32),
        "rewards": rng.normal(size=count).astype(np.float32),
        "terminals": np.zeros(count, bool),
        "timeouts": np.zeros(count, bool),
    }


def d4rl_file(path, **changes):
    """A file as D4RL publishes it; ``None`` leaves an array out."""
    content = arrays() | changes
    with h5py.File(path, "w") as file:
        for name, column in content.items():
            if column is not None:
                file.create_dataset(name, data=column, compression="gzip")
        file.create_dataset("infos/qpos", data=np.zeros((6, 2)))
        file.create_dataset("metadata/algorithm", data=np.bytes_("SAC"))
    return path


def episodes(lengths=(3, 2, 11)):
    """Episodes as Minari keeps them: the last of the first ends truly, the others by a time limit."""
    rng = np.random.default_rng(1)
    return [
        {
            "observations": rng.normal(size=(length + 1, 3)),
            "actions": rng.uniform(-1, 1, (length, 2)).astype(np.float32),
            "rewards": rng.normal(size=length),
            "terminations": np.arange(length) == (length - 1 if number == 0 else -1),
            "truncations": np.arange(length) == (length - 1 if number else -1),
        }
        for number, length in enumerate(lengths)
    ]


def minari_folder(path, given=None):
    (path / "data").mkdir(parents=True)
    with h5py.File(path / "data" / "main_data.hdf5", "w") as file:
        for number, episode in enumerate(given or episodes()):
            group = file.create_group(f"episode_{number}")
            group.attrs["id"] = number
            for name, column in episode.items():
                group.create_dataset(name, data=column)
            group.create_group("infos")
    return path


# What the formats mean


def test_d4rl_leaves_out_steps_that_a_time_limit_ended(tmp_path):
    terminals, timeouts = np.zeros(6, bool), np.zeros(6, bool)
    terminals[1], timeouts[3] = True, True
    path = d4rl_file(tmp_path / "hopper.hdf5", terminals=terminals, timeouts=timeouts)
    data, given = OfflineDataset.from_d4rl_hdf5(path), arrays()
    kept = [0, 1, 2, 4]  # 3 ended by its time limit, and nothing follows 5
    np.testing.assert_array_equal(data.observations, given["observations"][kept])
    np.testing.assert_array_equal(data.actions, given["actions"][kept])
    np.testing.assert_array_equal(data.rewards, given["rewards"][kept])
    np.testing.assert_array_equal(data.next_observations, given["observations"][[1, 2, 3, 5]])
    assert data.terminated.tolist() == [False, True, False, False]
    assert data.action_space == Box(-1, 1, (2,))


@pytest.mark.parametrize("kind", ["folder", "file", "loaded"])
def test_minari_keeps_every_step_and_only_true_terminations(kind, tmp_path):
    given = episodes()
    if kind == "loaded":
        parts = [SimpleNamespace(id=number, **episode) for number, episode in enumerate(given)]
        source = SimpleNamespace(iterate_episodes=lambda: iter(parts), action_space=Box(-1, 1, (2,)))
    else:
        source = minari_folder(tmp_path / "hopper")
        source = source / "data" / "main_data.hdf5" if kind == "file" else str(source)
    data = OfflineDataset.from_minari(source, dtype=torch.float64)
    np.testing.assert_array_equal(data.observations, np.concatenate([one["observations"][:-1] for one in given]))
    np.testing.assert_array_equal(data.next_observations, np.concatenate([one["observations"][1:] for one in given]))
    np.testing.assert_array_equal(data.rewards, np.concatenate([one["rewards"] for one in given]))
    assert data.terminated.nonzero().flatten().tolist() == [2]


def test_minari_episodes_come_in_the_order_of_their_numbers(tmp_path):
    given = episodes((1,) * 12)
    data = OfflineDataset.from_minari(minari_folder(tmp_path / "many", given), dtype=torch.float64)
    np.testing.assert_array_equal(data.rewards, np.concatenate([one["rewards"] for one in given]))


def test_a_rollout_logs_what_happened():
    env = gymnasium.make("Pendulum-v1", max_episode_steps=20)
    data = OfflineDataset.from_env_rollout(env, lambda seen: np.float32([seen[1]]), 50, seed=3, dtype=torch.float64)
    assert len(data) == 50
    assert not data.terminated.any(), "a time limit is no termination"
    torch.testing.assert_close(data.actions[:, 0], data.observations[:, 1])
    inside = (torch.arange(49) + 1) % 20 != 0
    torch.testing.assert_close(data.next_observations[:-1][inside], data.observations[1:][inside])
    cosine, sine, speed = data.observations.T
    reward = -(torch.atan2(sine, cosine) ** 2 + 0.1 * speed**2 + 0.001 * data.actions[:, 0] ** 2)
    torch.testing.assert_close(data.rewards, reward, rtol=1e-4, atol=1e-4)
    again = OfflineDataset.from_env_rollout(env, lambda seen: np.float32([seen[1]]), 50, seed=3, dtype=torch.float64)
    assert torch.equal(again.observations, data.observations)


def test_batches_are_rows_of_the_data():
    given = arrays()
    data = OfflineDataset.from_arrays(
        given["observations"], given["actions"], given["rewards"], given["observations"] + 1, np.arange(6) % 2
    )
    batch = data.sample(500, torch.Generator().manual_seed(0), gamma=0.9)
    assert set(batch.row.tolist()) == set(range(6)), "with replacement, and uniformly"
    assert torch.bincount(batch.row).min() > 50
    assert torch.equal(batch.observation, data.observations[batch.row])
    assert torch.equal(batch.next_observation, batch.observation + 1)
    assert torch.equal(batch.terminated, batch.row % 2 == 1)
    assert torch.equal(batch.discount, torch.full((500,), 0.9))


def test_rewards_are_scaled_before_they_are_shifted():
    given = arrays()
    data = OfflineDataset.from_arrays(
        given["observations"], given["actions"], np.float32([0, 1] * 3), given["observations"], given["terminals"]
    )
    prepared = data.prepared(lambda states: 2 * states, reward_scale=10_000, reward_shift=-1)
    assert prepared.rewards.tolist() == [-1, 9_999] * 3
    assert torch.equal(prepared.next_observations, 2 * data.next_observations)


# Normalised states


def test_normalised_states_have_mean_zero_and_a_deviation_just_below_one():
    states = 5 + 3 * torch.randn(1_000, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    states[:, 3] = 7.0
    normalizer = StateNormalizer(states)
    normal = normalizer(states)
    torch.testing.assert_close(normal.mean(0), torch.zeros(4, dtype=torch.float64), atol=1e-12, rtol=0)
    deviation = normal.std(0, correction=0)
    assert (deviation[:3] < 1).all()
    assert (deviation[:3] > 0.999).all()
    assert normal[:, 3].count_nonzero() == 0, "a constant dimension does not blow up"
    torch.testing.assert_close(normalizer(states[:2]), normal[:2])
    other = StateNormalizer(torch.zeros(2, 4, dtype=torch.float64))
    other.load_state_dict(normalizer.state_dict())
    assert torch.equal(other(states), normal)


@pytest.mark.parametrize("bad", [torch.zeros(0, 3), torch.zeros(3), torch.tensor([[torch.nan]])])
def test_states_without_statistics_are_refused(bad):
    with pytest.raises(ValueError, match="expected finite observations"):
        StateNormalizer(bad)
    with pytest.raises(ValueError, match="eps must be positive"):
        StateNormalizer(torch.zeros(3, 2), eps=0.0)


# Scores


@pytest.mark.parametrize(
    ("task", "low", "high"),
    [
        ("halfcheetah-medium-v2", -280.178953, 12135.0),
        ("Hopper-v5", -20.272305, 3234.3),
        ("walker2d-random-v2", 1.629008, 4592.3),
        ("antmaze-large-play-v0", 0.0, 1.0),
    ],
)
def test_scores_are_zero_for_a_random_policy_and_a_hundred_for_an_expert(task, low, high):
    np.testing.assert_allclose(d4rl_normalized_score(task, np.array([low, (low + high) / 2, high])), [0, 50, 100])


def test_tasks_without_references_are_refused():
    with pytest.raises(ValueError, match="no reference scores for 'Pendulum-v1'"):
        d4rl_normalized_score("Pendulum-v1", 0.0)


# Bad input


def broken(**changes):
    given = arrays()
    columns = {
        "observations": given["observations"],
        "actions": given["actions"],
        "rewards": given["rewards"],
        "next_observations": given["observations"],
        "terminated": given["terminals"],
    }
    return OfflineDataset.from_arrays(**(columns | changes))


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"rewards": np.float32([0, 1, np.nan, 3, 4, 5])}, ValueError, "rewards must be finite, got nan at row 2"),
        ({"rewards": np.float32([0, np.inf, 2, 3, 4, 5])}, ValueError, "rewards must be finite, got inf at row 1"),
        ({"observations": np.full((6, 3), np.nan)}, ValueError, "observations must be finite"),
        ({"rewards": np.zeros((6, 1))}, ValueError, r"rewards must have shape \(6,\), got \(6, 1\)"),
        ({"rewards": np.zeros(5)}, ValueError, r"rewards must have shape \(6,\), got \(5,\)"),
        ({"next_observations": np.zeros((6, 4))}, ValueError, r"next_observations must have shape \(6, 3\)"),
        ({"observations": np.zeros((6, 2, 2))}, ValueError, r"observations must be flat, \(n, s\)"),
        ({"terminated": np.zeros(5, bool)}, ValueError, r"terminated must have shape \(6,\), got \(5,\)"),
        ({"terminated": np.linspace(0, 1, 6)}, ValueError, "booleans or zeros and ones"),
        ({"actions": np.zeros((6, 2), np.int64)}, TypeError, "actions must be continuous, got torch.int64"),
        ({"actions": np.zeros(6, np.int64)}, TypeError, "actions must be continuous"),
        ({"actions": np.full((6, 2), 1.5)}, ValueError, r"must lie in .*\[1.5, 1.5\] at row 0: give the action_space"),
        ({"actions": np.zeros((0, 2))}, ValueError, "holds no transition"),
    ],
)
def test_each_thing_that_can_be_wrong_has_one_clear_error(changes, error, words):
    with pytest.raises(error, match=words):
        broken(**changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"terminals": None}, r"lacks \['terminals'\]; it holds"),
        ({"timeouts": None}, r"lacks \['timeouts'\]"),
        ({"rewards": np.zeros(4, np.float32)}, "must have one length, got .*'rewards': 4"),
        ({"rewards": np.full(6, np.nan)}, "rewards must be finite"),
    ],
)
def test_incomplete_d4rl_files_are_refused(changes, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        OfflineDataset.from_d4rl_hdf5(d4rl_file(tmp_path / "bad.hdf5", **changes))


def test_incomplete_minari_episodes_are_refused(tmp_path):
    missing, short = episodes(), episodes()
    del missing[1]["terminations"]
    short[1]["observations"] = short[1]["observations"][:-1]
    with pytest.raises(ValueError, match=r"episode_1 of .* lacks \['terminations'\]"):
        OfflineDataset.from_minari(minari_folder(tmp_path / "missing", missing))
    with pytest.raises(ValueError, match=r"episode_1 must have T actions and T \+ 1 observations"):
        OfflineDataset.from_minari(minari_folder(tmp_path / "short", short))
    nested = minari_folder(tmp_path / "nested", [{"observations": np.zeros(1)}])
    with h5py.File(nested / "data" / "main_data.hdf5", "w") as file:
        group = file.create_group("episode_0")
        group.create_group("observations").create_dataset("goal", data=np.zeros((2, 3)))
        for name in ("actions", "rewards", "terminations"):
            group.create_dataset(name, data=np.zeros(1))
    with pytest.raises(TypeError, match=r"observations of episode_0 of .* are nested: flatten"):
        OfflineDataset.from_minari(nested)
    empty = SimpleNamespace(iterate_episodes=lambda: iter(()), action_space=Box(-1, 1, (2,)))
    with pytest.raises(ValueError, match="holds no episode"):
        OfflineDataset.from_minari(empty)


def test_files_that_are_not_there_or_no_hdf5_are_refused(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        OfflineDataset.from_d4rl_hdf5(tmp_path / "none.hdf5")
    (tmp_path / "text.hdf5").write_text("no data")
    with pytest.raises(ValueError, match="is no HDF5 file"):
        OfflineDataset.from_d4rl_hdf5(tmp_path / "text.hdf5")
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ModuleNotFoundError, match="pip install 'poise-rl"):
        OfflineDataset.from_minari(tmp_path)


def test_rollouts_of_discrete_or_unbounded_environments_are_refused():
    with pytest.raises(TypeError, match="expected continuous actions"):
        OfflineDataset.from_env_rollout(gymnasium.make("CartPole-v1"), lambda _: np.int64(0), 5)
    env = gymnasium.make("Pendulum-v1")
    env.action_space = Box(-np.inf, np.inf, (1,))
    with pytest.raises(ValueError, match="finite bounds"):
        OfflineDataset.from_env_rollout(env, lambda _: np.zeros(1, np.float32), 5)
    with pytest.raises(ValueError, match="count must be at least 1"):
        OfflineDataset.from_env_rollout(gymnasium.make("Pendulum-v1"), lambda _: np.zeros(1, np.float32), 0)
