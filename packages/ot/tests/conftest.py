"""Writers of tiny files in the published formats."""

import itertools

import numpy as np
import pytest
import torch
from scipy import sparse


def published_potential(dim, seed):
    """A state dict with the names and shapes of the benchmark's files."""
    generator = torch.Generator().manual_seed(seed)
    widths = (max(2 * dim, 64), max(2 * dim, 64), max(dim, 32))

    def normal(*shape):
        return 0.1 * torch.randn(*shape, generator=generator)

    state = {}
    for index, width in enumerate(widths):
        state[f"quadratic_layers.{index}.quadratic_decomposed"] = normal(dim, 1, width)
        state[f"quadratic_layers.{index}.weight"] = normal(width, dim)
        state[f"quadratic_layers.{index}.bias"] = normal(width)
    for index, (width, out) in enumerate(itertools.pairwise(widths)):
        state[f"convex_layers.{index}.weight"] = normal(out, width).abs()
    state["final_layer.weight"] = normal(1, widths[-1]).abs()
    return state


def write_published_pair(folder, dim):
    (folder / "benchmarks" / "Mix3toMix10").mkdir(parents=True)
    for version in (1, 2):
        torch.save(published_potential(dim, version), folder / "benchmarks" / "Mix3toMix10" / f"{dim}_v{version}.pt")
    return folder


def write_string(group, name, values):
    import h5py

    dataset = group.create_dataset(name, data=np.array(values, dtype=object), dtype=h5py.string_dtype())
    dataset.attrs["encoding-type"] = "string-array"


def write_categorical(group, name, values):
    categories, codes = np.unique(values, return_inverse=True)
    column = group.create_group(name)
    column.attrs.update({"encoding-type": "categorical", "encoding-version": "0.2.0", "ordered": False})
    column.create_dataset("codes", data=codes.astype(np.int8))
    write_string(column, "categories", list(categories))


def write_matrix(file, name, matrix, layout):
    if layout == "dense":
        file.create_dataset(name, data=matrix).attrs["encoding-type"] = "array"
        return
    compressed = (sparse.csr_matrix if layout.startswith("csr") else sparse.csc_matrix)(matrix)
    group = file.create_group(name)
    if layout.endswith("legacy"):
        group.attrs.update({"h5sparse_format": layout[:3], "h5sparse_shape": matrix.shape})
    else:
        group.attrs.update({"encoding-type": f"{layout}_matrix", "encoding-version": "0.1.0", "shape": matrix.shape})
    for part in ("data", "indices", "indptr"):
        group.create_dataset(part, data=getattr(compressed, part))


def write_h5ad(path, drugs, doses, layout="dense", control=None, features=5, legacy=False):
    """A file of the on-disk format of AnnData 0.8 and later, or of 0.7."""
    import h5py

    matrix = np.random.default_rng(0).poisson(0.7, (len(drugs), features)).astype(np.float32)
    with h5py.File(path, "w") as file:
        file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        write_matrix(file, "X", matrix, layout)
        write_matrix(file.create_group("obsm"), "X_pca", matrix[:, :2], "dense")
        for table, index in (
            ("obs", [f"cell{i}" for i in range(len(drugs))]),
            ("var", [f"gene{i}" for i in range(features)]),
        ):
            group = file.create_group(table)
            group.attrs.update({"encoding-type": "dataframe", "encoding-version": "0.2.0", "_index": "_index"})
            write_string(group, "_index", index)
        obs = file["obs"]
        if legacy:
            categories, codes = np.unique(drugs, return_inverse=True)
            write_string(obs.create_group("__categories"), "drug", list(categories))
            obs.create_dataset("drug", data=codes.astype(np.int8))
        else:
            write_categorical(obs, "drug", drugs)
        obs.create_dataset("dose", data=np.array(doses))
        if control is not None:
            control(obs)
    return matrix


@pytest.fixture(name="published_potential")
def _published_potential():
    return published_potential


@pytest.fixture(name="write_published_pair")
def _write_published_pair():
    return write_published_pair


@pytest.fixture(name="write_h5ad")
def _write_h5ad():
    pytest.importorskip("h5py", reason="the extra poise-ot[cells] is not installed")
    return write_h5ad
