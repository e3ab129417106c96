"""Docstrings as Markdown: examples, formulas and names that docstrings mark in reStructuredText, for mkdocstrings."""

import re
from collections.abc import Callable
from typing import Any

import griffe

MATH = re.compile(r":math:`([^`]+)`")
ROLE = re.compile(r":(?:attr|class|data|exc|func|meth|mod|obj):`~?([^`]+)`")
DIRECTIVE = re.compile(r"(?P<indent> *)\.\. math::(?P<formula>.*)")
SOURCE = re.compile(r"(?P<indent> *)Source:(?P<text>.*)")


class MarkdownDocstrings(griffe.Extension):
    """Rewrites every docstring with :func:`markdown`."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring:
            obj.docstring.value = markdown(obj.docstring.value)


def markdown(docstring: str) -> str:
    """Fence examples, put formulas between dollars, write names as code, and a ``Source:`` section as a paragraph."""
    lines, result = [line.rstrip() for line in docstring.splitlines()], list[str]()
    while lines:
        line = lines.pop(0)
        indent = line[: len(line) - len(line.lstrip())]
        if line.lstrip().startswith(">>>"):
            example = [line, *_take(lines, lambda following: following != "")]
            result += [f"{indent}```pycon", *example, f"{indent}```"]
        elif directive := DIRECTIVE.fullmatch(line):
            formula = [part.strip() for part in (directive["formula"], *_body(lines, indent)) if part.strip()]
            result += ["", f"{indent}$$", *(indent + part for part in formula), f"{indent}$$", ""]
        elif source := SOURCE.fullmatch(line):
            text = " ".join(part.strip() for part in (source["text"], *_body(lines, indent)))
            result += [f"{indent}**Source:** {_inline(text.strip())}"]
        else:
            result.append(_inline(line))
    return "\n".join(result)


def _inline(line: str) -> str:
    return ROLE.sub(r"`\1`", MATH.sub(r"$\1$", line))


def _body(lines: list[str], indent: str) -> list[str]:
    """Remove and return the lines that are indented deeper than ``indent``; a blank line may come first."""
    if len(lines) > 1 and lines[0] == "" and lines[1].startswith(f"{indent} "):
        del lines[0]
    return _take(lines, lambda line: line.startswith(f"{indent} "))


def _take(lines: list[str], belongs: Callable[[str], bool]) -> list[str]:
    taken = []
    while lines and belongs(lines[0]):
        taken.append(lines.pop(0))
    return taken
