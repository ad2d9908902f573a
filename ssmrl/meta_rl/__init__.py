"""Learning to adapt."""

from ssmrl.meta_rl.action_sequences import BoxActions, CategoricalPlan, DiscreteActions, GaussianPlan, colored_noise
from ssmrl.meta_rl.actor_critic import ActorCriticBatch, actor_critic_batch
from ssmrl.meta_rl.baselines import ValueNetwork, fit_linear_baseline, linear_baseline, linear_features, value_loss
from ssmrl.meta_rl.control import AdaptiveControl, ControlState
from ssmrl.meta_rl.distributions import Categorical, Distribution, Gaussian, TanhGaussian
from ssmrl.meta_rl.dynamics import (
    DynamicsScales,
    Moments,
    dynamics_data,
    dynamics_scales,
    model_step,
    one_step_loss,
    open_loop_loss,
    predict_open_loop,
)
from ssmrl.meta_rl.dynamics_objectives import AdaptiveLosses, Transitions, adaptive_planning_loss, planning_loss
from ssmrl.meta_rl.evaluation import (
    AdaptationReport,
    AdaptationReturns,
    adaptation_report,
    adaptation_returns,
    plot_adaptation,
)
from ssmrl.meta_rl.losses import (
    clipped_surrogate_loss,
    dice_loss,
    entropy_bonus,
    importance_ratio,
    kl_penalty,
    likelihood_ratio_loss,
    loaded_dice_loss,
    magic_box,
    masked_mean,
    surrogate_loss,
)
from ssmrl.meta_rl.meta_learner import MetaLearner
from ssmrl.meta_rl.meta_maml import MetaMAML
from ssmrl.meta_rl.nonfinite import NonFinite
from ssmrl.meta_rl.objectives import implicit_loss, multi_step_loss, post_adaptation_loss, reptile_loss
from ssmrl.meta_rl.planning import Decision, Planned, Planner, cem, mppi, random_shooting, sequence_costs
from ssmrl.meta_rl.policies import CategoricalHead, GaussianHead, PolicyModel, PolicyOutput
from ssmrl.meta_rl.policy_batch import PolicyBatch, PolicyLosses, linear_advantages
from ssmrl.meta_rl.policy_maml import adapt_policy, policy_meta_loss
from ssmrl.meta_rl.policy_meta_learner import Collected, PolicyMAML
from ssmrl.meta_rl.policy_outer import GradientOuter, TrustRegionOuter
from ssmrl.meta_rl.ppo import PPO, PPOTerms, PPOUpdate, ppo_loss
from ssmrl.meta_rl.returns import discounted_returns, generalized_advantages, lambda_returns, normalize_advantages
from ssmrl.meta_rl.scores import (
    Interval,
    gap_closed,
    interquartile_mean,
    stratified_bootstrap,
    student_t_interval,
)
from ssmrl.meta_rl.segments import count_episodes, episode_step
from ssmrl.meta_rl.tasks import Task
from ssmrl.meta_rl.trust_region import TrustRegionStep, trust_region_step

__all__ = [
    "PPO",
    "ActorCriticBatch",
    "AdaptationReport",
    "AdaptationReturns",
    "AdaptiveControl",
    "AdaptiveLosses",
    "BoxActions",
    "Categorical",
    "CategoricalHead",
    "CategoricalPlan",
    "Collected",
    "ControlState",
    "Decision",
    "DiscreteActions",
    "Distribution",
    "DynamicsScales",
    "Gaussian",
    "GaussianHead",
    "GaussianPlan",
    "GradientOuter",
    "Interval",
    "MetaLearner",
    "MetaMAML",
    "Moments",
    "NonFinite",
    "PPOTerms",
    "PPOUpdate",
    "Planned",
    "Planner",
    "PolicyBatch",
    "PolicyLosses",
    "PolicyMAML",
    "PolicyModel",
    "PolicyOutput",
    "TanhGaussian",
    "Task",
    "Transitions",
    "TrustRegionOuter",
    "TrustRegionStep",
    "ValueNetwork",
    "actor_critic_batch",
    "adapt_policy",
    "adaptation_report",
    "adaptation_returns",
    "adaptive_planning_loss",
    "cem",
    "clipped_surrogate_loss",
    "colored_noise",
    "count_episodes",
    "dice_loss",
    "discounted_returns",
    "dynamics_data",
    "dynamics_scales",
    "entropy_bonus",
    "episode_step",
    "fit_linear_baseline",
    "gap_closed",
    "generalized_advantages",
    "implicit_loss",
    "importance_ratio",
    "interquartile_mean",
    "kl_penalty",
    "lambda_returns",
    "likelihood_ratio_loss",
    "linear_advantages",
    "linear_baseline",
    "linear_features",
    "loaded_dice_loss",
    "magic_box",
    "masked_mean",
    "model_step",
    "mppi",
    "multi_step_loss",
    "normalize_advantages",
    "one_step_loss",
    "open_loop_loss",
    "planning_loss",
    "plot_adaptation",
    "policy_meta_loss",
    "post_adaptation_loss",
    "ppo_loss",
    "predict_open_loop",
    "random_shooting",
    "reptile_loss",
    "sequence_costs",
    "stratified_bootstrap",
    "student_t_interval",
    "surrogate_loss",
    "trust_region_step",
    "value_loss",
]
