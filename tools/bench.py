"""Measure what methods cost and write it to docs/results/<package>/<slug>.bench.json.

    uv run python tools/bench.py ot/monge-gap ot/sparse-ot     these methods
    uv run python tools/bench.py --all                         every method that has a benchmark
    uv run python tools/bench.py --all --package vision        every one of a package

A benchmark is the function ``bench()`` in ``benchmarks/bench_<name>.py`` of the method's package; it returns the
record, made with ``poise.core.bench``. Run it on an idle machine. Several methods are measured one after the other,
in a process each.
"""

import argparse
import importlib.util
import math
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any, NoReturn

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler counts memory; it need not report on itself

from result_tables import cases_table, peers_table

from poise.core.bench import Case, Peer
from poise.core.lab.atomic import write_json
from poise.core.lab.environment import environment

ROOT = Path(__file__).resolve().parent.parent


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", metavar="P/METHOD")
    parser.add_argument("--all", action="store_true", help="every method that has a benchmark")
    parser.add_argument("--package", metavar="P", help="with --all: only this package")
    options = parser.parse_args(arguments)
    if options.all == bool(options.methods) or (options.package and not options.all):
        parser.error("name methods, or ask for --all (of a --package)")
    methods = benchmarked(options.package) if options.all else options.methods
    if not methods:
        parser.error(f"package {options.package!r} has no benchmark" if options.package else "there is no benchmark")
    for method in methods:
        if not benchmark(method).is_file():
            parser.error(f"{method} has no benchmark: {benchmark(method).relative_to(ROOT)} does not exist")
    if len(methods) == 1:
        measure(methods[0])
        return 0
    failed = [name for name in methods if subprocess.run([sys.executable, __file__, name], check=False).returncode]
    for name in failed:
        print(f"{name} failed", file=sys.stderr)
    return 1 if failed else 0


def benchmarked(package: str | None) -> list[str]:
    """Full names of the methods that have a benchmark, in alphabetical order."""
    members = {"core": ROOT / "shared"} | {folder.name: folder for folder in (ROOT / "packages").iterdir()}
    return sorted(
        f"{name}/{file.stem.removeprefix('bench_').replace('_', '-')}"
        for name, member in members.items()
        for file in (member / "benchmarks").glob("bench_*.py")
        if package in (None, name)
    )


def benchmark(method: str) -> Path:
    """Where the benchmark of a method belongs."""
    package, _, slug = method.partition("/")
    member = ROOT / "shared" if package == "core" else ROOT / "packages" / package
    return member / "benchmarks" / f"bench_{slug.replace('-', '_')}.py"


def measure(method: str) -> None:
    """Run one benchmark, write its record, and print its ratios."""
    file = benchmark(method)
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    record = checked(module.bench(), method)
    package, _, slug = method.partition("/")
    result = ROOT / "docs" / "results" / package / f"{slug}.bench.json"
    write_json(result, rounded(record) | {"environment": {**environment(), "date": date.today().isoformat()}})
    print(f"{method}: {result.relative_to(ROOT)}")
    for rows, table in ((record["cases"], cases_table), (record["peers"], peers_table)):
        if rows:
            print(f"\n{table(rows)}")
    print()


def checked(record: Mapping[str, Any], method: str) -> dict[str, Any]:
    """The record, if it is complete and about ``method``; otherwise the program ends."""
    if record.keys() != {"method", "cases", "peers"} or record["method"] != method or not record["cases"]:
        fail(f"{method}: bench() must return the method's name, at least one case, and the peers, got {record}")
    for row, form in [(row, Case) for row in record["cases"]] + [(row, Peer) for row in record["peers"]]:
        if row.keys() != form.__annotations__.keys():
            fail(f"{method}: a {form.__name__.lower()} has the fields {list(form.__annotations__)}, got {row}")
        for name, value in row.items():
            if isinstance(value, float) and not (math.isfinite(value) and value >= 0):
                fail(f"{method}: {name} must be a finite number, not negative, got {value} in {row}")
    return dict(record)


def rounded(value: Any) -> Any:
    """Four significant digits: the rest is noise, and would change with every run."""
    match value:
        case float():
            return float(f"{value:.4g}")
        case Mapping():
            return {key: rounded(item) for key, item in value.items()}
        case list() | tuple():
            return [rounded(item) for item in value]
        case _:
            return value


def fail(message: str) -> NoReturn:
    sys.exit(f"error: {message}")


if __name__ == "__main__":
    sys.exit(main())
