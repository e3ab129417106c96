"""Evaluation: returns are those of the deterministic policy, values are compared with returns from exactly the same states."""

import gymnasium
import numpy as np
import pytest
from gymnasium import Env
from gymnasium.spaces import Box

from poise.rl import bootstrap_interval, evaluate, interquartile_mean, q_value_bias, visited_states


class TwoStates(Env):
    """State 0 pays 1 and leads to state 1, which pays 2 and leads back; nothing else is there."""

    observation_space, action_space = Box(0, 1, (1,)), Box(-1, 1, (1,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state = np.array(self.np_random.integers(2))
        return self._see(), {}

    def step(self, action):
        reward = 1.0 + float(self.state)
        self.state = 1 - self.state
        return self._see(), reward, False, False, {}

    def _see(self):
        return np.array([self.state], np.float32)


class Known:
    """Its values are the true ones, plus an error."""

    def __init__(self, gamma, error):
        even, odd = 1 / (1 - gamma**2), gamma / (1 - gamma**2)
        self.exact = np.array([even + 2 * odd, 2 * even + odd])
        self.error = error

    def act(self, observation):
        return np.zeros((len(observation), 1), np.float32)

    def value(self, observation, action):
        return self.exact[observation[:, 0].astype(int)] + self.error


def limited(steps=50):
    return lambda: gymnasium.wrappers.TimeLimit(TwoStates(), steps)


@pytest.mark.parametrize("error", [0.0, 3.0, -2.0])
def test_bias_is_exact_where_values_are_known(error):
    found = q_value_bias(Known(0.5, error), limited(100), gamma=0.5, states=20, horizon=80, parallel=7)
    assert found.bias == pytest.approx(error, abs=1e-9)
    assert found.absolute == pytest.approx(abs(error), abs=1e-9)
    assert found.normalized == pytest.approx(error / np.abs(found.returns).mean(), abs=1e-9)
    assert sorted(set(found.returns.round(6))) == [pytest.approx(8 / 3), pytest.approx(10 / 3)]


def test_states_at_the_end_of_an_episode_get_a_whole_horizon():
    policy = Known(0.9, 0.0)
    found = q_value_bias(policy, limited(200), gamma=0.9, states=200, horizon=200)
    assert np.abs(found.values - found.returns).max() < 1e-7, "a return cut off by the time limit would be less"


@pytest.mark.parametrize("name", ["Pendulum-v1", "HalfCheetah-v5"])
def test_simulators_go_back_to_exactly_the_visited_states(name):
    class Swing:
        def __init__(self, size):
            self.size = size

        def act(self, observation):
            return np.repeat(np.tanh(observation[:, :1] - observation[:, 2:3]), self.size, 1)

    def make(steps=30):
        return gymnasium.make(name, max_episode_steps=steps)

    env = make()
    policy = Swing(env.action_space.shape[0])
    visited = visited_states(policy, make, count=10, seed=3)
    policy.value = lambda observation, action: np.zeros(len(observation))
    one_by_one = q_value_bias(policy, make, gamma=0.9, states=visited, horizon=20, parallel=1)
    together = q_value_bias(policy, make, gamma=0.9, states=visited, horizon=20, parallel=8)
    np.testing.assert_allclose(one_by_one.returns, together.returns, rtol=1e-6)
    # The first state of an episode: the return is that of the episode.
    state, total = env.reset(seed=0)[0], 0.0
    from poise.rl import save_state
    from poise.rl.evaluation.rollouts import Visited

    start = Visited([save_state(env)], [state])
    for step in range(20):
        state, reward, *_ = env.step(policy.act(state[None])[0])
        total += 0.9**step * reward
    assert q_value_bias(policy, make, gamma=0.9, states=start, horizon=20).returns[0] == pytest.approx(total, rel=1e-6)


def test_evaluation_gives_whole_undiscounted_episodes_of_its_seed():
    policy = Known(0.9, 0.0)
    returns = evaluate(policy, limited(11), episodes=6, seed=2)
    assert set(returns) <= {16.0, 17.0}
    np.testing.assert_array_equal(returns, evaluate(policy, limited(11), episodes=6, seed=2))
    with pytest.raises(ValueError, match="at least 1"):
        evaluate(policy, limited(11), episodes=0)


def test_an_environment_without_a_state_is_refused():
    class Hidden(TwoStates):
        def reset(self, *, seed=None, options=None):
            found = super().reset(seed=seed)
            self.kept, self.state = self.state, None
            return found

    with pytest.raises(TypeError, match="Hidden cannot be saved"):
        q_value_bias(Known(0.5, 0.0), lambda: gymnasium.wrappers.TimeLimit(Hidden(), 5), gamma=0.5)


@pytest.mark.parametrize("bad", [{"gamma": 1.5}, {"gamma": 0.5, "states": 0}, {"gamma": 0.5, "horizon": 0}])
def test_numbers_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match="expected gamma"):
        q_value_bias(Known(0.5, 0.0), limited(), **bad)


@pytest.mark.parametrize("shape", [(5, 1), (10, 3), (7, 2), (4, 4), (3, 1)])
def test_interquartile_mean_is_the_trimmed_mean_of_scipy(shape):
    from scipy.stats import trim_mean

    scores = np.random.default_rng(0).normal(size=shape)
    assert interquartile_mean(scores) == pytest.approx(trim_mean(scores, 0.25, axis=None), rel=1e-12)


def test_intervals_resample_the_runs_of_each_task():
    tasks = np.array([0.0, 100.0])
    assert bootstrap_interval(np.tile(tasks, (5, 1))) == (50.0, 50.0, 50.0), "no run differs within a task"
    scores = np.random.default_rng(0).normal(size=(200, 1))
    mean = bootstrap_interval(scores, np.mean, resamples=4_000)
    error = scores.std() / np.sqrt(200)
    assert mean.low == pytest.approx(mean.value - 1.96 * error, abs=0.02)
    assert mean.high == pytest.approx(mean.value + 1.96 * error, abs=0.02)
    assert bootstrap_interval(scores) == bootstrap_interval(scores)


def test_scores_that_are_none_are_refused():
    with pytest.raises(ValueError, match="finite scores"):
        interquartile_mean(np.array([1.0, np.nan]))
    with pytest.raises(ValueError, match=r"\(runs, tasks\)"):
        bootstrap_interval(np.zeros((0, 3)))
