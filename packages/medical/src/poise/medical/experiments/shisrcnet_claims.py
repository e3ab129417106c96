"""What the SHISRCNet experiment puts to the test."""

from typing import Literal

from poise.core.lab import Claim

PAPER = "Xie et al. 2023"


def mechanism(
    metric: str,
    arm: str,
    direction: Literal["higher", "lower"],
    source: str,
    *,
    versus: str | None = None,
    margin: float = 0.0,
    note: str = "",
) -> Claim:
    """A claim about what a part of the method does."""
    return Claim(
        metric=metric,
        arm=arm,
        versus=versus,
        direction=direction,
        kind="mechanism",
        margin=margin,
        source=f"{PAPER}, {source}",
        note=note,
    )


def outcome(metric: str, arm: str, versus: str, margin: float = 0.0) -> Claim:
    """A claim about what it is good for."""
    return Claim(
        metric=metric,
        arm=arm,
        versus=versus,
        direction="higher",
        kind="outcome",
        margin=margin,
        source=f"{PAPER}, abstract: from low resolution close to what high resolution gives",
    )


CLAIMS = (
    mechanism("view_gap", "shisrcnet", "higher", "the contrastive term", versus="no_contrast"),
    mechanism("gradient_share", "shisrcnet", "higher", "both halves train together"),
    mechanism(
        *("gradient_share", "detached", "lower", "both halves train together"),
        margin=1e-12,
        note="exactly 0 when the gradient is cut",
    ),
    mechanism(
        *("warmup_ratio", "shisrcnet", "lower", "the pixel term"),
        margin=1.0,
        note="the difference on test images after the warm-up, relative to that before",
    ),
    mechanism(
        *("l1_ratio", "shisrcnet", "lower", "the pixel term at weight 0.6"),
        margin=1.02,
        note="the difference after joint training, relative to that before: it falls, or stays within 2 %",
    ),
    outcome("psnr", "shisrcnet", "baseline", margin=0.5),
    outcome("accuracy", "two_stage", "baseline"),
    outcome("accuracy", "shisrcnet", "two_stage"),
    outcome("accuracy", "hr", "shisrcnet"),
    outcome("accuracy", "shisrcnet", "baseline"),
)
