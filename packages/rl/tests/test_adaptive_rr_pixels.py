"""Pixels: what is stacked, stored, sampled and resumed; n-step returns against a direct sum."""

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.rl import EpisodeStream, NStepReplayBuffer, PixelFrameStack, make_dmc_pixels, read_episode

STATE, ACTION = Box(-np.inf, np.inf, (2,)), Box(-1, 1, (1,))


def at(*numbers):
    return np.array(numbers, np.float32)


def fill(buffer, lengths, seed=0, begin=0):
    """Episodes of given lengths whose observation is (episode, time); every step by (episode, time)."""
    rng, steps = np.random.default_rng(seed), {}
    for episode, length in enumerate(lengths, begin):
        for time in range(length):
            reward, discount = float(rng.normal()), float(rng.choice([1.0, 0.5]))
            last = time == length - 1
            steps[episode, time] = reward, discount, last and episode % 2 == 0
            buffer.add(
                at(episode, time),
                at(0),
                reward,
                at(episode, time + 1),
                terminated=steps[episode, time][2],
                truncated=last,
                discount=discount,
            )
    return steps


@settings(deadline=None, max_examples=40)
@given(steps=st.integers(1, 4), lengths=st.lists(st.integers(1, 9), min_size=1, max_size=12), seed=st.integers(0, 99))
def test_returns_are_the_discounted_sums_and_vanish_after_a_terminal(steps, lengths, seed):
    buffer = NStepReplayBuffer(40, STATE, ACTION, steps=steps, gamma=0.9)
    happened = fill(buffer, lengths, seed)
    batch = buffer.sample(32, torch.Generator().manual_seed(seed))
    for place in range(32):
        episode, time = map(int, batch.observation[place].tolist())
        assert time <= max(0, lengths[episode] - steps), "n steps fit, or the episode is shorter"
        reward, discount = 0.0, 1.0
        for later in range(time, min(time + steps, lengths[episode])):
            r, d, terminal = happened[episode, later]
            reward, discount = reward + discount * r, discount * 0.9 * d * (not terminal)
        assert batch.reward[place].item() == pytest.approx(reward, abs=1e-5)
        assert float(batch.discount[place] * ~batch.terminated[place]) == pytest.approx(discount, abs=1e-6)


def test_one_step_is_a_temporal_difference():
    buffer = NStepReplayBuffer(40, STATE, ACTION, steps=1, gamma=0.9)
    fill(buffer, [6, 6])
    batch = buffer.sample(50, torch.Generator().manual_seed(0))
    assert (batch.next_observation[:, 1] - batch.observation[:, 1] == 1).all()


def test_episodes_come_equally_often_or_transitions_do():
    lengths = [4, 40]
    for sampling, share in (("episode", 0.5), ("uniform", 4 / 44)):
        buffer = NStepReplayBuffer(100, STATE, ACTION, steps=3, sampling=sampling)
        fill(buffer, lengths)
        batch = buffer.sample(20_000, torch.Generator().manual_seed(0))
        assert float((batch.observation[:, 0] == 0).double().mean()) == pytest.approx(share, abs=0.02)


def test_only_whole_episodes_that_are_still_stored_are_sampled():
    buffer = NStepReplayBuffer(30, STATE, ACTION, steps=3)
    with pytest.raises(ValueError, match="no episode has finished"):
        buffer.sample(1)
    for episode in range(20):
        fill(buffer, [7], begin=episode)
        batch = buffer.sample(200, torch.Generator().manual_seed(0))
        assert (batch.next_observation[:, 0] == batch.observation[:, 0]).all()
        kept = {episode - back for back in range(3)} & set(range(episode + 1))
        assert set(batch.observation[:, 0].int().tolist()) == kept


@pytest.mark.parametrize("in_files", [False, True])
@pytest.mark.parametrize("sampling", ["episode", "uniform"])
def test_a_resumed_buffer_samples_the_same_batches(in_files, sampling, tmp_path):
    def make(folder):
        budget = 1 if in_files else 10**6
        arguments = {"sampling": sampling, "memory_budget": budget, "directory": tmp_path / folder, "reserve": 60}
        return NStepReplayBuffer(30, STATE, ACTION, steps=2, **arguments)

    def go_on(buffer):
        for episode in range(6):
            fill(buffer, [5], begin=90 + episode)
            yield buffer.sample(16, generator)

    buffer, generator = make("a"), torch.Generator().manual_seed(0)
    fill(buffer, [4, 9, 3, 8])
    state, drawn = buffer.state_dict(), generator.get_state()
    expected = list(go_on(buffer))
    resumed = make("a" if in_files else "b")
    resumed.load_state_dict(state)
    generator.set_state(drawn)
    for before, after in zip(expected, go_on(resumed), strict=True):
        assert all(torch.equal(one, two) for one, two in zip(before, after, strict=True))
    assert (tmp_path / "a").is_dir() == in_files


