"""The routing study of sparse OT: a vision transformer with mixture-of-experts layers, under four routers.

The images are cut into patches, the tokens; in every second block (or the only one) a token goes through the experts that its router
chose. Tokens that no expert takes pass by the layer unchanged.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from poise.core.data import mnist5k
from poise.core.experiments.published_images import (
    ImageSplit,
    InMemory,
    evaluation_batches,
    read_image_folders,
    training_batches,
)
from poise.core.lab import ArmResult, Run
from poise.ot.entropic.sinkhorn import sinkhorn
from poise.ot.experiments import sparse_ot_figures as figures
from poise.ot.sparse.router import SparseOTRouter

ROUTERS = {
    "top1": "every token chooses its best expert by a softmax",
    "balanced": "the same with an auxiliary load-balancing loss (Fedus et al. 2022)",
    "sinkhorn": "every token chooses its best expert by an entropic plan (Clark et al. 2022)",
    "sparse": "every expert chooses tokens by a plan with at most as many nonzeros as its capacity",
}


@dataclass(frozen=True)
class Routing:
    """MNIST digits as 49 patches of 4 x 4 pixels; one block with 8 experts.

    Attributes:
        steps: optimizer steps.
        batch: images per step.
        learning_rate: of Adam.
        weight_decay: of AdamW.
        balance: weight of the load-balancing loss.
        sinkhorn_epsilon: regularization of the entropic router.
        group: images whose tokens are routed together.
        experts: number of experts.
        capacity_factor: capacity of an expert, in units of an equal share of the tokens.
        patch: side of a patch, in pixels.
        size: side of an image.
        channels: of an image.
        width: of a token.
        hidden: hidden units of an MLP, each expert's and the plain ones'.
        heads: of the attention.
        depth: number of blocks.
        every: every so many blocks, the MLP is a layer of experts.
        half: train under bfloat16 autocast; the plan is computed in float32.
    """

    steps: int = 600
    batch: int = 64
    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    balance: float = 0.01
    sinkhorn_epsilon: float = 0.1
    group: int = 16
    experts: int = 8
    capacity_factor: float = 1.0
    patch: int = 4
    size: int = 28
    channels: int = 1
    width: int = 48
    hidden: int = 96
    heads: int = 4
    depth: int = 1
    every: int = 1
    half: bool = False

    def __post_init__(self) -> None:
        if self.batch % self.group:
            raise ValueError(f"batch must be a multiple of group, got {self.batch} and {self.group}")
        if self.size % self.patch:
            raise ValueError(f"size must be a multiple of patch, got {self.size} and {self.patch}")

    @property
    def patches(self) -> int:
        """Tokens of an image."""
        return (self.size // self.patch) ** 2

    @property
    def capacity(self) -> int:
        """Tokens that an expert can take from a group; a multiple of 4, as in the published layer."""
        tokens = self.group * self.patches
        return min(tokens, 4 * math.ceil(self.capacity_factor * tokens / self.experts / 4))

    def images(self, run: Run) -> ImageSplit:
        """A split of the bundled digits; another one for every seed."""
        train, test = mnist5k().split(seed=run.seed)
        return ImageSplit(InMemory.of(train), InMemory.of(test))


@dataclass(frozen=True)
class PaperRouting(Routing):
    """V-MoE B/32 on ImageNet: 32 experts in every second block."""

    steps: int = 112_000
    batch: int = 1_024
    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    group: int = 16
    experts: int = 32
    capacity_factor: float = 1.05
    patch: int = 32
    size: int = 224
    channels: int = 3
    width: int = 768
    hidden: int = 3_072
    heads: int = 12
    depth: int = 12
    every: int = 2
    half: bool = True

    def images(self, run: Run) -> ImageSplit:
        return run.load(lambda path: read_image_folders(path, self.size))


class Routed(NamedTuple):
    """What a router decided.

    Attributes:
        combine: weight of every expert's answer for every token, 0 where it was not asked (groups, tokens, experts).
        load: tokens that wanted each expert, in units of its capacity (groups, experts).
        loss: an auxiliary loss.
    """

    combine: Tensor
    load: Tensor
    loss: Tensor


class Router(nn.Module, ABC):
    """Tokens (groups, tokens, width) to :class:`Routed`."""

    def __init__(self, config: Routing) -> None:
        super().__init__()
        self.config = config

    @abstractmethod
    def forward(self, tokens: Tensor) -> Routed: ...


class TokensChoose(Router):
    """Every token chooses one expert; those beyond an expert's capacity are dropped, in order."""

    def __init__(self, config: Routing, *, balanced: bool = False, entropic: bool = False) -> None:
        super().__init__(config)
        self.score = nn.Linear(config.width, config.experts, bias=False)
        self.balanced, self.entropic = balanced, entropic

    def forward(self, tokens: Tensor) -> Routed:
        logits = self.score(tokens).float()
        gates = logits.softmax(-1)
        preference = self._plan(gates.detach()) if self.entropic else gates
        wanted = F.one_hot(preference.argmax(-1), self.config.experts)
        place_in_queue = wanted.cumsum(-2) * wanted
        taken = wanted * (place_in_queue <= self.config.capacity)
        loss = self._balance(gates, wanted) if self.balanced else gates.new_zeros(())
        return Routed(gates * taken, wanted.sum(-2) / self.config.capacity, loss)

    def _plan(self, gates: Tensor) -> Tensor:
        """The entropic plan that gives every token one place and every expert an equal share."""
        groups, tokens, experts = gates.shape
        a, b = gates.new_ones(groups, tokens), gates.new_full((groups, experts), tokens / experts)
        return sinkhorn(a, b, -gates, self.config.sinkhorn_epsilon, tol=1e-2).plan()

    def _balance(self, gates: Tensor, wanted: Tensor) -> Tensor:
        """Experts times the product of the share of tokens and the mean gate of each: 1 when both are uniform."""
        share = wanted.float().mean(-2)
        return self.config.experts * (share * gates.mean(-2)).sum(-1).mean()


