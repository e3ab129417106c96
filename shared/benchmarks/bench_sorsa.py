"""Cost of SORSA, against peft's LoRA and PiSSA of the same rank and the form in which it was released.

The released form builds the dense matrix ``(U * S) @ V`` in every forward pass, so that autograd forms the dense weight gradient, too.
"""

import copy
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import peft
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from poise.core import SorsaConfig, apply_sorsa, sorsa_parameters, sorsa_penalty
from poise.core.adapters.sorsa import SorsaLinear
from poise.core.bench import Case, Peer, case, peer
from poise.core.experiments.pela_text import load_encoder

LAYERS = ((1024, 1024, 64, 64), (1024, 1024, 64, 512), (384, 1536, 8, 2048), (1024, 4096, 64, 512))
"""Inputs, outputs, rank, rows."""

PROJECTIONS = ("query", "key", "value", "dense")


def step(layer: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """Forward and backward pass, with a gradient for the input, as inside a network."""
    parameters = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    inputs = x.clone().requires_grad_()

    def call() -> Tensor:
        out = layer(inputs)
        torch.autograd.grad(out.square().sum(), (inputs, *parameters))
        return out.detach()

    return call


def one_layer(inputs: int, outputs: int, rank: int, rows: int) -> Case:
    base, x = nn.Linear(inputs, outputs), torch.randn(rows, inputs)
    adapted = SorsaLinear(copy.deepcopy(base), rank)
    return case(
        f"Linear {inputs} x {outputs}, rank {rank}, {rows} rows; plain: all weights are trained",
        plain=step(base, x),
        method=step(adapted, x),
        memory=rows == 512,
    )


def peft_layer(base: nn.Linear, rank: int, start: Any) -> Any:
    """A copy of the layer with an adapter of peft."""
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=["0"], init_lora_weights=start)
    model: Any = peft.get_peft_model(nn.Sequential(copy.deepcopy(base)), config)
    return model.base_model.model[0]


def against_lora(inputs: int, outputs: int, rank: int, rows: int) -> Peer:
    base, x = nn.Linear(inputs, outputs), torch.randn(rows, inputs)
    ours, theirs = SorsaLinear(copy.deepcopy(base), rank), peft_layer(base, rank, True)
    return peer(
        "peft LoRA",
        version("peft"),
        f"forward and backward, {inputs} x {outputs}, rank {rank}, {rows} rows",
        ours=step(ours, x),
        theirs=step(theirs, x),  # both compute the pretrained output at first
        repeats=15,
    )


class DenseProduct(nn.Module):
    """The released form, from its formula."""

    def __init__(self, layer: SorsaLinear) -> None:
        super().__init__()
        triplets = layer.triplets
        self.u, self.s, self.v = (
            nn.Parameter(factor.detach().clone()) for factor in (triplets.u, triplets.s, triplets.v)
        )
        self.base = layer.base

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(self.base, nn.Linear)
        return self.base(x) + F.linear(x, (self.u * self.s) @ self.v)


def against_dense_product(inputs: int, outputs: int, rank: int, rows: int) -> Peer:
    ours, x = SorsaLinear(nn.Linear(inputs, outputs), rank), torch.randn(rows, inputs)
    return peer(
        "dense product, as released",
        torch.__version__,
        f"forward and backward, {inputs} x {outputs}, rank {rank}, {rows} rows",
        ours=step(ours, x),
        theirs=step(DenseProduct(ours), x),
        repeats=9,
    )


def against_pissa(inputs: int, outputs: int, rank: int, randomized: bool) -> Peer:
    base = nn.Linear(inputs, outputs)
    start = "pissa_niter_4" if randomized else "pissa"

    def ours() -> Tensor:
        layer = SorsaLinear(copy.deepcopy(base), rank, svd="randomized" if randomized else "exact")
        return torch.linalg.vector_norm(layer.delta_weight())

    def theirs() -> Tensor:
        return torch.linalg.vector_norm(peft_layer(base, rank, start).get_delta_weight("default"))

    return peer(
        f"peft PiSSA ({start})",
        version("peft"),
        f"start, {inputs} x {outputs}, rank {rank}",
        ours=ours,
        theirs=theirs,
        repeats=3,
        warmup=1,
    )


def encoder() -> nn.Module:
    model, _ = load_encoder(64, torch.device("cpu"))
    return model


def encoder_step() -> Case:
    """A training step of MiniLM."""
    plain = encoder()
    adapted = apply_sorsa(
        copy.deepcopy(plain), SorsaConfig(r=8, target_modules=PROJECTIONS, exclude_modules="pooler.*")
    )
    ids = torch.randint(1_000, 20_000, (8, 64))

    def run(model: nn.Module) -> None:
        model.zero_grad()
        model(input_ids=ids).last_hidden_state.square().mean().backward()

    return case(
        "MiniLM, 8 x 64 tokens, rank 8, all projections; plain: all weights are trained",
        plain=lambda: run(plain),
        method=lambda: run(adapted),
        repeats=5,
    )


def penalty_of_encoder() -> Case:
    """The penalty of all its 72 factors, in a training step."""
    model = apply_sorsa(encoder(), SorsaConfig(r=8, target_modules=PROJECTIONS, exclude_modules="pooler.*"))
    moved(model)
    ids = torch.randint(1_000, 20_000, (8, 64))

    def run(with_penalty: bool) -> None:
        model.zero_grad()
        loss = model(input_ids=ids).last_hidden_state.square().mean()
        (loss + sorsa_penalty(model) if with_penalty else loss).backward()

    return case(
        "MiniLM with SORSA, 8 x 64 tokens; plain: without the penalty",
        plain=lambda: run(False),
        method=lambda: run(True),
        repeats=5,
        memory=False,
    )


def penalty_one_by_one() -> Peer:
    """The penalty of the encoder and its gradient, against the released sum over matrices."""
    model = apply_sorsa(encoder(), SorsaConfig(r=8, target_modules=PROJECTIONS, exclude_modules="pooler.*"))
    moved(model)
    factors = [factor for factor in sorsa_parameters(model) if factor.dim() == 2]

    def theirs() -> Tensor:
        total = torch.zeros(())
        for factor in factors:
            rows = factor if factor.shape[0] < factor.shape[1] else factor.mT
            total = total + torch.linalg.norm(rows @ rows.mT - torch.eye(len(rows)))
        return torch.stack([g.norm() for g in torch.autograd.grad(total / len(factors), factors)])

    def ours() -> Tensor:
        return torch.stack([g.norm() for g in torch.autograd.grad(sorsa_penalty(model), factors)])

    return peer(
        "one matrix after another, as released", torch.__version__, "penalty and gradient, 72 factors", ours, theirs
    )


def moved(model: nn.Module) -> None:
    """Away from orthonormality, where the gradient is zero."""
    with torch.no_grad():
        for factor in sorsa_parameters(model):
            factor.add_(0.01 * torch.randn_like(factor))


def bench() -> dict[str, Any]:
    """The record of docs/results/core/sorsa.bench.json."""
    torch.manual_seed(0)
    return {
        "method": "core/sorsa",
        "cases": [*(one_layer(*size) for size in LAYERS[:2]), encoder_step(), penalty_of_encoder()],
        "peers": [
            *(against_lora(*size) for size in LAYERS),
            *(against_dense_product(*size) for size in LAYERS),
            *(against_pissa(*size[:3], randomized) for size in LAYERS[1:] for randomized in (False, True)),
            penalty_one_by_one(),
        ],
    }
