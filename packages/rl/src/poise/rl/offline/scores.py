"""D4RL's normalised score: 0 is a random policy, 100 an expert.

Fu et al., "D4RL: Datasets for Deep Data-Driven Reinforcement Learning", arXiv 2004.07219.
"""

import numpy as np
from jaxtyping import Float

REFERENCE = {
    "halfcheetah": (-280.178953, 12135.0),
    "hopper": (-20.272305, 3234.3),
    "walker2d": (1.629008, 4592.3),
    "ant": (-325.6, 3879.7),
    "antmaze": (0.0, 1.0),
}
"""Return of a random policy and of an expert, as D4RL publishes them."""


def d4rl_normalized_score(env_id: str, returns: Float[np.ndarray, "..."] | float) -> Float[np.ndarray, "..."]:
    r""":math:`100\, (R - R_\text{random}) / (R_\text{expert} - R_\text{random})`.

    Args:
        env_id: the task, by the name of its data set or of its environment: ``"hopper-medium-v2"``, ``"Hopper-v5"``,
            ``"antmaze-umaze-v0"``.
        returns: undiscounted returns of whole episodes, of any shape.

    Raises:
        ValueError: D4RL has no reference for this task here.

    >>> d4rl_normalized_score("Hopper-v5", 3234.3).item()
    100.0
    """
    name = env_id.lower().partition("-")[0]
    if name not in REFERENCE:
        raise ValueError(f"no reference scores for {env_id!r}: the tasks known are {sorted(REFERENCE)}")
    low, high = REFERENCE[name]
    return np.asarray(100 * (np.asarray(returns, np.float64) - low) / (high - low))
