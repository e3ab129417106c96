"""The tools lay out methods that fail until they are written, try recipes and wheels, and refuse what they cannot do in one line."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import new_method
import pytest
import try_wheels
from try_recipes import PAGE, recipes

ROOT = Path(new_method.ROOT)
MARKER = "FILL IN"


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """A copy of what new_method adds to, of three members; vision holds no method yet."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for member in ("shared", "packages/ot", "packages/vision"):
        shutil.copytree(ROOT / member / "src", tmp_path / member / "src", ignore=shutil.ignore_patterns("__pycache__"))
        (tmp_path / member / "tests").mkdir()
        for samples in (ROOT / member / "tests").glob("samples.py"):
            shutil.copy(samples, tmp_path / member / "tests")
    return tmp_path


def entries(path: Path, name: str) -> int:
    """How many objects of a class a file makes; 0 without the file."""
    made = ast.walk(ast.parse(path.read_text())) if path.exists() else ()
    return sum(isinstance(node, ast.Call) and ast.unparse(node.func) == name for node in made)


def tree(root: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(
    ("package", "member"), [("ot", "packages/ot"), ("core", "shared"), ("vision", "packages/vision")]
)
def test_new_method_lays_out_everything(workspace: Path, package: str, member: str) -> None:
    source = workspace / member / "src/poise" / package
    catalog, samples = source / "catalog.py", workspace / member / "tests/samples.py"
    before = entries(catalog, "Method"), entries(samples, "Sample")

    assert new_method.main([package, "mirror-descent", "--family", "steps"], root=workspace) == 0

    for path in (
        source / "steps/__init__.py",
        source / "steps/mirror_descent.py",
        source / "experiments/__init__.py",
        source / "experiments/mirror_descent.py",
        workspace / member / "tests/test_mirror_descent.py",
        workspace / member / "benchmarks/bench_mirror_descent.py",
        workspace / "docs/methods" / package / "mirror-descent.notes.md",
    ):
        assert path.is_file(), path
    assert (entries(catalog, "Method"), entries(samples, "Sample")) == (before[0] + 1, before[1] + 1)
    assert '"mirror-descent"' in catalog.read_text()
    names = (source / "__init__.pyi").read_text()
    assert f"from poise.{package}.steps.mirror_descent import MirrorDescent as MirrorDescent" in names
    assert f"from poise.{package}.steps.mirror_descent import mirror_descent as mirror_descent" in names


def test_two_new_methods_live_beside_each_other(workspace: Path) -> None:
    before = entries(workspace / "packages/ot/tests/samples.py", "Sample")
    assert new_method.main(["ot", "one"], root=workspace) == 0
    assert new_method.main(["ot", "another-one"], root=workspace) == 0
    assert entries(workspace / "packages/ot/tests/samples.py", "Sample") == before + 2


def test_skeletons_are_well_formed(workspace: Path) -> None:
    before = tree(workspace)
    new_method.main(["ot", "mirror-descent"], root=workspace)
    written = [str(path) for path, content in tree(workspace).items() if before.get(path) != content]
    python = [path for path in written if path.endswith((".py", ".pyi"))]
    assert len(python) >= 7
    for check in (["check"], ["format", "--check"]):
        subprocess.run([sys.executable, "-m", "ruff", *check, *python], check=True)


def test_an_entry_changes_no_other_line(workspace: Path) -> None:
    samples = workspace / "shared/tests/samples.py"
    before = samples.read_text().splitlines()
    new_method.main(["core", "mirror-descent"], root=workspace)
    kept = set(samples.read_text().splitlines())
    assert [line for line in before if line not in kept and not line.startswith("from poise.core")] == []


def test_what_to_run_is_of_this_method_alone(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new_method.main(["core", "mirror-descent"], root=workspace)
    said = capsys.readouterr().out
    assert "shared/tests/test_mirror_descent.py tests/test_contract.py" in said
    assert '-k "mirror_descent or mirror-descent"' in said
    new_method.main(["ot", "barycenter"], root=workspace)
    assert '-k "barycenter"' in capsys.readouterr().out


def sources(workspace: Path) -> dict[str, str]:
    """The environment in which the copied members are found first."""
    folders = [str(workspace / member / "src") for member in ("packages/ot", "shared")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(folders)}


def test_loop_of_the_skeleton_trains_once_data_network_and_formula_are_filled_in(workspace: Path) -> None:
    new_method.main(["ot", "mirror-descent"], root=workspace)
    source = workspace / "packages/ot/src/poise/ot"
    for path, fillings in (
        (source / "penalties/mirror_descent.py", ["return x.square().mean()"]),
        (
            source / "experiments/mirror_descent.py",
            [
                "from poise.core.data import digits\n    return digits().split(seed=run.seed)",
                "return nn.Sequential(nn.Flatten(), nn.LazyLinear(10))",
            ],
        ),
    ):
        text = path.read_text()
        for filling in fillings:
            text = re.sub(r"raise NotImplementedError\(.*?\)\n(?=\n|$)", filling + "\n", text, count=1, flags=re.S)
        path.write_text(text)
    script = """
from dataclasses import replace
from pathlib import Path
from poise.core.lab import Run
from poise.ot.experiments.mirror_descent import EXPERIMENT
for arm in EXPERIMENT.arms:
    metrics = EXPERIMENT.run(replace(EXPERIMENT.presets["quick"], steps=100), arm, Run.scratch(Path(arm)))
    print(metrics["accuracy"])
"""
    command = [sys.executable, "-c", script]
    run = subprocess.run(command, cwd=workspace, env=sources(workspace), capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    plain, penalized = map(float, run.stdout.split())
    assert plain > 0.5
    assert penalized != plain
    assert "loss" in (workspace / "baseline/metrics.jsonl").read_text()


def test_skeleton_fails_until_it_is_filled(workspace: Path) -> None:
    new_method.main(["ot", "mirror-descent"], root=workspace)
    test = workspace / "packages/ot/tests/test_mirror_descent.py"
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-o",
            "addopts=--import-mode=importlib",
            str(test),
        ],
        cwd=workspace,
        env=sources(workspace),
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 1, run.stdout
    assert " passed" not in run.stdout
    assert "6 failed" in run.stdout
    assert MARKER in run.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "required"),
        (["ot"], "SLUG"),
        (["cooking", "souffle"], "no package"),
        (["../ot", "souffle"], "no package"),
        (["ot", "Monge_Gap"], "lower-case words"),
        (["ot", "monge--gap"], "lower-case words"),
        (["ot", "lambda"], "lower-case words"),
        (["ot", "2d-gap"], "lower-case words"),
        (["ot", "gap", "--family", "experiments"], "family"),
        (["ot", "gap", "--family", "../other"], "family"),
        (["ot", "gap", "--colour", "red"], "unrecognized"),
    ],
)
def test_bad_input_exits_with_2_and_one_line(
    arguments: list[str], said: str, workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tree(workspace)
    try:
        code = new_method.main(arguments, root=workspace)
    except SystemExit as exit:
        code = exit.code
    captured = capsys.readouterr()
    assert code == 2
    assert said in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert tree(workspace) == before


@pytest.mark.parametrize("taken", ["catalog", "file"])
def test_nothing_is_overwritten(taken: str, workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new_method.main(["ot", "mirror-descent"], root=workspace)
    if taken == "file":  # a catalog without the method, but with its benchmark still there
        catalog = workspace / "packages/ot/src/poise/ot/catalog.py"
        shutil.copy(ROOT / "packages/ot/src/poise/ot/catalog.py", catalog)
    before = tree(workspace)
    capsys.readouterr()
    assert new_method.main(["ot", "mirror-descent"], root=workspace) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert tree(workspace) == before


def test_catalog_without_methods_is_refused(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (workspace / "packages/ot/src/poise/ot/catalog.py").write_text('"""Nothing here."""\n')
    before = tree(workspace)
    assert new_method.main(["ot", "mirror-descent"], root=workspace) == 2
    assert "sets no METHODS" in capsys.readouterr().err
    assert tree(workspace) == before


@pytest.mark.parametrize(
    ("source", "value"),
    [
        ("X = ()", (9,)),
        ("X: tuple[int, ...] = (1,)", (1, 9)),
        ("X = (\n    1,\n    2,  # two\n)", (1, 2, 9)),
        ("A = (1, 2)\nX = A + (3,)", (1, 2, 3, 9)),
        ("A = (1,)\nX: tuple[int, ...] = tuple(a for a in A)", (1, 9)),
    ],
)
def test_entry_goes_to_the_end_of_any_tuple(source: str, value: tuple[int, ...]) -> None:
    namespace: dict[str, object] = {}
    exec(new_method.append(f"{source}\nY = X\n", "X", "    9,\n", Path("x.py")), namespace)
    assert namespace["X"] == namespace["Y"] == value


def test_no_skeleton_is_left_in_the_tree() -> None:
    folders = (ROOT / "shared", ROOT / "packages", ROOT / "docs")
    left = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for folder in folders
        for path in sorted(folder.rglob("*"))
        if path.suffix in (".py", ".pyi", ".md")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if MARKER in line
    ]
    assert not left, "these places of a new method wait to be written:\n" + "\n".join(left)


def test_every_recipe_says_what_it_installs() -> None:
    found = recipes(PAGE.read_text(encoding="utf-8"))
    assert len(found) == 6
    assert all(need == "timm" or (ROOT / need).is_dir() for recipe in found for need in recipe.needs)


def test_a_recipe_without_code_is_refused() -> None:
    with pytest.raises(ValueError, match="1 sections, but 0"):
        recipes("# Recipes\n\n## One\n\n```sh\npip install ./shared\n```\n")


def test_wheels_of_every_member_are_tried_with_their_own_tests_and_no_source(tmp_path: Path) -> None:
    assert set(try_wheels.MEMBERS) == set(new_method.PACKAGES)
    try_wheels.lay_out("ot", tmp_path)
    there = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert {"pyproject.toml", "conftest.py", "tools/strict.py", "packages/ot/tests/test_monge_gap.py"} <= there
    assert [name for name in there if "/src/" in name or name.startswith("shared/")] == []
    assert {name.split("/")[1] for name in there if name.startswith("packages/")} == {"ot"}


@pytest.mark.parametrize(("member", "names"), [("core", ["core"]), ("ot", ["core", "ot"])])
def test_a_member_is_installed_from_its_wheel_and_that_of_the_core(
    member: str, names: list[str], tmp_path: Path
) -> None:
    for name in new_method.PACKAGES:
        (tmp_path / f"poise_{name}-0.1.0-py3-none-any.whl").touch()
    wheels = [need for need in try_wheels.requirements(member, tmp_path) if need.startswith("poise")]
    assert wheels == [
        f"poise-{name}[lab] @ {(tmp_path / f'poise_{name}-0.1.0-py3-none-any.whl').as_uri()}" for name in names
    ]


def test_a_line_says_how_the_tests_of_a_member_ended() -> None:
    output = "method in 3 words\n1 failed, 334 passed, 49 skipped in 198.78s (0:03:18)\n"
    line = try_wheels.Outcome(1, output, 206.4, 114.0).line("rl")
    assert line == "FAILED  rl            206 s    114 s CPU  1 failed, 334 passed, 49 skipped in 198.78s (0:03:18)"
    assert try_wheels.Outcome(4, "ImportError", 1.0, 1.0).line("rl").endswith("no test ran")


def test_an_unknown_member_is_refused_before_anything_is_built(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        try_wheels.main(["cooking"])
    assert "there is no member 'cooking'; there are core, generative" in capsys.readouterr().err
