r"""PRDC: hold a policy to its nearest logged state-action pair, not to the action logged in the very same state.

Ran, Li, Zhang, Zhang and Yu, "Policy Regularization with Dataset Constraint for Offline Reinforcement Learning", ICML 2023,
arXiv 2306.06569.

.. math:: d_\beta(s, a) = \min_i \big\| [\beta s \,;\, a] - [\beta s_i \,;\, a_i] \big\|_2, \qquad
          \min_\phi\; -\lambda\, \mathbb E\, Q_1(s, \pi_\phi(s)) + \mathbb E\, d_\beta(s, \pi_\phi(s))

The policy may take an action from a neighbouring state, so the constraint is softer than behaviour cloning and still keeps it on
the data: :math:`d_\beta(s, \pi(s)) \le \|\pi(s) - a(s)\|`. The weight β of the states leads from the support of all actions (0)
to behaviour cloning (infinity). The released code minimises the mean squared difference to the neighbour's action, which is the
default here.

>>> import gymnasium, torch
>>> from poise.rl import PRDC, OfflineDataset, TD3BackboneConfig
>>> env = gymnasium.make("Pendulum-v1")
>>> data = OfflineDataset.from_env_rollout(env, lambda observation: env.action_space.high, 500)
>>> agent = PRDC(data, TD3BackboneConfig(hidden=(32, 32), batch_size=64), beta=2.0)
>>> generator = torch.Generator().manual_seed(0)
>>> for _ in range(2):
...     metrics = agent.learn(generator)
>>> agent.act(env.reset(seed=0)[0]).shape
(1,)

In a loop and with a policy of your own the constraint is a penalty:

>>> constraint = DatasetConstraint(data.observations, data.actions, beta=2.0)
>>> states, policy = data.observations[:8], torch.zeros(8, 1, requires_grad=True)
>>> constraint(states, policy, rows=torch.arange(8)).backward()
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from poise.core.eager import eager
from poise.core.neighbors.search import Neighbors
from poise.core.penalty import Penalty
from poise.core.schedule import Schedule
from poise.rl.offline.dataset import OfflineDataset
from poise.rl.offline.td3 import TD3, TD3BackboneConfig
from poise.rl.replay.batch import Batch


class Constrained(NamedTuple):
    """What :meth:`DatasetConstraint.query` finds, without gradient.

    Attributes:
        row: (batch,), that of the k-th nearest logged pair.
        distance: (batch,), :math:`d_\\beta` to it.
        action: (batch, a), its action, or the mean action of the k nearest.
    """

    row: Int64[Tensor, "batch"]
    distance: Float[Tensor, "batch"]
    action: Float[Tensor, "batch a"]


class DatasetConstraint(Penalty):
    r"""Mean squared distance of a policy's actions to those of the nearest logged pairs.

    The neighbours are searched at the current actions, exactly, and are constants for the gradient, which is
    :math:`2(\pi - a_{i^*})/(B A)` with respect to the actions and zero with respect to the states.

    States must be at a common scale (:class:`~poise.rl.StateNormalizer`), actions too: [-1, 1] as in D4RL
    (``gymnasium.wrappers.RescaleAction``).

    Args:
        states: s_i (n, s).
        actions: a_i (n, a).
        beta: β, weight of the states in the distance; at least 0. The paper takes 2 for locomotion, 5 to 15 for antmaze.
        weight: of the penalty, or a schedule of it. TD3+BC and PRDC keep it at 1 and weigh the value instead.
        k: which neighbour; 1 in the paper.
        mode: ``"kth"`` holds the policy to the k-th nearest pair alone, as the released code does, ``"mean"`` to the mean action of the
            k nearest.
        power: 2 is the mean over batch and dimensions of the squared difference of the actions, as in the released code; 1 is the
            mean of the distance :math:`d_\beta` itself, as in the paper's formula.
        backend: of the search, see :class:`poise.core.Neighbors`.
        memory: bytes of working memory of a search; ``None`` for its default.

    Raises:
        TypeError: states or actions are not floating.
        ValueError: shapes that do not fit, entries that are not finite, no pairs, or numbers out of range.

    Source:
        Ran et al. 2023, the point-to-set distance and the dataset constraint; the released code for its squared form.
    """

    keys: Tensor

    def __init__(
        self,
        states: Float[Tensor, "..."],
        actions: Float[Tensor, "..."],
        beta: float = 2.0,
        *,
        weight: float | Schedule = 1.0,
        k: int = 1,
        mode: str = "kth",
        power: int = 2,
        backend: str = "auto",
        memory: int | None = None,
    ) -> None:
        super().__init__(weight)
        keys = _keys(states, actions, beta)
        index = Neighbors(keys.detach(), backend, memory)
        if not 1 <= k <= len(keys):
            raise ValueError(f"k must lie in 1..{len(keys)} for {len(keys)} pairs, got {k}")
        if mode not in ("kth", "mean") or power not in (1, 2):
            raise ValueError(f"expected mode 'kth' or 'mean' and power 1 or 2, got {mode!r} and {power!r}")
        self.beta, self.k, self.mode, self.power = beta, k, mode, power
        self.backend, self.memory = backend, memory
        self.width = actions.shape[1]
        self.register_buffer("keys", index.data, persistent=False)
        self._index: Neighbors | None = index

    def query(
        self, states: Float[Tensor, "..."], actions: Float[Tensor, "..."], rows: Int64[Tensor, "..."] | None = None
    ) -> Constrained:
        """The nearest logged pairs.

        Args:
            states: (batch, s), normalised as the logged ones.
            actions: (batch, a).
            rows: (batch,), a logged pair for each that is known to be near: the row that the state was taken from. Its distance
                bounds the answer, which saves most of the search in large data sets and does not change the result.

        Raises:
            ValueError: shapes that do not fit, or entries that are not finite.
        """
        distances, index = self._nearest(states, actions, rows)
        neighbours = self.keys[index][..., -self.width :]
        return Constrained(
            index[:, -1], distances[:, -1], neighbours.mean(1) if self.mode == "mean" else neighbours[:, -1]
        )

    def penalty(
        self, states: Float[Tensor, "..."], actions: Float[Tensor, "..."], rows: Int64[Tensor, "..."] | None = None
    ) -> Tensor:
        """The unweighted term; arguments as in :meth:`query`, ``actions`` with the policy's gradient.

        Raises:
            ValueError: there is no action, or as :meth:`query`.
        """
        if len(actions) == 0:
            raise ValueError(f"actions must hold at least one row, got shape {tuple(actions.shape)}")
        if self.power == 2:
            return (actions - self.query(states, actions, rows).action).square().mean()
        _, index = self._nearest(states, actions, rows)
        near = index if self.mode == "mean" else index[:, -1:]
        key = _keys(states.detach(), actions, self.beta)
        return torch.linalg.vector_norm(key[:, None] - self.keys[near], dim=-1).mean()

    def policy_loss(self, batch: Batch, action: Tensor) -> Tensor:
        """The term for a policy that an agent is updating, whose batches carry the rows of the data set."""
        return self(batch.observation, action, batch.row)

    @eager
    @torch.no_grad()
    def _nearest(self, states: Tensor, actions: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        """Distances and rows (batch, k) of the k nearest pairs, ascending."""
        key = _keys(states, actions, self.beta)
        if (columns := self.keys.shape[1]) != key.shape[1] or actions.shape[1] != self.width:
            raise ValueError(
                f"expected states of {columns - self.width} and actions of {self.width} numbers, got {states.shape[1]} and "
                f"{actions.shape[1]}"
            )
        if self._index is None or self._index.data is not self.keys:  # the module was copied, moved or cast
            self._index = Neighbors(self.keys, self.backend, self.memory)
        return self._index.query(key, self.k, near=rows if self.k == 1 else None)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_index": None}  # of a copy; it is built again when first used

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, pairs={len(self.keys)}, beta={self.beta}, k={self.k}, mode={self.mode!r}, power={self.power}"


def dataset_constraint_loss(
    states: Float[Tensor, "..."],
    actions: Float[Tensor, "..."],
    logged_states: Float[Tensor, "..."],
    logged_actions: Float[Tensor, "..."],
    beta: float = 2.0,
    *,
    k: int = 1,
    mode: str = "kth",
    power: int = 2,
) -> Float[Tensor, ""]:
    """The constraint once, without an index that is kept; for repeated use build :class:`DatasetConstraint`.

    Args:
        states: (batch, s).
        actions: the policy's, (batch, a), with their gradient.
        logged_states: s_i (n, s).
        logged_actions: a_i (n, a).
        beta: see :class:`DatasetConstraint`.
        k: see there.
        mode: see there.
        power: see there.

    Raises:
        TypeError, ValueError: see there.
    """
    constraint = DatasetConstraint(logged_states, logged_actions, beta, k=k, mode=mode, power=power, backend="matmul")
    return constraint(states, actions)


class PRDC(TD3):
    """TD3 whose policy is held to its nearest logged state-action pairs.

    Actions should have the range [-1, 1], as in D4RL, for β to mean what it means in the paper (``gymnasium.wrappers.RescaleAction``).

    Args:
        data: the log.
        config: settings of the update, α among them.
        beta: see :class:`DatasetConstraint`.
        k: see there.
        mode: see there.
        power: see there.
        backend: see there.
        device: where networks, data and search are.
        dtype: type of networks and data.

    Attributes:
        constraint: the :class:`DatasetConstraint`; ``constraint.value`` is the last value.

    Source:
        Ran et al. 2023, the algorithm and its released code.
    """

    def __init__(
        self,
        data: OfflineDataset,
        config: TD3BackboneConfig | None = None,
        *,
        beta: float = 2.0,
        k: int = 1,
        mode: str = "kth",
        power: int = 2,
        backend: str = "auto",
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(data, config, device=device, dtype=dtype)
        self.constraint = DatasetConstraint(
            self.data.observations, self.data.actions, beta, k=k, mode=mode, power=power, backend=backend
        )
        self.policy_regularizer = self.constraint


def _keys(states: Tensor, actions: Tensor, beta: float) -> Tensor:
    """``[beta s ; a]``, in which distances are Euclidean."""
    if not 0 <= beta < float("inf"):
        raise ValueError(f"beta must be finite and at least 0, got {beta}")
    if states.ndim != 2 or actions.ndim != 2 or len(states) != len(actions):
        raise ValueError(
            f"expected states (n, s) and actions (n, a) of one length, got {tuple(states.shape)} and {tuple(actions.shape)}"
        )
    if actions.shape[1] == 0:
        raise ValueError(f"actions must have entries, got shape {tuple(actions.shape)}")
    return torch.cat([beta * states, actions], dim=1)
