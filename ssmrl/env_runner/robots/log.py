"""MuJoCo's messages go to `logging` instead of the console and a file in the working directory."""

from __future__ import annotations

import logging

__all__ = ["log_warnings"]

_LOGGER = logging.getLogger(__name__)


def log_warnings() -> None:
    """Send MuJoCo's warnings to this module's logger from now on, unless somebody else already takes them.

    MuJoCo has one handler in a process.
    """
    import mujoco

    if mujoco.get_mju_user_warning() is None:
        mujoco.set_mju_user_warning(_warn)


def _warn(message: str) -> None:
    # Of a deprecation in Gymnasium's own model files nobody but Gymnasium can do anything.
    level = logging.INFO if "deprecated" in message else logging.WARNING
    _LOGGER.log(level, "MuJoCo: %s", message)
