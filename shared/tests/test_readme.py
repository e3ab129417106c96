"""What the README of poise-core says about its modules and prints is true."""

import contextlib
import importlib
import io
import re
from pathlib import Path

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_every_module_of_the_table_exists() -> None:
    table = README.split("## Modules")[1].split("## Methods")[0]
    modules = re.findall(r"`(poise\.core\.\w+)`", table)
    assert modules
    for name in modules:
        importlib.import_module(name)


def test_the_snippets_print_what_their_comments_say() -> None:
    printed, said, names = io.StringIO(), [], {}
    for block in re.findall(r"^```python\n(.*?)^```$", README, re.DOTALL | re.MULTILINE):
        with contextlib.redirect_stdout(printed):
            exec(block, names)
        said += re.findall(r"^print\(.*\)  # (.*?)(?:: .*)?$", block, re.MULTILINE)
    assert said
    assert printed.getvalue().splitlines() == said
