"""Offline datasets: sources, validation, normalization, to one ``Transitions`` record."""

from efm_jax.data.builtin import BUILTIN_DATASET
from efm_jax.data.preprocess import REWARD_TRANSFORMS, fit_normalizer, gather_episodes, preprocess
from efm_jax.data.sources import DATASET_SOURCES, Folders, load_dataset
from efm_jax.data.summary import summarize
from efm_jax.envs.flatten import flatten_observation
from efm_jax.errors import DataError

__all__ = [
    "BUILTIN_DATASET",
    "DATASET_SOURCES",
    "REWARD_TRANSFORMS",
    "DataError",
    "Folders",
    "fit_normalizer",
    "flatten_observation",
    "gather_episodes",
    "load_dataset",
    "preprocess",
    "summarize",
]
