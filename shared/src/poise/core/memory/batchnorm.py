r"""Batch-normalisation statistics of a whole data set, for weights that did not produce the running ones.

Averaged, interpolated, pruned or random weights need new statistics before they can be evaluated.

>>> import torch
>>> from torch import nn
>>> layer, data = nn.BatchNorm1d(3), 5 + torch.randn(100, 3)
>>> recalibrate_batchnorm(layer, data.split([64, 36]))
>>> torch.allclose(layer.running_mean, data.mean(0)), torch.allclose(layer.running_var, data.var(0))
(True, True)
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import reduce
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from poise.core.memory.gather import gather_rows

Moments = tuple[int, Tensor, Tensor]
"""Count, mean and sum of squared deviations per channel."""


@torch.no_grad()
def recalibrate_batchnorm(
    model: nn.Module,
    batches: Iterable[Any],
    forward: Callable[[Any], Any] | None = None,
    group: dist.ProcessGroup | None = None,
) -> None:
    r"""Set the running mean and variance of every batch normalisation to those of its input over all batches.

    The layers normalise by the statistics of each batch meanwhile, as in training; everything else is in evaluation mode, so
    that dropout is off and no other state changes. Batches are pooled exactly,

        mean = (1/n) \sum_b n_b m_b,     var = (1/(n-1)) \sum_b [ M_b + n_b (m_b - mean)^2 ],

    with n_b, m_b, M_b the count, mean and squared deviations of batch b (Chan, Golub and LeVeque 1983). So the result for
    the first layer does not depend on how the data is cut into batches, which is not so for the average over batches that
    ``torch.optim.swa_utils.update_bn`` takes. Under ``torch.distributed`` the batches of all processes are pooled.

    Args:
        model: any module; one without batch normalisation is left alone and ``batches`` is not read.
        batches: inputs, or tuples or lists that start with them.
        forward: runs one batch through the model, where ``model(batch)`` would not do.
        group: the processes, ``None`` for all.

    Raises:
        ValueError: there are no batches. After this or any other exception the statistics are what they were.
    """
    norms = [layer for layer in model.modules() if isinstance(layer, _BatchNorm) and layer.track_running_stats]
    if not norms:
        return
    pooled: dict[_BatchNorm, Moments] = {}

    def observe(layer: _BatchNorm, inputs: tuple[Tensor, ...]) -> None:
        new = _moments(inputs[0])
        pooled[layer] = _merge(pooled[layer], new) if layer in pooled else new

    number = 0
    with _observing(model, norms, observe):
        for batch in batches:
            if forward is not None:
                forward(batch)
            else:
                model(batch[0] if isinstance(batch, tuple | list) else batch)
            number += 1
    if not number:
        raise ValueError("batches must hold at least one batch, got none")
    for layer, moments in pooled.items():
        count, mean, squares = _over_processes(moments, group)
        for buffer, value in ((layer.running_mean, mean), (layer.running_var, squares / (count - 1))):
            assert buffer is not None  # it tracks statistics
            buffer.copy_(value)
        if layer.num_batches_tracked is not None:
            layer.num_batches_tracked.fill_(number)


@contextmanager
def _observing(
    model: nn.Module, norms: list[_BatchNorm], observe: Callable[[_BatchNorm, tuple[Tensor, ...]], None]
) -> Iterator[None]:
    """Show the inputs of the layers, which normalise by their batch and leave their statistics alone."""
    modes = [(module, module.training) for module in model.modules()]
    handles = [layer.register_forward_pre_hook(observe) for layer in norms]
    model.eval()
    for layer in norms:
        layer.training, layer.track_running_stats = True, False
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training
        for layer in norms:
            layer.track_running_stats = True


def _moments(x: Tensor) -> Moments:
    x = x.to(torch.promote_types(x.dtype, torch.float32)).transpose(0, 1).flatten(1)
    mean = x.mean(1)
    return x.shape[1], mean, (x - mean[:, None]).square_().sum(1)


def _merge(a: Moments, b: Moments) -> Moments:
    count, delta = a[0] + b[0], b[1] - a[1]
    return count, a[1] + delta * (b[0] / count), a[2] + b[2] + delta.square() * (a[0] * b[0] / count)


def _over_processes(moments: Moments, group: dist.ProcessGroup | None) -> Moments:
    count, mean, squares = moments
    counts, means, deviations = gather_rows(
        torch.tensor([count], device=mean.device), mean[None], squares[None], group=group
    )
    return reduce(_merge, zip(counts.tolist(), means, deviations, strict=True))