def test_only_the_newest_frame_is_stored_and_large_buffers_need_a_directory(tmp_path):
    pixels = Box(0, 255, (9, 84, 84), np.uint8)
    with pytest.raises(ValueError, match=r"21\.2 GB.*directory"):
        NStepReplayBuffer(1_000_000, pixels, ACTION, frame_stack=3)
    small = NStepReplayBuffer(100, pixels, ACTION, frame_stack=3)
    assert small.nbytes == 100 * 3 * 84 * 84 == small._arrays["observation"].nbytes
    with pytest.raises(ValueError, match="sampling"):
        NStepReplayBuffer(100, pixels, ACTION, sampling="prioritized")


def test_discounts_out_of_range_are_refused():
    buffer = NStepReplayBuffer(30, STATE, ACTION)
    with pytest.raises(ValueError, match="discount"):
        buffer.add(at(0, 0), at(0), 0.0, at(0, 1), terminated=False, truncated=False, discount=1.5)


def test_published_episode_files_are_read(tmp_path):
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (8, 3, 6, 6), dtype=np.uint8)
    stacks = np.stack([np.concatenate([frames[max(0, time - back)] for back in (2, 1, 0)]) for time in range(8)])
    episode = {
        "observation": stacks,
        "action": rng.uniform(-1, 1, (8, 1)).astype(np.float32),
        "reward": rng.normal(size=(8, 1)).astype(np.float32),
        "discount": np.ones((8, 1), np.float32),
    }
    np.savez_compressed(tmp_path / "20240101T000000_0_7.npz", **episode)
    buffer = NStepReplayBuffer(50, Box(0, 255, (9, 6, 6), np.uint8), ACTION, frame_stack=3)
    buffer.add_episode(read_episode(tmp_path / "20240101T000000_0_7.npz"))
    batch = buffer.gather(torch.arange(5))
    np.testing.assert_array_equal(batch.observation, stacks[:5])
    np.testing.assert_array_equal(batch.next_observation, stacks[3:])
    np.testing.assert_array_equal(batch.action, episode["action"][1:6])
    np.savez(tmp_path / "bad.npz", observation=stacks)
    with pytest.raises(ValueError, match="has no action"):
        read_episode(tmp_path / "bad.npz")
    with pytest.raises(ValueError, match="one length"):
        buffer.add_episode(episode | {"reward": episode["reward"][:3]})


# Environments


@pytest.fixture
def pendulum():
    pytest.importorskip("pygame")
    return lambda **given: PixelFrameStack(
        gymnasium.make("Pendulum-v1", render_mode="rgb_array"), size=(24, 24), **given
    )


def test_frames_are_stacked_newest_last_and_begin_alike(pendulum):
    env = pendulum(frame_stack=3)
    first, _ = env.reset(seed=0)
    assert env.observation_space.contains(first)
    assert first.dtype == np.uint8
    assert first.shape == (9, 24, 24)
    assert (first[:3] == first[3:6]).all()
    assert (first[:3] == first[6:]).all()
    second = env.step(env.action_space.high)[0]
    third = env.step(env.action_space.high)[0]
    assert (second[:6] == first[3:]).all()
    assert (third[:6] == second[3:]).all()
    assert (third[6:] != second[6:]).any()


def test_repeated_actions_add_their_rewards(pendulum):
    repeated, plain = pendulum(action_repeat=3), gymnasium.make("Pendulum-v1")
    repeated.reset(seed=1)
    plain.reset(seed=1)
    for _ in range(5):
        expected = sum(plain.step(plain.action_space.high)[1] for _ in range(3))
        assert repeated.step(repeated.action_space.high)[1] == pytest.approx(expected)


def test_pixels_store_and_stream(pendulum):
    stream = EpisodeStream(pendulum(action_repeat=2), seed=0)
    space = stream.env.observation_space
    buffer = NStepReplayBuffer(300, space, stream.env.action_space, frame_stack=3)
    seen = []
    for _ in range(100):  # one episode of 200 frames
        taken = stream.step(stream.env.action_space.high)
        buffer.add(*taken[:4], terminated=taken.terminated, truncated=taken.truncated)
        seen.append(taken)
    batch = buffer.sample(32, torch.Generator().manual_seed(0))
    for place, row in enumerate(batch.row.tolist()):
        np.testing.assert_array_equal(batch.observation[place], seen[row].observation)
        np.testing.assert_array_equal(batch.next_observation[place], seen[row + 2].next_observation)


def test_environments_that_do_not_render_are_refused():
    with pytest.raises(ValueError, match="rgb_array"):
        PixelFrameStack(gymnasium.make("Pendulum-v1"))


def test_control_suite_from_pixels():
    pytest.importorskip("dm_control")
    try:
        env = make_dmc_pixels("quadruped", "run", seed=3)
    except RuntimeError as error:
        pytest.skip(f"no renderer here: {error}")
    assert env.observation_space.shape == (9, 84, 84)
    assert env.action_space.shape == (12,)
    first, _ = env.reset(seed=3)
    again, _ = env.reset(seed=3)
    assert np.array_equal(first, again)
    assert first.std() > 5, "something is to be seen"
    after, reward, terminated, truncated, _ = env.step(np.ones(12, np.float32))
    assert (after[6:] != first[6:]).any()
    assert 0 <= reward <= 2, "the rewards of two physics steps"
    assert not terminated
    assert not truncated
    with pytest.raises(ValueError, match="quadruped"):
        make_dmc_pixels("quadruped", "fly")
