"""A module for --plugins that makes things go wrong, as the variable BREAK says."""

import os
import resource

import gymnasium
import jax
import numpy as np
from gymnasium.envs.classic_control.pendulum import PendulumEnv

HOW = os.environ.get("BREAK", "")


class Broken(PendulumEnv):
    """Pendulum-v1, but for its third step."""

    def step(self, action):
        observation, reward, *ends = super().step(action)
        self.count = getattr(self, "count", 0) + 1
        if self.count == 3:
            if HOW == "raises":
                raise RuntimeError("the simulator\nfell over")
            observation = {"nan": observation * np.nan, "shape": observation[:2]}.get(
                HOW, observation
            )
            reward = {"reward": np.nan, "type": None}.get(HOW, reward)
        return observation, reward, *ends


gymnasium.register("Broken-v0", f"{__name__}:Broken", max_episode_steps=5)
if HOW == "file size":
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
elif HOW == "devices":
    jax.config.update("jax_platforms", "nosuch")
elif HOW == "user" and os.getuid() == 0:
    os.setuid(65534)
