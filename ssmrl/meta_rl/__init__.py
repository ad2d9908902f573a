"""Learning to adapt."""

from ssmrl.meta_rl.meta_maml import MetaMAML
from ssmrl.meta_rl.tasks import Task

__all__ = ["MetaMAML", "Task"]
