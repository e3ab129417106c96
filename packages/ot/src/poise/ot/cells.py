"""Single-cell perturbation data from AnnData files (``.h5ad``), read with h5py alone.

The file holds a matrix of cells by features and a table about the cells; three of its columns matter here: which ``drug`` a cell
got, at what ``dose``, and whether it is a ``control``. Both the present on-disk format (dense, CSR and CSC matrices, categorical,
nullable and string columns) and that of AnnData 0.7, in which 4i and sci-Plex 3 are published, are understood.

Format: https://anndata.readthedocs.io/en/stable/fileformat-prose.html

    cells = read_cells("sciplex3.h5ad", features="obsm/X_pca")
    source, target = cells.controls(), cells.treated("givinostat", 1000.0)
"""

from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    import h5py

YES = ("true", "1", "1.0", "yes", "control")
NO = ("false", "0", "0.0", "no", "treated", "")


@dataclass(frozen=True)
class Cells:
    """Cells, what was measured of them, and what was done to them.

    Attributes:
        features: one row per cell, float32.
        names: names of the features.
        drug: the drug of each cell.
        dose: its dose; 0 everywhere when the file has none.
        control: which cells are untreated.
    """

    features: Float[Tensor, "cells features"]
    names: tuple[str, ...]
    drug: np.ndarray
    dose: np.ndarray
    control: np.ndarray

    def contexts(self) -> list[tuple[str, float]]:
        """The treatments that occur, ``(drug, dose)``, sorted."""
        treated = ~self.control
        return sorted(
            {(str(drug), float(dose)) for drug, dose in zip(self.drug[treated], self.dose[treated], strict=True)}
        )

    def controls(self) -> Float[Tensor, "cells features"]:
        """The untreated cells."""
        return self.features[torch.from_numpy(self.control)]

    def treated(self, drug: str, dose: float) -> Float[Tensor, "cells features"]:
        """The cells that got ``drug`` at ``dose``.

        Raises:
            ValueError: no cell did.
        """
        chosen = ~self.control & (self.drug == drug) & (self.dose == dose)
        if not chosen.any():
            raise ValueError(f"no cell got {drug!r} at dose {dose:g}; the treatments are {_shortened(self.contexts())}")
        return self.features[torch.from_numpy(chosen)]


def read_cells(
    path: str | Path, *, features: str = "X", drug: str = "drug", dose: str | None = "dose", control: str = "control"
) -> Cells:
    """Read a ``.h5ad`` file.

    Args:
        path: the file, or a folder that holds exactly one.
        features: which matrix: ``X``, ``layers/NAME``, or ``obsm/NAME`` for an embedding such as 50 principal components.
        drug: column with the drug's name.
        dose: column with the dose; ``None`` if the data set has none.
        control: column that says which cells are controls (booleans, 0 and 1, or words like ``True``). If there is no such column,
            the controls are the cells whose drug has this name.

    Raises:
        ImportError: h5py is not installed.
        FileNotFoundError: no such file.
        ValueError: not an AnnData file, or a column or matrix is missing, of the wrong size or not finite.
    """
    h5py = _import_h5py()
    path = _single_file(Path(path))
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise ValueError(f"{path} is not an HDF5 file: {error}") from error
    with file:
        if not isinstance(file.get("obs"), h5py.Group) or not isinstance(file.get("var"), h5py.Group):
            raise ValueError(f"{path} is not an AnnData file: it has no tables 'obs' and 'var'")
        drugs = _column(file["obs"], drug).astype(str)
        doses = np.zeros(len(drugs)) if dose is None else _numbers(_column(file["obs"], dose), dose)
        controls = _truths(_column(file["obs"], control), control) if control in file["obs"] else drugs == control
        matrix = _matrix(file, features)
        genes = _column(file["var"], _attribute(file["var"], "_index") or "_index").astype(str).tolist()
    if len(matrix) != len(drugs) or len(doses) != len(drugs):
        raise ValueError(f"{path}: {features!r} has {len(matrix)} rows for {len(drugs)} cells")
    if not np.isfinite(matrix).all():
        raise ValueError(f"{path}: {features!r} has entries that are not finite")
    if not controls.any() or controls.all():
        raise ValueError(f"{path}: {int(controls.sum())} of {len(controls)} cells are controls: a map needs both kinds")
    component = features.removeprefix("obsm/")  # its columns are no genes and have no names
    names = genes if component == features else [f"{component}_{index}" for index in range(matrix.shape[1])]
    return Cells(torch.from_numpy(matrix), tuple(names), drugs, doses, controls)


