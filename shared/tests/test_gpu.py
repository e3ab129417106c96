"""poise.core.gpu: device, seeds, precision, memory, tiles, transfer and timing, on a CPU; on CUDA where there is one."""

import random
import time
from collections import UserDict, namedtuple
from collections.abc import Callable
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from poise.core.gpu import (
    StepTimer,
    derive_generator,
    deterministic,
    peak_memory,
    pick_device,
    pick_precision,
    prefetch,
    seed_everything,
    seed_worker,
)

on_cuda = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICES = ["cpu", pytest.param("cuda", marks=on_cuda)]


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


class TestDevice:
    @pytest.fixture
    def two_gpus(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"Card {index}")

    @pytest.fixture
    def no_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)

    @pytest.mark.usefixtures("no_gpu")
    def test_without_a_gpu_auto_is_the_cpu(self) -> None:
        assert pick_device() == torch.device("cpu")
        assert pick_device(torch.device("cpu")) == torch.device("cpu")

    @pytest.mark.usefixtures("two_gpus")
    def test_with_gpus_auto_is_the_first_and_cuda_the_current_one(self) -> None:
        assert pick_device("auto") == torch.device("cuda", 0)
        assert pick_device("cuda") == torch.device("cuda", 1)
        assert pick_device("cuda:1") == torch.device("cuda", 1)
        assert pick_device("cpu") == torch.device("cpu")

    @pytest.mark.usefixtures("two_gpus")
    def test_a_gpu_that_is_not_there_is_refused_with_those_that_are(self) -> None:
        with pytest.raises(ValueError, match=r"'cuda:2' was asked for, but there is cpu, cuda:0 \(Card 0\), cuda:1"):
            pick_device("cuda:2")

    @pytest.mark.usefixtures("no_gpu")
    @pytest.mark.parametrize(
        ("built_with", "reason"), [("13.2", "sees no CUDA device"), (None, "is built without CUDA")]
    )
    def test_cuda_without_a_gpu_is_refused_with_the_reason(
        self, monkeypatch: pytest.MonkeyPatch, built_with: str | None, reason: str
    ) -> None:
        monkeypatch.setattr(torch.version, "cuda", built_with)
        with pytest.raises(ValueError, match=f"{reason}; there is cpu"):
            pick_device("cuda")

    @pytest.mark.usefixtures("no_gpu")
    def test_other_devices_must_be_there_too(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(ValueError, match="'mps' was asked for"):
            pick_device("mps")
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("mps"))
        assert pick_device("mps") == torch.device("mps")

    @pytest.mark.parametrize("name", ["gpu", "", "cuda:x"])
    def test_nonsense_is_refused(self, name: str) -> None:
        with pytest.raises(ValueError, match="device must be 'auto'"):
            pick_device(name)


