"""Run the arms of an experiment under one seed, into one folder.

::

    OUT/run.json                 what was asked for
    OUT/<arm>/metrics.jsonl      the log; result.json: the metrics; figures/, artifacts/, checkpoints/, tensorboard/
    OUT/compare/figures/         figures over several arms
    OUT/report.html
"""

import json
import math
import os
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from poise.core.lab import catalogs, settings
from poise.core.lab.atomic import remove_leftovers, write_json, write_text
from poise.core.lab.errors import BadInput, RunFailed
from poise.core.lab.fingerprint import fingerprint
from poise.core.lab.run import ArmResult, Run

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Request:
    """One ``poise run``.

    Attributes:
        method: full name of the method.
        preset: name of the preset.
        changes: ``key=value`` settings.
        arms: the arms to run; empty for all.
        seed: the seed.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        data: folder of a published data set, for presets that read one.
        out: the run's folder; None chooses one below ``runs/``.
        resume: go on with what is in ``out``.
        trackers: names of accelerate's trackers.
    """

    method: str
    preset: str = "quick"
    changes: tuple[str, ...] = ()
    arms: tuple[str, ...] = ()
    seed: int = 0
    device: str = "auto"
    data: Path | None = None
    out: Path | None = None
    resume: bool = False
    trackers: tuple[str, ...] = ("tensorboard",)


@dataclass(frozen=True)
class Plan:
    """A request that was checked against the experiment."""

    request: Request
    experiment: Any
    config: Any
    arms: tuple[str, ...]
    settings: dict[str, Any]


def plan(request: Request) -> Plan:
    """Check a request.

    Raises:
        BadInput: unknown method, preset, arm or setting; a data folder that is not there.
    """
    method = catalogs.find(request.method)
    experiment = catalogs.load_experiment(method)
    if request.preset not in experiment.presets:
        raise BadInput(
            f"{method.name} has no preset {request.preset!r}{catalogs.nearest(request.preset, list(experiment.presets))}"
        )
    arms = experiment.arms_of(request.preset)
    for arm in request.arms:
        if arm not in arms:
            raise BadInput(f"{method.name} has no arm {arm!r} in {request.preset}{catalogs.nearest(arm, list(arms))}")
    if request.data is not None and not request.data.exists():
        raise BadInput(f"--data {request.data}: there is no such file or folder")
    config = settings.override(experiment.presets[request.preset], list(request.changes))
    values = settings.as_json(config)
    asked = {
        "method": method.name,
        "preset": request.preset,
        "seed": request.seed,
        "config": values,
        "fingerprint": fingerprint(method.experiment, config=values, seed=request.seed),
    }
    return Plan(request, experiment, config, request.arms or arms, asked)


def execute(plan: Plan, progress: Any = None) -> dict[str, Any]:
    """Run what is planned; arms that are finished already are kept.

    Args:
        plan: a checked request.
        progress: called with an arm's name, returns its progress display.

    Returns:
        What ``poise run --json`` prints.

    Raises:
        BadInput: the folder holds something else.
        RunFailed: an arm failed; its state is kept.
    """
    started = time.monotonic()
    out = _folder(plan)
    kept: dict[str, ArmResult | None] = {}
    if is_main():
        remove_leftovers(out)
        kept = {arm: finished(arm, out) for arm in plan.arms}
    kept = _from_main(kept, plan.request.device)  # decided once, while no process is ahead of another
    results = {arm: kept[arm] or _arm(plan, arm, out, progress) for arm in plan.arms}
    report = out / "report.html"
    if is_main():
        _compare(plan, results, out)
        from poise.core.lab.report import write_report

        write_report([out], report)
    _leave_together()
    return {
        "method": plan.settings["method"],
        "preset": plan.request.preset,
        "seed": plan.request.seed,
        "arms": {arm: dict(result.metrics) for arm, result in results.items()},
        "out": str(out),
        "report": str(report),
        "seconds": round(time.monotonic() - started, 3),
    }


def finished(arm: str, out: Path) -> ArmResult | None:
    """The result of an arm in ``out``, if it is there."""
    path = out / arm / "result.json"
    if not path.is_file():
        return None
    return ArmResult(arm, json.loads(path.read_text(encoding="utf-8"))["metrics"], path.parent)


def is_stale(plan: Plan, out: Path) -> bool:
    """Whether ``out`` holds a run with other settings or of other code."""
    path = out / "run.json"
    return (
        path.is_file() and json.loads(path.read_text(encoding="utf-8"))["fingerprint"] != plan.settings["fingerprint"]
    )


def _folder(plan: Plan) -> Path:
    out = plan.request.out
    if is_main():
        out = out or _free_folder(plan)
        _claim_folder(plan, out)
    chosen = _from_main(out, plan.request.device)
    assert chosen is not None
    return chosen


