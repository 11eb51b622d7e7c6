"""MuJoCo locomotion (Hopper, HalfCheetah, Walker2d, Ant) on a small machine.  Why:
docs/qipo_in_practice.md

Values must reach over an episode in few steps (n_step), be cautious about actions that the data
does not have (ensemble), and tilt little where they differ little (a small beta); half of a support
set's base measure is the data action; the table is filled once, for a second one would hold the
errors of the first; what is played is the mean of a few actions.  QIPO-Diff: --config.path=vp
--config.solver=dpmpp --config.sample_steps=20.
"""

from efm_jax.rl.config import QIPOConfig


def get_config() -> QIPOConfig:
    return QIPOConfig(
        path="ot", hidden_dims=(256, 256, 256), solver="midpoint", sample_steps=5,
        learning_rate=1e-3, learning_rate_schedule="cosine", ema_decay=0.999,
        critic="ensemble", num_critics=5, pessimism=1.0, expectile=0.7, discount=0.99, n_step=100,
        critic_hidden_dims=(256, 256), critic_layer_norm=True, critic_learning_rate=3e-4,
        polyak=0.005, reward_transform="locomotion",
        beta=0.3, support_size=8, data_copies=8.0, renew_every=4_000, estimator="resample",
        action_selection="mean", num_candidates=8,
        behavior_steps=80_000, critic_steps=10_000, policy_steps=4_000,
        log_every=250,  # a chunk: what SIGTERM waits for
        checkpoint_every=10_000, eval_every=2_000, eval_episodes=20,
    )  # fmt: skip
