"""How good is an algorithm, over seeds and tasks? The interquartile mean, with stratified bootstrap intervals.

Agarwal et al., "Deep Reinforcement Learning at the Edge of the Statistical Precipice", NeurIPS 2021, arXiv 2108.13264 (rliable).

>>> import numpy as np
>>> interquartile_mean(np.array([[0.0], [1.0], [2.0], [100.0]]))
1.5
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64

Scores = Float64[np.ndarray, "runs tasks"]


class Interval(NamedTuple):
    """A statistic and its confidence interval."""

    value: float
    low: float
    high: float


def interquartile_mean(scores: Float64[np.ndarray, "..."]) -> float:
    """Mean of the middle half of all scores, runs and tasks taken together.

    A quarter of the scores, rounded down, is left out at each end.

    Args:
        scores: of any shape.

    Raises:
        ValueError: there are none, or some are not finite.
    """
    if not scores.size or not np.isfinite(scores).all():
        raise ValueError(f"expected finite scores, got an array of shape {scores.shape}: {scores}")
    ordered = np.sort(scores, axis=None)
    cut = len(ordered) // 4
    return float(ordered[cut : len(ordered) - cut].mean())


def bootstrap_interval(
    scores: Scores,
    statistic: Callable[[np.ndarray], float] = interquartile_mean,
    *,
    resamples: int = 2_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """A statistic of runs over tasks, and its percentile-bootstrap interval.

    Runs are resampled within each task (stratified), since every task has runs of its own.

    Args:
        scores: (runs, tasks).
        statistic: of an array of that shape.
        resamples: how many.
        confidence: of the interval.
        seed: the interval is a function of the scores and of this.

    Raises:
        ValueError: no runs or tasks, or numbers out of range.
    """
    if scores.ndim != 2 or not scores.size:
        raise ValueError(f"scores must have shape (runs, tasks), got {scores.shape}")
    if resamples < 1 or not 0 < confidence < 1:
        raise ValueError(f"expected resamples >= 1 and confidence in (0, 1), got {resamples} and {confidence}")
    runs, tasks = scores.shape
    rng = np.random.default_rng(seed)
    drawn = rng.integers(runs, size=(resamples, runs, tasks))
    values = [statistic(scores[rows, np.arange(tasks)]) for rows in drawn]
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(statistic(scores), float(low), float(high))
