"""The command line from end to end: exit codes, one clear line for every mistake, and the JSON that programs read."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from poise.core.lab.cli import main


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        """The one JSON value on stdout; anything else there is a mistake."""
        assert self.code in (0, 1), self.err
        (line,) = self.out.splitlines()
        return json.loads(line)


Poise = Callable[..., Outcome]


@pytest.fixture
def poise(toy: str, capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Poise:
    """Runs a command in this process, in an empty folder; the toy domain is installed."""
    monkeypatch.chdir(tmp_path)

    def command(*arguments: object) -> Outcome:
        capfd.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as exit:
            code = int(exit.code or 0)
        return Outcome(code, *capfd.readouterr())

    return command


@pytest.fixture
def run(poise: Poise, toy: str) -> Poise:
    """``poise run`` of the toy method without trackers."""
    return lambda *arguments: poise("run", toy, "--tracker", "none", *arguments)


def refused(outcome: Outcome, code: int, *words: str) -> None:
    """The command ended with ``code`` and one line on stderr that holds all ``words``."""
    assert outcome.code == code, outcome
    assert outcome.out == ""
    (line,) = outcome.err.splitlines()
    assert line.startswith("poise: ")
    assert [word for word in words if word not in line] == [], line


# Methods


def test_list_gives_the_documented_keys(poise: Poise) -> None:
    listed = poise("list", "--json").json()
    assert all(set(method) == {"slug", "package", "title", "kind", "presets", "arms"} for method in listed)
    assert {"slug": "blobs", "package": "toy", "title": "Blobs", "kind": "training"}.items() <= listed[-1].items()
    assert listed == sorted(listed, key=lambda method: (method["package"], method["slug"]))


def test_list_shows_the_methods_of_one_package(poise: Poise) -> None:
    assert [method["slug"] for method in poise("list", "--package", "toy", "--json").json()] == ["blobs"]
    assert "toy/blobs" in poise("list", "--package", "toy").out


def test_list_refuses_a_package_that_is_not_there(poise: Poise) -> None:
    refused(poise("list", "--package", "tox"), 2, "'tox'", "did you mean toy")


def test_list_works_as_a_program_and_imports_no_torch(toy: str) -> None:
    code = (
        "import sys; from poise.core.lab.cli import main; main(['list', '--json']); assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert toy in {f"{method['package']}/{method['slug']}" for method in json.loads(done.stdout)}


def test_the_program_is_installed(toy: str) -> None:
    program = Path(sys.executable).with_name("poise")
    done = subprocess.run([program, "cite", toy], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("@misc{nobody2026blobs,")


def test_a_reader_that_has_seen_enough_is_no_error(toy: str) -> None:
    shell = f"{sys.executable} -m poise.core.lab.cli cite {' '.join([toy] * 3)} | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_info_tells_formula_defaults_arms_and_claims(poise: Poise, toy: str) -> None:
    found = poise("info", toy, "--json").json()
    assert found["formula"].startswith(r"\lambda")
    assert found["defaults"]["quick"]["widths"] == [8]
    assert set(found["arms"]) == {"baseline", "decay"}
    assert [claim["metric"] for claim in found["claims"]] == ["norm", "accuracy"]
    assert found["verified"] is None
    readable = poise("info", toy).out
    assert all(word in readable for word in ("Blobs", r"\lambda", "print('blobs')", "decay", "norm", "rate=0.01"))


def test_a_slug_will_do_where_it_is_unique(poise: Poise) -> None:
    assert poise("cite", "blobs").out.startswith("@misc")


@pytest.mark.parametrize("command", ["info", "cite", "run", "verify"])
def test_an_unknown_method_is_answered_with_the_nearest_names(poise: Poise, command: str) -> None:
    refused(poise(command, "toy/blob"), 2, "unknown method 'toy/blob'", "did you mean toy/blobs", "poise list")


def test_doctor_says_what_is_there(poise: Poise) -> None:
    found = poise("doctor", "--json").json()
    assert found["environment"]["torch"]
    assert found["packages"]["poise-core"]
    assert poise("doctor").code == 0


# Usage


def test_help_is_help(poise: Poise) -> None:
    outcome = poise("--help")
    assert outcome.code == 0
    assert all(name in outcome.out for name in ("list", "info", "cite", "run", "verify", "report", "doctor"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), ("COMMAND",)),
        (("lst",), ("lst",)),
        (("run",), ("P/METHOD",)),
        (("run", "toy/blobs", "--sed", "1"), ("--sed",)),
        (("run", "toy/blobs", "--seed", "one"), ("--seed", "'one'")),
        (("run", "toy/blobs", "--seed", "-1"), ("--seed", "-1")),
        (("verify", "toy/blobs", "--seeds", "0"), ("--seeds", "0")),
        (("verify",), ("--all",)),
        (("verify", "toy/blobs", "--engine", "slurm"), ("slurm", "local", "ray")),
        (("run", "toy/blobs", "--device", "gpu7"), ("--device gpu7",)),
        (("run", "toy/blobs", "--preset", "quik"), ("'quik'", "did you mean quick")),
        (("run", "toy/blobs", "--arm", "decoy"), ("'decoy'", "did you mean decay")),
        (("run", "toy/blobs", "--set", "step=3"), ("step", "did you mean steps")),
        (("run", "toy/blobs", "--set", "steps=many"), ("steps", "a whole number", "'many'")),
        (("run", "toy/blobs", "--set", "steps=1.5"), ("steps", "a whole number", "'1.5'")),
        (("run", "toy/blobs", "--set", "rate=fast"), ("rate", "a number", "'fast'")),
        (("run", "toy/blobs", "--set", "published=maybe"), ("published", "true or false", "'maybe'")),
        (("run", "toy/blobs", "--set", "loss=hinge"), ("loss", "logistic", "squared", "'hinge'")),
        (("run", "toy/blobs", "--set", "widths=8,x"), ("widths", "'8,x'")),
        (("run", "toy/blobs", "--set", "steps"), ("key=value", "'steps'")),
        (("run", "toy/blobs", "--set", "steps=0"), ("steps must be at least 1, got 0",)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_bad_usage_gets_one_line(poise: Poise, arguments: tuple[str, ...], words: tuple[str, ...]) -> None:
    refused(poise(*arguments), 2, *words)
    assert list(Path.cwd().iterdir()) == []


# Runs


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
    assert not re.search(r"""(src=|url\()["']?https?:|<link[^>]+href""", page), "the page loads something from elsewhere"


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
    refused(run("--out", "here", "--arm", "decay"), 2, "--out here", "--resume")


def test_a_run_is_not_resumed_with_other_settings(run: Poise) -> None:
    run("--out", "here", "--arm", "baseline")
    refused(run("--out", "here", "--resume", "--set", "rate=0.5"), 2, "--out here", "rate=0.01", "0.5")
    refused(run("--out", "here", "--resume", "--seed", "1"), 2, "--out here", "seed 0")


def test_a_folder_of_something_else_is_left_alone(run: Poise, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter.tex").write_text("Years of work.")
    refused(run("--out", "thesis"), 2, "--out thesis", "not empty")
    refused(run("--out", "thesis", "--resume"), 2, "--out thesis", "not empty")
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["chapter.tex"]


def test_a_file_in_place_of_the_folder_is_refused(run: Poise, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("not a folder")
    refused(run("--out", "taken"), 2, "--out taken", "cannot write there")
    refused(run("--out", "taken/below"), 2, "--out taken/below", "cannot write there")
    assert (tmp_path / "taken").read_text() == "not a folder"


# Data


def test_a_preset_that_reads_data_asks_for_it(run: Poise) -> None:
    refused(run("--preset", "paper"), 2, "--data", "Points and labels from points.txt")


def test_a_data_folder_that_is_not_there_is_refused(run: Poise) -> None:
    refused(run("--preset", "paper", "--data", "nowhere"), 2, "--data nowhere", "no such file or folder")


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
    refused(run("--preset", "paper", "--data", "data"), 2, "--data data", words)


def test_published_data_is_read(run: Poise, tmp_path: Path) -> None:
    (tmp_path / "points.txt").write_text("".join(f"{x} {-x} {x % 2}\n" for x in range(20)))
    assert (
        run("--preset", "paper", "--data", tmp_path, "--arm", "decay", "--set", "steps=2", "--json").json()["seed"] == 0
    )


# Failures


def test_a_loss_that_is_not_a_number_stops_the_run(run: Poise, tmp_path: Path) -> None:
    outcome = run("--out", "here", "--arm", "decay", "--set", "explode_at=8", "--json")
    refused(outcome, 3, "arm decay failed", "the loss is nan at step 8 of train", "resume with: poise run toy/blobs")
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
        refused(run("--out", "here", "--arm", "decay"), 3, "interrupted in arm decay", "--out here --resume")
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
    refused(
        run("--out", "here", "--arm", "decay", "--resume"), 3, str(Path("here/decay/checkpoints/warmup.pt")), "damaged"
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
    refused(run("--out", "here", "--arm", "decay", "--resume"), 3, "warmup.pt")
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


@pytest.fixture
def mounted(tmp_path: Path, toy: str) -> Callable[..., Outcome]:
    """Runs ``poise run`` in a process that alone sees a file system mounted on the folder ``disk``, and copies that to ``kept``.

    The mount lives in a namespace of its own, so that no test can leave it behind.
    """
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()
    namespace = ["unshare", "--map-root-user", "--mount"]
    able = subprocess.run([*namespace, "mount", "-t", "tmpfs", "tmpfs", disk], capture_output=True, text=True)
    if able.returncode != 0:
        pytest.skip(f"this system lets no test mount a file system: {able.stderr.strip()}")

    def command(options: str, *arguments: str) -> Outcome:
        script = f'mount -t tmpfs -o {options} tmpfs disk || exit 99; "$@"; code=$?; cp -a disk kept; exit $code'
        program = [sys.executable, "-m", "poise.core.lab.cli", "run", toy, "--tracker", "none", *arguments]
        done = subprocess.run(
            [*namespace, "sh", "-c", script, "sh", *program], cwd=tmp_path, capture_output=True, text=True
        )
        assert kept.is_dir(), done.stderr
        return Outcome(done.returncode, done.stdout, done.stderr)

    return command


def test_a_folder_that_cannot_be_written_is_refused(mounted: Callable[..., Outcome]) -> None:
    outcome = mounted("ro", "--out", "disk/run")
    refused(outcome, 2, "--out disk/run", "cannot write there", "Read-only file system")


def test_a_full_disk_ends_the_run_and_costs_nothing_that_was_saved(
    mounted: Callable[..., Outcome], run: Poise, tmp_path: Path
) -> None:
    wide = ("--arm", "decay", "--set", "widths=64,64", "explode_at=-1")
    outcome = mounted("size=160k", *wide, "--out", "disk/run")
    refused(outcome, 3, "arm decay failed", "No space left on device", "--resume")
    saved = tmp_path / "kept/run/decay"
    assert [path.name for path in (saved / "checkpoints").iterdir()] == ["warmup.pt"]
    assert not (saved / "result.json").exists()
    resumed = run(*wide, "--out", "kept/run", "--resume", "--json").json()
    assert resumed["arms"] == run(*wide, "--out", "straight", "--json").json()["arms"]


# Verification


def test_verify_judges_the_claims_keeps_runs_and_exits_with_one_when_a_claim_is_refuted(
    poise: Poise, run: Poise, toy: str, tmp_path: Path
) -> None:
    for seed in (0, 1):
        assert run("--seed", seed, "--out", f"kept/toy-blobs/quick/seed{seed}").code == 0
    verify = ("verify", toy, "--seeds", 3, "--jobs", 1, "--root", "kept", "--results", "verdicts")
    before = (tmp_path / "kept/toy-blobs/quick/seed0/decay/result.json").stat().st_mtime_ns
    outcome = poise(*verify, "--json")
    assert outcome.code == 1
    (verdict,) = outcome.json()
    assert {"method", "preset", "seeds", "claims", "arms", "environment", "seconds"} <= set(verdict)
    assert (verdict["method"], verdict["preset"], verdict["seeds"]) == (toy, "quick", [0, 1, 2])
    keys = {"kind", "metric", "arm", "versus", "direction", "margin", "effect", "ci", "verdict", "source", "note"}
    assert all(keys <= set(claim) for claim in verdict["claims"])
    assert [claim["verdict"] for claim in verdict["claims"]] == ["holds", "refuted"]
    assert [len(values) for values in verdict["arms"]["decay"].values()] == [3, 3, 3]
    assert json.loads((tmp_path / "verdicts/toy/blobs.json").read_text()) == verdict
    assert (tmp_path / "kept/toy-blobs/quick/seed0/decay/result.json").stat().st_mtime_ns == before
    readable = poise(*verify)
    assert readable.code == 1
    assert "refuted" in readable.out


def test_info_shows_the_last_verdict(poise: Poise, toy: str, tmp_path: Path) -> None:
    (tmp_path / "results/toy").mkdir(parents=True)
    (tmp_path / "results/toy/blobs.json").write_text(json.dumps({"seeds": [0], "claims": [{"verdict": "undecided"}]}))
    assert poise("info", toy, "--json").json()["verified"]["claims"] == [{"verdict": "undecided"}]


def test_verify_refuses_a_preset_without_claims(poise: Poise, toy: str) -> None:
    refused(poise("verify", toy, "--preset", "paper", "--json"), 2, "makes no claim", "paper")


# Reports


def test_report_compares_runs(poise: Poise, run: Poise, tmp_path: Path) -> None:
    for seed in (0, 1):
        run("--seed", seed, "--out", f"seed{seed}", "--arm", "baseline")
    made = poise("report", "seed0", "seed1", "--out", "page.html", "--json").json()
    assert made["report"] == "page.html"
    assert (tmp_path / "page.html").read_text().count("Blobs") >= 2


def test_report_refuses_a_folder_without_a_run(poise: Poise, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(poise("report", "empty"), 2, "empty", "no run")
    refused(poise("report", "nowhere"), 2, "nowhere", "no run")
