"""Begin again, in part: re-initialise a module, its last layers, or shrink it and add noise.

Nikishin et al., "The Primacy Bias in Deep Reinforcement Learning", ICML 2022, arXiv 2205.07802 (resets); Ash and Adams, "On
Warm-Starting Neural Network Training", NeurIPS 2020, arXiv 1910.08475 (shrink and perturb).

>>> import torch
>>> from torch import nn
>>> layer = nn.Linear(2, 2)
>>> _ = nn.init.constant_(layer.bias, -100.0)
>>> _ = reset_module(layer, torch.Generator().manual_seed(0))
>>> bool(layer.bias.abs().max() < 1)
True
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)
Initialize = Callable[[nn.Module], None]


def reset_module(
    module: Module,
    generator: torch.Generator | None = None,
    *,
    initialize: Initialize | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> Module:
    """Re-initialise ``module`` in place, as if it had just been made.

    A module with a method ``reset_parameters`` of its own, as every layer of PyTorch and every network here has, resets what is inside
    it; others are searched.

    Args:
        module: what to reset.
        generator: fixes the draws; ``None`` draws from PyTorch's global generator. With one, the global generator is left as it was.
        initialize: what to do instead with each innermost module, ``nn.Module.apply`` style.
        optimizer: forget its moments of the parameters that are reset.

    Returns:
        ``module``.

    Raises:
        TypeError: a parameter whose module has no ``reset_parameters``: give ``initialize``.

    Source:
        Nikishin et al. 2022, section 4.
    """
    with drawing_from(generator):
        if initialize is not None:
            module.apply(initialize)
        else:
            _reset(module, "")
    if optimizer is not None:
        forget_moments(optimizer, module.parameters())
    return module


def reset_last_layers(
    module: Module,
    count: int = 1,
    generator: torch.Generator | None = None,
    *,
    initialize: Initialize | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> Module:
    """Re-initialise the last ``count`` linear or convolution layers of ``module``, in the order of ``module.modules()``.

    Args:
        module: one head; of a network with several, call it for each.
        count: how many.
        generator: see :func:`reset_module`.
        initialize: see there.
        optimizer: see there.

    Returns:
        ``module``.

    Raises:
        ValueError: fewer layers than ``count``, or ``count`` below 1.

    Source:
        Nikishin et al. 2022: the last layers of the policy and of the value network every K steps.
    """
    layers = [part for part in module.modules() if isinstance(part, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)]
    if not 1 <= count <= len(layers):
        raise ValueError(f"expected count from 1 to the {len(layers)} layers of {type(module).__name__}, got {count}")
    for layer in layers[-count:]:
        reset_module(layer, generator, initialize=initialize, optimizer=optimizer)
    return module


@torch.no_grad()
def shrink_and_perturb(
    module: Module,
    shrink: float = 0.8,
    perturb: float | None = None,
    generator: torch.Generator | None = None,
) -> Module:
    r""":math:`\theta \leftarrow \alpha\theta + \beta\theta_0` in place, with fresh parameters :math:`\theta_0`.

    Args:
        module: what to shrink.
        shrink: α in [0, 1]; 1 keeps all of it.
        perturb: β; ``None`` is 1 - α.
        generator: fixes the fresh parameters; see :func:`reset_module`.

    Returns:
        ``module``.

    Raises:
        ValueError: numbers out of range.
        TypeError: see :func:`reset_module`.

    Source:
        Ash and Adams 2020, algorithm 1; with fresh parameters as noise D'Oro et al. 2023 and Ma et al. 2024.
    """
    noise = 1 - shrink if perturb is None else perturb
    if not (0 <= shrink <= 1 and noise >= 0):
        raise ValueError(f"expected shrink in [0, 1] and perturb >= 0, got {shrink} and {noise}")
    fresh = reset_module(copy.deepcopy(module), generator)
    for own, new in zip(module.parameters(), fresh.parameters(), strict=True):
        own.mul_(shrink).add_(new, alpha=noise)
    return module


def forget_moments(optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor]) -> None:
    """Drop what the optimizer remembers of ``parameters``."""
    for parameter in parameters:
        optimizer.state.pop(parameter, None)


@contextmanager
def drawing_from(generator: torch.Generator | None) -> Iterator[None]:
    """PyTorch's global generator replaced by draws of ``generator`` for a while."""
    if generator is None:
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator, device=generator.device)))
        yield


def _reset(module: nn.Module, name: str) -> None:
    own = getattr(module, "reset_parameters", None)
    if callable(own):
        own()
        return
    if list(module.parameters(recurse=False)):
        raise TypeError(
            f"{type(module).__name__} {name!r} has parameters and no reset_parameters(): say with `initialize` how to begin again"
        )
    for child_name, child in module.named_children():
        _reset(child, f"{name}.{child_name}".lstrip("."))
