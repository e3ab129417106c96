"""What poise.rl offers. Imports no torch, so that ``poise list`` is instant."""

from poise.core.catalog import Headline, Method

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
    headline=Headline(
        promise="values are approximated better: their error falls",
        metric="q_error",
        arm="beer",
        step="20 DPG updates, 256-256, batch 256",
        peer="stable-baselines3",
        peer_case="20 TD3 updates, 256-256, batch 256, sampling included; agreement of all networks after two equal updates",
    ),
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

ADAPTIVE_RR = Method(
    slug="adaptive-rr",
    package="rl",
    title="Adaptive RR",
    kind="training",
    problem="Train a pixel agent often on its data without its critic losing the ability to learn.",
    summary="Measures the critic's fraction of active units, and raises the replay ratio once the critic has recovered.",
    formula=r"\Phi = \frac{\#\{\text{activations} > 0\}}{\#\{\text{activations}\}}, \qquad "
    r"|\bar\Phi_e - \bar\Phi_{e'}| \le 0.001 \;\Rightarrow\; \mathrm{RR}: 0.5 \to 2",
    usage="""import gymnasium
import numpy as np
import torch
from gymnasium.wrappers import RescaleAction
from poise.rl import AdaptiveReplayRatio, DrQV2Agent, EpisodeStream, NStepReplayBuffer, PixelFrameStack

pendulum = gymnasium.make("Pendulum-v1", render_mode="rgb_array", max_episode_steps=20)
env = PixelFrameStack(RescaleAction(pendulum, np.float32(-1), np.float32(1)), size=(24, 24), action_repeat=2)
agent = DrQV2Agent(env.observation_space, env.action_space, channels=8, hidden=32, pad=2, exploration_steps=20)
buffer = NStepReplayBuffer(1_000, env.observation_space, env.action_space, frame_stack=3)
controller = AdaptiveReplayRatio(low=0.5, high=2.0, check_freq=2, phi_gap=0.05)
stream, generator = EpisodeStream(env, seed=0), torch.Generator().manual_seed(0)
for step in range(60):
    taken = stream.step(agent.act(stream.observation, generator, step))
    buffer.add(*taken[:4], terminated=taken.terminated, truncated=taken.truncated)
    for _ in range(controller.updates_for_step(step) if step >= 20 else 0):
        metrics = agent.update(buffer.sample(16, generator), step, generator)
        controller.on_update(metrics["critic_fau"])
    if taken.ended:
        controller.on_episode_end()
print(controller.replay_ratio, controller.checks[-1])
""",
    api=(
        "poise.rl.AdaptiveReplayRatio",
        "poise.rl.FAUMonitor",
        "poise.rl.DrQV2Agent",
        "poise.rl.NStepReplayBuffer",
        "poise.rl.RandomShiftsAug",
        "poise.rl.TruncatedNormal",
        "poise.rl.schedule",
        "poise.rl.plasticity_injection",
        "poise.rl.reset_module",
        "poise.rl.reset_last_layers",
        "poise.rl.shrink_and_perturb",
        "poise.rl.recycle_dormant",
        "poise.rl.dormant_units",
        "poise.rl.L2Init",
        "poise.rl.CReLU",
        "poise.rl.with_layer_norm",
        "poise.rl.with_spectral_norm",
        "poise.rl.with_crelu",
        "poise.rl.heavy_priming",
        "poise.rl.target_fitting_loss",
        "poise.rl.PixelFrameStack",
        "poise.rl.make_dmc_pixels",
        "poise.rl.read_episode",
    ),
    presets=("quick", "paper"),
    arms=(
        "baseline",
        "rr_high",
        "rr_high_no_shift",
        "adaptive",
        "rr_low_no_shift",
        "shift_until",
        "shift_from",
        "primed",
        "reset_actor",
        "reset_critic",
        "reset_heads",
        "inject_actor",
        "inject_critic",
        "layer_norm",
        "spectral_norm",
        "crelu",
        "weight_decay",
        "l2_init",
        "shrink_perturb",
        "redo",
        "probe_fresh",
        "probe_shift",
        "probe_no_shift",
    ),
    headline=Headline(
        promise="the return rises above that of a low replay ratio",
        metric="return",
        arm="adaptive",
        step="DrQ-v2 update, batch 256, 84 x 84, FAU of critic",
        peer="drqv2 augmentation, grid_sample form",
        peer_case="random shift by up to 4 pixels of 256 x 9 x 84 x 84",
    ),
    paper="Guozheng Ma, Lu Li, Sen Zhang, Zixuan Liu, Zhen Wang, Yixin Chen, Li Shen, Xueqian Wang and Dacheng Tao, Revisiting "
    "Plasticity in Visual Reinforcement Learning: Data, Modules and Training Stages, ICLR 2024",
    url="https://arxiv.org/abs/2310.07418",
    bibtex="""@inproceedings{ma2024revisiting,
  title     = {Revisiting Plasticity in Visual Reinforcement Learning: Data, Modules and Training Stages},
  author    = {Ma, Guozheng and Li, Lu and Zhang, Sen and Liu, Zixuan and Wang, Zhen and Chen, Yixin and Shen, Li and
               Wang, Xueqian and Tao, Dacheng},
  booktitle = {International Conference on Learning Representations},
  year      = {2024},
  url       = {https://arxiv.org/abs/2310.07418}
}""",
    tags=(
        "reinforcement learning",
        "plasticity",
        "replay ratio",
        "pixels",
        "DrQ-v2",
        "data augmentation",
        "dormant units",
    ),
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
    headline=Headline(
        promise="the policy that is learned from a log earns more than TD3+BC's: the return rises",
        metric="return",
        arm="prdc",
        versus="td3bc",
        step="20 updates, 256-256, batch 256, 1,000,000 HalfCheetah transitions",
        peer="scipy KDTree",
        peer_case="256 queries in 1,000,000 x 23 HalfCheetah rows, actions 0.5 from the logged ones",
    ),
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

METHODS: tuple[Method, ...] = (ADAPTIVE_RR, BEER, PRDC)
