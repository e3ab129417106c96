"""Settings, the metric log, checkpoints, fingerprints: what a run keeps on disk."""

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import torch
from numpy.random import mtrand

from poise.core.lab import checkpoint
from poise.core.lab.atomic import replacing, write_json
from poise.core.lab.errors import BadInput, RunFailed
from poise.core.lab.fingerprint import fingerprint
from poise.core.lab.metrics import MetricLog, read
from poise.core.lab.run import Run
from poise.core.lab.settings import as_json, override


@dataclass(frozen=True)
class Config:
    steps: int = 10
    rate: float = 0.1
    name: str = "a"
    flag: bool = False
    mode: Literal["fast", "slow"] = "fast"
    widths: tuple[int, ...] = (64, 64)
    limit: float | None = None
    where: Path = Path("x")

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")


def test_settings_take_the_type_of_their_field():
    changed = override(
        Config(),
        ["steps=3", "rate=1e-3", "flag=true", "mode=slow", "widths=8,16,8", "limit=2", "where=/tmp", "name=b=c"],
    )
    assert changed == Config(3, 1e-3, "b=c", True, "slow", (8, 16, 8), 2.0, Path("/tmp"))


def test_an_optional_setting_takes_none():
    assert override(Config(limit=1.0), ["limit=none"]).limit is None


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("steps", "key=value"),
        ("step=3", "did you mean steps"),
        ("steps=3.5", "expected a whole number, got '3.5'"),
        ("flag=maybe", "true or false"),
        ("mode=medium", "one of fast, slow"),
        ("widths=a,b", "separated by commas"),
        ("limit=x", "a number or none"),
        ("steps=0", "at least 1"),
    ],
)
def test_a_wrong_setting_is_one_clear_error(assignment, message):
    with pytest.raises(BadInput, match=message):
        override(Config(), [assignment])


