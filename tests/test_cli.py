"""The command line: one clear line for every mistake, the JSON that programs read, verification and reports."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Poise = Callable[..., Any]


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
    poise("list", "--package", "tox").is_refused(2, "'tox'", "did you mean toy")


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
    poise(command, "toy/blob").is_refused(2, "unknown method 'toy/blob'", "did you mean toy/blobs", "poise list")


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
    poise(*arguments).is_refused(2, *words)
    assert list(Path.cwd().iterdir()) == []


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


def test_info_shows_the_verdicts_of_every_preset(poise: Poise, toy: str, tmp_path: Path) -> None:
    claim = {"metric": "error", "arm": "decay", "versus": None, "scale": "difference", "effect": 1, "ci": [0, 2]}
    claim |= {"margin": 0, "verdict": "holds"}
    (tmp_path / "results/toy").mkdir(parents=True)
    for name, seeds in (("blobs.json", 5), ("blobs.paper.json", 3)):
        (tmp_path / "results/toy" / name).write_text(json.dumps({"seeds": [*range(seeds)], "claims": [claim]}))
    verified = poise("info", toy, "--json").json()["verified"]
    assert {preset: len(verdict["seeds"]) for preset, verdict in verified["presets"].items()} == {
        "quick": 5,
        "paper": 3,
    }
    assert "preset paper, 3 seeds" in poise("info", toy).out


def test_fewer_seeds_replace_neither_the_verdict_nor_its_figure(poise: Poise, toy: str, tmp_path: Path) -> None:
    verify = ("verify", toy, "--jobs", "1", "--root", "kept", "--results", "verdicts")
    poise(*verify, "--seeds", "2")
    verdict, picture = (tmp_path / "verdicts/toy" / name for name in ("blobs.json", "blobs.png"))
    picture.write_bytes(b"of two seeds")
    figures = tmp_path / "kept/toy-blobs/quick/seed0/compare/figures"
    figures.mkdir(parents=True, exist_ok=True)
    (figures / "of_one_seed.png").write_bytes(b"of one seed")
    poise(*verify, "--seeds", "1")
    assert json.loads(verdict.read_text())["seeds"] == [0, 1]
    assert picture.read_bytes() == b"of two seeds"


def test_verify_refuses_a_preset_without_claims(poise: Poise, toy: str) -> None:
    poise("verify", toy, "--preset", "paper", "--json").is_refused(2, "makes no claim", "paper")


# Reports


def test_report_compares_runs(poise: Poise, run: Poise, tmp_path: Path) -> None:
    for seed in (0, 1):
        run("--seed", seed, "--out", f"seed{seed}", "--arm", "baseline")
    made = poise("report", "seed0", "seed1", "--out", "page.html", "--json").json()
    assert made["report"] == "page.html"
    assert (tmp_path / "page.html").read_text().count("Blobs") >= 2


def test_report_refuses_a_folder_without_a_run(poise: Poise, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    poise("report", "empty").is_refused(2, "empty", "no run")
    poise("report", "nowhere").is_refused(2, "nowhere", "no run")
