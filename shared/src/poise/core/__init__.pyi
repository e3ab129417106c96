from poise.core import data as data
from poise.core import functional as functional
from poise.core import gates as gates
from poise.core import gpu as gpu
from poise.core import schedule as schedule
from poise.core.penalty import Penalties as Penalties
from poise.core.penalty import Penalty as Penalty
