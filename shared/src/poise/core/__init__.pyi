from poise.core.penalty import Penalties as Penalties
from poise.core.penalty import Penalty as Penalty
