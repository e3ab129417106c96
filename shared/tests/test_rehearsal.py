"""What tests of experiments rely on tells a sound experiment from one that does not resume, or measures nothing."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from poise.core.lab import Experiment, Run
from poise.core.lab.rehearsal import check_resume, figures, killed_at, rehearse


@dataclass(frozen=True)
class Config:
    steps: int = 6
    keep: bool = True
    """Whether what is counted goes into the checkpoints."""


def count(total: torch.Tensor) -> None:
    total += 1


class Counting:
    """Its method is where runs are killed."""

    @staticmethod
    def step(total: torch.Tensor) -> None:
        count(total)


def run(config: Config, arm: str, run: Run) -> dict[str, float]:
    total = torch.zeros((), dtype=torch.float64)
    for step in run.steps(config.steps, **({"total": total} if config.keep else {})):
        Counting.step(total)
        run.log(step, total=total)
    return {"total": float(total) if arm == "baseline" else torch.nan}


EXPERIMENT = Experiment(
    method="toy/counting", presets={"quick": Config()}, arms={"baseline": "", "broken": ""}, run=run, claims=()
)


def test_arms_are_run_in_folders_of_their_own(tmp_path: Path) -> None:
    result = rehearse(EXPERIMENT, Config(), "baseline", tmp_path)
    assert result.metrics == {"total": 6}
    assert result.dir == tmp_path / "baseline"
    (result.dir / "figures").mkdir()
    assert figures(result.dir) == set()


def test_metrics_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"arm 'broken': metrics must be finite, got \{'total': nan\}"):
        rehearse(EXPERIMENT, Config(), "broken", tmp_path)


def test_a_run_that_keeps_its_state_resumes(tmp_path: Path) -> None:
    restarted = []
    check_resume(
        EXPERIMENT,
        Config(),
        "baseline",
        tmp_path,
        kill=(Counting, "step", 4),
        restart=lambda: restarted.append(True),
    )
    assert restarted == [True]


def test_a_run_that_forgets_its_state_is_found_out(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="must end like the whole one"):
        check_resume(EXPERIMENT, Config(keep=False), "baseline", tmp_path, kill=(Counting, "step", 4))


def test_a_run_that_ends_before_it_is_killed_is_found_out() -> None:
    with pytest.raises(AssertionError, match="to be called 2 times, got 1"), killed_at(Counting, "step", 2):
        Counting.step(torch.zeros(()))
