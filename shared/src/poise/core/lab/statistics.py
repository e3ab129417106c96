"""Verdicts: does a claim hold over the seeds that were run?"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from poise.core.lab.experiment import Claim, Verdict

RESAMPLES = 10_000
CONFIDENCE = 0.95
LEAST_SEEDS = 3
"""With fewer seeds a bootstrap interval means nothing, and every claim stays undecided."""


def judge(claim: Claim, arms: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, Any]:
    """Measure a claim over seeds.

    Differences (or log ratios) are paired by seed; their mean gets a percentile-bootstrap confidence interval. The claim *holds*
    when the whole interval is beyond the margin, is *refuted* when the whole interval falls short of it, and stays *undecided*
    otherwise. For a claim against a bound (``versus`` is None) the effect is the metric itself, and the bound may be met exactly.

    Args:
        claim: the claim.
        arms: per arm and metric the values, one per seed, in the same order everywhere.

    Returns:
        The claim's record in a verdict file.

    Raises:
        ValueError: an arm did not report the metric, or a ratio of numbers that are not positive was asked for.
    """
    effects = _effects(claim, arms)
    mean, low, high = _interval(effects)
    if claim.scale == "ratio":
        mean, low, high = np.exp(mean), np.exp(low), np.exp(high)
    verdict = _verdict(claim, low, high) if len(effects) >= LEAST_SEEDS else "undecided"
    return {
        "kind": claim.kind,
        "metric": claim.metric,
        "arm": claim.arm,
        "versus": claim.versus,
        "direction": claim.direction,
        "scale": claim.scale,
        "margin": claim.margin,
        "effect": float(mean),
        "ci": [float(low), float(high)],
        "verdict": verdict,
        "source": claim.source,
        "note": claim.note,
    }


def _effects(claim: Claim, arms: Mapping[str, Mapping[str, Sequence[float]]]) -> np.ndarray:
    ours = _values(claim, claim.arm, arms)
    if claim.versus is None:
        return ours
    theirs = _values(claim, claim.versus, arms)
    sign = 1.0 if claim.direction == "higher" else -1.0
    if claim.scale == "difference":
        return sign * (ours - theirs)
    if (ours <= 0).any() or (theirs <= 0).any():
        raise ValueError(f"a ratio of {claim.metric} needs positive values, got {ours.tolist()} and {theirs.tolist()}")
    return sign * (np.log(ours) - np.log(theirs))


def _values(claim: Claim, arm: str, arms: Mapping[str, Mapping[str, Sequence[float]]]) -> np.ndarray:
    try:
        return np.asarray(arms[arm][claim.metric], dtype=np.float64)
    except KeyError:
        raise ValueError(
            f"the claim on {claim.metric!r} needs that metric of the arm {arm!r}, which did not report it"
        ) from None


def _interval(effects: np.ndarray) -> tuple[float, float, float]:
    rng = np.random.default_rng(0)  # the interval is a function of the data
    means = effects[rng.integers(len(effects), size=(RESAMPLES, len(effects)))].mean(axis=1)
    tail = (1 - CONFIDENCE) / 2
    # A mean of equal numbers may differ from them in the last digit, and a bound may be met exactly.
    low, high = np.clip(np.quantile(means, [tail, 1 - tail]), effects.min(), effects.max())
    return float(effects.mean()), float(low), float(high)


def _verdict(claim: Claim, low: float, high: float) -> Verdict:
    if claim.versus is None:
        met, missed = (low, high) if claim.direction == "higher" else (-high, -low)
        bound = claim.margin if claim.direction == "higher" else -claim.margin
        return "holds" if met >= bound else "refuted" if missed < bound else "undecided"
    return "holds" if low > claim.margin else "refuted" if high < claim.margin else "undecided"
