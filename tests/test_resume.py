"""A run that is killed at any moment resumes to bit-identical results."""

import json
import multiprocessing
import os
import random
import socket
import sys
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Protocol

import psutil
import pytest

from poise.core.lab.cli import main

ARMS = ("baseline", "decay")
STEPS = 16
LINES = len(ARMS) * (STEPS // 2 + STEPS)

# Imported once and inherited by every run, which then starts within milliseconds.
PRELOADED = ["accelerate", "jinja2", "torch", "torch._dynamo", "poise.core.lab.execute", "poise.core.lab.report"]


class Runner(Protocol):
    """How this file starts and kills ``poise run``."""

    def start(self, out: Path, *, resume: bool = False) -> None:
        """Begin a run, or go on with one."""

    def is_running(self) -> bool:
        """Whether it has not ended yet."""

    def kill(self) -> None:
        """End it at once; it gets no chance to tidy up."""

    def wait(self) -> None:
        """Let it end by itself."""


def arguments(out: Path, resume: bool) -> list[str]:
    settings = ["--set", f"steps={STEPS}", "pause=0.02", *(["--resume"] if resume else [])]
    return ["run", "toy/blobs", "--tracker", "none", "--device", "cpu", "--out", str(out), *settings]


class Forked:
    """One process, forked from a server that has torch loaded."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOADED)
        self._process: BaseProcess | None = None

    def start(self, out: Path, *, resume: bool = False) -> None:
        self._process = self._context.Process(target=main, args=(arguments(out, resume),))
        self._process.start()

    def is_running(self) -> bool:
        return self._process is not None and self._process.is_alive()

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()

    def wait(self) -> None:
        assert self._process is not None
        self._process.join()


class Launched:
    """Two processes under ``accelerate launch``, killed together with their launcher."""

    def __init__(self) -> None:
        self._process: psutil.Popen | None = None

    def start(self, out: Path, *, resume: bool = False) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        # On a CPU, accelerate starts several processes only when it is told that they are for GPUs.
        options = [
            "--multi_gpu",
            "--num_processes=2",
            "--num_machines=1",
            "--mixed_precision=no",
            "--dynamo_backend=no",
        ]
        launch = [sys.executable, "-m", "accelerate.commands.launch", *options, f"--main_process_port={port}"]
        command = [*launch, "-m", "poise.core.lab.cli", *arguments(out, resume)]
        self._process = psutil.Popen(command, env=os.environ | {"ACCELERATE_USE_CPU": "true"})

    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def kill(self) -> None:
        if self._process is not None and self._process.poll() is None:
            # The launcher gives its workers sessions of their own, so that they do not die with it.
            family = [self._process, *self._process.children(recursive=True)]
            for member in family:
                member.kill()
            psutil.wait_procs(family)

    def wait(self) -> None:
        assert self._process is not None
        assert self._process.wait() == 0


@pytest.fixture(autouse=True)
def checkpoint_every_step(toy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POISE_CHECKPOINT_SECONDS", "0")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def forked() -> Iterator[Runner]:
    runner = Forked()
    yield runner
    runner.kill()


@pytest.fixture
def launched() -> Iterator[Runner]:
    runner = Launched()
    yield runner
    runner.kill()


def logged(out: Path) -> int:
    """How many lines the run has logged so far."""
    return sum(path.read_bytes().count(b"\n") for path in out.glob("*/metrics.jsonl"))


def results(out: Path) -> dict[str, object]:
    """Everything that a run leaves behind to be read: metrics, logs and tensors."""
    found: dict[str, object] = {}
    for arm in ARMS:
        found[f"{arm} metrics"] = json.loads((out / arm / "result.json").read_text())["metrics"]
        for path in sorted([*out.glob(f"{arm}/metrics*.jsonl"), *out.glob(f"{arm}/artifacts/*")]):
            found[f"{arm} {path.name}"] = path.read_bytes()
    return found


def run_with_kills(runner: Runner, out: Path, kills: int, seed: int) -> None:
    """Run to the end through ``kills`` kills, at random moments spread over what is left of the run."""
    draw = random.Random(seed)
    for left in range(kills, 0, -1):
        before = logged(out)
        until = min(LINES - 1, before + draw.randint(1, max(1, 2 * (LINES - before) // (left + 1))))
        runner.start(out, resume=out.exists())
        while logged(out) < until:
            assert runner.is_running(), "the run ended before it was killed"
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.03))
        runner.kill()
        assert not (out / "report.html").exists()
    runner.start(out, resume=True)
    runner.wait()


def same_bits(runner: Runner, folder: Path, kills: int, seed: int) -> None:
    """Compare a run with kills to one without."""
    runner.start(folder / "straight")
    runner.wait()
    run_with_kills(runner, folder / "killed", kills, seed)
    assert results(folder / "killed") == results(folder / "straight")


def test_a_killed_run_leaves_a_checkpoint_of_the_step_before(forked: Runner, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    forked.start(out)
    while logged(out) < STEPS // 2 + 3:
        assert forked.is_running()
        time.sleep(0.001)
    forked.kill()
    assert {path.name for path in (out / ARMS[0] / "checkpoints").glob("*.pt")} == {"warmup.pt", "train.pt"}


def test_a_file_that_a_killed_run_did_not_finish_is_removed(forked: Runner, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    forked.start(out)
    while logged(out) < 3:
        assert forked.is_running()
        time.sleep(0.001)
    forked.kill()
    half = out / ARMS[0] / "artifacts" / ".weights.safetensors.x1y2z3.tmp"
    half.parent.mkdir(exist_ok=True)
    half.write_bytes(b"half")
    forked.start(out, resume=True)
    forked.wait()
    assert not half.exists()
    assert list(out.rglob("*.safetensors"))


@pytest.mark.parametrize("seed", [0, 1])
def test_killed_four_times_a_run_ends_with_the_same_bits(forked: Runner, tmp_path: Path, seed: int) -> None:
    same_bits(forked, tmp_path, kills=4, seed=seed)


@pytest.mark.slow
def test_killed_twenty_times_a_run_ends_with_the_same_bits(forked: Runner, tmp_path: Path) -> None:
    same_bits(forked, tmp_path, kills=20, seed=2)


@pytest.mark.slow
def test_two_processes_train_together_and_resume_to_the_same_bits(launched: Runner, tmp_path: Path) -> None:
    same_bits(launched, tmp_path, kills=2, seed=3)
    first, second = (tmp_path / "straight" / ARMS[1] / name for name in ("metrics.jsonl", "metrics.rank1.jsonl"))
    assert first.read_bytes() != second.read_bytes(), "the processes saw the same part of each batch"
