"""Peak memory of one call, on the host and on CUDA, counted in bytes that the allocator handed out.

>>> import torch
>>> round(peak_memory(lambda: torch.zeros(1_000, 1_000)), 3)  # a million float32 numbers
4.0
"""

import gc
from collections.abc import Callable

import torch
from torch.autograd.profiler import profile

MEGABYTE = 1_000_000
"""Bytes in the MB of every number that poise reports."""


def peak_memory(call: Callable[[], object], device: torch.device | str | None = None) -> float:
    """Peak memory that one call needs on top of what is allocated when it starts, in MB (10^6 bytes).

    On CUDA this is the high-water mark of the caching allocator. On the host it is the running sum of all allocations
    and releases that PyTorch's allocator reports to the profiler while the call runs: exact, the same in every run, and
    blind to the heap that other libraries (NumPy, JAX) manage themselves. The profiler writes lines about itself to
    stderr unless ``KINETO_LOG_LEVEL=99`` is set before PyTorch is imported.

    Args:
        call: what to measure; called once. Call it before, if what its first call caches should not count.
        device: where to measure. ``None`` measures the current CUDA device if CUDA is in use and the call allocates
            there, and the host otherwise.

    Returns:
        MB, at least 0.

    Raises:
        ValueError: ``device`` is neither a CPU nor a CUDA device.
    """
    if device is None:
        if not torch.cuda.is_initialized():
            return _host_peak(call)
        host: list[float] = []
        on_device = _cuda_peak(lambda: host.append(_host_peak(call)), torch.device("cuda", torch.cuda.current_device()))
        return on_device or host[0]
    device = torch.device(device)
    if device.type == "cpu":
        return _host_peak(call)
    if device.type == "cuda":
        return _cuda_peak(call, device)
    raise ValueError(f"device must be a CPU or CUDA device, got {device}")


def _cuda_peak(call: Callable[[], object], device: torch.device) -> float:
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / MEGABYTE


def _host_peak(call: Callable[[], object]) -> float:
    gc.collect()
    with profile(use_kineto=True, profile_memory=True) as recorded:
        call()
    assert recorded.kineto_results is not None  # set when the context closes
    changes = [
        (event.start_ns(), event.nbytes())
        for event in recorded.kineto_results.events()
        if event.name() == "[memory]" and event.device_type() == torch.profiler.DeviceType.CPU
    ]
    changes.sort(key=lambda change: change[0])
    allocated = peak = 0
    for _, nbytes in changes:
        allocated += nbytes
        peak = max(peak, allocated)
    return peak / MEGABYTE
