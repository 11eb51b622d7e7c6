"""QIPO on the six AntMaze tasks, for an accelerator: ``locomotion.py`` with the rewards of AntMaze.

From QGPO's code (see ``locomotion.py``): rewards - 1.  It takes 32 support actions here and 16
there; the code that is likely QIPO's takes 64 for all, and guidance scale 3, in the middle of the
scales 1 to 4 that QGPO tries on AntMaze, and beta_q 20.

The data are Minari's D4RL/antmaze/*-v1, in the dict observations of Gymnasium Robotics, not D4RL's
files: no environment of today has their 29 observations.  They are new recordings of the same
mazes.  By the script that made them an episode goes on at the goal, so that no step is terminal and
a policy that reaches the goal collects 0 there after -1 for every step before.
"""

import dataclasses
import pathlib
import runpy

from efm_jax.rl.config import QIPOConfig

CHANGED = {"reward_transform": "antmaze", "beta_q": 20.0}


def get_config() -> QIPOConfig:
    # By its file, because a preset is run by its own and belongs to no package then.
    locomotion = runpy.run_path(str(pathlib.Path(__file__).with_name("locomotion.py")))
    return dataclasses.replace(locomotion["get_config"](), **CHANGED)
