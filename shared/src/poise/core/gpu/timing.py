"""Time of the parts of a training step, without stopping the GPU.

>>> import torch
>>> timer = StepTimer("cpu")
>>> for _ in range(3):
...     with timer("loss"):
...         _ = torch.randn(100, 100).square().mean()
>>> len(timer.milliseconds()["loss"]), timer.median()["loss"] > 0
(3, True)
"""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


class StepTimer:
    """Milliseconds of named parts of a loop.

    On CUDA a part is timed by two events on the current stream, which cost microseconds; nothing waits until the
    numbers are read. Elsewhere the clock is read, after the device has finished.

    Args:
        device: where the work happens.
        warmup: the first measurements of every part to leave out (compilation, caches, cuDNN's choice of algorithms).

    Raises:
        ValueError: ``warmup`` is negative.
    """

    def __init__(self, device: torch.device | str, warmup: int = 0) -> None:
        if warmup < 0:
            raise ValueError(f"warmup must not be negative, got {warmup}")
        self.device = torch.device(device)
        self.warmup = warmup
        self._spans: dict[str, list[Callable[[], float]]] = {}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Time what happens inside the ``with``; parts may nest, and repeat."""
        stop = self._start()
        yield
        self._spans.setdefault(part, []).append(stop())

    def milliseconds(self) -> dict[str, list[float]]:
        """Every measurement of every part, in order, after the warm-up."""
        return {part: [span() for span in spans[self.warmup :]] for part, spans in self._spans.items()}

    def median(self) -> dict[str, float]:
        """The median of every part that was measured after the warm-up, in milliseconds."""
        return {part: statistics.median(times) for part, times in self.milliseconds().items() if times}

    def _start(self) -> Callable[[], Callable[[], float]]:
        """Start a measurement; the function returned stops it, and returns how to read it."""
        if self.device.type == "cuda":
            return self._start_events()
        self._finish()
        start = time.perf_counter()

        def stop() -> Callable[[], float]:
            self._finish()
            elapsed = (time.perf_counter() - start) * 1e3
            return lambda: elapsed

        return stop

    def _start_events(self) -> Callable[[], Callable[[], float]]:
        stream = torch.cuda.current_stream(self.device)
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record(stream)

        def read() -> float:
            last.synchronize()
            return first.elapsed_time(last)

        def stop() -> Callable[[], float]:
            last.record(stream)
            return read

        return stop

    def _finish(self) -> None:
        if self.device.type not in ("cpu", "meta"):
            torch.accelerator.synchronize(self.device)
