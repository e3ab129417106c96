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

METHODS: tuple[Method, ...] = (BEER,)
