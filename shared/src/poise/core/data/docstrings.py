"""Real text of ten kinds: the docstrings of NumPy and SciPy, labelled by the module they document.

>>> train, test = docstring_corpus().split(train=50, test=26)
>>> len(train), train.classes[:3]
(500, ('scipy.stats', 'scipy.signal', 'scipy.special'))
"""

import importlib
import inspect
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from poise.core.data.wheels import wheel_file
from poise.core.gpu.seeds import derive_generator

MODULES = (
    *("scipy.stats", "scipy.signal", "scipy.special", "scipy.linalg", "scipy.ndimage"),
    *("scipy.optimize", "scipy.sparse", "scipy.interpolate", "numpy.random", "numpy.ma"),
)
FILE = ("scipy", "stats/__init__.py")
"""A file of the package that is needed."""

GIVEAWAYS = tuple(sorted({"np", "sp", *(part for module in MODULES for part in module.split("."))}))
"""Module names and their aliases, which would tell the label."""

LEAST_TEXTS = 65
"""Texts of each module that the corpus promises; with SciPy 1.17 and NumPy 2.4 there are more of every one."""


@dataclass(frozen=True, eq=False)
class Texts:
    """Labelled texts.

    Attributes:
        name: what they are called.
        texts: the texts.
        symbols: name of what each text documents, with its class: ``"rv_continuous.fit"``.
        targets: class indices, int64 ``(texts,)``.
        classes: name of every class, by index.
        licence: licence of the texts.
        source: where they come from.
    """

    name: str
    texts: tuple[str, ...]
    symbols: tuple[str, ...]
    targets: Int[Tensor, "texts"]
    classes: tuple[str, ...]
    licence: str
    source: str

    def __len__(self) -> int:
        return len(self.texts)

    def subset(self, rows: list[int]) -> "Texts":
        """The given rows, with the same classes."""
        return replace(
            self,
            texts=tuple(self.texts[row] for row in rows),
            symbols=tuple(self.symbols[row] for row in rows),
            targets=self.targets[rows],
        )

    def split(self, train: int = 50, test: int = 26, *, seed: int = 0) -> "TextSplit":
        """Part every class at random, with all texts about one class object on one side.

        Args:
            train: texts of each class for training, exactly.
            test: texts of each class for testing, at most.
            seed: the same seed gives the same split of the same texts.

        Raises:
            ValueError: a class cannot be parted so.
        """
        generator = derive_generator(seed, "split")
        sides: tuple[list[int], list[int]] = ([], [])
        for label, name in enumerate(self.classes):
            held_in, held_out = self._part(label, train, test, generator)
            if len(held_in) < train or not held_out:
                raise ValueError(f"{name}: {len(held_in)} texts for training and {len(held_out)} for testing remain")
            sides[0].extend(held_in[:train])
            sides[1].extend(held_out[:test])
        return TextSplit(*(self.subset(sorted(side)) for side in sides))

    def _part(self, label: int, train: int, test: int, generator: torch.Generator) -> tuple[list[int], list[int]]:
        """Rows of one class for either side, each in random order."""
        rows = torch.nonzero(self.targets == label).flatten()
        rows = rows[torch.randperm(len(rows), generator=generator)]
        groups: dict[str, list[int]] = {}
        for row in rows.tolist():
            groups.setdefault(self.symbols[row].partition(".")[0], []).append(row)
        held_in: list[int] = []
        held_out: list[int] = []
        left = len(rows)
        for group in groups.values():
            left -= len(group)
            enough = len(held_in) + left >= train  # the rest can still fill the training side
            (held_out if enough and len(held_out) < test else held_in).extend(group)
        return held_in, held_out


class TextSplit(NamedTuple):
    """Texts to learn from, and texts to judge by."""

    train: Texts
    test: Texts


