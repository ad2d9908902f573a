"""Learning to adapt."""

from ssmrl.meta_rl.meta_learner import MetaLearner
from ssmrl.meta_rl.meta_maml import MetaMAML
from ssmrl.meta_rl.objectives import implicit_loss, multi_step_loss, post_adaptation_loss, reptile_loss
from ssmrl.meta_rl.tasks import Task

__all__ = [
    "MetaLearner",
    "MetaMAML",
    "Task",
    "implicit_loss",
    "multi_step_loss",
    "post_adaptation_loss",
    "reptile_loss",
]
