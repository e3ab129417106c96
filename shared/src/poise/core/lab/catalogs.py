"""Find installed methods by name. Imports no torch."""

import difflib
import importlib
from functools import cache
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from poise.core.catalog import Method
from poise.core.lab.errors import BadInput

if TYPE_CHECKING:
    from poise.core.lab.experiment import Experiment


@cache
def installed() -> dict[str, Method]:
    """Every method of every installed package, by full name, in alphabetical order."""
    found = [method for point in entry_points(group="poise.domains") for method in point.load()]
    return {method.name: method for method in sorted(found, key=lambda method: method.name)}


def packages() -> list[str]:
    """The installed packages that can hold methods, with or without any."""
    return sorted({point.name for point in entry_points(group="poise.domains")})


def in_package(package: str | None) -> list[Method]:
    """The methods of one package, or of all for ``None``.

    Raises:
        BadInput: no such package is installed.
    """
    if package is None:
        return list(installed().values())
    if package not in packages():
        raise BadInput(f"no package {package!r} is installed{nearest(package, packages())}")
    return [method for method in installed().values() if method.package == package]


def find(name: str) -> Method:
    """The method called ``package/slug``; the slug alone will do when it is unique.

    Raises:
        BadInput: there is none; the message gives the nearest names.
    """
    methods = installed()
    if name in methods:
        return methods[name]
    same_slug = [method for method in methods.values() if method.slug == name]
    if len(same_slug) == 1:
        return same_slug[0]
    raise BadInput(f"unknown method {name!r}{nearest(name, list(methods))}; `poise list` shows all")


def load_experiment(method: Method) -> "Experiment":
    """Import the experiment of a method.

    Raises:
        BadInput: the experiment needs a package that is not installed.
    """
    try:
        return importlib.import_module(method.experiment).EXPERIMENT
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.startswith("poise."):
            raise
        raise BadInput(
            f"the experiment of {method.name} needs the package {error.name!r}: pip install 'poise-{method.package}[lab]'"
        ) from error


def nearest(name: str, known: list[str]) -> str:
    """A phrase that offers the known names nearest to ``name``; when nothing is near, all of a short list."""
    slugs = {candidate.rpartition("/")[2]: candidate for candidate in known}
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    close += [slugs[slug] for slug in difflib.get_close_matches(name.rpartition("/")[2], slugs, n=3, cutoff=0.5)]
    if not close and len(known) <= 12:
        return f"; there is {', '.join(known)}" if known else "; there is none"
    unique = list(dict.fromkeys(close))[:3]
    return f"; did you mean {' or '.join(unique)}?" if unique else ""
