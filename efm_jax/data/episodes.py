"""From steps in a row to episodes."""

import numpy as np


def episodes(
    rewards: np.ndarray, ends: np.ndarray, terminals: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """First row, return and length of each episode, from ``rewards [N]`` and flags of its rows.

    ``ends [N]`` marks an episode's last row, ``terminals [N]`` the environment's own ends.  Return
    and length are counted up to the first terminal row: where a recording went on after it, the
    environment would not have.
    """
    last = np.flatnonzero(ends)
    if len(last) == 0:
        last = np.array([len(rewards) - 1])
    starts = np.concatenate([[0], last[:-1] + 1])
    terminal_rows = np.append(np.flatnonzero(terminals), len(rewards))
    last = np.minimum(last, terminal_rows[np.searchsorted(terminal_rows, starts)])
    returns = np.array(
        [rewards[i : j + 1].sum(dtype=np.float64) for i, j in zip(starts, last, strict=True)]
    )
    return starts, returns, (last - starts + 1).astype(np.int64)
