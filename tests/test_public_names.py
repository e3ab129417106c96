"""Every public name of every member, called with what it does not hope for, answers as it should or refuses in poise's own words.

A new name stands in ``FUZZ`` of the member's ``tests/fuzz.py``: with a valid call, or with the reason why it has none.
"""

import dataclasses
import functools
import importlib
import importlib.util
import random
import types
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.core.contract.robustness import CHANGES, stands
from poise.core.testing import Exempt, Fuzz, Sample

ROOT = Path(__file__).parents[1]
FILES = {"core": ROOT / "shared/tests/fuzz.py"} | {
    path.parents[1].name: path for path in sorted(ROOT.glob("packages/*/tests/fuzz.py"))
}


@functools.cache
def load(path: Path) -> types.ModuleType:
    """A file beside a member's tests, as a module."""
    spec = importlib.util.spec_from_file_location(f"{path.stem}_{path.parts[-3]}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FUZZ: dict[str, dict[str, Fuzz | Exempt]] = {package: load(path).FUZZ for package, path in FILES.items()}
EXAMPLES = 2
"""Of each change of each call, the same ones everywhere: the whole takes a minute."""

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SEEDS = 2**16
"""Which tensor, which entry, which axis."""
SIZES = (0, 1, 2, 5)
"""Of the batch or of another axis."""


def public_names(package: str) -> dict[str, object]:
    """What ``poise.package`` exports and defines itself; what its public modules hold goes under ``module.name``."""
    home = f"poise.{package}"
    found: dict[str, object] = {}
    for name in importlib.import_module(home).__all__:
        value = getattr(importlib.import_module(home), name)
        if isinstance(value, types.ModuleType):
            found |= {f"{name}.{inner}": member for inner, member in members(value).items()}
        elif getattr(value, "__module__", home).startswith(home):  # not what another member defines
            found[name] = value
    return found


def members(module: types.ModuleType) -> dict[str, object]:
    names = getattr(module, "__all__", None)
    if names is not None:
        return {name: getattr(module, name) for name in names}
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and callable(value) and getattr(value, "__module__", "") == module.__name__
    }


def valid_call(package: str, name: str) -> tuple[Sample, Fuzz]:
    fuzz = FUZZ[package][name]
    assert isinstance(fuzz, Fuzz)
    sample = fuzz.sample
    if isinstance(sample, str):
        (sample,) = (found for found in load(FILES[package].parent / "samples.py").SAMPLES if found.name == sample)
    return dataclasses.replace(sample, name=f"{package}.{name}"), fuzz


CALLED = [(package, name) for package, names in FUZZ.items() for name, fuzz in names.items() if isinstance(fuzz, Fuzz)]


@pytest.mark.parametrize(
    "package", ["core", *sorted(path.name for path in (ROOT / "packages").iterdir() if path.is_dir())]
)
def test_every_public_name_has_a_valid_call_or_a_reason_for_none(package: str) -> None:
    names, fuzz = set(public_names(package)), FUZZ.get(package, {})
    modules = {name for name, entry in fuzz.items() if isinstance(entry, Exempt) and name not in names}
    missing = {name for name in names - set(fuzz) if name.partition(".")[0] not in modules}
    assert not missing, f"say in {package}'s tests/fuzz.py how these are called: {sorted(missing)}"
    gone = {name for name in set(fuzz) - names if not any(full.startswith(f"{name}.") for full in names)}
    assert not gone, f"{package}'s tests/fuzz.py names what is not public: {sorted(gone)}"
    assert [name for name, entry in fuzz.items() if isinstance(entry, Exempt) and not entry.reason] == []


@pytest.mark.parametrize(("package", "name"), CALLED)
def test_exceptions_are_from_laws_that_exist(package: str, name: str) -> None:
    _, fuzz = valid_call(package, name)
    assert set(fuzz.but) <= set(CHANGES)
    assert all(fuzz.but.values())


@pytest.mark.parametrize(("package", "name"), CALLED)
def test_a_changed_call_answers_or_refuses(package: str, name: str) -> None:
    sample, fuzz = valid_call(package, name)
    for change in sorted(set(CHANGES) - set(fuzz.but)):
        # not drawn by hypothesis, whose draws depend on the modules that happen to be loaded, even if derandomized
        draw = random.Random(f"{package}.{name} {change}")
        for _ in range(EXAMPLES):
            dtype, seed, size = draw.choice(DTYPES), draw.randrange(SEEDS), draw.choice(SIZES)
            stands(sample, change, dtype, seed=seed, size=size)


@pytest.mark.slow
@pytest.mark.parametrize(("package", "name"), CALLED)
def test_no_changed_call_is_found_that_does_not(package: str, name: str) -> None:
    sample, fuzz = valid_call(package, name)

    @settings(max_examples=200, deadline=None, database=None)
    @given(
        change=st.sampled_from(sorted(set(CHANGES) - set(fuzz.but))),
        dtype=st.sampled_from(DTYPES),
        seed=st.integers(0, SEEDS - 1),
        size=st.sampled_from(SIZES),
    )
    def stands_up(change: str, dtype: torch.dtype, seed: int, size: int) -> None:
        stands(sample, change, dtype, seed=seed, size=size)

    stands_up()
