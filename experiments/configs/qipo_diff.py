"""QIPO-Diff: energy-weighted diffusion on the linear VP path, sampled by DPM-Solver++."""

from efm_jax.rl.config import QIPOConfig


def get_config() -> QIPOConfig:
    return QIPOConfig(path="vp", sample_steps=15)
