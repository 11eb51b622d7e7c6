"""All that plays: environments, rollouts, scores, video, scripted controllers."""

from efm_jax.envs.rollout import EvaluationError, Rollouts, evaluate
from efm_jax.envs.scores import (
    dataset_references,
    mean_and_interval,
    normalized_score,
    reference_scores,
    score,
)

__all__ = [
    "EvaluationError",
    "Rollouts",
    "dataset_references",
    "evaluate",
    "mean_and_interval",
    "normalized_score",
    "reference_scores",
    "score",
]
