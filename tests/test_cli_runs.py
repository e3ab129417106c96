"""``poise run``: what a run keeps, what it refuses to overwrite or read, and how it fails without losing anything."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Poise = Callable[..., Any]


# What a run keeps


def test_a_run_prints_its_metrics_and_keeps_everything(run: Poise, tmp_path: Path, toy: str) -> None:
    outcome = run("--out", "here", "--json", "--seed", "3", "--set", "widths=4,4", "rate=0.1", "--set", "loss=squared")
    done = outcome.json()
    assert set(done) == {"method", "preset", "seed", "arms", "out", "report", "seconds"}
    assert (done["method"], done["preset"], done["seed"], done["out"]) == (toy, "quick", 3, "here")
    assert set(done["arms"]) == {"baseline", "decay"}
    assert set(done["arms"]["decay"]) == {"accuracy", "norm", "noise"}
    settings = json.loads((tmp_path / "here/run.json").read_text())["config"]
    assert (settings["widths"], settings["rate"], settings["loss"]) == ([4, 4], 0.1, "squared")
    assert (tmp_path / "here/decay/artifacts/weights.safetensors").is_file()
    page = (tmp_path / done["report"]).read_text()
    assert all(word in page for word in ("Blobs", "decay", "accuracy", "widths"))
    assert not re.search(r"""(src=|url\()["']?https?:|<link[^>]+href""", page), (
        "the page loads something from elsewhere"
    )


def test_a_run_for_people_shows_a_table_and_the_report(run: Poise) -> None:
    outcome = run("--arm", "baseline", "--out", "here")
    assert outcome.code == 0
    assert "accuracy" in outcome.out
    assert "here/report.html" in outcome.out
    assert "decay" not in outcome.out


def test_tensorboard_gets_the_log(poise: Poise, toy: str, tmp_path: Path) -> None:
    assert poise("run", toy, "--arm", "decay", "--out", "here").code == 0
    assert list(tmp_path.glob("here/decay/tensorboard/**/events.*"))


def test_runs_without_a_folder_get_one_each(run: Poise) -> None:
    folders = [run("--arm", "baseline", "--json").json()["out"] for _ in range(2)]
    assert folders == ["runs/toy-blobs-quick-seed0", "runs/toy-blobs-quick-seed0-2"]


def test_a_finished_run_is_kept_on_resume(run: Poise, tmp_path: Path) -> None:
    first = run("--out", "here", "--json", "--arm", "decay").json()
    log = tmp_path / "here/decay/metrics.jsonl"
    before = log.stat().st_mtime_ns
    again = run("--out", "here", "--json", "--resume").json()
    assert again["arms"]["decay"] == first["arms"]["decay"]
    assert set(again["arms"]) == {"baseline", "decay"}
    assert log.stat().st_mtime_ns == before


def test_a_run_is_not_overwritten(run: Poise) -> None:
    run("--out", "here", "--arm", "baseline")
    run("--out", "here", "--arm", "decay").is_refused(2, "--out here", "--resume")


def test_a_run_is_not_resumed_with_other_settings(run: Poise) -> None:
    run("--out", "here", "--arm", "baseline")
    run("--out", "here", "--resume", "--set", "rate=0.5").is_refused(2, "--out here", "rate=0.01", "0.5")
    run("--out", "here", "--resume", "--seed", "1").is_refused(2, "--out here", "seed 0")


def test_a_folder_of_something_else_is_left_alone(run: Poise, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter.tex").write_text("Years of work.")
    run("--out", "thesis").is_refused(2, "--out thesis", "not empty")
    run("--out", "thesis", "--resume").is_refused(2, "--out thesis", "not empty")
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["chapter.tex"]


def test_a_file_in_place_of_the_folder_is_refused(run: Poise, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("not a folder")
    run("--out", "taken").is_refused(2, "--out taken", "cannot write there")
    run("--out", "taken/below").is_refused(2, "--out taken/below", "cannot write there")
    assert (tmp_path / "taken").read_text() == "not a folder"


# Data


def test_a_preset_that_reads_data_asks_for_it(run: Poise) -> None:
    run("--preset", "paper").is_refused(2, "--data", "Points and labels from points.txt")


def test_a_data_folder_that_is_not_there_is_refused(run: Poise) -> None:
    run("--preset", "paper", "--data", "nowhere").is_refused(2, "--data nowhere", "no such file or folder")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "points.txt"),
        ("1 2 0\n1 2\n", "expected sequence"),
        ("a b c\n", "'a'"),
        ("1 2\n3 4\n", "three numbers to a line"),
    ],
    ids=["absent", "ragged", "words", "narrow"],
)
def test_data_of_another_format_is_refused(run: Poise, tmp_path: Path, content: str | None, words: str) -> None:
    (tmp_path / "data").mkdir()
    if content is not None:
        (tmp_path / "data/points.txt").write_text(content)
    run("--preset", "paper", "--data", "data").is_refused(2, "--data data", words)


