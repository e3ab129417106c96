"""Cost of BEER in an update, against the agent without it and the authors' formulation; TD3 against stable-baselines3.

uv run python tools/bench.py rl/beer
"""

from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import Env

from poise.core.bench import Case, Peer, case, peer
from poise.rl import Batch, BEERRegularizer, DPGAgent, ReplayBuffer, TD3Agent, bellman_cosine_bound, representation_rank
from poise.rl.representation.critic_step import CriticStep

BATCH, UPDATES = 256, 20
"""Transitions per update, and updates per measurement."""


def make_env() -> Env[Any, Any]:
    """The sizes of the paper's larger tasks: 17 numbers seen, 6 actions."""
    return gymnasium.make("HalfCheetah-v5")


def filled(env: Env[Any, Any], add: Callable[..., Any], count: int = 5_000) -> None:
    """Store random transitions of the environment's sizes."""
    rng = np.random.default_rng(0)
    assert env.observation_space.shape
    assert env.action_space.shape
    size, actions = env.observation_space.shape[0], env.action_space.shape[0]
    for step in range(count):
        rows = rng.normal(size=(2, size)).astype(np.float32)
        add(rows[0], rng.uniform(-1, 1, actions).astype(np.float32), float(rng.normal()), rows[1], step % 1_000 == 999)


def updater(agent: DPGAgent | TD3Agent, env: Env[Any, Any]) -> Callable[[], None]:
    """Some updates from a replay buffer."""
    buffer = ReplayBuffer(20_000, env.observation_space, env.action_space)
    filled(env, lambda *step: buffer.add(*step[:4], terminated=False, truncated=step[4]))
    generator = torch.Generator().manual_seed(0)

    def update() -> None:
        for _ in range(UPDATES):
            agent.update(buffer.sample(BATCH, generator))

    return update


class AuthorsFormulation:
    """The term as released: online features at the next state by one more forward pass of policy and critic, norms taken apart."""

    def __init__(self, beta: float) -> None:
        self.beta = beta

    def critic_loss(self, step: CriticStep) -> torch.Tensor:
        online = step.online_next_features()
        with torch.no_grad():
            w = step.head_weight.norm(2) ** 2
            norm, online_norm = step.features.norm(dim=-1, keepdim=True), online.norm(dim=-1, keepdim=True)
            next_norm = step.next_features.norm(dim=-1, keepdim=True)
            reward = step.batch.reward.unsqueeze(1)
            numerator = norm**2 + 0.99**2 * online_norm**2 - reward**2 / w
            bound = (numerator / (norm * next_norm) / (2 * 0.99)).squeeze(1)
        cosine = torch.nn.functional.cosine_similarity(step.features, step.next_features, dim=-1, eps=1e-6)
        return self.beta * (cosine - bound).relu().mean()


def overhead(official: bool) -> Case:
    """An update of deterministic policy gradient without and with BEER."""
    env = make_env()
    plain = DPGAgent(env.observation_space, env.action_space)
    beer = DPGAgent(env.observation_space, env.action_space, regularizers=[BEERRegularizer(1e-3, official=official)])
    name = f"{UPDATES} DPG updates, 256-256, batch {BATCH}" + (", norm from the online critic" if official else "")
    return case(name, updater(plain, env), updater(beer, env))


def against_authors() -> Peer:
    """The same update with the term written as in the released code; ours computes the paper's form."""
    env = make_env()
    ours, theirs = (
        updater(DPGAgent(env.observation_space, env.action_space, regularizers=[term]), env)
        for term in (BEERRegularizer(1e-3), AuthorsFormulation(1e-3))
    )
    name = f"{UPDATES} DPG updates with the term; agreement of the bounds with official=True"
    return peer("released formulation", "BEER-ICLR2024", name, ours, theirs, agreement=bound_agreement())


