"""QIPO on the six AntMaze tasks as a public copy of training code has it: ``locomotion_code.py``
with the rewards of AntMaze and its beta_q; of the data see ``antmaze.py``.
"""

import dataclasses
import pathlib
import runpy

from efm_jax.rl.config import QIPOConfig


def get_config() -> QIPOConfig:
    # By their files, because a preset is run by its own and belongs to no package then.
    folder = pathlib.Path(__file__).parent
    antmaze, code = (
        runpy.run_path(str(folder / f"{n}.py")) for n in ("antmaze", "locomotion_code")
    )
    return dataclasses.replace(code["get_config"](), **antmaze["CHANGED"])
