"""QIPO on OGBench's single tasks by the protocol of FQL, for an accelerator.

Of Park et al. 2025 (FQL, arXiv 2502.02538): two critics, their mean (--config.pessimism=1 is their
minimum, which FQL takes in a few tasks), batches of 256, Adam with 3e-4, discount 0.99, Polyak rate
0.005, four layers of 512 in every network, layer norm in the critics, no transform of rewards, a
million steps, ten steps of the flow, 50 episodes every 100,000 steps.  It scores by
the success of the last ones; no best is chosen.

What differs: there, behavior, critic and policy learn side by side, a million steps of each; here
they follow one another, and the policy's million, which QIPO does not need, is 100,000 steps with
ten tables.  The critics are IQL's, as FQL compares with, not its actor's.  Not FQL's and not tuned
here: beta, support_size and data_copies, of the project's own study.

Smaller: --config.behavior_steps=100000 --config.critic_steps=200000
--config.hidden_dims="(256,256)" --config.critic_hidden_dims="(256,256)".
"""

from efm_jax.rl.config import QIPOConfig


def get_config() -> QIPOConfig:
    return QIPOConfig(
        path="ot", hidden_dims=(512,) * 4, activation="gelu", sample_steps=10,
        batch_size=256, learning_rate=3e-4,
        critic="ensemble", num_critics=2, pessimism=0.0, expectile=0.9, discount=0.99,
        polyak=0.005, critic_hidden_dims=(512,) * 4, critic_layer_norm=True,
        critic_learning_rate=3e-4,
        beta=3.0, support_size=16, renew_every=10_000, estimator="resample",
        behavior_steps=1_000_000, critic_steps=1_000_000, policy_steps=100_000,
        log_every=1_000, checkpoint_every=100_000, eval_every=100_000, eval_episodes=50,
    )  # fmt: skip
