"""L_orth minimized alone, from random kernels: does it reach an orthogonal layer where one exists, and its bound where none does?"""

import torch
from torch import nn

from poise.core.experiments import orthogonal_conv_figures as figures
from poise.core.lab import Run
from poise.core.weights.conv_geometry import ConvGeometry
from poise.core.weights.orthogonal_conv import conv_orth_loss

LANDSCAPE = {
    "rows": (3, 4, 3, 1),
    "strided_rows": (6, 2, 3, 2),
    "columns": (4, 3, 3, 1),
    "strided_columns": (12, 2, 3, 2),
    "square": (4, 4, 3, 1),
    "strided_square": (8, 2, 3, 2),
    "too_many_rows": (16, 2, 2, 3),
    "gaps": (20, 2, 2, 3),
}
"""Sizes M, C, k, S whose landscape is explored: four that allow an orthogonal layer, two square ones that do too but whose orthogonal
kernels are not connected, and two that allow none: more rows than the kernel reaches, and windows with gaps between them."""


def landscape(starts: int, steps: int, run: Run) -> dict[str, float]:
    """Minimize L_orth from random kernels; all starts of a size are the groups of one kernel, which do not interact.

    Args:
        starts: random kernels per size.
        steps: of Adam, the second half at a tenth of the learning rate.
        run: of the experiment.
    """
    metrics, ends = {}, {}
    for name, (rows, channels, taps, stride) in LANDSCAPE.items():
        kernels = torch.randn(starts * rows, channels, taps, taps, generator=run.generator)
        weight = nn.Parameter((kernels / (channels * taps**2) ** 0.5).to(run.device, torch.float64))
        optimizer = torch.optim.Adam([weight], lr=1e-2)
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [steps // 2], gamma=0.1)
        state = {"weight": weight.data, "optimizer": optimizer, "schedule": schedule}
        for step in run.steps(steps, name=name, **state):
            loss = conv_orth_loss(weight, stride, groups=starts)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if step % 100 == 0:
                run.log(step, loss=loss / starts)
        ends[name] = torch.stack([conv_orth_loss(kernel, stride) for kernel in weight.detach().chunk(starts)])
        metrics[f"{name}_worst"] = float(ends[name].max())
        metrics[f"{name}_reached"] = float((ends[name] < 1e-3).double().mean())
    admissible = [name for name in LANDSCAPE if "square" not in name and least_loss(name) == 0]
    impossible = [name for name in LANDSCAPE if least_loss(name) > 0]
    metrics["admissible_worst"] = max(metrics[f"{name}_worst"] for name in admissible)
    metrics["above_bound"] = max(float((ends[name] - least_loss(name)).abs().max()) for name in impossible)
    run.save("ends", **ends)
    run.figure("landscape", figures.landscape(ends, {name: least_loss(name) for name in ends}))
    return metrics


def least_loss(name: str) -> int:
    rows, channels, taps, stride = LANDSCAPE[name]
    return ConvGeometry(rows, channels, (taps, taps), (stride, stride)).least_loss
