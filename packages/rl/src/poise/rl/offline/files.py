"""The two formats in which offline data are published, D4RL's HDF5 and Minari's, as arrays of transitions."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

Arrays = Mapping[str, np.ndarray]


def d4rl_transitions(path: Path) -> dict[str, np.ndarray]:
    """The arrays of ``OfflineDataset.from_arrays`` from a file of D4RL, the last step before a time limit left out."""
    wanted = "observations", "actions", "rewards", "terminals", "timeouts"
    with _opened(path) as file:
        rows = _read(file, wanted, f"the D4RL file {path}")
    lengths = {name: len(column) for name, column in rows.items()}
    if len(set(lengths.values())) != 1:
        raise ValueError(f"the arrays of {path} must have one length, got {lengths}")
    kept = np.flatnonzero(~rows["timeouts"][:-1].astype(bool))
    return {
        "observations": rows["observations"][kept],
        "actions": rows["actions"][kept],
        "rewards": rows["rewards"][kept],
        "next_observations": rows["observations"][kept + 1],
        "terminated": rows["terminals"][kept],
    }


def minari_transitions(episodes: Iterable[tuple[str, Arrays]]) -> dict[str, np.ndarray]:
    """The same from episodes, each with one observation more than it has steps."""
    parts: dict[str, list[np.ndarray]] = {}
    for name, episode in episodes:
        steps = len(episode["actions"])
        if len(episode["observations"]) != steps + 1 or any(
            len(episode[column]) != steps for column in ("rewards", "terminations")
        ):
            lengths = {column: len(values) for column, values in episode.items()}
            raise ValueError(f"{name} must have T actions and T + 1 observations, got the lengths {lengths}")
        for column, values in (
            ("observations", episode["observations"][:-1]),
            ("actions", episode["actions"]),
            ("rewards", episode["rewards"]),
            ("next_observations", episode["observations"][1:]),
            ("terminated", episode["terminations"]),
        ):
            parts.setdefault(column, []).append(values)
    if not parts:
        raise ValueError("the data set holds no episode")
    return {column: np.concatenate(pieces) for column, pieces in parts.items()}


def minari_episodes(path: Path) -> Iterator[tuple[str, Arrays]]:
    """The episodes of a data set on disk, in their order."""
    file_path = path / "data" / "main_data.hdf5" if path.is_dir() else path
    with _opened(file_path) as file:
        names = sorted((name for name in file if name.startswith("episode_")), key=lambda name: int(name[8:]))
        for name in names:
            yield name, _read(file[name], MINARI_ARRAYS, f"{name} of {file_path}")


def loaded_episodes(dataset: Any) -> Iterator[tuple[str, Arrays]]:
    """The episodes of a ``minari.MinariDataset``."""
    for episode in dataset.iterate_episodes():
        name = f"episode {episode.id}"
        yield name, {column: _flat(getattr(episode, column), f"{column} of {name}") for column in MINARI_ARRAYS}


MINARI_ARRAYS = "observations", "actions", "rewards", "terminations"


def _opened(path: Path) -> Any:
    try:
        import h5py
    except ImportError as error:
        raise ModuleNotFoundError("reading HDF5 files needs h5py: pip install 'poise-rl[offline]'") from error
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    if not h5py.is_hdf5(path):
        raise ValueError(f"{path} is no HDF5 file")
    return h5py.File(path, "r")


def _read(group: Any, wanted: Iterable[str], where: str) -> dict[str, np.ndarray]:
    missing = [name for name in wanted if name not in group]
    if missing:
        raise ValueError(f"{where} lacks {missing}; it holds {sorted(group)}")
    return {name: _flat(group[name], f"{name} of {where}") for name in wanted}


def _flat(values: Any, where: str) -> np.ndarray:
    """An array; what is nested (spaces of dictionaries or tuples) is refused."""
    if isinstance(values, Mapping | tuple | list) or not hasattr(values, "shape"):
        raise TypeError(f"{where} are nested: flatten the data set (gymnasium.spaces.flatten)")
    return np.asarray(values)
