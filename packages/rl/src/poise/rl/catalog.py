"""What poise.rl offers. Imports no torch, so that ``poise list`` is instant."""

from poise.core.catalog import Method

BEER = Method(
    slug="beer",
    package="rl",
    title="BEER",
    kind="penalty",
    problem="Train a value network by bootstrapping without its representation collapsing, or being spread further than values need.",
    summary="Penalises how much more alike the representations of successive state-action pairs are than the Bellman equation allows.",
    formula=r"\mathbb E \Big[ \cos(\phi, \phi') - \frac{\|\phi\|^2 + \gamma^2\|\phi'\|^2 - r^2/\|w\|^2}"
    r"{2\gamma\|\phi\|\|\phi'\|} \Big]_+",
    usage="""import torch
from poise.rl import BEERRegularizer, Representation

critic, target = (
    torch.nn.Sequential(torch.nn.Linear(4, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1)) for _ in range(2)
)
phi, phi_next = Representation(critic), Representation(target)  # reads any network with a linear head
beer = BEERRegularizer(weight=1e-3)
optimizer = torch.optim.Adam(critic.parameters(), lr=3e-4)
for _ in range(10):
    pair, next_pair, reward = torch.randn(256, 4), torch.randn(256, 4), torch.randn(256)
    with torch.no_grad():
        goal = reward + 0.99 * target(next_pair).squeeze(1)
    loss = (critic(pair).squeeze(1) - goal).square().mean()
    loss = loss + beer(phi.features, phi_next.features, reward, phi.weight, 0.99)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print(beer.value, beer.active)
""",
    api=(
        "poise.rl.BEERRegularizer",
        "poise.rl.beer_loss",
        "poise.rl.bellman_cosine_bound",
        "poise.rl.Representation",
        "poise.rl.representation_rank",
        "poise.rl.q_value_bias",
        "poise.rl.evaluate",
        "poise.rl.interquartile_mean",
        "poise.rl.bootstrap_interval",
        "poise.rl.DPGAgent",
        "poise.rl.TD3Agent",
        "poise.rl.DQNAgent",
        "poise.rl.CriticStep",
        "poise.rl.CriticRegularizer",
        "poise.rl.InFeRRegularizer",
        "poise.rl.DR3Regularizer",
        "poise.rl.DissimilarityRegularizer",
        "poise.rl.ReplayBuffer",
        "poise.rl.EpisodeStream",
        "poise.rl.DMControl",
    ),
    presets=("quick", "control", "lunar-lander", "paper"),
    arms=("baseline", "beer", "beer_x100", "strong_beer", "infer", "dr3", "unbounded"),
    paper="Qiang He, Tianyi Zhou, Meng Fang and Setareh Maghsudi, Adaptive Regularization of Representation Rank as an Implicit "
    "Constraint of Bellman Equation, ICLR 2024",
    url="https://arxiv.org/abs/2404.12754",
    bibtex="""@inproceedings{he2024adaptive,
  title     = {Adaptive Regularization of Representation Rank as an Implicit Constraint of {B}ellman Equation},
  author    = {He, Qiang and Zhou, Tianyi and Fang, Meng and Maghsudi, Setareh},
  booktitle = {International Conference on Learning Representations},
  year      = {2024},
  url       = {https://arxiv.org/abs/2404.12754}
}""",
    tags=("reinforcement learning", "critic", "representation rank", "Bellman equation", "TD3", "DPG", "DQN", "Q bias"),
)

PRDC = Method(
    slug="prdc",
    package="rl",
    title="PRDC",
    kind="penalty",
    problem="Learn a policy from a fixed log without its values exploding on actions that nobody tried.",
    summary="Holds the policy to the nearest logged state-action pair instead of the action logged in the very same state.",
    formula=r"d_\beta(s, a) = \min_i \big\| [\beta s \,;\, a] - [\beta s_i \,;\, a_i] \big\|, \qquad "
    r"\min_\phi\; -\lambda\, \mathbb E\, Q(s, \pi_\phi(s)) + \mathbb E\, d_\beta(s, \pi_\phi(s))",
    usage="""import gymnasium
import torch
from poise.rl import PRDC, OfflineDataset, TD3BackboneConfig

env = gymnasium.make("Pendulum-v1")
log = OfflineDataset.from_env_rollout(env, lambda observation: env.action_space.sample(), 1_000)
agent = PRDC(log, TD3BackboneConfig(hidden=(32, 32), batch_size=64), beta=2.0)
generator = torch.Generator().manual_seed(0)
for _ in range(10):
    metrics = agent.learn(generator)
print(agent.constraint.value, agent.act(env.reset(seed=0)[0]))
""",
    api=(
        "poise.rl.PRDC",
        "poise.rl.DatasetConstraint",
        "poise.rl.dataset_constraint_loss",
        "poise.rl.TD3",
        "poise.rl.TD3BC",
        "poise.rl.TD3BackboneConfig",
        "poise.rl.PolicyRegularizer",
        "poise.rl.BehaviorCloning",
        "poise.rl.OfflineDataset",
        "poise.rl.StateNormalizer",
        "poise.rl.d4rl_normalized_score",
        "poise.rl.Constrained",
    ),
    presets=("quick", "paper"),
    arms=("baseline", "td3bc", "prdc", "support", "beta_100", "nearest_state"),
    paper="Yuhang Ran, Yi-Chen Li, Fuxiang Zhang, Zongzhang Zhang and Yang Yu, Policy Regularization with Dataset Constraint for "
    "Offline Reinforcement Learning, ICML 2023",
    url="https://arxiv.org/abs/2306.06569",
    bibtex="""@inproceedings{ran2023policy,
  title     = {Policy Regularization with Dataset Constraint for Offline Reinforcement Learning},
  author    = {Ran, Yuhang and Li, Yi-Chen and Zhang, Fuxiang and Zhang, Zongzhang and Yu, Yang},
  booktitle = {International Conference on Machine Learning},
  year      = {2023},
  url       = {https://arxiv.org/abs/2306.06569}
}""",
    tags=("reinforcement learning", "offline", "policy", "nearest neighbour", "TD3+BC", "D4RL", "Minari"),
)

METHODS: tuple[Method, ...] = (BEER, PRDC)
