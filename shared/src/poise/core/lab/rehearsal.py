"""What the tests of every experiment do with it: run an arm in a folder of its own, and kill a run to see how it goes on."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from poise.core.lab.experiment import Experiment
from poise.core.lab.run import ArmResult, Run


def rehearse(experiment: Experiment, config: Any, arm: str, folder: Path, **settings: Any) -> ArmResult:
    """Run one arm in ``folder/arm``.

    Args:
        experiment: whose arm.
        config: its settings, small ones.
        arm: which arm.
        folder: holds a folder for each arm.
        settings: of :meth:`Run.scratch`.

    Raises:
        AssertionError: a metric is not finite.
    """
    run = Run.scratch(folder / arm, **settings)
    metrics = experiment.run(config, arm, run)
    if wrong := {name: value for name, value in metrics.items() if not math.isfinite(value)}:
        raise AssertionError(f"{experiment.method}, arm {arm!r}: metrics must be finite, got {wrong}")
    return ArmResult(arm, metrics, run.dir)


def figures(folder: Path) -> set[str]:
    """The files of the figures that a run drew."""
    return {path.name for path in (folder / "figures").iterdir()}


class KilledError(Exception):
    """A run was killed on purpose."""


@contextmanager
def killed_at(owner: Any, name: str, call: int) -> Iterator[None]:
    """Within, the ``call``-th call of ``owner.name`` ends the run instead.

    Raises:
        AssertionError: the run ended before it.
    """
    original, calls = getattr(owner, name), 0

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise KilledError
        return original(*arguments, **options)

    with patch.object(owner, name, counted):
        try:
            yield
        except KilledError:
            return
    raise AssertionError(f"{name} was to be called {call} times, got {calls}")


def check_resume(
    experiment: Experiment,
    config: Any,
    arm: str,
    folder: Path,
    *,
    kill: tuple[Any, str, int],
    restart: Callable[[], None] | None = None,
) -> None:
    """A run that checkpoints every step and is killed must go on as if it had not been.

    Args:
        experiment: whose arm.
        config: its settings, small ones.
        arm: which arm.
        folder: where both runs are made.
        kill: the arguments of :func:`killed_at`.
        restart: forgets what a new process would not know.

    Raises:
        AssertionError: metrics or log of the resumed run differ from those of an uninterrupted one.
    """
    with patch("poise.core.lab.run.CHECKPOINT_SECONDS", 0.0):
        whole = rehearse(experiment, config, arm, folder / "whole")
        with killed_at(*kill):
            rehearse(experiment, config, arm, folder / "killed")
        if restart is not None:
            restart()
        resumed = rehearse(experiment, config, arm, folder / "killed")
    if resumed.metrics != whole.metrics:
        raise AssertionError(f"the resumed run must end like the whole one, got {resumed.metrics} for {whole.metrics}")
    logs = [(result.dir / "metrics.jsonl").read_bytes() for result in (whole, resumed)]
    if logs[0] != logs[1]:
        raise AssertionError("the resumed run must log what the whole one did")
