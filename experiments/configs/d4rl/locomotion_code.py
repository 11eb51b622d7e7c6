"""QIPO on D4RL's nine locomotion tasks as a public copy of training code has it, for an
accelerator.  QIPO-OT; --config.path=vp is QIPO-Diff.

That the copy, in a third-party project under the name of the method, is the authors' own is likely,
not proven.  What differs from ``locomotion.py``, which keeps to the paper:

- the network predicts the noise on the OT path too, and DPM-Solver++ of order 2 samples;
- no data action is in a support set of 64;
- a Polyak average of the policy (rate 0.005) draws the tables, the last parameters act;
- ten tables, one every 10,000 steps, the first from the behavior model: a total tilt of 10 beta;
- 100 episodes an evaluation, every 5,000 steps.

What the code does and this does not: t uniform from 1e-3 on; next states' actions drawn anew every
100,000 critic steps; random features of t; no standardization of observations.
"""

import dataclasses
import pathlib
import runpy

from efm_jax.rl.config import QIPOConfig


def get_config() -> QIPOConfig:
    changed = {"prediction": "noise", "solver": "dpmpp", "data_copies": 0.0, "table_polyak": 0.005}
    # By its file, because a preset is run by its own and belongs to no package then.
    locomotion = runpy.run_path(str(pathlib.Path(__file__).with_name("locomotion.py")))
    return dataclasses.replace(locomotion["get_config"](), **changed)
