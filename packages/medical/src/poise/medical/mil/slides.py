"""Which slides there are: their labels, patients and splits, from the tables that the field keeps; and splits by patient.

A table is a CSV file with the columns ``slide_id`` and ``label``, and possibly ``case_id`` (or ``patient_id``) and ``split``. CLAM
keeps splits in a file of its own, ``splits_0.csv``, with a column of slide ids for each of ``train``, ``val`` and ``test``.

>>> slides = Slides.of([Slide("a1", 0, "ann"), Slide("a2", 1, "ann"), Slide("b1", 1, "bob"), Slide("c1", 0, "cy")])
>>> parts = split_patients(slides, {"train": 0.5, "test": 0.5}, seed=0)
>>> len({slide.split for slide in parts if slide.patient == "ann"})  # both of ann's slides are on one side
1
"""

import csv
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from poise.core.gpu import derive_generator


@dataclass(frozen=True)
class Slide:
    """One slide: its name, its class, whose it is, and the part of the data that it belongs to ("" if none yet)."""

    id: str
    label: int
    patient: str
    split: str = ""


@dataclass(frozen=True)
class Slides:
    """A table of slides. No patient is in two of its splits.

    Attributes:
        rows: the slides.
        classes: the name of every class.

    Raises:
        ValueError: a slide is there twice, has a label without a class, or a patient is in two splits.
    """

    rows: tuple[Slide, ...]
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        twice = [name for name, count in Counter(slide.id for slide in self.rows).items() if count > 1]
        if twice:
            raise ValueError(f"slides are listed more than once: {_some(twice)}")
        for slide in self.rows:
            if not 0 <= slide.label < len(self.classes):
                raise ValueError(
                    f"slide {slide.id!r} has the label {slide.label}, but labels must lie in 0..{len(self.classes) - 1}"
                )
        check_patients(self.rows)

    @classmethod
    def of(cls, rows: Iterable[Slide]) -> "Slides":
        """Slides whose classes are called after their numbers."""
        rows = tuple(rows)
        return cls(rows, tuple(str(label) for label in range(max((slide.label for slide in rows), default=-1) + 1)))

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Slide]:
        return iter(self.rows)

    def part(self, split: str) -> "Slides":
        """The slides of one split.

        Raises:
            ValueError: there is none.
        """
        rows = tuple(slide for slide in self.rows if slide.split == split)
        if not rows:
            raise ValueError(
                f"no slide is in the split {split!r}, only in {sorted({slide.split for slide in self.rows})}"
            )
        return replace(self, rows=rows)

    def merged(self, groups: Sequence[Sequence[int]]) -> "Slides":
        """Fewer classes: the i-th group of old classes becomes class i.

        Raises:
            ValueError: the groups do not hold every class exactly once.
        """
        new = {old: index for index, group in enumerate(groups) for old in group}
        if sorted(old for group in groups for old in group) != list(range(len(self.classes))):
            raise ValueError(
                f"groups must hold each of the {len(self.classes)} classes once, got {[list(g) for g in groups]}"
            )
        names = tuple("+".join(self.classes[old] for old in group) for group in groups)
        return Slides(tuple(replace(slide, label=new[slide.label]) for slide in self.rows), names)


def check_patients(slides: Iterable[Slide]) -> None:
    """Refuse splits that share a patient.

    Raises:
        ValueError: slides of one patient are in two splits; the message names patients and splits.
    """
    seen: dict[str, set[str]] = {}
    for slide in slides:
        if slide.split:
            seen.setdefault(slide.patient, set()).add(slide.split)
    leaks = [f"{patient} ({', '.join(sorted(splits))})" for patient, splits in sorted(seen.items()) if len(splits) > 1]
    if leaks:
        raise ValueError(f"patient leakage: {len(leaks)} patients have slides in more than one split: {_some(leaks)}")


