"""The metric log of one arm: one JSON line per call, mirrored to the trackers, and rewound to a checkpoint on resume."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Tracker = Callable[[dict[str, float], int], None]


class MetricLog:
    """Append-only JSONL.

    A resumed run executes its script from the top and skips the loops that are done. Lines it logs again on the way to the newest
    checkpoint are in the file already: up to that place, writing only moves the position. Lines hold no clock time, so what is
    logged twice is equal byte for byte.

    Args:
        path: the file; its folder exists.
        known: length in bytes up to which the file is backed by a checkpoint; anything behind it is cut off.
    """

    def __init__(self, path: Path, known: int = 0) -> None:
        self.path = path
        self.position = 0
        self._known = known
        self._file = path.open("r+b" if path.exists() else "w+b")
        self._file.truncate(known)
        self._file.seek(known)

    def write(self, line: Mapping[str, Any]) -> bool:
        """Add a line; false if it was in the file already."""
        data = (json.dumps(line) + "\n").encode()
        self.position += len(data)
        if self.position <= self._known:
            return False
        self._file.write(data)
        self._file.flush()
        return True

    def rewind(self, position: int) -> None:
        """Go to the place that a checkpoint remembers."""
        self.position = position

    def sync(self) -> None:
        """Make sure that what was written outlives a power cut; called before a checkpoint points at it."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def read(path: Path) -> list[dict[str, Any]]:
    """All complete lines of a metric log; a line cut off by a crash is left out."""
    if not path.is_file():
        return []
    return [
        json.loads(line) for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")
    ]
