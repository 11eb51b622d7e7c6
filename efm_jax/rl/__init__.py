"""Offline RL: generative model, critics, policies, and what trains and loads them."""

__all__ = ["load_policy"]


def __getattr__(name: str):
    # Only on demand: it brings checkpoints, and presets import efm_jax.rl.config.
    if name == "load_policy":
        from efm_jax.runs.loading import load_policy

        return load_policy
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
