"""Put an experiment's claims to the test: run its arms over seeds, keep what is finished, judge, and write the verdict file."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from poise.core.lab import catalogs
from poise.core.lab.atomic import replacing, write_json
from poise.core.lab.environment import environment
from poise.core.lab.errors import BadInput, RunFailed
from poise.core.lab.execute import Plan, Request, finished, is_stale, plan
from poise.core.lab.report import in_order
from poise.core.lab.statistics import judge

Engine = Literal["local", "ray"]


@dataclass(frozen=True)
class Job:
    """One seed of one method, run by a process of its own: ``poise run`` with ``--resume``."""

    request: Request
    threads: int

    @property
    def name(self) -> str:
        return f"{self.request.method} seed {self.request.seed}"

    def __call__(self) -> str | None:
        """Run it; return what went wrong, if anything."""
        request = self.request
        command = [sys.executable, "-m", "poise.core.lab.cli", "run", request.method, "--preset", request.preset]
        command += [
            "--seed",
            str(request.seed),
            "--device",
            request.device,
            "--out",
            str(request.out),
            "--resume",
            "--json",
        ]
        command += ["--data", str(request.data)] if request.data else []
        threads = {name: str(self.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
        done = subprocess.run(command, env=os.environ | threads, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return None
        lines = done.stderr.strip().splitlines()
        return lines[-1] if lines else f"ended with exit code {done.returncode}"


def verify(
    names: Iterable[str],
    *,
    seeds: int = 5,
    preset: str = "quick",
    jobs: int | None = None,
    engine: Engine = "local",
    device: str = "auto",
    data: Path | None = None,
    root: Path = Path("runs/verify"),
    results: Path | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """Verify methods over the seeds ``0..seeds - 1``.

    Args:
        names: full names of the methods.
        seeds: number of seeds.
        preset: the preset whose claims are judged.
        jobs: processes at a time; the cores are divided among them. Default: one per core.
        engine: ``local`` processes, or tasks on a Ray cluster whose nodes share the file system.
        device: passed to every run.
        data: passed to every run.
        root: where the runs are kept; finished arms found there are not run again, unless their code or settings changed.
        results: folder of the verdict files; None keeps them with the runs.
        tell: told of every finished job.

    Returns:
        The verdict of each method.

    Raises:
        BadInput: no claims for this preset, or the engine is not installed.
        RunFailed: some runs failed; the finished ones are kept.
    """
    if seeds < 1:
        raise BadInput(f"--seeds must be at least 1, got {seeds}")
    plans = {name: [_seed_plan(name, preset, seed, device, data, root) for seed in range(seeds)] for name in names}
    for name, of_method in plans.items():
        if not any(preset in claim.presets for claim in of_method[0].experiment.claims):
            raise BadInput(f"{name} makes no claim about the preset {preset!r}")
    waiting = [one for of_method in plans.values() for one in of_method if _unfinished(one)]
    cores = os.cpu_count() or 1
    workers = min(jobs or cores, max(1, len(waiting)))
    todo = [Job(one.request, max(1, cores // workers)) for one in waiting]
    if skipped := sum(map(len, plans.values())) - len(todo):
        tell(f"{skipped} runs were finished already")
    failures = (_ray if engine == "ray" else _local)(todo, workers, tell)
    if failures:
        first = "; ".join(f"{name}: {why}" for name, why in list(failures.items())[:3])
        raise RunFailed(
            f"{len(failures)} of {len(todo)} runs failed ({first}); finished runs are kept, run verify again to go on"
        )
    return [_verdict(name, of_method, results, tell) for name, of_method in plans.items()]


def _seed_plan(name: str, preset: str, seed: int, device: str, data: Path | None, root: Path) -> Plan:
    method = catalogs.find(name)
    out = root / method.name.replace("/", "-") / preset / f"seed{seed}"
    request = Request(method=method.name, preset=preset, seed=seed, device=device, data=data, out=out, resume=True)
    return plan(request)


def _unfinished(one: Plan) -> bool:
    out = _out(one)
    if is_stale(one, out):
        shutil.rmtree(out)
    return any(finished(arm, out) is None for arm in one.arms)


def _local(jobs: list[Job], workers: int, tell: Callable[[str], None]) -> dict[str, str]:
    failures = {}
    with ThreadPoolExecutor(workers) as pool:
        running = {pool.submit(job): job for job in jobs}
        for count, future in enumerate(as_completed(running), 1):
            name, problem = running[future].name, future.result()
            tell(f"[{count}/{len(jobs)}] {name}: {problem or 'done'}")
            if problem:
                failures[name] = problem
    return failures


def _ray(jobs: list[Job], workers: int, tell: Callable[[str], None]) -> dict[str, str]:
    try:
        import ray
    except ModuleNotFoundError:
        raise BadInput("--engine ray needs Ray: pip install 'poise-core[ray]'") from None
    if not ray.is_initialized():
        ray.init(
            log_to_driver=False,
            include_dashboard=False,
            **({} if "RAY_ADDRESS" in os.environ else {"num_cpus": workers}),
        )
    root = Path.cwd()
    task = ray.remote(num_cpus=1)(_in_folder)
    names = {}
    for job in jobs:
        absolute = replace(job, request=replace(job.request, out=root / _required(job.request.out)))
        names[task.remote(absolute)] = job.name
    failures, left = {}, list(names)
    while left:
        (ready, *_), left = ray.wait(left)
        problem = ray.get(ready)
        tell(f"[{len(jobs) - len(left)}/{len(jobs)}] {names[ready]}: {problem or 'done'}")
        if problem:
            failures[names[ready]] = problem
    return failures


def _in_folder(job: Job) -> str | None:
    return job()


def _verdict(name: str, plans: list[Plan], results: Path | None, tell: Callable[[str], None]) -> dict[str, Any]:
    first = plans[0]
    records = [[_record(one, arm) for one in plans] for arm in first.arms]
    arms = {
        arm: {metric: [record["metrics"][metric] for record in of_arm] for metric in of_arm[0]["metrics"]}
        for arm, of_arm in zip(first.arms, records, strict=True)
    }
    preset = first.request.preset
    verdict = {
        "method": first.settings["method"],
        "preset": preset,
        "seeds": [one.request.seed for one in plans],
        "claims": _judge_all(first, preset, arms),
        "arms": arms,
        "environment": environment(),
        "seconds": round(sum(record["seconds"] for of_arm in records for record in of_arm), 1),
    }
    package, slug = verdict["method"].split("/")
    write_json(_out(first).parent / "verdict.json", verdict)
    if results is not None:
        published = results / package / verdict_file(slug, preset)
        if _publish(published, verdict, tell):
            _publish_figure(_out(first) / "compare" / "figures", published)
    return verdict


def verdict_file(slug: str, preset: str) -> str:
    """The name of the file that keeps a method's verdict under a preset."""
    return f"{slug}.json" if preset == "quick" else f"{slug}.{preset}.json"


