"""Trajectories as a Minari data set, for offline learning elsewhere. Needs the extra `minari`.

Letters: B rows, T steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from gymnasium import Space
from numpy.typing import NDArray
from torch import Tensor

from ssmrl.env_runner._checks import require_array_space
from ssmrl.env_runner.rollout import Trajectory

__all__ = ["to_minari"]


def to_minari(
    trajectory: Trajectory,
    dataset_id: str,
    observation_space: Space[Any],
    action_space: Space[Any],
    *,
    tasks: Sequence[Mapping[str, Any]] | None = None,
    **metadata: Any,
) -> Any:
    """Write the episodes of a trajectory as a Minari data set, and return it (a `minari.MinariDataset`).

    Episodes are ordered by row, then by time. Each has its T actions and T + 1 observations, the final one included;
    invalid steps are left out. `infos["row"]` (T + 1,) is the row that it is from. What has not ended where the
    trajectory stops is marked as truncated there, as Minari's own collector does it; a trajectory that went on from a
    carry begins with the rest of an episode. The data set lies where Minari puts it: below the environment variable
    MINARI_DATASETS_PATH, or ~/.minari/datasets.

    Args:
        trajectory: leaves (B, T, ...); float actions and observations are written in the dtype of their space.
        dataset_id: "(namespace/)name-v0".
        observation_space: the single one.
        action_space: the single one.
        tasks: B mappings, the task of each row: name -> number or array; `infos["task"][name]` (T + 1, ...).
        **metadata: more arguments of `minari.create_dataset_from_buffers`: `env` (an id or EnvSpec), `eval_env`,
            `algorithm_name`, `author`, `author_email`, `code_permalink`, `description`, `data_format`, ... Minari
            warns about those it misses.

    Raises:
        ImportError: Minari is not installed.
        ValueError: `tasks` is not one mapping per row; Minari's own, e.g. for an id that exists.
    """
    try:
        import minari
    except ImportError as error:
        raise ImportError('`to_minari` needs Minari: pip install "ssmrl[minari]".') from error
    require_array_space("observation_space", observation_space)
    require_array_space("action_space", action_space)
    num_rows = len(trajectory.valid)
    if tasks is not None and len(tasks) != num_rows:
        raise ValueError(f"`tasks` must hold one mapping for each of the {num_rows} rows; got {len(tasks)}.")
    episodes = []
    for row, steps in _episodes(trajectory):
        data = Trajectory(*(leaf[row, steps] for leaf in trajectory))
        truncations = data.truncated.numpy()
        truncations[-1] |= not bool(data.terminated[-1])
        length = len(steps) + 1
        infos: dict[str, Any] = {"row": np.full(length, row)}
        if tasks is not None:
            infos["task"] = {name: np.stack([np.asarray(value)] * length) for name, value in tasks[row].items()}
        episodes.append(
            minari.data_collector.EpisodeBuffer(
                observations=_array(torch.cat([data.observation, data.next_observation[-1:]]), observation_space),
                actions=_array(data.action, action_space),
                rewards=data.reward.numpy(),
                terminations=data.terminated.numpy(),
                truncations=truncations,
                infos=infos,
            )
        )
    return minari.create_dataset_from_buffers(
        dataset_id, episodes, observation_space=observation_space, action_space=action_space, **metadata
    )


def _episodes(trajectory: Trajectory) -> list[tuple[int, NDArray[np.intp]]]:
    """Return the row and the valid steps of every episode."""
    episodes = []
    for row in range(len(trajectory.valid)):
        steps = np.flatnonzero(trajectory.valid[row].numpy())
        ended = (trajectory.terminated[row] | trajectory.truncated[row]).numpy()[steps]
        pieces = np.split(steps, np.flatnonzero(ended) + 1)
        episodes += [(row, piece) for piece in pieces if len(piece)]
    return episodes


def _array(tensor: Tensor, space: Space[Any]) -> NDArray[Any]:
    return tensor.numpy().astype(space.dtype)
