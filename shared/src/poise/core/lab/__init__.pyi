from poise.core.lab.experiment import Claim as Claim
from poise.core.lab.experiment import Experiment as Experiment
from poise.core.lab.run import ArmResult as ArmResult
from poise.core.lab.run import Run as Run
