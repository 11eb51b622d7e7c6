"""MuJoCo locomotion (Hopper, HalfCheetah, Walker2d, Ant) on a small machine.  Why:
docs/qipo_in_practice.md

Values must look as far as an episode is long (discount: a shorter one prefers what is fast and
falls later) in few steps (n_step), and be cautious about actions that the data does not have
(ensemble).  beta is per thousandth of the range of returns, to which rewards are scaled; one by the
effective size of support sets (target_ess) is ten times as large where most actions hardly matter,
and then the critic's errors choose.  Half of the sets' base measure is the data action.  The table
is filled once, for a second one would hold the errors of the first, and what came of it must do
better than the behavior model in learned dynamics (guard).  What is played is the mean of a few
actions.  QIPO-Diff: --config.path=vp --config.solver=dpmpp --config.sample_steps=20.
"""

from efm_jax.rl.config import QIPOConfig


def get_config() -> QIPOConfig:
    return QIPOConfig(
        path="ot", hidden_dims=(256, 256, 256), solver="midpoint", sample_steps=5,
        learning_rate=1e-3, learning_rate_schedule="cosine", ema_decay=0.999,
        critic="ensemble", num_critics=5, pessimism=1.0, expectile=0.7, discount=0.997, n_step=100,
        critic_hidden_dims=(256, 256), critic_layer_norm=True, critic_learning_rate=3e-4,
        polyak=0.005, reward_transform="locomotion",
        beta=0.5, support_size=8, data_copies=8.0, renew_every=4_000,
        estimator="resample", guard=2.0, action_selection="mean", num_candidates=8,
        behavior_steps=80_000, critic_steps=10_000, policy_steps=4_000,
        log_every=250,  # a chunk: what SIGTERM waits for
        checkpoint_every=10_000, eval_every=2_000, eval_episodes=20,
    )  # fmt: skip
