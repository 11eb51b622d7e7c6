"""Every part of QIPO-OT in a few seconds, for tests and a look at the files; little is learned."""

from efm_jax.rl.config import QIPOConfig


def get_config() -> QIPOConfig:
    return QIPOConfig(
        hidden_dims=(32, 32), critic_hidden_dims=(32, 32), support_size=4,
        behavior_steps=200, critic_steps=200, policy_steps=200, renew_every=100,
        log_every=50, checkpoint_every=100, eval_every=100, eval_episodes=2,
    )  # fmt: skip