def test_settings_survive_json():
    assert json.loads(json.dumps(as_json(Config())))["widths"] == [64, 64]


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file.json"
    write_json(path, {"good": 1})

    def interrupted():
        with replacing(path) as temporary:
            temporary.write_text("half a fi")
            raise InterruptedError

    with pytest.raises(InterruptedError):
        interrupted()
    assert json.loads(path.read_text()) == {"good": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_json_files_hold_no_nan(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "file.json", {"x": float("nan")})
    assert not (tmp_path / "file.json").exists()


def test_replayed_lines_are_written_once(tmp_path):
    path = tmp_path / "log.jsonl"
    log = MetricLog(path)
    log.write({"step": 0})
    known = log.position
    log.write({"step": 1})
    log.close()
    log = MetricLog(path, known=known)
    assert not log.write({"step": 0})
    assert log.write({"step": 1})
    log.close()
    assert read(path) == [{"step": 0}, {"step": 1}]


def test_a_line_cut_off_by_a_crash_is_left_out(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 0}\n{"st')
    assert read(path) == [{"step": 0}]


def test_a_checkpoint_brings_back_every_random_number_generator(tmp_path):
    generator = torch.Generator().manual_seed(1)
    mtrand.standard_normal()  # fills the cache of the polar method
    checkpoint.save(tmp_path / "c.pt", checkpoint.capture_rng(generator))

    def draws():
        return (
            torch.rand(3).tolist(),
            torch.rand(3, generator=generator).tolist(),
            random.random(),
            mtrand.standard_normal(3).tolist(),
        )

    first = draws()
    checkpoint.restore_rng(checkpoint.load(tmp_path / "c.pt"), generator)
    assert draws() == first


def test_a_damaged_checkpoint_is_named_and_left_alone(tmp_path):
    path = tmp_path / "c.pt"
    checkpoint.save(path, {"x": torch.ones(1000)})
    data = path.read_bytes()[:-100]
    path.write_bytes(data)
    with pytest.raises(RunFailed, match=r"c\.pt is damaged"):
        checkpoint.load(path)
    assert path.read_bytes() == data


def test_a_checkpoint_executes_nothing(tmp_path):
    torch.save({"x": Config}, tmp_path / "c.pt")
    with pytest.raises(RunFailed, match="damaged"):
        checkpoint.load(tmp_path / "c.pt")


def test_what_cannot_be_checkpointed_is_named(tmp_path):
    run = Run.scratch(tmp_path)
    with pytest.raises(TypeError, match="'thing'"):
        list(run.steps(1, thing=object()))


def train(folder, stop=None):
    run = Run.scratch(folder, seed=3)
    weights, seen = torch.zeros(2), []
    for name in ("first", "second"):
        for step in run.steps(4, name=name, weights=weights):
            weights += torch.rand(2, generator=run.generator) + torch.rand(2)
            run.log(step, weight=weights.sum())
            seen.append((name, step))
            if (name, step) == stop:
                run.close()
                return weights, seen
    run.close()
    return weights, seen


@pytest.mark.parametrize("stop", [("first", 2), ("second", 0), ("second", 3)])
def test_a_run_that_stopped_ends_like_one_that_did_not(tmp_path, monkeypatch, stop):
    monkeypatch.setattr("poise.core.lab.run.CHECKPOINT_SECONDS", 0.0)
    whole, _ = train(tmp_path / "whole")
    train(tmp_path / "parts", stop)
    resumed, seen = train(tmp_path / "parts")
    assert torch.equal(resumed, whole)
    assert len(seen) < 8
    assert (tmp_path / "parts/metrics.jsonl").read_text() == (tmp_path / "whole/metrics.jsonl").read_text()


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    with pytest.raises(RunFailed, match="loss is nan at step 7"):
        Run.scratch(tmp_path).log(7, loss=torch.tensor(float("nan")))


def test_a_checkpoint_of_another_loop_is_refused(tmp_path):
    list(Run.scratch(tmp_path).steps(2, weights=torch.zeros(2)))
    with pytest.raises(RunFailed, match="another version"):
        list(Run.scratch(tmp_path).steps(2, model=torch.nn.Linear(2, 2)))


def test_a_preset_that_reads_data_says_so_when_none_is_given(tmp_path):
    def reader(path):
        """Images in ImageFolder layout."""
        raise FileNotFoundError(f"no class folder in {path}")

    with pytest.raises(BadInput, match=r"--data \(Images in ImageFolder layout\)"):
        Run.scratch(tmp_path).load(reader)
    with pytest.raises(BadInput, match="no class folder"):
        Run.scratch(tmp_path, data=tmp_path).load(reader)


def test_a_fingerprint_follows_the_code_but_not_its_comments(tmp_path, monkeypatch):
    package = tmp_path / "poise" / "imprint"
    package.mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path)

    def write(helper, **names):
        number = len(list(package.glob("experiment*.py")))
        (package / f"helper{number}.py").write_text(helper)
        (package / f"experiment{number}.py").write_text(f"from poise.imprint.helper{number} import value\n")
        return f"poise.imprint.experiment{number}"

    import poise.core.lab.fingerprint as module

    codes = [
        module._code(module._source(_helper(write(text))))
        for text in ("value = 1\n", '"""Doc."""\nvalue = 1  # why\n', "value = 2\n")
    ]
    assert codes[0] == codes[1] != codes[2]


def _helper(experiment):
    return experiment.replace("experiment", "helper")


def test_a_fingerprint_follows_the_settings():
    module = "poise.core.penalty"
    assert fingerprint(module, seed=0) == fingerprint(module, seed=0) != fingerprint(module, seed=1)


def test_a_fingerprint_reaches_modules_through_lazy_public_names():
    from poise.core.lab.fingerprint import _defining_module

    assert _defining_module("poise.core", "Penalty") == "poise.core.penalty"
    assert _defining_module("poise.core", "schedule") == "poise.core.schedule"
