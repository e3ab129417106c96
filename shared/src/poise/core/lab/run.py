"""What a training loop gets from the lab: a seed, a device, progress, a metric log, figures, checkpoints and resume."""

import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from poise.core.gpu import pick_device, seed_everything
from poise.core.lab import checkpoint
from poise.core.lab.atomic import replacing
from poise.core.lab.errors import BadInput, RunFailed
from poise.core.lab.metrics import MetricLog, read
from poise.core.lab.progress import Progress, Silent

if TYPE_CHECKING:
    from accelerate import Accelerator
    from matplotlib.figure import Figure

T = TypeVar("T")

CHECKPOINT_SECONDS = float(os.environ.get("POISE_CHECKPOINT_SECONDS", "20"))
"""Seconds between checkpoints of a single process. Several processes save every twentieth of a loop, so that they save together."""


@dataclass(frozen=True)
class ArmResult:
    """A finished arm: its metrics and the artifacts it saved."""

    arm: str
    metrics: Mapping[str, float]
    dir: Path

    def load(self, name: str) -> dict[str, Tensor]:
        """The tensors that the arm saved under ``name``."""
        from safetensors.torch import load_file

        return load_file(self.dir / "artifacts" / f"{name}.safetensors")

    def has(self, name: str) -> bool:
        """Whether the arm saved something under ``name``."""
        return (self.dir / "artifacts" / f"{name}.safetensors").is_file()


