"""What each command of ``poise`` does. Heavy imports stay inside the functions: ``list`` must not load torch."""

import argparse
import contextlib
import dataclasses
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from poise.core.lab import catalogs
from poise.core.lab.errors import BadInput


def list_command(options: argparse.Namespace) -> int:
    """``poise list``."""
    methods = catalogs.in_package(options.package)
    if options.json:
        keys = ("slug", "package", "title", "kind", "presets", "arms")
        _print_json([{key: getattr(method, key) for key in keys} for method in methods])
    elif methods:
        _print_table(
            ("method", "kind", "what it is for"), [(method.name, method.kind, method.problem) for method in methods]
        )
    else:
        print(f"no method in {options.package or 'the installed packages'} yet")
    return 0


def info_command(options: argparse.Namespace) -> int:
    """``poise info``."""
    from poise.core.lab.settings import as_json
    from poise.core.lab.verify import results_folder, verdict_file

    method = catalogs.find(options.method)
    experiment = catalogs.load_experiment(method)
    folder = results_folder() / method.package
    verified = {
        preset: {key: verdict[key] for key in ("seeds", "claims")}
        for preset in experiment.presets
        if (verdict := _verdict(folder / verdict_file(method.slug, preset)))
    }
    record = {
        **dataclasses.asdict(method),
        "defaults": {name: as_json(config) for name, config in experiment.presets.items()},
        "arms": dict(experiment.arms),
        "claims": [dataclasses.asdict(claim) for claim in experiment.claims],
        "verified": {**verified["quick"], "presets": verified} if "quick" in verified else None,
    }
    if options.json:
        _print_json(record)
    else:
        _print_info(record, method.name)
    return 0