class ExpertsChoose(Router):
    """Sparse transport between the tokens and the experts of a group."""

    def __init__(self, config: Routing) -> None:
        super().__init__(config)
        self.router = SparseOTRouter(config.width, config.experts, capacity_factor=config.capacity_factor)

    def forward(self, tokens: Tensor) -> Routed:
        dispatch, combine, _ = self.router(tokens)
        return Routed(combine, dispatch.sum(-2) / self.config.capacity, combine.new_zeros(()))


def make_router(arm: str, config: Routing) -> Router:
    """The router of an arm."""
    if arm == "sparse":
        return ExpertsChoose(config)
    return TokensChoose(config, balanced=arm == "balanced", entropic=arm == "sinkhorn")


class Experts(nn.Module):
    """As many two-layer perceptrons as there are experts, each of which sees its tokens only."""

    def __init__(self, config: Routing, router: Router) -> None:
        super().__init__()
        self.config, self.router = config, router
        scale = (2 / config.width) ** 0.5
        self.inner = nn.Parameter(scale * torch.randn(config.experts, config.width, config.hidden))
        self.outer = nn.Parameter(config.hidden**-0.5 * torch.randn(config.experts, config.hidden, config.width))
        self.routed: Routed | None = None

    def forward(self, tokens: Tensor) -> Tensor:
        groups = tokens.reshape(-1, self.config.group * self.config.patches, self.config.width)
        self.routed = self.router(groups)
        combine = self.routed.combine
        most = int((combine > 0).sum(-2).max())  # the places an expert fills; a router may round its capacity up
        weight, index = combine.mT.topk(max(1, most), dim=-1)  # (groups, experts, places); unused places have weight 0
        places = index.flatten(1).unsqueeze(-1).expand(-1, -1, self.config.width)
        chosen = groups.gather(1, places).unflatten(1, index.shape[1:])
        answers = torch.einsum("geph,ehd->gepd", F.gelu(torch.einsum("gepd,edh->geph", chosen, self.inner)), self.outer)
        weighted = (answers * weight.unsqueeze(-1)).flatten(1, 2)
        return torch.zeros_like(groups).scatter_add(1, places, weighted.to(groups.dtype)).view_as(tokens)


class Block(nn.Module):
    """Attention and an MLP, both residual."""

    def __init__(self, config: Routing, mlp: nn.Module) -> None:
        super().__init__()
        self.before_attention, self.before_mlp = nn.LayerNorm(config.width), nn.LayerNorm(config.width)
        self.attention = nn.MultiheadAttention(config.width, config.heads, batch_first=True)
        self.mlp = mlp

    def forward(self, tokens: Tensor) -> Tensor:
        normed = self.before_attention(tokens)
        tokens = tokens + self.attention(normed, normed, normed, need_weights=False)[0]
        return tokens + self.mlp(self.before_mlp(tokens))


