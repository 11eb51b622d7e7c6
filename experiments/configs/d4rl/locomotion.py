"""QIPO on D4RL's nine locomotion tasks as the paper has it, for an accelerator.  QIPO-OT;
--config.path=vp is QIPO-Diff.  ``locomotion_code.py`` has it as code that is likely the authors'.

Where the values are from:

- Zhang et al. 2025 (arXiv 2503.04975): the three phases, the critic's kind, velocity matching on
  the OT path, M actions of the current policy and the data action, the full sum over them.
- Where the paper is silent, that code: beta, support_size, sample_steps, the batches and steps of
  the phases, renew_every (ten tables), when the policy is evaluated, and on how many episodes; that
  the best checkpoint by evaluation is reported.
- The code of QGPO (Lu et al. 2023; ChenDRAG/CEP-energy-guided-diffusion, Offline_RL_2D), whose
  critic the paper follows: the U-shaped network and its widths, 32 features of t, Adam with rates
  1e-4 and 3e-4, neither clipping nor an average of the field, twin critics of three ReLU layers of
  256, discount, polyak, beta_q, DPM-Solver of order 2, the transform of rewards.

What is not known, and what stands here instead: the solver of QIPO-OT's velocities (auto: midpoint,
two evaluations a step).

What differs: QGPO's critic takes 16 support actions, here all phases share one support_size; QGPO's
features of t are random, here their frequencies are fixed; QGPO does not standardize observations.

Memory, counted, not measured, for halfcheetah-medium-expert (2M transitions): the table of support
sets is 3.6 GB a seed, and a policy step holds some tens of arrays [256, support_size + 1, 512], 34
MB each, for each seed.  For eight seeds on one device take --config.estimator=resample
(an unbiased draw of one action of each set: 65 times less) or fewer seeds; on several devices
--parallel=seeds.
"""

from efm_jax.rl.config import QIPOConfig


def get_config() -> QIPOConfig:
    return QIPOConfig(
        path="ot", network="unet", hidden_dims=(512, 256, 128), time_features=32,
        solver="auto", sample_steps=15, learning_rate=1e-4, max_grad_norm=0.0,
        batch_size=256, behavior_batch_size=4096,
        critic="softmax_q", num_critics=2, beta_q=1.0, discount=0.99, polyak=0.005,
        critic_hidden_dims=(256, 256, 256), critic_learning_rate=3e-4,
        reward_transform="locomotion",
        beta=3.0, support_size=64, renew_every=10_000, estimator="full",
        behavior_steps=600_000, critic_steps=500_000, policy_steps=100_000,
        log_every=200,  # a chunk: what SIGTERM waits for
        checkpoint_every=10_000, eval_every=5_000, eval_episodes=100,
    )  # fmt: skip
