"""Gymnasium environments: batched, seeded, rolled out and cut into support and query windows."""

from ssmrl.env_runner.environment import Environment, Maker, derive_seed
from ssmrl.env_runner.episodes import collect_episodes, first_episodes, pack_valid
from ssmrl.env_runner.minari_export import to_minari
from ssmrl.env_runner.noise import Noise, gumbel_noise, normal_noise
from ssmrl.env_runner.normalization import (
    RewardScale,
    RunningMoments,
    init_moments,
    init_reward_scale,
    normalize,
    scale_rewards,
    update_moments,
)
from ssmrl.env_runner.policies import PerTaskState, by_task, per_task, random_policy
from ssmrl.env_runner.rollout import (
    Policy,
    RolloutCarry,
    Trajectory,
    action_features,
    policy_inputs,
    rollout,
)
from ssmrl.env_runner.simulation import UnstableSimulationError
from ssmrl.env_runner.tasks import (
    NOMINAL_PHYSICS,
    TaskFamily,
    changing,
    family_names,
    make_with_physics,
    metaworld_tasks,
    sample_physics,
    task_family,
)
from ssmrl.env_runner.windows import Windows, cut_windows, split_support_query

__all__ = [
    "NOMINAL_PHYSICS",
    "Environment",
    "Maker",
    "Noise",
    "PerTaskState",
    "Policy",
    "RewardScale",
    "RolloutCarry",
    "RunningMoments",
    "TaskFamily",
    "Trajectory",
    "UnstableSimulationError",
    "Windows",
    "action_features",
    "by_task",
    "changing",
    "collect_episodes",
    "cut_windows",
    "derive_seed",
    "family_names",
    "first_episodes",
    "gumbel_noise",
    "init_moments",
    "init_reward_scale",
    "make_with_physics",
    "metaworld_tasks",
    "normal_noise",
    "normalize",
    "pack_valid",
    "per_task",
    "policy_inputs",
    "random_policy",
    "rollout",
    "sample_physics",
    "scale_rewards",
    "split_support_query",
    "task_family",
    "to_minari",
    "update_moments",
]
