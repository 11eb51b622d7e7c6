"""Datasets for the entry points: where the environment says that files are."""

import os

from efm_jax.data import Folders


def dataset_folders() -> Folders:
    """Say where named datasets are; ``D4RL_DATASET_DIR`` moves D4RL's, as it does for ``d4rl``."""
    folder = os.environ.get("D4RL_DATASET_DIR")
    return Folders(d4rl=folder) if folder else Folders()
