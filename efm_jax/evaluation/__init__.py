"""Rollouts in Gymnasium environments, normalized scores, distances between samples."""

from efm_jax.evaluation.distances import mmd, sliced_wasserstein
from efm_jax.evaluation.rollout import Rollouts, evaluate
from efm_jax.evaluation.scores import mean_and_interval, normalized_score, reference_scores

__all__ = [
    "Rollouts",
    "evaluate",
    "mean_and_interval",
    "mmd",
    "normalized_score",
    "reference_scores",
    "sliced_wasserstein",
]