def _verdict(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def cite_command(options: argparse.Namespace) -> int:
    """``poise cite``."""
    print("\n\n".join(dict.fromkeys(catalogs.find(name).bibtex.strip() for name in options.methods)))
    return 0


def run_command(options: argparse.Namespace) -> int:
    """``poise run``."""
    from poise.core.lab import execute, progress

    _check_device(options.device)
    trackers = tuple(options.tracker or ("tensorboard",))
    request = execute.Request(
        method=options.method,
        preset=options.preset,
        changes=tuple(options.set),
        arms=tuple(dict.fromkeys(options.arm)),
        seed=options.seed,
        device=options.device,
        data=options.data,
        out=options.out,
        resume=options.resume,
        trackers=() if trackers == ("none",) else trackers,
    )
    with _quiet_stdout():
        done = execute.execute(execute.plan(request), progress.for_arm)
    if not execute.is_main():
        return 0
    if options.json:
        _print_json(done)
    else:
        rows = [
            (arm, metric, _number(value)) for arm, metrics in done["arms"].items() for metric, value in metrics.items()
        ]
        _print_table(("arm", "metric", "value"), rows)
        print(f"\n{done['method']} ({done['preset']}, seed {done['seed']}) took {done['seconds']:.0f} s")
        print(f"report: {done['report']}")
    return 0


def verify_command(options: argparse.Namespace) -> int:
    """``poise verify``."""
    from poise.core.lab.verify import results_folder, verify

    _check_device(options.device)
    names = [catalogs.find(name).name for name in options.methods]
    if options.all or options.package:
        names += [method.name for method in catalogs.in_package(options.package)]
    if not names:
        raise BadInput("verify: name a method, or give --all or --package P")
    verdicts = verify(
        dict.fromkeys(names),
        seeds=options.seeds,
        preset=options.preset,
        jobs=options.jobs,
        engine=options.engine,
        device=options.device,
        data=options.data,
        root=options.root,
        results=options.results or results_folder(),
        tell=lambda text: print(text, file=sys.stderr),
    )
    if options.json:
        _print_json(verdicts)
    else:
        _print_claims((verdict["method"], claim) for verdict in verdicts for claim in verdict["claims"])
    return int(any(claim["verdict"] == "refuted" for verdict in verdicts for claim in verdict["claims"]))


def report_command(options: argparse.Namespace) -> int:
    """``poise report``."""
    from poise.core.lab.report import default_page, write_report

    page = options.out or default_page(options.runs)
    write_report(options.runs, page)
    if options.json:
        _print_json({"report": str(page), "runs": [str(folder) for folder in options.runs]})
    else:
        print(page)
    return 0


def doctor_command(options: argparse.Namespace) -> int:
    """``poise doctor``."""
    from poise.core.lab.doctor import examine

    found = examine()
    if options.json:
        _print_json(found)
        return 0
    rows = [(key, str(value)) for key, value in found["environment"].items()]
    rows += [("memory", f"{found['memory_gb']} GB"), ("free disk", f"{found['disk_gb']} GB")]
    rows += [
        (name, f"{version}, {found['methods'][name.removeprefix('poise-')]} methods")
        for name, version in found["packages"].items()
    ]
    rows += [(name, version or "not installed") for name, version in found["optional"].items()]
    rows += [
        (f"data: {one['name']}", "available" if one["available"] else f"missing ({one['package']})")
        for one in found["data"]
    ]
    _print_table(("what", "found"), rows)
    print("\n" + ("\n".join(f"problem: {problem}" for problem in found["problems"]) or "everything works"))
    return 0


def _check_device(device: str) -> None:
    from poise.core.gpu import pick_device

    try:
        pick_device(device)
    except (ValueError, RuntimeError) as error:
        raise BadInput(f"--device {device}: {error}") from error


@contextlib.contextmanager
def _quiet_stdout() -> Iterator[None]:
    """Libraries that print go to stderr, so that stdout holds the result alone."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def _print_json(value: Any) -> None:
    print(json.dumps(value, ensure_ascii=False, default=str))


def _print_info(record: dict[str, Any], name: str) -> None:
    print(f"{name}: {record['title']} ({record['kind']})\n{record['paper']}\n{record['url']}\n")
    print(f"{record['problem']}\n{record['summary']}\n\n  {record['formula']}\n")
    print("\n".join(f"    {line}" for line in record["usage"].strip().splitlines()))
    print("\narms")
    _print_table(("arm", "what it is"), [*record["arms"].items()])
    for preset, values in record["defaults"].items():
        print(f"\npreset {preset}: " + ", ".join(f"{key}={value}" for key, value in values.items()))
    print("\nclaims")
    if record["verified"]:
        for preset, verdict in record["verified"]["presets"].items():
            print(f"preset {preset}, {len(verdict['seeds'])} seeds")
            _print_claims((name, claim) for claim in verdict["claims"])
    else:
        print("not verified here yet: poise verify " + name)
        _print_table(
            ("metric", "arm", "versus", "direction", "margin", "kind"),
            [
                tuple(str(claim[key]) for key in ("metric", "arm", "versus", "direction", "margin", "kind"))
                for claim in record["claims"]
            ],
        )


def _print_claims(claims: Iterable[tuple[str, dict[str, Any]]]) -> None:
    rows = []
    for name, claim in claims:
        factor = " x" if claim["scale"] == "ratio" else ""
        effect = f"{_number(claim['effect'])}{factor} [{_number(claim['ci'][0])}, {_number(claim['ci'][1])}]"
        rows.append(
            (
                name,
                claim["metric"],
                claim["arm"],
                claim["versus"] or "bound",
                effect,
                _number(claim["margin"]),
                claim["verdict"],
            )
        )
    _print_table(("method", "metric", "arm", "versus", "effect [95 % interval]", "margin", "verdict"), rows)


def _print_table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> None:
    table = [head, *rows]
    widths = [max(len(row[column]) for row in table) for column in range(len(head))]
    for index, row in enumerate(table):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        if index == 0:
            print("  ".join("-" * width for width in widths))


def _number(value: float) -> str:
    return f"{value:.4g}"
