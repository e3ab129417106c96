"""How a run shows that it is alive: rich progress bars on a terminal, nothing elsewhere."""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, runtime_checkable


@runtime_checkable
class Progress(Protocol):
    """What a run tells about its loops."""

    def loop(self, name: str, count: int, start: int) -> AbstractContextManager[Callable[[], None]]:
        """Show a loop; the context gives the function to call after each step."""

    def show(self, metrics: Mapping[str, float]) -> None:
        """Show what was logged last."""


class Silent:
    """Shows nothing."""

    @contextmanager
    def loop(self, name: str, count: int, start: int) -> Iterator[Callable[[], None]]:
        yield lambda: None

    def show(self, metrics: Mapping[str, float]) -> None:
        """Nothing."""


class Bars:
    """One rich bar on stderr per loop, with the last logged metrics."""

    def __init__(self, arm: str) -> None:
        self._arm = arm
        self._text = ""

    @contextmanager
    def loop(self, name: str, count: int, start: int) -> Iterator[Callable[[], None]]:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Rich

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("[dim]{task.fields[metrics]}"),
        )
        with Rich(*columns, console=Console(stderr=True), transient=True) as rich:
            task = rich.add_task(f"{self._arm} · {name}", total=count, completed=start, metrics="")
            yield lambda: rich.update(task, advance=1, metrics=self._text)

    def show(self, metrics: Mapping[str, float]) -> None:
        self._text = "  ".join(f"{key} {value:.4g}" for key, value in metrics.items())


def for_arm(arm: str) -> Progress:
    """Bars on a terminal; silence in a pipe, a log file or a worker."""
    return Bars(arm) if sys.stderr.isatty() else Silent()