def test_published_data_is_read(run: Poise, tmp_path: Path) -> None:
    (tmp_path / "points.txt").write_text("".join(f"{x} {-x} {x % 2}\n" for x in range(20)))
    assert (
        run("--preset", "paper", "--data", tmp_path, "--arm", "decay", "--set", "steps=2", "--json").json()["seed"] == 0
    )


# Failures


def test_a_loss_that_is_not_a_number_stops_the_run(run: Poise, tmp_path: Path) -> None:
    outcome = run("--out", "here", "--arm", "decay", "--set", "explode_at=8", "--json")
    outcome.is_refused(3, "arm decay failed", "the loss is nan at step 8 of train", "resume with: poise run toy/blobs")
    assert "--set explode_at=8 --out here --resume" in outcome.err
    assert (tmp_path / "here/decay/checkpoints/warmup.pt").is_file()
    assert not (tmp_path / "here/decay/result.json").exists()
    logged = (tmp_path / "here/decay/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in logged] == [*range(6), *range(8)]


@pytest.fixture
def interrupted(run: Poise, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a run that its user stopped in the second loop; the next run is not stopped."""
    calls = iter(range(1, 100))

    def sleep(_: float) -> None:
        if next(calls) == 10:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("time.sleep", sleep)
        run("--out", "here", "--arm", "decay").is_refused(3, "interrupted in arm decay", "--out here --resume")
    return tmp_path / "here/decay"


def test_an_interrupted_run_resumes_to_the_same_metrics(run: Poise, interrupted: Path) -> None:
    resumed = run("--out", "here", "--arm", "decay", "--resume", "--json").json()
    straight = run("--out", "there", "--arm", "decay", "--json").json()
    assert resumed["arms"] == straight["arms"]
    assert (interrupted / "metrics.jsonl").read_bytes() == (
        interrupted / "../../there/decay/metrics.jsonl"
    ).read_bytes()


@pytest.mark.parametrize("keep", [0, 1, 500, -1], ids=["emptied", "one-byte", "beginning", "all-but-one-byte"])
def test_a_damaged_checkpoint_is_named_and_nothing_is_overwritten(run: Poise, interrupted: Path, keep: int) -> None:
    checkpoint = interrupted / "checkpoints/warmup.pt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:keep])
    before = contents(interrupted)
    run("--out", "here", "--arm", "decay", "--resume").is_refused(
        3, str(Path("here/decay/checkpoints/warmup.pt")), "damaged"
    )
    after = contents(interrupted)
    after.pop("error.txt", None)
    assert after == before


def test_a_damaged_checkpoint_can_be_deleted(run: Poise, interrupted: Path) -> None:
    (interrupted / "checkpoints/warmup.pt").unlink()
    resumed = run("--out", "here", "--arm", "decay", "--resume", "--json").json()
    assert resumed["arms"] == run("--out", "there", "--arm", "decay", "--json").json()["arms"]


def test_a_checkpoint_that_would_run_code_is_refused(run: Poise, interrupted: Path, tmp_path: Path) -> None:
    import torch

    torch.save({"step": Trap(tmp_path / "sprung")}, interrupted / "checkpoints/warmup.pt")
    run("--out", "here", "--arm", "decay", "--resume").is_refused(3, "warmup.pt")
    assert not (tmp_path / "sprung").exists()


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below ``folder``."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# File systems that say no


def test_a_folder_that_cannot_be_written_is_refused(mounted: Poise) -> None:
    outcome = mounted("ro", "--out", "disk/run")
    outcome.is_refused(2, "--out disk/run", "cannot write there", "Read-only file system")


def test_a_full_disk_ends_the_run_and_costs_nothing_that_was_saved(
    mounted: Poise, apart: Poise, tmp_path: Path
) -> None:
    wide = ("--arm", "decay", "--set", "widths=64,64", "explode_at=-1")
    outcome = mounted("size=160k", *wide, "--out", "disk/run")
    outcome.is_refused(3, "arm decay failed", "No space left on device", "--resume")
    saved = tmp_path / "kept/run/decay"
    assert [path.name for path in (saved / "checkpoints").iterdir()] == ["warmup.pt"]
    assert not (saved / "result.json").exists()
    resumed = apart(*wide, "--out", "kept/run", "--resume", "--json").json()
    assert resumed["arms"] == apart(*wide, "--out", "straight", "--json").json()["arms"]
