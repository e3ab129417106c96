"""What the arms of the adaptive-replay-ratio experiment do differently."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from poise.rl.agents.drqv2 import DrQV2Agent
from poise.rl.agents.pixel_networks import Heads
from poise.rl.plasticity.redo import recycle_dormant
from poise.rl.plasticity.reset import shrink_and_perturb
from poise.rl.plasticity.surgery import with_crelu, with_layer_norm, with_spectral_norm
from poise.rl.replay.batch import Batch

Intervention = Callable[[DrQV2Agent, Batch, torch.Generator], None]


@dataclass(frozen=True)
class Arm:
    """One way of training.

    Attributes:
        about: what it is, in one line.
        ratio: the replay ratio: one of the two, or the controller's.
        shift: whether images are shifted: always, never, or until or from the step of the intervention.
        heads: changes the perceptrons.
        weight_decay: of Adam.
        l2_init: weight of the distance to the initial parameters.
        intervene: what is done to the agent, once or every so many steps.
        periodic: whether it is done again and again.
        primed: whether training begins with many updates on the first transitions.
    """

    about: str
    ratio: Literal["low", "high", "adaptive"] = "low"
    shift: Literal["on", "off", "until", "from"] = "on"
    heads: Heads | None = None
    weight_decay: float = 0.0
    l2_init: float = 0.0
    intervene: Intervention | None = None
    periodic: bool = False
    primed: bool = False


def _reset(name: str, last_layers: int | None = None) -> Intervention:
    return lambda agent, batch, generator: agent.reset(name, generator, last_layers=last_layers)


def _inject(name: str) -> Intervention:
    return lambda agent, batch, generator: agent.inject(name, generator)


def _reset_heads(agent: DrQV2Agent, batch: Batch, generator: torch.Generator) -> None:
    for name in ("actor", "critic"):
        agent.reset(name, generator, last_layers=1)


def _shrink_and_perturb(agent: DrQV2Agent, batch: Batch, generator: torch.Generator) -> None:
    for network in (agent.encoder, agent.actor, agent.critic):
        shrink_and_perturb(network, generator=generator)


def _recycle(agent: DrQV2Agent, batch: Batch, generator: torch.Generator) -> None:
    with torch.no_grad():
        z = agent.encoder(batch.observation)
    critic, encoder = agent.optimizers["critic"], agent.optimizers["encoder"]
    recycle_dormant(agent.critic, z, batch.action, generator=generator, optimizer=critic)
    recycle_dormant(agent.encoder, batch.observation, generator=generator, optimizer=encoder)


ACTING = {
    "baseline": Arm("replay ratio 0.5 throughout"),
    "rr_high": Arm("replay ratio 2 throughout", "high"),
    "rr_high_no_shift": Arm("replay ratio 2, images not shifted", "high", shift="off"),
    "adaptive": Arm("replay ratio 0.5, and 2 once the critic has recovered", "adaptive"),
    "rr_low_no_shift": Arm("replay ratio 0.5, images not shifted", shift="off"),
    "shift_until": Arm("images shifted until the step of the intervention", shift="until"),
    "shift_from": Arm("images shifted from the step of the intervention on", shift="from"),
    "primed": Arm("many updates on the first transitions before training goes on", primed=True),
    "reset_actor": Arm("policy reset periodically", "high", intervene=_reset("actor"), periodic=True),
    "reset_critic": Arm("critic reset periodically", "high", intervene=_reset("critic"), periodic=True),
    "reset_heads": Arm(
        "last layers of policy and critic reset periodically", "high", intervene=_reset_heads, periodic=True
    ),
    "inject_actor": Arm("plasticity injected into the policy once", shift="off", intervene=_inject("actor")),
    "inject_critic": Arm("plasticity injected into the critic once", shift="off", intervene=_inject("critic")),
    "layer_norm": Arm("layer norm in the heads", shift="off", heads=with_layer_norm),
    "spectral_norm": Arm("spectral norm in the heads", shift="off", heads=with_spectral_norm),
    "crelu": Arm("CReLU in the heads", shift="off", heads=with_crelu),
    "weight_decay": Arm("weight decay of 1e-5", shift="off", weight_decay=1e-5),
    "l2_init": Arm("L2-init of weight 1e-2", shift="off", l2_init=1e-2),
    "shrink_perturb": Arm("shrink and perturb periodically", shift="off", intervene=_shrink_and_perturb, periodic=True),
    "redo": Arm("dormant units recycled periodically", shift="off", intervene=_recycle, periodic=True),
}

PROBES = {
    "probe_fresh": "plasticity probe of the untrained networks",
    "probe_shift": "plasticity probe after heavy priming with shifted images",
    "probe_no_shift": "plasticity probe after heavy priming with images as they are",
}

ARMS = {name: arm.about for name, arm in ACTING.items()} | PROBES

QUICK = ("baseline", "rr_high", "rr_high_no_shift", "adaptive", *PROBES)
