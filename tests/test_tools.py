"""tools/new_method.py lays out methods that fail until they are written, and refuses what it cannot do in one line."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import new_method
import pytest
from try_recipes import PAGE, recipes

ROOT = Path(new_method.ROOT)
MARKER = "FILL IN"


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """A copy of what new_method adds to, of two members."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for member in ("shared", "packages/ot"):
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


@pytest.mark.parametrize(("package", "member"), [("ot", "packages/ot"), ("core", "shared")])
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


def test_skeleton_fails_until_it_is_filled(workspace: Path) -> None:
    new_method.main(["ot", "mirror-descent"], root=workspace)
    sources = os.pathsep.join(str(workspace / member / "src") for member in ("packages/ot", "shared"))
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
        env=os.environ | {"PYTHONPATH": sources},
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