class Run:
    """One arm of an experiment under one seed.

    Attributes:
        seed: the seed; torch, numpy and random are seeded with it before the experiment starts.
        device: where to compute.
        dir: the arm's folder.
        generator: a CPU generator seeded with ``seed``, checkpointed with every loop.
    """

    def __init__(
        self,
        dir: Path,
        *,
        seed: int = 0,
        device: str = "auto",
        data: Path | None = None,
        progress: Progress | None = None,
        trackers: tuple[str, ...] = (),
    ) -> None:
        self.dir, self.seed, self._data = dir, seed, data
        self._device, self._trackers = device, trackers
        self._progress = progress or Silent()
        self._loop, self._offset = "", 0
        self._started_trackers = False
        for folder in (dir, dir / "checkpoints"):
            folder.mkdir(parents=True, exist_ok=True)
        seed_everything(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self._log = MetricLog(self._file("metrics.jsonl"), known=self._known_log())

    @classmethod
    def scratch(cls, dir: Path, *, seed: int = 0, device: str = "cpu", data: Path | None = None) -> "Run":
        """A run in a folder of your own, without progress output and trackers; for tests and notebooks."""
        return cls(Path(dir), seed=seed, device=device, data=data)

    # Processes and devices

    @property
    def rank(self) -> int:
        """Index of this process among those started by ``accelerate launch``."""
        return int(os.environ.get("RANK", "0"))

    @property
    def world(self) -> int:
        """Number of processes."""
        return int(os.environ.get("WORLD_SIZE", "1"))

    @property
    def is_main(self) -> bool:
        """Whether this process writes the results."""
        return self.rank == 0

    @cached_property
    def accelerator(self) -> "Accelerator":
        """HF accelerate's object, made when first used."""
        from accelerate import Accelerator

        chosen = pick_device(self._device)
        if self.world == 1 and chosen.type == "cuda":
            torch.cuda.set_device(chosen)
        random_state = checkpoint.capture_rng(self.generator)
        accelerator = Accelerator(cpu=chosen.type == "cpu", log_with=list(self._trackers) or None, project_dir=self.dir)
        checkpoint.restore_rng(random_state, self.generator)  # a resumed run makes it at another step
        return accelerator

    @cached_property
    def device(self) -> torch.device:
        return self.accelerator.device if self.world > 1 else pick_device(self._device)

    def prepare(self, *objects: Any) -> Any:
        """Models, optimizers and loaders, ready for this device and number of processes (``Accelerator.prepare``)."""
        return self.accelerator.prepare(*objects)

    def backward(self, loss: Tensor) -> None:
        """``loss.backward()`` under accelerate's mixed precision."""
        self.accelerator.backward(loss)

    def shard(self, batch: T) -> T:
        """This process's part of a batch of which every process knows the whole: every ``world``-th entry."""
        return batch if self.world == 1 else batch[self.rank :: self.world]  # type: ignore[index]

    # Data

    def load(self, reader: Callable[[Path], T]) -> T:
        """Read the data set at the path that the user gave with ``--data``.

        Raises:
            BadInput: no path was given, or ``reader`` refuses what it finds there.
        """
        if self._data is None:
            raise BadInput(f"this preset reads a data set: give its path with --data ({_purpose(reader)})")
        try:
            return reader(self._data)
        except (ValueError, FileNotFoundError, NotADirectoryError, IsADirectoryError, KeyError) as error:
            raise BadInput(f"--data {self._data}: {error}") from error

    # The loop

    def steps(self, count: int, *, name: str = "train", **objects: Any) -> Iterator[int]:
        """Yield ``0..count - 1`` with a progress bar, and keep checkpoints.

        After a kill the same call continues where the last checkpoint was, or is skipped when the loop was finished: then
        ``objects`` and all random states are as they were there.

        Args:
            count: number of steps.
            name: name of the loop; each loop of a run has its own.
            objects: everything that changes during the loop: objects with ``state_dict``, tensors, dicts of tensors.

        Raises:
            RunFailed: the checkpoint is damaged or belongs to another loop.
        """
        self._loop = name
        path = self._file(f"checkpoints/{name}.pt")
        start = self._resume(path, name, count, objects)
        if start < count:
            yield from self._iterate(start, count, name, path, objects)
        self._offset += count

    def _iterate(self, start: int, count: int, name: str, path: Path, objects: dict[str, Any]) -> Iterator[int]:
        every = max(1, count // 20) if self.world > 1 else None
        saved = time.monotonic()
        with self._progress.loop(name, count, start) as advance:
            for step in range(start, count):
                yield step
                advance()
                due = time.monotonic() - saved > CHECKPOINT_SECONDS if every is None else (step + 1) % every == 0
                if due or step + 1 == count:
                    self._save(path, name, step + 1, objects)
                    saved = time.monotonic()

    def _save(self, path: Path, name: str, step: int, objects: dict[str, Any]) -> None:
        self._log.sync()
        state = {
            "loop": name,
            "step": step,
            "log": self._log.position,
            "objects": checkpoint.capture(self._unwrapped(objects)),
            "rng": checkpoint.capture_rng(self.generator),
        }
        if self.world > 1 and path.exists():
            path.replace(_previous(path))  # a kill may leave the processes one checkpoint apart
        checkpoint.save(path, state)

    def _resume(self, path: Path, name: str, count: int, objects: dict[str, Any]) -> int:
        state = self._common_checkpoint(path)
        if state is None:
            return 0
        if state["objects"].keys() != objects.keys() or state["step"] > count:
            raise RunFailed(
                f"the checkpoint {path} belongs to another version of this loop (it holds {sorted(state['objects'])} at step "
                f"{state['step']}, the loop has {sorted(objects)} and {count} steps); nothing was overwritten"
            )
        checkpoint.restore(self._unwrapped(objects), state["objects"])
        checkpoint.restore_rng(state["rng"], self.generator)
        self._log.rewind(state["log"])
        return int(state["step"])

    def _common_checkpoint(self, path: Path) -> dict[str, Any] | None:
        """The newest checkpoint of this loop that every process has."""
        found = {
            state["step"]: state
            for file in (path, _previous(path))
            if file.exists()
            for state in [checkpoint.load(file)]
        }
        if self.world == 1:
            return found[max(found)] if found else None
        from accelerate.utils import gather_object

        _ = self.accelerator
        everyone = gather_object([sorted(found)])
        common = set.intersection(*(set(steps) for steps in everyone))
        return found[max(common)] if common else None

    def _unwrapped(self, objects: dict[str, Any]) -> dict[str, Any]:
        if self.world == 1:
            return objects
        unwrap = self.accelerator.unwrap_model
        return {key: unwrap(value) if isinstance(value, torch.nn.Module) else value for key, value in objects.items()}

    # What a run leaves behind

    def log(self, step: int, **metrics: float | Tensor) -> None:
        """Log scalars to ``metrics.jsonl`` and the trackers.

        Raises:
            RunFailed: ``loss`` is not finite. The last checkpoint is kept.
        """
        values = {key: float(value.detach() if isinstance(value, Tensor) else value) for key, value in metrics.items()}
        if not math.isfinite(values.get("loss", 0.0)):
            raise RunFailed(f"the loss is {values['loss']} at step {step} of {self._loop or 'the run'}")
        finite = {key: value if math.isfinite(value) else None for key, value in values.items()}
        line = {"loop": self._loop, "step": step, "total": self._offset + step, **finite}
        new = self._log.write(line)
        self._progress.show(values)
        if new and self.is_main and self._trackers:
            random_state = checkpoint.capture_rng(self.generator)
            self._track(line)
            checkpoint.restore_rng(random_state, self.generator)  # trackers must not change what a run computes

    def figure(self, name: str, figure: "Figure") -> None:
        """Keep a matplotlib figure as ``figures/<name>.png``."""
        if self.is_main:
            with replacing(self.dir / "figures" / f"{name}.png") as temporary:
                figure.savefig(temporary, format="png", dpi=110, bbox_inches="tight")

    def save(self, name: str, **tensors: Tensor) -> None:
        """Keep tensors as ``artifacts/<name>.safetensors``, for the experiment's ``compare`` and for the user."""
        from safetensors.torch import save_file

        if self.is_main:
            plain = {
                key: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
                for key, tensor in tensors.items()
            }
            with replacing(self.dir / "artifacts" / f"{name}.safetensors") as temporary:
                save_file(plain, temporary)

    def close(self) -> None:
        """Close the log and the trackers."""
        self._log.close()
        if self._started_trackers:
            for tracker in self.accelerator.trackers:
                tracker.finish()

    # Files

    def _file(self, name: str) -> Path:
        """A file of this process: the main one has the plain name."""
        path = self.dir / name
        return path if self.is_main else path.with_name(f"{path.stem}.rank{self.rank}{path.suffix}")

    def _known_log(self) -> int:
        """How far the metric log is backed by a checkpoint."""
        suffix = "" if self.is_main else f".rank{self.rank}"
        files = [
            file
            for file in (self.dir / "checkpoints").glob(f"*{suffix}.pt")
            if self.is_main is (".rank" not in file.name)
        ]
        return max((checkpoint.load(file)["log"] for file in files), default=0)

    def _track(self, line: dict[str, Any]) -> None:
        """Mirror a logged line to the trackers; a resumed run first shows them what was logged before."""
        lines = [line]
        if not self._started_trackers:
            self._started_trackers = True
            shutil.rmtree(self.dir / "tensorboard", ignore_errors=True)
            self.accelerator.init_trackers("tensorboard")
            lines = read(self._log.path)
        for known in lines:
            values = {
                f"{known['loop']}/{key}": value for key, value in known.items() if key not in ("loop", "step", "total")
            }
            self.accelerator.log(
                {key: value for key, value in values.items() if value is not None}, step=known["total"]
            )


def _previous(path: Path) -> Path:
    return path.with_suffix(".previous.pt")


def _purpose(reader: Callable[..., Any]) -> str:
    text: str = reader.__doc__ or reader.__name__
    return text.strip().splitlines()[0].rstrip(".")
