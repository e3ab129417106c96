"""What the PRDC experiment puts to the test."""

from poise.core.lab import Claim

PAPER = "Ran et al. 2023"
SOFTER = f"{PAPER}, abstract: a softer constraint, under which actions of neighbouring states may be taken"

LOGS = {
    "": "A log of many noises.",
    "narrow_": "A log of little noise.",
    "hopper_": "Hopper under smooth random actions.",
}
"""Prefixes of the metrics of each log of the ``quick`` preset, and what it is."""


def nearer(prefix: str, preset: str, note: str = "") -> Claim:
    """The constraint does what it minimises."""
    return Claim(
        metric=f"{prefix}distance",
        arm="prdc",
        direction="lower",
        scale="ratio",
        margin=2.0,
        kind="mechanism",
        source=f"{PAPER}: the distance to the data set is what is minimised",
        note=f"Mean d_beta(s, pi(s)) over 1,000 logged states at the end, against TD3 without a constraint. {note}".strip(),
        presets=(preset,),
    )


def soberer(prefix: str, preset: str, note: str = "") -> Claim:
    """Values are overestimated less."""
    return Claim(
        metric=f"{prefix}overestimation",
        arm="prdc",
        direction="lower",
        kind="mechanism",
        source=f"{PAPER}, abstract: values are overestimated less",
        note=f"Mean of Q(s0, pi(s0)) minus the discounted Monte-Carlo return, over 50 initial states. {note}".strip(),
        presets=(preset,),
    )


CLAIMS = (
    *(nearer(prefix, "quick", note) for prefix, note in LOGS.items()),
    *(soberer(prefix, "quick", note) for prefix, note in LOGS.items()),
    nearer("", "paper"),
    soberer("", "paper"),
    Claim(
        metric="neighbour_share",
        arm="prdc",
        versus=None,
        direction="higher",
        kind="mechanism",
        source=SOFTER,
        note="Share of logged states at which the nearest pair is not the one logged there, at the end.",
        presets=("quick", "paper"),
    ),
    Claim(
        metric="gain",
        arm="prdc",
        versus=None,
        direction="higher",
        kind="outcome",
        source=f"{PAPER}: the learned policy is better than the one that made the data",
        note="Mean return of 10 episodes minus the mean return of the logged ones, PRDC.",
    ),
    Claim(
        metric="gain",
        arm="td3bc",
        versus=None,
        direction="higher",
        kind="outcome",
        source=f"{PAPER}: the learned policy is better than the one that made the data",
        note="The same for TD3+BC.",
    ),
    Claim(
        metric="return",
        arm="prdc",
        direction="higher",
        kind="outcome",
        source=f"{PAPER}: without a constraint offline learning fails",
        presets=("quick", "paper"),
    ),
    Claim(
        metric="return",
        arm="prdc",
        versus="td3bc",
        direction="higher",
        kind="outcome",
        source=f"{PAPER}, abstract: state of the art on locomotion",
        note="Expected within the noise of the pendulum, whose log covers its states well.",
        presets=("quick", "paper"),
    ),
    Claim(
        metric="line_return",
        arm="prdc",
        versus="td3bc",
        direction="higher",
        kind="outcome",
        source=SOFTER,
        note="Where every other cell of a line was logged with steps away from the goal.",
    ),
    Claim(
        metric="line_gain",
        arm="td3bc",
        versus=None,
        direction="higher",
        kind="outcome",
        source=SOFTER,
        note="Cloning with a value still beats the behaviour there.",
    ),
    Claim(
        metric="line_return",
        arm="prdc",
        versus="beta_100",
        direction="higher",
        kind="outcome",
        source=f"{PAPER}: a large beta is behaviour cloning",
        note="As beta grows, PRDC loses what it has over TD3+BC.",
    ),
)
