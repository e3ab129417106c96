"""The plasticity probe: prime on few transitions, intervene in one module, and see how well new targets are fitted.

No acting comes in between, so that nothing but the networks' ability to learn is measured. The probe runs through encoder and critic:
an intervention in the policy is its control, and must change nothing.
"""

import copy
from typing import Any

import torch
from torch import Tensor

from poise.core.gpu import derive_generator
from poise.core.lab import Run
from poise.rl.agents.drqv2 import DrQV2Agent
from poise.rl.plasticity.fau import FAUMonitor
from poise.rl.plasticity.probe import target_fitting_loss
from poise.rl.replay.batch import Batch

INTERVENTIONS = {
    "early": ("none", "reset_critic"),
    "late": ("none", "reset_actor", "reset_critic", "reset_encoder", "inject_critic", "inject_encoder"),
}


def intervened(agent: DrQV2Agent, name: str, seed: int) -> DrQV2Agent:
    """A copy of the agent after an intervention."""
    twin = copy.deepcopy(agent)
    kind, _, part = name.partition("_")
    if kind == "reset":
        twin.reset(part, derive_generator(seed, "intervention"))
    elif kind == "inject":
        twin.inject(part, derive_generator(seed, "intervention"))
    return twin


def probe(agent: DrQV2Agent, data: Batch, run: Run, stage: str, **settings: Any) -> dict[str, float]:
    """The loss on random targets after each intervention, and the fraction of active units on the data."""
    inputs = data.observation, data.action
    names = INTERVENTIONS[stage]
    found = {"fit": torch.zeros(len(names), dtype=torch.float64)}
    for index in run.steps(len(names), name=f"fit_{stage}", found=found):
        twin = intervened(agent, names[index], run.seed)
        losses = target_fitting_loss(
            twin.value_network, inputs, seed=run.seed, template=agent.value_network, **settings
        )
        found["fit"][index] = losses.double().mean().cpu()
        run.log(index, fit=found["fit"][index])
    loss = dict(zip(names, found["fit"].tolist(), strict=True))
    return {f"fit_{name}_{stage}": value for name, value in loss.items()} | {
        f"{name}_fau_{stage}": value for name, value in active(agent, data).items()
    }


@torch.no_grad()
def active(agent: DrQV2Agent, data: Batch) -> dict[str, float]:
    """The fractions of active units of encoder and critic on the data as they are."""
    monitor = FAUMonitor({"encoder": agent.encoder, "critic": agent.critic})
    with monitor.counting():
        agent.value_network(data.observation, data.action)
    return {name: float(value) for name, value in monitor.fractions().items()}


@torch.no_grad()
def kill_and_revive(agent: DrQV2Agent, data: Batch, seed: int) -> dict[str, float]:
    """The critic's fraction of active units with all hidden biases at -100, and after a reset."""
    twin = copy.deepcopy(agent)
    for layer in twin.critic.modules():
        if isinstance(layer, torch.nn.Linear) and layer.out_features > 1:
            layer.bias.fill_(-100.0)
    dead = active(twin, data)["critic"]
    twin.reset("critic", derive_generator(seed, "intervention"))
    return {"dead_fau": dead, "revived_fau": active(twin, data)["critic"]}


@torch.no_grad()
def injection_change(agent: DrQV2Agent, data: Batch, seed: int) -> float:
    """The greatest change of a value by plasticity injection into the critic, relative to the greatest value."""

    def values(of: DrQV2Agent) -> Tensor:
        return torch.stack(of.value_network(data.observation, data.action))

    before = values(agent)
    return float((values(intervened(agent, "inject_critic", seed)) - before).abs().max() / before.abs().max())


def summary(measured: dict[str, float]) -> dict[str, float]:
    """What the interventions changed: losses are compared with those of the same agent without one."""
    late = {name: measured[f"fit_{name}_late"] for name in INTERVENTIONS["late"]}
    return {
        "fit_loss": late["none"],
        "critic_fau": measured["critic_fau_late"],
        "encoder_fau": measured["encoder_fau_late"],
        "restored_by_critic": late["none"] - late["reset_critic"],
        "restored_by_critic_injection": late["none"] - late["inject_critic"],
        "critic_over_encoder": late["reset_encoder"] - late["reset_critic"],
        "changed_by_actor": abs(late["none"] - late["reset_actor"]),
        "early_over_late": late["reset_critic"] - measured["fit_reset_critic_early"],
    }
