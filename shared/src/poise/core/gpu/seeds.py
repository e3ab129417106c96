"""Seeds: one number fixes every random draw, of every process and every data-loading worker.

>>> import torch
>>> seed_everything(0)
>>> first = torch.rand(2)
>>> seed_everything(0)
>>> torch.equal(first, torch.rand(2))
True
>>> noise = derive_generator(0, "noise", 7)  # the draws of step 7, whatever was drawn before
>>> torch.equal(torch.rand(2, generator=noise), torch.rand(2, generator=derive_generator(0, "noise", 7)))
True
"""

import hashlib
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.random.mtrand import set_bit_generator


def seed_everything(seed: int) -> None:
    """Seed the global generators of Python, NumPy and PyTorch (CPU and every accelerator).

    For programs, not for library functions: these take a ``torch.Generator``.

    Args:
        seed: from 0 to 2**63 - 1.

    Raises:
        ValueError: the seed is out of range.
    """
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed must lie in 0..2**63 - 1, got {seed}")
    random.seed(seed)
    set_bit_generator(np.random.MT19937(seed))  # the one behind np.random.rand and the libraries that use it
    torch.manual_seed(seed)


def seed_worker(worker_id: int) -> None:
    """Reseed a data-loading worker so that no two workers of any two processes draw the same numbers.

    ``DataLoader(..., worker_init_fn=seed_worker)``. PyTorch already seeds the workers of one process differently. But
    processes of a distributed run that start from one seed also give their workers one seed, and would augment their
    shards alike. The process is told apart by ``RANK``, which ``torchrun`` and ``accelerate launch`` set.

    Args:
        worker_id: the worker's number, given by the loader; its seed already depends on it, and on the epoch.
    """
    rank = int(os.environ.get("RANK", "0"))
    sequence = np.random.SeedSequence([torch.initial_seed() % 2**63, rank])
    seed_everything(int(sequence.generate_state(1, np.uint64)[0] >> 1))


def derive_generator(seed: int, *path: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator of its own for every purpose and step, independent of what was drawn elsewhere.

    Args:
        seed: the experiment's seed.
        path: what the draws are for, ``("augment", epoch, rank)``; another path gives independent draws.
        device: where the generator draws.
    """
    digest = hashlib.sha256(repr((seed, *path)).encode()).digest()
    generator = torch.Generator(device)
    generator.manual_seed(int.from_bytes(digest[:8], "little") >> 1)  # 63 bits: manual_seed takes signed numbers
    return generator


@contextmanager
def deterministic() -> Iterator[None]:
    """Allow only operations that give the same bits every time; the others raise an error that names them.

    On CUDA this must be entered before the first matrix product: cuBLAS reads its workspace setting once.
    """
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
        torch.backends.cudnn.benchmark = benchmark
