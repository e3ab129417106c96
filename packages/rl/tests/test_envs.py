"""Environments: a stream of episodes continues exactly, a task of the control suite is a gymnasium environment."""

import gymnasium
import numpy as np
import pytest

from poise.rl import DMControl, EpisodeStream, restore_state, save_state


@pytest.mark.parametrize("name", ["Pendulum-v1", "Hopper-v5", "CartPole-v1"])
def test_a_resumed_stream_continues_exactly(name):
    def make():
        return EpisodeStream(gymnasium.make(name), seed=4)

    rng = np.random.default_rng(0)
    one = make()

    def act():
        if name == "CartPole-v1":
            return np.array(rng.integers(2))
        return rng.uniform(-1, 1, one.env.action_space.shape).astype(np.float32)

    for _ in range(230):
        one.step(act())
    other = make()
    other.load_state_dict(one.state_dict())
    assert other.episode == one.episode > 0
    assert other.finished_return == one.finished_return
    assert other.episode_return == one.episode_return
    for _ in range(100):
        action = act()
        before, after = one.step(action), other.step(action)
        assert all(np.array_equal(left, right) for left, right in zip(before, after, strict=True))


def test_a_stream_gives_the_last_observation_and_then_resets():
    stream = EpisodeStream(gymnasium.make("Pendulum-v1", max_episode_steps=3), seed=0)
    first = stream.observation
    steps = [stream.step(np.zeros(1, np.float32)) for _ in range(3)]
    assert [step.ended for step in steps] == [False, False, True]
    assert steps[-1].truncated
    assert not steps[-1].terminated
    assert not np.array_equal(stream.observation, steps[-1].next_observation)
    assert not np.array_equal(stream.observation, first), "every episode has a seed of its own"
    assert stream.finished_return == pytest.approx(sum(step.reward for step in steps))


@pytest.fixture
def control():
    pytest.importorskip("dm_control")
    return DMControl


def test_control_suite_tasks_are_flat_and_end_by_truncation(control):
    env = control("cartpole", "swingup")
    state, _ = env.reset(seed=0)
    assert state.shape == env.observation_space.shape == (5,)
    assert state.dtype == np.float32
    for step in range(1_000):
        state, reward, terminated, truncated, _ = env.step(env.action_space.high)
        assert 0 <= reward <= 1
        assert truncated == (step == 999)
        assert not terminated


def test_control_suite_episodes_depend_on_their_seed_alone(control):
    env = control("finger", "turn_hard")
    first = env.reset(seed=5)[0]
    after = env.step(env.action_space.high)[0]
    env.reset(seed=6)
    np.testing.assert_array_equal(env.reset(seed=5)[0], first)
    np.testing.assert_array_equal(env.step(env.action_space.high)[0], after)
    np.testing.assert_array_equal(control("finger", "turn_hard").reset(seed=5)[0], first)


def test_control_suite_goes_back_to_a_state(control):
    env = control("cheetah", "run", action_repeat=2)
    env.reset(seed=0)
    for _ in range(20):
        env.step(env.action_space.high)
    saved = save_state(env)
    ahead = [env.step(env.action_space.low)[:2] for _ in range(10)]
    env.reset()
    restore_state(env, saved)
    again = [env.step(env.action_space.low)[:2] for _ in range(10)]
    for (state, reward), (other, same) in zip(ahead, again, strict=True):
        np.testing.assert_array_equal(state, other)
        assert reward == same


def test_control_suite_refuses_what_it_does_not_know(control):
    with pytest.raises(ValueError, match="walk"):
        control("walker", "fly")
    with pytest.raises(ValueError, match="bodies"):
        control("unicorn", "run")
    with pytest.raises(ValueError, match="action_repeat"):
        control("walker", "walk", action_repeat=0)
    env = control("walker", "walk")
    env.reset(seed=0)
    with pytest.raises(ValueError, match="in \\[-1, 1\\]"):
        env.step(2 * env.action_space.high)
