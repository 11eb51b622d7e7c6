"""All that plays: environments, rollouts, scores, video, scripted controllers."""

from efm_jax.envs.rollout import Rollouts, evaluate
from efm_jax.envs.scores import (
    dataset_references,
    mean_and_interval,
    normalized_score,
    reference_scores,
)

__all__ = [
    "Rollouts",
    "dataset_references",
    "evaluate",
    "mean_and_interval",
    "normalized_score",
    "reference_scores",
]