def bound_agreement() -> float:
    """Relative difference of the two formulations of the bound where they mean the same."""
    generator = torch.Generator().manual_seed(0)
    features, following, online = (torch.randn(BATCH, 256, generator=generator) for _ in range(3))
    reward, weight = 20 * torch.randn(BATCH, generator=generator), torch.randn(1, 256, generator=generator)
    ours = bellman_cosine_bound(features, following, reward, weight, 0.99, norm_from=online)
    numerator = features.norm(dim=-1) ** 2 + 0.99**2 * online.norm(dim=-1) ** 2 - reward**2 / weight.norm(2) ** 2
    theirs = numerator / (features.norm(dim=-1) * following.norm(dim=-1)) / (2 * 0.99)
    return float((ours - theirs).norm() / theirs.norm())


def against_stable_baselines() -> Peer:
    """TD3 updates, sampling from replay included, in both libraries at the same sizes and rates."""
    from stable_baselines3 import TD3
    from stable_baselines3.common.logger import configure

    env = make_env()
    theirs = TD3(
        "MlpPolicy",
        env,
        batch_size=BATCH,
        learning_rate=3e-4,
        policy_kwargs={"net_arch": [256, 256]},
        device="cpu",
        buffer_size=20_000,
    )
    theirs.set_logger(configure(None, []))
    replay: Any = theirs.replay_buffer
    filled(env, lambda s, a, r, n, end: replay.add(s[None], n[None], a[None], np.array([r]), np.array([False]), [{}]))
    agent = TD3Agent(env.observation_space, env.action_space)
    agreement = update_agreement(agent, theirs)
    name = f"{UPDATES} TD3 updates, 256-256, batch {BATCH}, sampling included; agreement of all networks after two equal updates"
    ours = updater(agent, env)
    return peer(
        "stable-baselines3",
        version("stable-baselines3"),
        name,
        ours,
        lambda: theirs.train(UPDATES, BATCH),
        agreement=agreement,
    )


def update_agreement(agent: TD3Agent, theirs: Any) -> float:
    """Relative difference of all parameters after two updates on one batch, from the same start and without noise."""
    policy = theirs.policy
    pairs = [
        (agent.actor, policy.actor.mu),
        (agent.actor_target, policy.actor_target.mu),
        *zip(agent.critics, policy.critic.q_networks, strict=True),
        *zip(agent.critic_targets, policy.critic_target.q_networks, strict=True),
    ]
    for ours, other in pairs:
        for own, given in zip(ours.parameters(), other.parameters(), strict=True):
            own.data.copy_(given.data)
    replay: Any = theirs.replay_buffer
    drawn = replay.sample(BATCH)
    drawn = drawn._replace(observations=drawn.observations.float(), next_observations=drawn.next_observations.float())
    same = Batch(
        drawn.observations,
        drawn.actions,
        drawn.rewards.squeeze(1),
        torch.full((BATCH,), theirs.gamma),
        drawn.next_observations,
        drawn.dones.squeeze(1) > 0,
        torch.arange(BATCH),
    )
    sample, noise = replay.sample, theirs.target_policy_noise
    replay.sample, theirs.target_policy_noise = (lambda *_, **__: drawn), 0.0
    theirs.train(2, BATCH)
    replay.sample, theirs.target_policy_noise = sample, noise
    for _ in range(2):
        agent.update(same, torch.zeros_like(drawn.actions))
    found, expected = (
        torch.cat([parameter.detach().flatten() for pair in pairs for parameter in pair[side].parameters()])
        for side in (0, 1)
    )
    return float((found - expected).norm() / expected.norm())


def rank_by_gram() -> Peer:
    """The rank of 4,096 features by eigenvalues of their Gram matrix, and by singular values."""
    features = torch.randn(4_096, 256, generator=torch.Generator().manual_seed(0)).relu()
    return peer(
        "torch.linalg.svdvals",
        torch.__version__,
        "rank of 4096 x 256 features",
        lambda: float(representation_rank(features, method="gram")),
        lambda: float(representation_rank(features, method="svd")),
    )


def bench() -> dict[str, Any]:
    """All cases."""
    return {
        "method": "rl/beer",
        "cases": [overhead(official=False), overhead(official=True)],
        "peers": [against_authors(), against_stable_baselines(), rank_by_gram()],
    }
