"""Exact nearest neighbours: where matrix products win, where a k-d tree does, and what ``auto`` makes of it.

The plain step is the whole distance matrix and ``topk``. "curved" data fills three dimensions of its 23 up to a little noise, as
states of a physical system do; "random" data fills all of them.
"""

from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import PackageNotFoundError, version

import numpy as np
import torch
from scipy.spatial import KDTree
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from poise.core.bench import Case, Peer, case, peer
from poise.core.neighbors.search import Neighbors

K = 1

Search = Callable[[], np.ndarray]
"""Runs the queries and returns the distances."""


def random(rows: int, columns: int, queries: int) -> tuple[Tensor, Tensor]:
    """Standard normal data and queries."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, columns, generator=generator), torch.randn(queries, columns, generator=generator)


def curved(rows: int, columns: int, queries: int) -> tuple[Tensor, Tensor]:
    """A smooth three-dimensional surface in ``columns`` dimensions."""
    generator = torch.Generator().manual_seed(0)
    latent, first, second = (
        torch.randn(shape, generator=generator) for shape in ((rows + queries, 3), (3, 32), (32, columns))
    )
    points = (latent @ first).tanh() @ second / 6
    points += 0.02 * torch.randn(points.shape, generator=generator)
    return points[:rows], points[rows:]


def libraries(data: Tensor, queries: Tensor) -> Iterator[tuple[str, str, Search]]:
    """The peers that are installed, each with its index built."""
    points, asked = data.double().numpy(), queries.double().numpy()
    tree = KDTree(points)
    yield "scipy KDTree", version("scipy"), lambda: tree.query(asked, K)[0]
    forest = NearestNeighbors(n_neighbors=K).fit(points)
    yield "scikit-learn NearestNeighbors", version("scikit-learn"), lambda: forest.kneighbors(asked)[0].squeeze(1)
    try:
        flat_version = version("faiss-cpu")
    except PackageNotFoundError:
        return
    import faiss

    flat = faiss.IndexFlatL2(data.shape[1])
    flat.add(data.numpy())
    yield "faiss IndexFlatL2", flat_version, lambda: np.sqrt(flat.search(queries.numpy(), K)[0].squeeze(1))


def whole_matrix(data: Tensor, queries: Tensor) -> Tensor:
    """What one would write without thinking of memory."""
    return torch.cdist(queries, data).topk(K, largest=False).values


def distances(index: Neighbors, queries: Tensor) -> np.ndarray:
    """Ours."""
    return index.query(queries, K).distances.squeeze(1).numpy()


def bounded_distances(index: Neighbors, queries: Tensor, near: Tensor) -> np.ndarray:
    """Ours, of queries that have a near row."""
    return index.query(queries, K, near=near).distances.squeeze(1).numpy()


def settled(data: Tensor, queries: Tensor) -> Neighbors:
    """An index that has made its choice."""
    index = Neighbors(data)
    for _ in range(200):
        index.query(queries, K)
    return index


def bench() -> dict[str, str | list[Case] | list[Peer]]:
    """The record of all cases."""
    cases: list[Case] = []
    peers: list[Peer] = []
    for make, rows, columns, asked in (
        (random, 1_000, 16, 64),
        (random, 10_000, 23, 256),
        (random, 100_000, 4, 256),
        (curved, 100_000, 23, 256),
        (curved, 100_000, 23, 1),
    ):
        data, queries = make(rows, columns, asked)
        name = f"{make.__name__} {rows:,} x {columns}, {asked} queries"
        ours = {name: settled(data, queries), f"{name}, matmul": Neighbors(data, "matmul")}
        found = {label: partial(distances, index, queries) for label, index in ours.items()}
        cases += [case(label, partial(whole_matrix, data, queries), search) for label, search in found.items()]
        peers += [
            peer(library, release, label, ours=search, theirs=theirs)
            for library, release, theirs in libraries(data, queries)
            for label, search in found.items()
        ]
    for make, rows, columns, asked, distance in ((random, 100_000, 16, 256, 0.2), (curved, 100_000, 23, 256, 0.2)):
        data, _ = make(rows, columns, asked)
        queries = data[:asked] + distance * torch.randn(asked, columns, generator=torch.Generator().manual_seed(1))
        name = f"{make.__name__} {rows:,} x {columns}, {asked} queries, a near row known, boxes"
        search = partial(bounded_distances, Neighbors(data, "boxes"), queries, torch.arange(asked))
        cases.append(case(name, partial(whole_matrix, data, queries), search))
        peers += [
            peer(library, release, name, ours=search, theirs=theirs)
            for library, release, theirs in libraries(data, queries)
        ]
    return {"method": "core/neighbors", "cases": cases, "peers": peers}
