"""MuJoCo locomotion (Hopper, HalfCheetah, Walker2d, Ant) on a small machine: about 15 minutes on 2 cores.

Larger networks, D4RL's reward scale, implicit Q-learning, and the resampled estimator, whose steps
cost no more than a behaviour step.  QIPO-Diff: --config.path=vp --config.solver=dpmpp.
"""

from efm_jax.rl.config import QIPOConfig


def get_config() -> QIPOConfig:
    return QIPOConfig(
        path="ot",
        hidden_dims=(256, 256, 256),
        learning_rate=5e-4,
        ema_decay=0.999,
        solver="midpoint",
        sample_steps=8,
        beta=3.0,
        support_size=16,
        renew_every=5_000,
        estimator="resample",
        critic="iql",
        critic_hidden_dims=(256, 256),
        critic_layer_norm=True,
        critic_learning_rate=3e-4,
        discount=0.99,
        polyak=0.005,
        expectile=0.7,
        reward_transform="locomotion",
        behavior_steps=30_000,
        critic_steps=30_000,
        policy_steps=10_000,
        log_every=250,  # a chunk: what SIGTERM waits for
        checkpoint_every=10_000,
        eval_every=0,
        eval_episodes=20,
    )
