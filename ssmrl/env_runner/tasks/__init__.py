"""Task distributions, one family per file."""

from ssmrl.env_runner.tasks.bandits import bandit
from ssmrl.env_runner.tasks.classic import NOMINAL_PHYSICS, classic_physics, make_with_physics, sample_physics
from ssmrl.env_runner.tasks.direction import ant_angle, ant_direction, halfcheetah_direction, humanoid_direction
from ssmrl.env_runner.tasks.disabled import disabled
from ssmrl.env_runner.tasks.dynamics import one_parameter, random_parameters
from ssmrl.env_runner.tasks.family import TaskFamily, changing
from ssmrl.env_runner.tasks.goal import ant_goal
from ssmrl.env_runner.tasks.linear import best_prediction, linear_system, noise_floor
from ssmrl.env_runner.tasks.metaworld import metaworld_tasks
from ssmrl.env_runner.tasks.navigation import navigation, sparse_navigation
from ssmrl.env_runner.tasks.registration import family_names, task_family
from ssmrl.env_runner.tasks.sinusoid import sinusoid
from ssmrl.env_runner.tasks.swingup import cartpole_swingup
from ssmrl.env_runner.tasks.tabular import optimal_return, tabular_mdp
from ssmrl.env_runner.tasks.velocity import ant_velocity, halfcheetah_velocity, walker2d_velocity

__all__ = [
    "NOMINAL_PHYSICS",
    "TaskFamily",
    "ant_angle",
    "ant_direction",
    "ant_goal",
    "ant_velocity",
    "bandit",
    "best_prediction",
    "cartpole_swingup",
    "changing",
    "classic_physics",
    "disabled",
    "family_names",
    "halfcheetah_direction",
    "halfcheetah_velocity",
    "humanoid_direction",
    "linear_system",
    "make_with_physics",
    "metaworld_tasks",
    "navigation",
    "noise_floor",
    "one_parameter",
    "optimal_return",
    "random_parameters",
    "sample_physics",
    "sinusoid",
    "sparse_navigation",
    "tabular_mdp",
    "task_family",
    "walker2d_velocity",
]
