"""Gymnasium's MuJoCo robots with tasks: rewards, physics, single environments and native batches."""

from ssmrl.env_runner.robots.reward import Angle, Direction, Goal, Motion, Reward, Velocity
from ssmrl.env_runner.robots.single import RobotEnv

__all__ = ["Angle", "Direction", "Goal", "Motion", "Reward", "RobotEnv", "Velocity"]
