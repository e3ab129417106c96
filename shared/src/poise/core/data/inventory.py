"""What data are here: for ``poise doctor``.

>>> {data.name: data.available for data in bundled()}["digits"]
True
"""

from dataclasses import dataclass
from importlib.metadata import version

from poise.core.data import docstrings, images, pictures, scans, tables
from poise.core.data.wheels import DISTRIBUTIONS, MissingDataError, wheel_file


@dataclass(frozen=True)
class Bundled:
    """One data set.

    Attributes:
        name: the name of the function in ``poise.core.data`` that loads it, or of the picture.
        package: the package on PyPI that ships it; several for a set composed of several.
        version: the installed version of the package, ``None`` when the data are not available.
        problem: why the data cannot be loaded, and what to install; empty if they can.
    """

    name: str
    package: str
    version: str | None
    problem: str = ""

    @property
    def available(self) -> bool:
        """Whether it can be loaded."""
        return not self.problem


def bundled() -> list[Bundled]:
    """Every data set that ``poise.core.data`` can load, and whether its file is here.

    Reads no data and imports no package.
    """
    files = {name: [place] for name, place in {**images.FILES, **tables.FILES, **pictures.FILES, **scans.FILES}.items()}
    files["photograph_crops"] = [pictures.FILES[name] for name in pictures.PHOTOGRAPHS]
    files["histology_tiles"] = [pictures.FILES["histology"]]
    files["docstring_corpus"] = [docstrings.FILE]
    return [_look(name, places) for name, places in files.items()]


def _look(name: str, places: list[tuple[str, str]]) -> Bundled:
    distributions = list(dict.fromkeys(DISTRIBUTIONS.get(package, package) for package, _ in places))
    try:
        for package, path in places:
            wheel_file(package, path)
    except MissingDataError as error:
        return Bundled(name, ", ".join(distributions), None, str(error))
    return Bundled(name, ", ".join(distributions), ", ".join(version(one) for one in distributions))