def docstring_corpus() -> Texts:
    """The docstrings of ten modules of SciPy and NumPy, about 1,700 texts of 80 to 400 characters, label = module.

    See :func:`module_docstrings` for what is kept of a docstring. A text that documents something in two of the
    modules is left out. The number of texts depends on the installed versions.

    Raises:
        MissingDataError: SciPy is not installed.
        RuntimeError: a module has fewer than 65 texts, as when Python runs with ``-OO``, which strips docstrings.
    """
    wheel_file(*FILE)  # says what to install if it is missing
    by_module = {module: module_docstrings(module, without=GIVEAWAYS) for module in MODULES}
    modules_with = Counter(text for texts in by_module.values() for text in texts.values())
    rows = [
        (text, symbol, label)
        for label, texts in enumerate(by_module.values())
        for symbol, text in texts.items()
        if modules_with[text] == 1
    ]
    texts, symbols, labels = zip(*rows, strict=True) if rows else ((), (), ())
    counts = Counter(labels)
    for label, module in enumerate(MODULES):
        if counts[label] < LEAST_TEXTS:
            raise RuntimeError(
                f"{module} has {counts[label]} docstrings of its own, expected at least {LEAST_TEXTS}; "
                "is Python run with -OO, which strips them?"
            )
    return Texts(
        name="docstring_corpus",
        texts=texts,
        symbols=symbols,
        targets=torch.tensor(labels),
        classes=MODULES,
        licence="BSD-3-Clause",
        source="docstrings of the installed SciPy and NumPy",
    )


def module_docstrings(module: str, *, without: tuple[str, ...] = (), over: int = 80, most: int = 400) -> dict[str, str]:
    """Distinct docstrings of a module's public functions, classes and methods, by symbol (``"Generator.normal"``).

    Doctests, links, references and reStructuredText marks are removed, and white space becomes single spaces. A text
    that documents several symbols is given once, under the first of them in alphabetical order.

    Args:
        module: dotted name; it is imported.
        without: words to remove from the texts, alone or as part of a dotted name, in either case: names that would
            give the module away.
        over: characters that a text must exceed, or it is dropped.
        most: characters after which a text is cut.
    """
    names = "|".join(re.escape(word) for word in without)
    giveaway = re.compile(rf"\b(?:{names})\b\.?", re.IGNORECASE) if names else None
    symbols: dict[str, str] = {}
    for symbol, documented in _public(importlib.import_module(module)):
        docstring = documented.__doc__
        if not isinstance(docstring, str):
            continue
        text = _prose(docstring, giveaway)
        if len(text) > over:
            symbols.setdefault(text[:most].rstrip(), symbol)
    return {symbol: text for text, symbol in symbols.items()}


def _public(module: ModuleType) -> Iterator[tuple[str, Any]]:
    """Public callables of a module and public methods of its classes, in alphabetical order."""
    for name in sorted(getattr(module, "__all__", dir(module))):
        value = getattr(module, name, None)
        if name.startswith("_") or not callable(value):
            continue
        yield name, value
        if inspect.isclass(value):
            for attribute in sorted(dir(value)):
                method = getattr(value, attribute, None)
                if not attribute.startswith("_") and callable(method):
                    yield f"{name}.{attribute}", method


_DOCTEST = re.compile(r"^[ \t]*>>>.*?(?:\n[ \t]*\n|\Z)", re.MULTILINE | re.DOTALL)  # output included
_LINK = re.compile(r"(?:https?://|doi:|:doi:)\S+|\[[\w*]+\]_|^\.\. \[\w+\]", re.IGNORECASE | re.MULTILINE)
_MARKS = re.compile(r":[a-z:]+:(?=`)|[-=~]{3,}|`")


def _prose(docstring: str, giveaway: re.Pattern[str] | None) -> str:
    text = inspect.cleandoc(docstring)
    for unwanted in (_DOCTEST, _LINK, _MARKS, giveaway):
        if unwanted is not None:
            text = unwanted.sub(" ", text)
    return " ".join(text.split())