def _judge_all(first: Plan, preset: str, arms: dict[str, dict[str, list[float]]]) -> list[dict[str, Any]]:
    try:
        return [judge(claim, arms) for claim in first.experiment.claims if preset in claim.presets]
    except ValueError as error:
        raise RunFailed(f"{first.settings['method']}: {error}") from error


def _publish_figure(figures: Path, verdict: Path) -> None:
    """Keep the first comparison of the first seed beside the verdict, for the docs page: small, with a palette of 256 colours."""
    from PIL import Image

    for figure in in_order(figures)[:1]:
        with Image.open(figure) as picture:
            picture.thumbnail((1600, 2400))
            small = picture.convert("RGB").quantize(256)
        with replacing(verdict.with_suffix(".png")) as temporary:
            small.save(temporary, format="PNG", optimize=True)


def _publish(path: Path, verdict: dict[str, Any], tell: Callable[[str], None]) -> bool:
    """Write a verdict file, unless one over more seeds is there; whether it was written."""
    known = len(json.loads(path.read_text(encoding="utf-8"))["seeds"]) if path.is_file() else 0
    if known > len(verdict["seeds"]):
        tell(f"{path} has {known} seeds and was left as it is")
        return False
    write_json(path, verdict)
    tell(f"wrote {path}")
    return True


def _record(one: Plan, arm: str) -> dict[str, Any]:
    return json.loads((_out(one) / arm / "result.json").read_text(encoding="utf-8"))


def _out(one: Plan) -> Path:
    return _required(one.request.out)


def _required(out: Path | None) -> Path:
    assert out is not None
    return out


def results_folder() -> Path:
    """``docs/results`` of the workspace around the current folder, else ``results`` in the current folder."""
    for folder in (Path.cwd(), *Path.cwd().parents):
        if (folder / "docs" / "results").is_dir() or (folder / "uv.lock").is_file():
            return folder / "docs" / "results"
    return Path("results")
