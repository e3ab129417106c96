"""Replay: what is sampled is what happened, over any number of steps and frames, after any number of turns of the ring."""

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.rl import ReplayBuffer

STATE, ACTION = Box(-np.inf, np.inf, (2,)), Box(-1, 1, (1,))


def at(*numbers):
    return np.array(numbers, np.float32)


def fill(buffer, count, seed=0, lengths=(1, 9), kept=None):
    """Episodes of random length whose observation is (episode, time); returns every step by (episode, time)."""
    rng = np.random.default_rng(seed)
    steps, episode = kept if kept is not None else {}, 0
    while len(steps) < count:
        length, ends = int(rng.integers(*lengths)), bool(rng.integers(2))
        for time in range(length):
            action, reward = rng.uniform(-1, 1, 1).astype(np.float32), float(rng.normal())
            last = time == length - 1
            steps[episode, time] = action, reward, last and ends, last
            buffer.add(
                at(episode, time), action, reward, at(episode, time + 1), terminated=last and ends, truncated=last
            )
        episode += 1
    return steps


@settings(deadline=None, max_examples=60)
@given(steps=st.integers(1, 4), capacity=st.integers(12, 60), count=st.integers(1, 150), seed=st.integers(0, 99))
def test_every_sample_is_what_happened(steps, capacity, count, seed):
    buffer = ReplayBuffer(capacity, STATE, ACTION, steps=steps, gamma=0.9)
    happened = fill(buffer, count, seed)
    batch = buffer.sample(64, torch.Generator().manual_seed(seed))
    for place in range(64):
        episode, time = map(int, batch.observation[place].tolist())
        action, reward, terminated, last = happened[episode, time]
        assert batch.action[place].item() == pytest.approx(action.item())
        taken = 1
        while taken < steps and not last:
            _, more, terminated, last = happened[episode, time + taken]
            reward += 0.9**taken * more
            taken += 1
        assert batch.reward[place].item() == pytest.approx(reward, abs=1e-5)
        assert batch.discount[place].item() == pytest.approx(0.9**taken)
        assert batch.terminated[place].item() == terminated
        assert batch.next_observation[place].tolist() == [episode, time + taken]


@pytest.mark.parametrize("steps", [1, 3])
def test_every_transition_of_the_last_rows_can_be_sampled_and_no_other(steps):
    buffer = ReplayBuffer(50, STATE, ACTION, steps=steps)
    happened = list(fill(buffer, 200))
    batch = buffer.sample(20_000, torch.Generator().manual_seed(0))
    sampled = {tuple(map(int, row)) for row in batch.observation.tolist()}
    newest = happened[-len(sampled) :]
    assert sampled == set(newest), "an episode just ended, so that all of its steps are complete"
    assert 35 <= len(sampled) == len(buffer) < 50
    counts = np.unique(batch.row.numpy(), return_counts=True)[1]
    assert counts.std() < 4 * np.sqrt(20_000 / len(sampled))


def test_transitions_over_several_steps_wait_until_they_are_complete():
    buffer = ReplayBuffer(20, STATE, ACTION, steps=3)
    for time in range(4):
        buffer.add(at(0, time), at(0), 1.0, at(0, time + 1), terminated=False, truncated=False)
        assert len(buffer) == max(0, time - 1)
    buffer.add(at(0, 4), at(0), 1.0, at(0, 5), terminated=True, truncated=False)
    assert len(buffer) == 5


def test_stacked_frames_come_back_as_the_environment_stacked_them():
    stack, frames = 3, Box(0, 255, (6, 4, 4), np.uint8)
    buffer = ReplayBuffer(40, frames, Discrete(2), steps=2, frame_stack=stack)
    rng = np.random.default_rng(0)
    after = {}
    for _ in range(20):
        length = int(rng.integers(1, 7))
        history = [rng.integers(0, 256, (2, 4, 4), dtype=np.uint8)] * stack
        stacks = []
        for _ in range(length + 1):
            stacks.append(np.concatenate(history[-stack:]))
            history.append(rng.integers(0, 256, (2, 4, 4), dtype=np.uint8))
        for time in range(length):
            last = time == length - 1
            buffer.add(stacks[time], 1, 0.0, stacks[time + 1], terminated=False, truncated=last)
            after[stacks[time].tobytes()] = stacks[min(time + 2, length)].tobytes()
    assert buffer._arrays["observation"].nbytes == 40 * 2 * 4 * 4
    batch = buffer.sample(200, torch.Generator().manual_seed(0))
    assert batch.observation.dtype == torch.uint8
    assert batch.action.dtype == torch.int64
    for observation, following in zip(batch.observation, batch.next_observation, strict=True):
        assert after[observation.numpy().tobytes()] == following.numpy().tobytes()


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_resumed_buffer_samples_the_same_batches(on_disk, tmp_path):
    def make(folder):
        return ReplayBuffer(30, STATE, ACTION, steps=2, directory=tmp_path / folder if on_disk else None, reserve=40)

    def go_on(buffer):
        for time in range(25):
            buffer.add(at(99, time), at(0.5), 1.0, at(99, time + 1), terminated=False, truncated=time == 24)
            yield buffer.sample(16, generator)

    buffer, generator = make("a"), torch.Generator().manual_seed(0)
    fill(buffer, 70)
    state, drawn = buffer.state_dict(), generator.get_state()
    expected = list(go_on(buffer))  # the killed run has overwritten rows of its checkpoint
    resumed = make("a" if on_disk else "b")
    resumed.load_state_dict(state)
    generator.set_state(drawn)
    for before, after in zip(expected, go_on(resumed), strict=True):
        assert all(torch.equal(one, two) for one, two in zip(before, after, strict=True))


def test_files_that_ran_too_far_ahead_are_refused(tmp_path):
    buffer = ReplayBuffer(20, STATE, ACTION, directory=tmp_path, reserve=10)
    fill(buffer, 30)
    state = buffer.state_dict()
    fill(buffer, 20)
    with pytest.raises(ValueError, match="ahead of the state"):
        ReplayBuffer(20, STATE, ACTION, directory=tmp_path, reserve=10).load_state_dict(state)


def test_a_state_of_another_size_is_refused():
    with pytest.raises(ValueError, match="20 rows, this one has 30"):
        ReplayBuffer(30, STATE, ACTION).load_state_dict(ReplayBuffer(20, STATE, ACTION).state_dict())


def test_bad_input_is_refused():
    buffer = ReplayBuffer(20, STATE, ACTION)
    with pytest.raises(ValueError, match="no transition"):
        buffer.sample(1)
    end = {"terminated": False, "truncated": False}
    for reward in (np.nan, np.inf):
        with pytest.raises(ValueError, match="finite"):
            buffer.add(at(0, 0), at(0), reward, at(0, 1), **end)
    with pytest.raises(ValueError, match="observation must have shape"):
        buffer.add(at(0), at(0), 0.0, at(0, 1), **end)
    with pytest.raises(ValueError, match="action must have shape"):
        buffer.add(at(0, 0), 0, 0.0, at(0, 1), **end)
    with pytest.raises(TypeError, match="FlattenObservation"):
        ReplayBuffer(20, Dict({"a": STATE}), ACTION)
    with pytest.raises(TypeError, match="Discrete"):
        ReplayBuffer(20, STATE, Dict({"a": ACTION}))
    with pytest.raises(ValueError, match="capacity"):
        ReplayBuffer(3, STATE, ACTION, steps=2)
    with pytest.raises(ValueError, match="frames do not divide"):
        ReplayBuffer(20, STATE, ACTION, frame_stack=3)
