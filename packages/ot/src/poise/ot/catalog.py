"""What poise.ot offers. Imports no torch, so that ``poise list`` is instant."""

from poise.core.catalog import Headline, Method

MONGE_GAP = Method(
    slug="monge-gap",
    package="ot",
    title="Monge gap",
    kind="penalty",
    problem="Learn a transport map between two samples that is optimal for a cost of my choice, with any network.",
    summary="Adds to a fitting loss how much more the map costs than the best way to move its inputs to its outputs.",
    formula=r"\min_T \Delta(T_\sharp\mu, \nu) + \lambda \Big[ \tfrac1n \sum_i c(x_i, T(x_i))"
    r" - W_{c,\varepsilon}(\rho_n, T_\sharp\rho_n) \Big]",
    usage="""import torch
from poise.ot import Euclidean, MongeGapLoss, sinkhorn_divergence

net = torch.nn.Sequential(torch.nn.Linear(2, 32), torch.nn.GELU(), torch.nn.Linear(32, 2))
optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
gap = MongeGapLoss(Euclidean(), weight=1.0)
for _ in range(10):
    x, y = torch.randn(128, 2), torch.randn(128, 2) + 3
    t = net(x)
    loss = sinkhorn_divergence(t, y, static_b=True) + gap(x, t)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print(gap.value)
""",
    api=(
        "poise.ot.MongeGapLoss",
        "poise.ot.monge_gap",
        "poise.ot.monge_gap_from_samples",
        "poise.ot.sinkhorn_divergence",
        "poise.ot.sinkhorn",
        "poise.ot.MongeMapEstimator",
        "poise.ot.ConditionalMongeMap",
        "poise.ot.ConditionalMongeMapEstimator",
        "poise.ot.StructuredMap",
        "poise.ot.SphereMap",
        "poise.ot.ConservativePenalty",
        "poise.ot.ICNN",
        "poise.ot.NeuralDualSolver",
        "poise.ot.mixture_pair",
        "poise.ot.read_cells",
    ),
    presets=("quick", "known-map", "mixtures", "paper", "cells"),
    arms=("baseline", "monge_gap", "strong_gap", "euclidean", "strong_euclidean", "icnn_dual"),
    headline=Headline(
        promise="the learned map comes closer to the optimal one",
        metric="uvp",
        arm="monge_gap",
        preset="known-map",
        step="training step of a 3-64-64-3 map, batch 256",
        peer="ott-jax under jit",
        peer_case="gap, value and gradient, n = 1024, d = 32, float32, eps = 0.01 mean cost, error 0.001",
    ),
    paper="Théo Uscidda and Marco Cuturi, The Monge Gap: A Regularizer to Learn All Transport Maps, ICML 2023",
    url="https://arxiv.org/abs/2302.04953",
    bibtex="""@inproceedings{uscidda2023monge,
  title     = {The {M}onge Gap: A Regularizer to Learn All Transport Maps},
  author    = {Uscidda, Th{\\'e}o and Cuturi, Marco},
  booktitle = {International Conference on Machine Learning},
  year      = {2023},
  url       = {https://arxiv.org/abs/2302.04953}
}""",
    tags=("optimal transport", "Monge map", "Sinkhorn", "single cell", "perturbation", "colour transfer", "ICNN"),
)

SPARSE_OT = Method(
    slug="sparse-ot",
    package="ot",
    title="Sparsity-constrained optimal transport",
    kind="solver",
    problem="Find a transport plan in which no column (or row) uses more than k entries: experts that take k tokens, say.",
    summary="Quadratically regularised transport with a hard cap on the nonzeros of every column, solved to the optimum in batches.",
    formula=r"\min_{T \ge 0,\ T 1 = a,\ T^\top 1 = b} \langle T, C \rangle + \sum_j \tfrac{\gamma}{2} \|t_j\|^2"
    r" \quad \text{s.t. } \|t_j\|_0 \le k",
    usage="""import torch
from poise.ot import recover_plan, sparsity_constrained_ot

a, b = torch.full((24,), 1 / 24), torch.full((8,), 1 / 8)
C = torch.rand(24, 8)
result = sparsity_constrained_ot(a, b, C, k=4)
print(result.plan.count_nonzero(dim=0).max() <= 4, result.row_error)
plan = recover_plan(result)  # both marginals, the cap where it can be kept
""",
    api=(
        "poise.ot.sparsity_constrained_ot",
        "poise.ot.solve_semi_dual",
        "poise.ot.solve_dual",
        "poise.ot.recover_plan",
        "poise.ot.OTResult",
        "poise.ot.SparsityConstrained",
        "poise.ot.SquaredL2",
        "poise.ot.NegEntropy",
        "poise.ot.sparse_simplex_projection",
        "poise.ot.SparseOTRouter",
        "poise.ot.color_transfer",
    ),
    presets=("quick", "routing", "paper"),
    arms=("baseline", "kl", "l2", "k1", "k2", "k4", "k16", "top1", "balanced", "sinkhorn", "sparse"),
    headline=Headline(
        promise="a larger cap on the nonzeros makes the problem smoother: fewer steps to its optimum",
        metric="smoothness_steps",
        arm="k16",
        versus="k1",
        step="expert layer, 4 groups of 784 tokens, 8 experts",
        peer="POT",
        peer_case="semi-dual value and gradient, 2000 x 2000, k = 8",
    ),
    paper="Tianlin Liu, Joan Puigcerver and Mathieu Blondel, Sparsity-Constrained Optimal Transport, ICLR 2023",
    url="https://arxiv.org/abs/2209.15466",
    bibtex="""@inproceedings{liu2023sparsity,
  title     = {Sparsity-Constrained Optimal Transport},
  author    = {Liu, Tianlin and Puigcerver, Joan and Blondel, Mathieu},
  booktitle = {International Conference on Learning Representations},
  year      = {2023},
  url       = {https://arxiv.org/abs/2209.15466}
}""",
    tags=("optimal transport", "mixture of experts", "matching", "cardinality", "colour transfer"),
)

METHODS: tuple[Method, ...] = (MONGE_GAP, SPARSE_OT)