class VisionTransformer(nn.Module):
    """Patches, blocks, mean over the tokens, a linear classifier."""

    def __init__(self, config: Routing, arm: str, classes: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(config.channels, config.width, config.patch, stride=config.patch)
        self.position = nn.Parameter(0.02 * torch.randn(config.patches, config.width))
        mlps = [self._mlp(config, arm, block) for block in range(config.depth)]
        self.blocks = nn.Sequential(*(Block(config, mlp) for mlp in mlps))
        self.experts = [mlp for mlp in mlps if isinstance(mlp, Experts)]
        self.head = nn.Sequential(nn.LayerNorm(config.width), nn.Linear(config.width, classes))

    @staticmethod
    def _mlp(config: Routing, arm: str, block: int) -> nn.Module:
        if (block + 1) % config.every == 0:
            return Experts(config, make_router(arm, config))
        return nn.Sequential(nn.Linear(config.width, config.hidden), nn.GELU(), nn.Linear(config.hidden, config.width))

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).mT + self.position
        return self.head(self.blocks(tokens).mean(1))

    def routed(self) -> list[Routed]:
        """What the routers decided in the last forward pass."""
        return [layer.routed for layer in self.experts if layer.routed is not None]


def run_routing(config: Routing, arm: str, run: Run) -> dict[str, float]:
    """Train the classifier under one router and measure how it spreads the tokens."""
    images = config.images(run)
    plain = VisionTransformer(config, arm, len(images.train.classes)).to(run.device)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    model, optimizer = run.prepare(plain, optimizer)
    decay = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.learning_rate, config.steps, pct_start=0.1)
    batches = None
    for step in run.steps(config.steps, model=model, optimizer=optimizer, decay=decay):
        if batches is None:  # a resumed run begins in the middle
            batches = training_batches(
                images.train, config.batch, range(step, config.steps),
                seed=run.seed, device=run.device, rank=run.rank, world=run.world,
            )  # fmt: skip
        inputs, targets = next(batches)
        with torch.autocast(run.device.type, torch.bfloat16, enabled=config.half):
            loss = F.cross_entropy(model(inputs), targets)
        loads = torch.stack([routed.load.amax(-1).mean() for routed in plain.routed()])
        auxiliary = torch.stack([routed.loss for routed in plain.routed()]).sum()
        optimizer.zero_grad()
        run.backward(loss + config.balance * auxiliary)
        optimizer.step()
        decay.step()
        if step % 20 == 0:
            run.log(step, loss=loss, max_load=loads.mean())

    metrics, loads_by_expert = evaluate(config, plain, images, run)
    run.save("loads", load=loads_by_expert)
    return metrics


@torch.no_grad()
def evaluate(
    config: Routing, model: VisionTransformer, images: ImageSplit, run: Run
) -> tuple[dict[str, float], Tensor]:
    """Accuracy and load on the test images; whole groups only, so that every expert's capacity means the same."""
    model.eval()
    correct, seen, loads, dropped = 0, 0, [], []
    for inputs, targets in evaluation_batches(images.test, config.batch, run.device):
        whole = len(inputs) // config.group * config.group
        if whole == 0:
            break
        with torch.autocast(run.device.type, torch.bfloat16, enabled=config.half):
            predicted = model(inputs[:whole]).argmax(-1)
        correct += int((predicted == targets[:whole]).sum())
        seen += whole
        for routed in model.routed():
            loads.append(routed.load.float().cpu())
            dropped.append((routed.combine == 0).all(-1).float().mean())
    if not seen:
        raise ValueError(f"{config.group} test images are needed for one group, got {len(images.test.labels)}")
    load = torch.cat(loads)
    metrics = {
        "accuracy": correct / seen,
        "max_load": float(load.max()),
        "mean_max_load": float(load.amax(-1).mean()),
        "dropped_tokens": float(torch.stack(dropped).mean()),
    }
    return metrics, load.mean(0)


def compare_routers(results: Mapping[str, ArmResult], run: Run) -> None:
    """How every router spreads the tokens over the experts."""
    run.figure("loads", figures.loads(results))
