"""Responses of single cells are read from AnnData files of every layout, and bad files are explained."""

import numpy as np
import pytest
import torch

from poise.ot import (
    read_cells,
)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


DRUGS = ["control", "givinostat", "givinostat", "trametinib", "control", "trametinib"]
DOSES = [0.0, 10.0, 1_000.0, 10.0, 0.0, 10.0]


@pytest.mark.parametrize("layout", ["dense", "csr", "csc", "csr_legacy"])
@pytest.mark.parametrize("legacy", [False, True])
def test_cells_are_read_from_every_layout(tmp_path, layout, legacy, write_h5ad):
    matrix = write_h5ad(tmp_path / "cells.h5ad", DRUGS, DOSES, layout, legacy=legacy)
    cells = read_cells(tmp_path)  # the folder: run.load passes what --data says
    np.testing.assert_array_equal(cells.features.numpy(), matrix)
    assert cells.names == tuple(f"gene{i}" for i in range(5))
    assert cells.contexts() == [("givinostat", 10.0), ("givinostat", 1000.0), ("trametinib", 10.0)]
    np.testing.assert_array_equal(cells.controls().numpy(), matrix[[0, 4]])
    np.testing.assert_array_equal(cells.treated("trametinib", 10.0).numpy(), matrix[[3, 5]])


def boolean(obs):
    obs.create_dataset("control", data=np.array(DRUGS) == "control")


def integer(obs):
    obs.create_dataset("control", data=(np.array(DRUGS) == "control").astype(np.int64))


def words(obs):
    import h5py

    obs.create_dataset("control", data=[str(drug == "control") for drug in DRUGS], dtype=h5py.string_dtype())


def nullable(obs):
    group = obs.create_group("control")
    group.attrs["encoding-type"] = "nullable-boolean"
    group.create_dataset("values", data=np.array(DRUGS) == "control")
    group.create_dataset("mask", data=np.zeros(len(DRUGS), dtype=bool))


@pytest.mark.parametrize("control", [None, boolean, integer, words, nullable])
def test_controls_are_known_by_column_or_by_name(tmp_path, control, write_h5ad):
    write_h5ad(tmp_path / "cells.h5ad", DRUGS, DOSES, control=control)
    np.testing.assert_array_equal(read_cells(tmp_path / "cells.h5ad").control, np.array(DRUGS) == "control")


def test_cells_can_be_read_as_components_and_without_doses(tmp_path, write_h5ad):
    matrix = write_h5ad(tmp_path / "cells.h5ad", DRUGS, DOSES)
    cells = read_cells(tmp_path, features="obsm/X_pca", dose=None)
    np.testing.assert_array_equal(cells.features.numpy(), matrix[:, :2])
    assert cells.names == ("X_pca_0", "X_pca_1")
    assert cells.contexts() == [("givinostat", 0.0), ("trametinib", 0.0)]


def test_bad_cell_files_are_explained(tmp_path, write_h5ad):
    import h5py

    with pytest.raises(FileNotFoundError, match=r"one \.h5ad file"):
        read_cells(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_cells(tmp_path / "none.h5ad")
    text = tmp_path / "text.h5ad"
    text.write_text("not HDF5")
    with pytest.raises(ValueError, match="not an HDF5 file"):
        read_cells(text)
    with h5py.File(text, "w") as file:
        file.create_dataset("X", data=np.zeros((2, 2)))
    with pytest.raises(ValueError, match="not an AnnData file"):
        read_cells(text)
    write_h5ad(text, DRUGS, DOSES)
    for arguments, message in (
        ({"drug": "perturbation"}, "no column 'perturbation'; it has dose, drug"),
        ({"features": "layers/counts"}, "no matrix 'layers/counts'; it has X, obsm/X_pca"),
        ({"dose": "drug"}, "must hold numbers"),
        ({"control": "DMSO"}, "0 of 6 cells are controls"),
        ({"control": "dose"}, "which cells are controls"),
    ):
        with pytest.raises(ValueError, match=message):
            read_cells(text, **arguments)
    with pytest.raises(ValueError, match="no cell got 'aspirin'"):
        read_cells(text).treated("aspirin", 1.0)


def test_missing_h5py_names_the_extra(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ImportError, match=r"poise-ot\[cells\]"):
        read_cells(tmp_path)