def split_patients(slides: Slides, shares: Mapping[str, float], seed: int = 0) -> Slides:
    """Part the slides at random, whole patients at a time and each class in about the same proportion.

    A patient counts for the largest label among the slides. Each patient goes to the split that is furthest behind its share, so
    that a split may lack a class that has fewer patients than there are splits.

    Args:
        slides: what to part; splits they have already are replaced.
        shares: the share of patients for every split, which sum to 1.
        seed: the same seed gives the same split on every machine.

    Raises:
        ValueError: the shares are not positive or do not sum to 1.
    """
    if not shares or min(shares.values()) <= 0 or abs(sum(shares.values()) - 1) > 1e-9:
        raise ValueError(f"shares must be positive and sum to 1, got {dict(shares)}")
    label: dict[str, int] = {}
    for slide in slides:
        label[slide.patient] = max(slide.label, label.get(slide.patient, 0))
    generator = derive_generator(seed, "split_patients")
    split: dict[str, str] = {}
    owed = dict.fromkeys(
        shares, 0.0
    )  # what each split should have had so far; a class that is rare evens out with the next
    for group in range(len(slides.classes)):
        patients = sorted(patient for patient, its_label in label.items() if its_label == group)
        for index in torch.randperm(len(patients), generator=generator).tolist():
            owed = {name: owed[name] + share for name, share in shares.items()}
            chosen = max(owed, key=lambda name: owed[name])
            owed[chosen] -= 1
            split[patients[index]] = chosen
    return replace(slides, rows=tuple(replace(slide, split=split[slide.patient]) for slide in slides))


def read_slides(path: Path | str, *, splits: Path | str | None = None, classes: Sequence[str] | None = None) -> Slides:
    """Read a table of labels, and CLAM's table of splits if there is one.

    Args:
        path: the CSV file. Labels are numbers, or names; without a column of patients every slide is a patient of its own.
        splits: CLAM's ``splits_<fold>.csv``. Slides it does not list are left out.
        classes: names of the classes in their order; by default the names found, sorted.

    Raises:
        ValueError: a column or a label is missing, a label is not among the classes, a listed slide is not in the table, or a
            patient is in two splits.
        FileNotFoundError: there is no such file.
    """
    path = Path(path)
    table = _rows(path)
    missing = {"slide_id", "label"} - set(table[0] if table else ())
    if missing:
        raise ValueError(
            f"{path.name} needs the columns slide_id and label, {' and '.join(sorted(missing))} is missing"
        )
    names = [row["label"].strip() for row in table]
    if unlabelled := [row["slide_id"] for row, name in zip(table, names, strict=True) if not name]:
        raise ValueError(f"{path.name}: slides without a label: {_some(unlabelled)}")
    known = tuple(classes) if classes is not None else _classes(names)
    patient_column = next((name for name in ("case_id", "patient_id") if name in table[0]), "slide_id")
    given = None if splits is None else _clam_splits(Path(splits), {row["slide_id"] for row in table})
    rows = []
    for row, name in zip(table, names, strict=True):
        if given is not None and row["slide_id"] not in given:
            continue
        if name not in known:
            raise ValueError(
                f"{path.name}: slide {row['slide_id']!r} has the label {name!r}, which is not one of {list(known)}"
            )
        split = row.get("split", "").strip() if given is None else given[row["slide_id"]]
        rows.append(Slide(row["slide_id"], known.index(name), row[patient_column], split))
    return Slides(tuple(rows), known)


def _clam_splits(path: Path, slides: set[str]) -> dict[str, str]:
    table = _rows(path)
    columns = [name for name in ("train", "val", "test") if name in (table[0] if table else ())]
    if not columns:
        raise ValueError(f"{path.name} needs at least one of the columns train, val and test")
    listed = [(row[name].strip(), name) for name in columns for row in table if row[name].strip()]
    if unknown := [slide for slide, _ in listed if slide not in slides]:
        raise ValueError(f"{path.name} lists slides that have no label: {_some(unknown)}")
    if twice := [slide for slide, count in Counter(slide for slide, _ in listed).items() if count > 1]:
        raise ValueError(f"{path.name} lists slides more than once: {_some(twice)}")
    return dict(listed)


def _classes(names: Sequence[str]) -> tuple[str, ...]:
    if all(name.lstrip("-").isdigit() for name in names):
        numbers = [int(name) for name in names]
        if min(numbers) < 0:
            raise ValueError(f"labels must be 0 or above, got {min(numbers)}")
        return tuple(str(number) for number in range(max(numbers) + 1))
    return tuple(sorted(set(names)))


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        return [{key: value or "" for key, value in row.items() if key} for row in csv.DictReader(file)]


def _some(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
