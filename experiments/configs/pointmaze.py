"""PointMaze with a sparse reward: long horizons, small networks."""

from efm_jax.rl.config import QIPOConfig


def get_config() -> QIPOConfig:
    return QIPOConfig(hidden_dims=(64, 64, 64))