class Draws(Dataset[tuple[float, float, float]]):
    """Four rows of random numbers, one from each global generator (NumPy caches every second normal number)."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, row: int) -> tuple[float, float, float]:
        return random.random(), float(np.random.mtrand.standard_normal()), torch.rand(()).item()


class TestSeeds:
    @staticmethod
    def draws() -> tuple[float, float, float]:
        return Draws()[0]

    def test_a_seed_fixes_all_global_generators(self) -> None:
        seed_everything(3)
        first = self.draws()
        seed_everything(3)
        assert self.draws() == first
        seed_everything(4)
        assert all(a != b for a, b in zip(self.draws(), first, strict=True))

    @pytest.mark.parametrize("seed", [-1, 2**63])
    def test_a_seed_out_of_range_is_refused(self, seed: int) -> None:
        with pytest.raises(ValueError, match=r"seed must lie in 0\.\.2\*\*63 - 1"):
            seed_everything(seed)

    def test_derived_generators_depend_on_the_path_and_on_nothing_else(self) -> None:
        def draw(*path: int | str) -> Tensor:
            return torch.rand(4, generator=derive_generator(0, *path))

        state = torch.get_rng_state()
        assert torch.equal(draw("augment", 1), draw("augment", 1))
        assert torch.equal(torch.get_rng_state(), state)
        paths = [(), ("augment",), ("augment", 1), ("augment", 2), ("noise", 1), ("augment", "1")]
        assert len({tuple(draw(*path).tolist()) for path in paths}) == len(paths)
        assert derive_generator(1).initial_seed() != derive_generator(2).initial_seed()

    def test_workers_differ_from_each_other_between_epochs_and_between_processes(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def epochs(rank: int) -> list[tuple[float, float, float]]:
            monkeypatch.setenv("RANK", str(rank))
            generator = torch.Generator().manual_seed(0)
            loader = DataLoader(
                Draws(), batch_size=None, num_workers=2, worker_init_fn=seed_worker, generator=generator
            )
            return [tuple(row) for _ in range(2) for row in loader]

        first, again, other = epochs(0), epochs(0), epochs(1)
        assert first == again
        for of_one_library in zip(*first, *other, strict=True):
            assert len(set(of_one_library)) == 16

    def test_deterministic_restores_what_was_set_before(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
        monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
        with deterministic():
            assert torch.are_deterministic_algorithms_enabled()
            assert not torch.backends.cudnn.benchmark
        assert not torch.are_deterministic_algorithms_enabled()
        assert torch.backends.cudnn.benchmark


class TestPrecision:
    def test_auto_is_float32_on_a_cpu(self) -> None:
        precision = pick_precision("cpu")
        assert precision.dtype is torch.float32
        with precision.autocast():
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is torch.float32
        assert not precision.scaler().is_enabled()

    @pytest.mark.parametrize(
        ("capability", "dtype"), [((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)]
    )
    def test_auto_on_cuda_follows_the_generation(
        self, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: torch.dtype
    ) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        assert pick_precision("cuda:0").dtype is dtype

    def test_bfloat16_computes_products_in_it_and_keeps_parameters(self) -> None:
        layer = nn.Linear(2, 2)
        precision = pick_precision("cpu", "bfloat16")
        with precision.autocast():
            assert layer(torch.ones(1, 2)).dtype is torch.bfloat16
        assert layer.weight.dtype is torch.float32
        assert not precision.scaler().is_enabled()

    def test_float16_scales_gradients(self) -> None:
        assert pick_precision("cpu", "float16").scaler().is_enabled()

    def test_an_unknown_name_is_refused(self) -> None:
        with pytest.raises(ValueError, match="one of auto, float32, bfloat16, float16, got 'half'"):
            pick_precision("cpu", "half")


Pair = namedtuple("Pair", ["x", "y"])


class TestPrefetch:
    @pytest.mark.parametrize("device", DEVICES)
    def test_batches_come_in_order_with_their_containers(self, device: str) -> None:
        batches = [
            torch.arange(3.0),
            [torch.zeros(1), "name", 3],
            {"a": torch.ones(2), "b": (torch.zeros(1), None)},
            Pair(torch.ones(1), torch.zeros(1)),
            UserDict(ids=torch.ones(2)),
        ]
        moved = list(prefetch(batches, device))
        assert [type(batch) for batch in moved] == [type(batch) for batch in batches]
        assert moved[0].tolist() == [0, 1, 2]
        assert moved[1][1:] == ["name", 3]
        assert moved[2]["b"][1] is None
        assert moved[3].y.device.type == device
        assert moved[4]["ids"].device.type == device
        assert batches[4]["ids"].device.type == "cpu"  # the loader's own batch is left alone

    def test_nothing_is_read_ahead_of_time_on_a_cpu(self) -> None:
        read = []

        def loader() -> Any:
            for number in range(3):
                read.append(number)
                yield torch.tensor(number)

        batches = prefetch(loader(), "cpu")
        next(batches)
        assert read == [0]

    def test_on_cuda_the_next_copy_starts_before_a_batch_is_handed_over(self, monkeypatch: pytest.MonkeyPatch) -> None:
        log: list[str] = []
        current = FakeStream("main", log)
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: FakeStream("side", log))
        monkeypatch.setattr(torch.cuda, "stream", fake_stream_context)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
        monkeypatch.setattr(Tensor, "pin_memory", lambda self: log.append(f"pin {self.item()}") or self)
        monkeypatch.setattr(Tensor, "to", lambda self, device, non_blocking: log.append(f"copy {self.item()}") or self)
        monkeypatch.setattr(
            Tensor, "record_stream", lambda self, stream: log.append(f"used {self.item()} {stream.name}")
        )
        for batch in prefetch([torch.tensor(0), torch.tensor(1)], "cuda"):
            log.append(f"compute {batch.item()}")
        assert log == [
            *("pin 0", "copy 0", "side records 0"),
            *("pin 1", "copy 1", "side records 1"),
            *("main waits for 0", "used 0 main", "compute 0"),
            *("main waits for 1", "used 1 main", "compute 1"),
        ]


class FakeStream:
    """Writes down what a CUDA stream would be asked to do."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log, self.events = name, log, 0

    def record_event(self) -> SimpleNamespace:
        event = SimpleNamespace(number=self.events)
        self.log.append(f"{self.name} records {event.number}")
        self.events += 1
        return event

    def wait_event(self, event: SimpleNamespace) -> None:
        self.log.append(f"{self.name} waits for {event.number}")


