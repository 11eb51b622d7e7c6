"""Rollouts in Gymnasium environments and normalised scores."""

from efm_jax.evaluation.rollout import Rollouts, evaluate
from efm_jax.evaluation.scores import mean_and_interval, normalized_score, reference_scores

__all__ = ["Rollouts", "evaluate", "mean_and_interval", "normalized_score", "reference_scores"]