def _import_h5py() -> ModuleType:
    try:
        import h5py
    except ImportError as error:
        raise ImportError("reading .h5ad files needs h5py: pip install 'poise-ot[cells]'") from error
    return h5py


def _single_file(path: Path) -> Path:
    if not path.is_dir():
        if not path.is_file():
            raise FileNotFoundError(f"no such file: {path}")
        return path
    files = sorted(path.glob("*.h5ad"))
    if len(files) != 1:
        raise FileNotFoundError(f"expected one .h5ad file in {path}, got {len(files)}")
    return files[0]


def _attribute(node: "h5py.Group | h5py.Dataset", *names: str) -> str:
    """The first of the attributes that is there, as text."""
    value = next((node.attrs[name] for name in names if name in node.attrs), "")
    return value.decode() if isinstance(value, bytes) else str(value)


def _column(table: "h5py.Group", name: str) -> np.ndarray:
    """A column of a table, whatever its encoding; missing entries are NaN, or the empty string where the column is text."""
    if name not in table:
        columns = sorted(key for key in table if not key.startswith("_"))
        raise ValueError(f"the table {table.name!r} has no column {name!r}; it has {_shortened(columns)}")
    node: Any = table[name]
    if hasattr(node, "keys"):  # a group: categorical, or values with a mask
        if "categories" in node:
            return _decoded(_values(node["categories"]), node["codes"][...])
        values = _values(node["values"])
        missing = node["mask"][...].astype(bool)
        return _with_missing(values, missing)
    if "__categories" in table and name in table["__categories"]:  # AnnData 0.7
        return _decoded(_values(table["__categories"][name]), node[...])
    return _values(node)


def _values(dataset: "h5py.Dataset") -> np.ndarray:
    return dataset.asstr()[...] if dataset.dtype.kind in "OS" else dataset[...]


def _decoded(categories: np.ndarray, codes: np.ndarray) -> np.ndarray:
    return _with_missing(categories[np.maximum(codes, 0)], codes < 0)


def _with_missing(values: np.ndarray, missing: np.ndarray) -> np.ndarray:
    if not missing.any():
        return values
    text = values.dtype.kind in "OSU"
    return np.where(missing, "" if text else np.nan, values if text else values.astype(float))


def _numbers(column: np.ndarray, name: str) -> np.ndarray:
    try:
        return column.astype(float)
    except ValueError as error:
        raise ValueError(f"the column {name!r} must hold numbers: {error}") from error


def _truths(column: np.ndarray, name: str) -> np.ndarray:
    words = np.char.lower(column.astype(str))
    control = np.isin(words, YES)
    strange = ~control & ~np.isin(words, NO)
    if strange.any():
        raise ValueError(f"the column {name!r} must say which cells are controls, got {words[strange][0]!r}")
    return control


def _matrix(file: "h5py.File", features: str) -> np.ndarray:
    """A dense float32 matrix from a dense, CSR or CSC one."""
    if features not in file:
        nested = [f"{group}/{name}" for group in ("layers", "obsm") for name in file.get(group, ())]
        held = [*(["X"] if "X" in file else []), *nested]
        raise ValueError(f"the file has no matrix {features!r}; it has {_shortened(held)}")
    node: Any = file[features]
    if not hasattr(node, "keys"):
        matrix = node[...]
    else:
        from scipy import sparse

        kind = _attribute(node, "encoding-type", "h5sparse_format").removesuffix("_matrix")
        if kind not in ("csr", "csc"):
            raise ValueError(f"the matrix {features!r} has the encoding {kind!r}; expected a dense, CSR or CSC matrix")
        shape = node.attrs["shape" if "shape" in node.attrs else "h5sparse_shape"]
        make = sparse.csr_matrix if kind == "csr" else sparse.csc_matrix
        parts = (node["data"][...].astype(np.float32), node["indices"][...], node["indptr"][...])
        matrix = make(parts, shape=tuple(int(size) for size in shape)).toarray()
    if matrix.ndim != 2:
        raise ValueError(f"the matrix {features!r} must have 2 axes, got shape {matrix.shape}")
    return np.ascontiguousarray(matrix, dtype=np.float32)


def _shortened(items: list[Any]) -> str:
    listed = ", ".join(str(item) for item in items[:8])
    return listed + (f", ... ({len(items)} in all)" if len(items) > 8 else "") if items else "none"
