"""poise.core.bench compares calls fairly, and tools/bench.py writes what it measured."""

import gc
import json
import subprocess
import sys
import time
from pathlib import Path

import bench as tool
import pytest
import torch

from poise.core.bench import case, interleave, peak_memory, peer, relative_difference


def test_every_round_calls_each_once_and_the_order_alternates() -> None:
    calls: list[str] = []
    order = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    interleave(order, repeats=4, warmup=1, least_ms=0.0)
    assert "".join(calls) == "abc" + "abc" + "cba" + "abc" + "cba"


def test_times_are_milliseconds_of_one_call() -> None:
    times = interleave({"short": lambda: time.sleep(0.002), "long": lambda: time.sleep(0.02)}, repeats=3)
    assert 2 <= times["short"] < 15
    assert 20 <= times["long"] < 60


def test_short_calls_are_repeated_until_the_clock_can_measure_them() -> None:
    calls = 0

    def short() -> None:
        nonlocal calls
        calls += 1

    interleave({"short": short}, repeats=1, warmup=100, least_ms=5.0)
    assert calls > 1_000


def test_median_ignores_an_outlier() -> None:
    pauses = iter([0.0, 0.0, 0.0, 0.3, 0.0, 0.0])
    times = interleave({"call": lambda: time.sleep(next(pauses))}, repeats=5, warmup=1, least_ms=0.0)
    assert times["call"] < 50


def test_garbage_collection_is_off_while_timing_and_back_on_after_an_error() -> None:
    seen: list[bool] = []
    interleave({"call": lambda: seen.append(gc.isenabled())}, repeats=1, warmup=1, least_ms=0.0)
    assert seen == [True, False]
    assert gc.isenabled()
    answers = iter([None, 1 / 1])

    def fails_while_timed() -> None:
        if next(answers) is not None:
            raise KeyError("inside")

    with pytest.raises(KeyError):
        interleave({"call": fails_while_timed}, repeats=1, warmup=1)
    assert gc.isenabled()


@pytest.mark.parametrize("arguments", [{"repeats": 0}, {"warmup": 0}])
def test_interleave_refuses_nothing_to_do(arguments: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="expected calls"):
        interleave({"call": lambda: None}, **arguments)
    with pytest.raises(ValueError, match="expected calls"):
        interleave({})


def test_case_has_times_ratio_and_memory() -> None:
    record = case(
        "zeros",
        plain=lambda: torch.zeros(250_000),
        method=lambda: torch.zeros(1_000_000).square(),
        repeats=3,
    )
    assert record["ratio"] == record["method_ms"] / record["plain_ms"]
    assert record["plain_mb"] == pytest.approx(1.0)
    assert record["method_mb"] == pytest.approx(8.0)


def test_case_without_memory_says_so() -> None:
    record = case("nothing", plain=lambda: None, method=lambda: None, repeats=1, memory=False)
    assert record["plain_mb"] is None
    assert record["method_mb"] is None


def test_peer_compares_times_and_results() -> None:
    x = torch.randn(50, 50, generator=torch.Generator().manual_seed(0))
    record = peer("numpy", "2", "50 x 50", lambda: x @ x, lambda: (x.numpy() @ x.numpy()) * 1.001, repeats=2)
    assert record["speedup"] == record["peer_ms"] / record["ours_ms"]
    assert record["agreement"] == pytest.approx(0.001, rel=0.05)
    by_caller = peer("p", "1", "c", lambda: 1.0, lambda: 2.0, agreement=0.25, repeats=1)
    assert by_caller["agreement"] == 0.25
    by_function = peer("p", "1", "c", lambda: 3.0, lambda: 2.0, agreement=lambda a, b: a - b, repeats=1)
    assert by_function["agreement"] == 1.0


