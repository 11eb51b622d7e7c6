"""QIPO on the six AntMaze tasks as a public copy of training code has it: ``locomotion_code.py``
with the rewards of AntMaze and its beta_q; of the data see ``antmaze.py``.
"""

import dataclasses

from efm_jax.rl.config import QIPOConfig
from experiments.configs.d4rl import antmaze, locomotion_code


def get_config() -> QIPOConfig:
    return dataclasses.replace(locomotion_code.get_config(), **antmaze.CHANGED)
