"""Cost of the dataset constraint in an update of TD3, and of its exact search against other exact searches.

Everything runs on real steps of HalfCheetah-v5 under random and smooth actions. Collecting a million of them takes minutes, so
they are kept in the temporary folder. Policies are imitated by normal noise on every dimension of the logged actions, cut off at the
bounds of the actions as a policy's are.

uv run python tools/bench.py rl/prdc
"""

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from scipy.spatial import KDTree
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from poise.core.bench import Case, Peer, case, peer, relative_difference
from poise.rl import PRDC, TD3, DatasetConstraint, OfflineDataset

ROWS, FEWER_ROWS = 1_000_000, 100_000
BATCH, UPDATES, BETA = 256, 20, 2.0
NOISES = 0.1, 0.5, 1.0
CHUNK = 8_192

Search = Callable[[], np.ndarray]
"""Runs the queries and returns the distances."""


def collect(count: int, copies: int = 16) -> dict[str, np.ndarray]:
    """Steps of HalfCheetah: uniform actions in half of the copies, smooth ones in the others."""
    envs = gymnasium.make_vec(
        "HalfCheetah-v5", num_envs=copies, vector_kwargs={"autoreset_mode": gymnasium.vector.AutoresetMode.SAME_STEP}
    )
    rng = np.random.default_rng(0)
    assert envs.single_action_space.shape is not None
    smooth = np.zeros((copies, *envs.single_action_space.shape))
    observations, _ = envs.reset(seed=0)
    columns: dict[str, list[np.ndarray]] = {
        name: [] for name in ("observations", "actions", "rewards", "next_observations", "terminated")
    }
    for _ in range(-(-count // copies)):
        smooth = 0.9 * smooth + 0.4 * rng.normal(size=smooth.shape)
        uniform = rng.uniform(-1, 1, smooth.shape)
        actions = np.where(np.arange(copies)[:, None] % 2 == 0, uniform, smooth.clip(-1, 1)).astype(np.float32)
        following, rewards, terminated, truncated, info = envs.step(actions)
        reached = following.copy()
        for copy in np.flatnonzero(terminated | truncated):
            reached[copy] = info["final_obs"][copy]
        for name, column in zip(columns, (observations, actions, rewards, reached, terminated), strict=True):
            columns[name].append(column.astype(np.float32))
        observations = following
    envs.close()
    return {name: np.concatenate(parts)[:count] for name, parts in columns.items()}


def halfcheetah(count: int) -> OfflineDataset:
    """The first ``count`` of the steps that are kept, collected when there are not enough."""
    path = Path(tempfile.gettempdir()) / "poise-halfcheetah-v5.npz"
    kept = dict(np.load(path)) if path.is_file() else {"rewards": np.empty(0)}
    if len(kept["rewards"]) < count:
        kept = collect(count)
        np.savez(path, **kept)
    names = "observations", "actions", "rewards", "next_observations", "terminated"
    return OfflineDataset.from_arrays(*(kept[name][:count] for name in names))


def updater(agent: TD3) -> Callable[[], None]:
    """Some updates."""
    generator = torch.Generator().manual_seed(0)

    def update() -> None:
        for _ in range(UPDATES):
            agent.learn(generator)

    return update


def overhead(data: OfflineDataset) -> Case:
    """An update of TD3 without and with the constraint, after the search has settled for one of its ways."""
    plain, constrained = updater(TD3(data)), updater(PRDC(data, beta=BETA))
    for _ in range(4):
        constrained()
    name = f"{UPDATES} updates, 256-256, batch {BATCH}, {len(data):,} HalfCheetah transitions"
    return case(name, plain, constrained)


def bounded(data: OfflineDataset, noise: float) -> Case:
    """The search by the product of all rows, and by boxes from the batch row's own distance."""
    agent = PRDC(data, beta=BETA)
    states, actions = agent.data.observations, agent.data.actions
    plain, boxes = (DatasetConstraint(states, actions, BETA, backend=backend) for backend in ("matmul", "boxes"))
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(len(data), (BATCH,), generator=generator)
    policy = (actions[rows] + noise * torch.randn(BATCH, actions.shape[1], generator=generator)).clamp(-1, 1)
    name = f"{BATCH} queries in {len(data):,} rows, actions {noise} from the logged ones: all rows, and boxes"
    return case(name, lambda: plain.query(states[rows], policy), lambda: boxes.query(states[rows], policy, rows))


def chunked_product(keys: Tensor, queries: Tensor) -> np.ndarray:
    """The recommended brute force: products of chunks that fit into the cache, and a running minimum; float32."""
    half_norms = keys.square().sum(1) / 2
    best = torch.full((len(queries),), torch.inf)
    nearest = torch.zeros(len(queries), dtype=torch.long)
    for start in range(0, len(keys), CHUNK):
        score, row = torch.addmm(
            half_norms[start : start + CHUNK], queries, keys[start : start + CHUNK].T, alpha=-1
        ).min(1)
        nearest = torch.where(score < best, row + start, nearest)
        best = torch.minimum(best, score)
    return (keys[nearest] - queries).norm(dim=1).numpy()


def exact(keys: Tensor, queries: Tensor) -> np.ndarray:
    """Distances by brute force in float64, computed directly."""
    found = torch.full((len(queries),), torch.inf, dtype=torch.float64)
    for rows in keys.double().split(CHUNK):
        found = torch.minimum(
            found, torch.cdist(queries.double(), rows, compute_mode="donot_use_mm_for_euclid_dist").amin(1)
        )
    return found.numpy()


class Peers:
    """Other exact searches, their index built once for all queries."""

    def __init__(self, keys: Tensor) -> None:
        self.keys = keys
        self.tree = KDTree(keys.double().numpy())
        self.forest = NearestNeighbors(n_neighbors=1).fit(keys.numpy())
        self.flat: Any = None
        try:
            self.flat_version = version("faiss-cpu")
        except PackageNotFoundError:
            return
        import faiss

        self.flat = faiss.IndexFlatL2(keys.shape[1])
        self.flat.add(keys.numpy())

    def of(self, queries: Tensor) -> Iterator[tuple[str, str, Search]]:
        """Name, version and call of each."""
        asked = queries.numpy()
        yield "scipy KDTree", version("scipy"), lambda: self.tree.query(asked)[0]
        yield (
            "scikit-learn NearestNeighbors",
            version("scikit-learn"),
            lambda: self.forest.kneighbors(asked)[0].squeeze(1),
        )
        if self.flat is not None:
            yield "faiss IndexFlatL2", self.flat_version, lambda: np.sqrt(self.flat.search(asked, 1)[0].squeeze(1))
        yield "torch chunked product", torch.__version__, partial(chunked_product, self.keys, queries)


def searches(data: OfflineDataset, noises: tuple[float, ...]) -> Iterator[Peer]:
    """A batch of queries against every peer; agreement is the difference of our distances from brute force in float64."""
    agent = PRDC(data, beta=BETA)
    states, actions = agent.data.observations, agent.data.actions
    constraint = DatasetConstraint(states, actions, BETA, backend="boxes")
    peers = Peers(constraint.keys)
    generator = torch.Generator().manual_seed(0)
    for noise in noises:
        rows = torch.randint(len(data), (BATCH,), generator=generator)
        disturbed = actions[rows] + noise * torch.randn(BATCH, actions.shape[1], generator=generator)
        policy = disturbed.clamp(-1, 1)
        queries = torch.cat([BETA * states[rows], policy], dim=1)

        def ours(rows: Tensor = rows, policy: Tensor = policy) -> np.ndarray:
            return constraint.query(states[rows], policy, rows).distance.numpy()

        difference = relative_difference(ours(), exact(constraint.keys, queries))
        width = constraint.keys.shape[1]
        name = f"{BATCH} queries in {len(data):,} x {width} HalfCheetah rows, actions {noise} from the logged ones"
        for library, release, theirs in peers.of(queries):
            yield peer(library, release, name, ours, theirs, agreement=difference, repeats=5, warmup=1)


def bench() -> dict[str, Any]:
    """All cases."""
    large, small = halfcheetah(ROWS), halfcheetah(FEWER_ROWS)
    return {
        "method": "rl/prdc",
        "cases": [overhead(small), overhead(large), *(bounded(large, noise) for noise in NOISES)],
        "peers": [*searches(large, NOISES), *searches(small, (0.5,))],
    }
