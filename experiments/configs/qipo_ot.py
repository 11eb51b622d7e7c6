"""QIPO-OT: energy-weighted flow matching on the conditional OT path; the default."""

from efm_jax.rl.config import QIPOConfig


def get_config() -> QIPOConfig:
    return QIPOConfig(path="ot")
