"""PointMaze with a sparse reward: paths through the maze are in the data only in pieces.

A long horizon (a target looks ten steps ahead, the discount 200), and an upper expectile, for the
data walks to goals of its own and only the best of what it did at a place leads to the task's.
"""

from efm_jax.rl.config import QIPOConfig


def get_config() -> QIPOConfig:
    return QIPOConfig(
        path="ot", hidden_dims=(128, 128, 128), solver="midpoint", sample_steps=5,
        learning_rate_schedule="cosine", ema_decay=0.999,
        critic="iql", expectile=0.9, discount=0.995, n_step=10, polyak=0.01,
        critic_hidden_dims=(128, 128), critic_layer_norm=True,
        target_ess=0.5, renew_every=2_500, estimator="resample",
        behavior_steps=20_000, critic_steps=20_000, policy_steps=7_500,
        log_every=250, checkpoint_every=10_000, eval_every=2_500, eval_episodes=20,
    )  # fmt: skip
