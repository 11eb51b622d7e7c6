"""Offline datasets: sources, validation, normalisation, to one ``Transitions`` record."""

from efm_jax.data.builtin import BUILTIN_DATASET
from efm_jax.data.errors import DataError
from efm_jax.data.flatten import flatten_observation
from efm_jax.data.preprocess import REWARD_TRANSFORMS, fit_normalizer, gather_episodes, preprocess
from efm_jax.data.sources import DATASET_SOURCES, load_dataset

__all__ = [
    "BUILTIN_DATASET",
    "DATASET_SOURCES",
    "REWARD_TRANSFORMS",
    "DataError",
    "fit_normalizer",
    "flatten_observation",
    "gather_episodes",
    "load_dataset",
    "preprocess",
]