def _claim_folder(plan: Plan, out: Path) -> None:
    """Write the settings into ``out``, unless it belongs to something else."""
    known = out / "run.json"
    try:
        if known.is_file():
            if not plan.request.resume:
                raise BadInput(
                    f"--out {out} holds a run already: add --resume to go on with it, or choose another folder"
                )
            if is_stale(plan, out):
                raise BadInput(f"--out {out} was made with {_difference(plan, known)}; choose another folder")
        elif out.is_dir() and any(out.iterdir()):
            raise BadInput(f"--out {out} is not empty and holds no run; choose another folder")
        write_json(known, plan.settings)
    except OSError as error:
        raise BadInput(f"--out {out}: cannot write there ({error.strerror or error})") from error


def _difference(plan: Plan, path: Path) -> str:
    there = json.loads(path.read_text(encoding="utf-8"))
    for key in ("method", "preset", "seed"):
        if there[key] != plan.settings[key]:
            return f"{key} {there[key]!r} instead of {plan.settings[key]!r}"
    for key, value in plan.settings["config"].items():
        if there["config"].get(key) != value:
            return f"{key}={there['config'].get(key)!r} instead of {value!r}"
    return "another version of the code"


def _free_folder(plan: Plan) -> Path:
    base = Path("runs") / f"{plan.settings['method'].replace('/', '-')}-{plan.request.preset}-seed{plan.request.seed}"
    candidates = [base, *(base.with_name(f"{base.name}-{count}") for count in range(2, 1000))]
    taken = [folder for folder in candidates if folder.exists()]
    if plan.request.resume and taken:
        return taken[-1]
    return next(folder for folder in candidates if not folder.exists())


def _arm(plan: Plan, arm: str, out: Path, progress: Any) -> ArmResult:
    started = time.monotonic()
    folder = out / arm
    request = plan.request
    try:
        run = Run(
            folder,
            seed=request.seed,
            device=request.device,
            data=request.data,
            progress=progress(arm) if progress else None,
            trackers=request.trackers,
        )
        try:
            metrics = _checked(plan.experiment.run(plan.config, arm, run))
        finally:
            run.close()
        if run.is_main:
            record = {"arm": arm, "metrics": metrics, "seconds": round(time.monotonic() - started, 3), **plan.settings}
            write_json(folder / "result.json", record)
    except BadInput:
        raise
    except KeyboardInterrupt:
        raise RunFailed(f"interrupted in arm {arm}; {_how_to_resume(plan, out)}") from None
    except (
        Exception
    ) as error:  # the experiment's own code may raise anything; the user gets one line and the traceback's place
        raise RunFailed(
            f"arm {arm} failed: {_one_line(error)}; {_keep_traceback(folder)}{_how_to_resume(plan, out)}"
        ) from error
    return ArmResult(arm, metrics, folder)


def _checked(metrics: Mapping[str, float]) -> dict[str, float]:
    values = {key: float(value) for key, value in metrics.items()}
    for key, value in values.items():
        if not math.isfinite(value):
            raise RunFailed(f"the metric {key} is {value}")
    return values


def _keep_traceback(folder: Path) -> str:
    path = folder / "error.txt"
    try:
        write_text(path, traceback.format_exc())
    except OSError:  # a full disk is the likely reason for being here
        return ""
    return f"traceback in {path}; "


def _how_to_resume(plan: Plan, out: Path) -> str:
    changes = "".join(f" --set {change}" for change in plan.request.changes)
    data = f" --data {plan.request.data}" if plan.request.data else ""
    return (
        f"resume with: poise run {plan.settings['method']} --preset {plan.request.preset} --seed {plan.request.seed}"
        f"{changes}{data} --out {out} --resume"
    )


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, RunFailed) else f"{type(error).__name__}: {text}"


def _compare(plan: Plan, results: dict[str, ArmResult], out: Path) -> None:
    if plan.experiment.compare is None:
        return
    run = Run(out / "compare", seed=plan.request.seed, device=plan.request.device, data=plan.request.data)
    try:
        plan.experiment.compare(plan.config, results, run)
    finally:
        run.close()


def is_main() -> bool:
    """Whether this process, of those that ``accelerate launch`` started, writes the results."""
    return os.environ.get("RANK", "0") == "0"


def _from_main(value: T, device: str) -> T:
    """The main process's value, in every process."""
    if _processes() == 1:
        return value
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    from poise.core.gpu import pick_device

    PartialState(cpu=pick_device(device).type == "cpu")
    return broadcast_object_list([value])[0]


def _leave_together() -> None:
    """Wait for the other processes and part with them."""
    if _processes() > 1:
        from accelerate import PartialState

        PartialState().wait_for_everyone()
        PartialState().destroy_process_group()


def _processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))