def test_relative_difference_is_zero_for_equal_results_of_any_kind() -> None:
    assert relative_difference(torch.arange(3.0, requires_grad=True), [0.0, 1.0, 2.0]) == 0
    assert relative_difference(torch.ones(2, dtype=torch.bfloat16), [1.0, 1.0]) == 0
    assert relative_difference(1.5, 1.0) == pytest.approx(0.5)
    assert relative_difference([0.5], [0.0]) == 0.5
    with pytest.raises(ValueError, match="same shape"):
        relative_difference([1.0], [1.0, 2.0])


def test_peak_memory_is_reexported() -> None:
    assert peak_memory(lambda: torch.zeros(1_000_000)) == pytest.approx(4.0)


BENCHMARK = """
from poise.core.bench import Case, Peer

def bench():
    return {
        "method": "ot/best-map",
        "cases": [Case(name="a", plain_ms=1.0, method_ms=2.3456789, ratio=2.3456789, plain_mb=None, method_mb=None)],
        "peers": [Peer(peer="p", version="1", case="a", ours_ms=1.0, peer_ms=2.0, speedup=2.0, agreement=1.23456e-9)],
    }
"""


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A workspace with one benchmark, which the tool takes for its own."""
    monkeypatch.setattr(tool, "ROOT", tmp_path)
    for member in ("packages/ot", "packages/rl", "shared"):
        (tmp_path / member / "benchmarks").mkdir(parents=True)
    (tmp_path / "packages/ot/benchmarks/bench_best_map.py").write_text(BENCHMARK)
    return tmp_path


def test_tool_writes_the_record_with_its_environment(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main(["ot/best-map"]) == 0
    record = json.loads((workspace / "docs/results/ot/best-map.bench.json").read_text())
    assert record["cases"][0]["ratio"] == 2.346
    assert record["peers"][0]["agreement"] == 1.235e-9
    assert {"python", "torch", "processor", "threads", "date"} <= record["environment"].keys()
    assert "2.35×" in capsys.readouterr().out


def test_tool_finds_every_benchmark(workspace: Path) -> None:
    (workspace / "shared/benchmarks/bench_cut_mix.py").write_text(BENCHMARK)
    assert tool.benchmarked(None) == ["core/cut-mix", "ot/best-map"]
    assert tool.benchmarked("core") == ["core/cut-mix"]
    assert tool.main(["--all", "--package", "ot"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name methods"),
        (["ot/best-map", "--all"], "name methods"),
        (["ot/best-map", "--package", "ot"], "name methods"),
        (["--all", "--package", "rl"], "'rl' has no benchmark"),
        (["rl/beer"], "packages/rl/benchmarks/bench_beer.py does not exist"),
    ],
)
def test_tool_refuses_bad_usage_in_one_line(
    workspace: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        tool.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("ot/best-map", "ot/other"), "must return the method's name"),
        (("plain_ms=1.0, ", ""), "a case has the fields"),
        (("speedup=2.0", "speedup=float('nan')"), "speedup must be a finite number"),
        (("ratio=2.3456789", "ratio=-1.0"), "ratio must be a finite number"),
    ],
)
def test_tool_refuses_a_malformed_record_and_writes_nothing(
    workspace: Path, change: tuple[str, str], message: str
) -> None:
    file = workspace / "packages/ot/benchmarks/bench_best_map.py"
    file.write_text(BENCHMARK.replace(*change))
    with pytest.raises(SystemExit, match=message):
        tool.main(["ot/best-map"])
    assert not (workspace / "docs").exists()


def test_tool_measures_several_methods_in_a_process_each(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (workspace / "shared/benchmarks/bench_cut_mix.py").write_text(BENCHMARK)
    commands: list[list[str]] = []

    def run(command: list[str], check: bool) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, returncode=len(commands) - 1)

    monkeypatch.setattr(subprocess, "run", run)
    assert tool.main(["--all"]) == 1
    assert commands == [[sys.executable, tool.__file__, name] for name in ("core/cut-mix", "ot/best-map")]
    assert "ot/best-map failed" in capsys.readouterr().err