@contextmanager
def fake_stream_context(stream: FakeStream) -> Any:
    yield


class TestTiming:
    @pytest.mark.parametrize("device", DEVICES)
    def test_parts_are_timed_in_milliseconds(self, device: str) -> None:
        timer = StepTimer(device, warmup=1)
        for _ in range(3):
            with timer("step"):
                torch.ones(10, device=device).sum()
                if device == "cpu":
                    time.sleep(0.01)
        assert len(timer.milliseconds()["step"]) == 2
        assert timer.median()["step"] > (10 if device == "cpu" else 0)

    def test_parts_may_nest(self) -> None:
        timer = StepTimer("cpu")
        with timer("outer"), timer("inner"):
            time.sleep(0.001)
        assert timer.median()["outer"] >= timer.median()["inner"] >= 1

    def test_a_part_that_failed_is_not_counted(self) -> None:
        timer = StepTimer("cpu")
        with pytest.raises(KeyError), timer("step"):
            raise KeyError("inside")
        assert timer.milliseconds() == {}

    def test_parts_with_nothing_but_warmup_have_no_median(self) -> None:
        timer = StepTimer("cpu", warmup=1)
        with timer("step"):
            pass
        assert timer.median() == {}
        with pytest.raises(ValueError, match="warmup must not be negative"):
            StepTimer("cpu", warmup=-1)

    def test_on_cuda_nothing_waits_until_the_times_are_read(self, monkeypatch: pytest.MonkeyPatch) -> None:
        log: list[str] = []

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self, stream: str) -> None:
                log.append(f"record on {stream}")

            def synchronize(self) -> None:
                log.append("wait")

            def elapsed_time(self, last: "Event") -> float:
                return 1.5

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "main")
        timer = StepTimer("cuda")
        with timer("step"):
            log.append("work")
        assert log == ["record on main", "work", "record on main"]
        assert timer.median() == {"step": 1.5}
        assert log[-1] == "wait"


class TestPeakMemory:
    def test_temporaries_count_and_what_was_there_before_does_not(self) -> None:
        before = torch.zeros(1_000_000)
        assert peak_memory(lambda: (before + 1).sum()) == pytest.approx(4.0, abs=0.001)
        assert peak_memory(lambda: None) == 0

    def test_released_memory_is_counted_once(self) -> None:
        def call() -> None:
            for _ in range(5):
                torch.zeros(1_000_000)

        assert peak_memory(call) == pytest.approx(4.0)

    def test_releasing_what_was_there_before_is_not_negative(self) -> None:
        kept = [torch.zeros(1_000_000)]
        assert peak_memory(kept.clear) == 0

    def test_the_backward_pass_counts(self) -> None:
        x = torch.zeros(1_000_000, requires_grad=True)
        assert peak_memory(lambda: torch.autograd.grad(x.exp().sum(), x)) >= 8.0

    def test_it_is_the_same_every_time(self) -> None:
        x = rand(300, 300)
        calls: list[Callable[[], Tensor]] = [lambda: torch.linalg.eigvalsh(x @ x.T)] * 3
        assert len({peak_memory(call, "cpu") for call in calls}) == 1

    def test_other_devices_are_refused(self) -> None:
        with pytest.raises(ValueError, match="must be a CPU or CUDA device, got meta"):
            peak_memory(lambda: None, "meta")

    @pytest.mark.parametrize("device", [pytest.param("cuda", marks=on_cuda)])
    def test_cuda_is_measured_where_the_call_allocates(self, device: str) -> None:
        torch.zeros(1, device=device)
        assert peak_memory(lambda: torch.zeros(1_000_000, device=device)) == pytest.approx(4.0, abs=0.2)
        assert peak_memory(lambda: torch.zeros(1_000_000)) == pytest.approx(4.0)
