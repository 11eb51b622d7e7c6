"""The built-in dataset: scripted controllers on ``Pendulum-v1``, recorded at first use.

It is a local Minari dataset like any other, recorded as :mod:`efm_jax.data.recording` says; nothing
is downloaded.
"""

import gymnasium
import numpy as np

from efm_jax import checks
from efm_jax.data import recording
from efm_jax.data.minari import local_path
from efm_jax.envs import pendulum
from efm_jax.envs.play import Act

BUILTIN_DATASET = "efm/pendulum/scripted-v0"

# Purposes of the controllers' random numbers, folded into the recording's seed.
_CONTROLLERS, _NOISE = range(2)


def ensure_recorded() -> None:
    """Record the built-in dataset if it is not there."""
    if not local_path(BUILTIN_DATASET).exists():
        record()


def record(seed: int = 0, num_episodes: int = 200) -> None:
    """Record ``num_episodes`` episodes of 200 steps, each by a controller of its own.

    The same seed gives the same bytes.  Does nothing lasting when the dataset exists by the time
    the recording is done.  The reference of score 100 is the best scripted controller without
    noise.

    Raises:
      DataError: Minari's folder cannot be written.
    """
    checks.check_integer("seed", seed, 0)
    checks.check_integer("num_episodes", num_episodes, 1)
    parameters = np.random.default_rng([seed, _CONTROLLERS])
    noise = np.random.default_rng([seed, _NOISE])

    def begin(_: int) -> Act:
        controller = pendulum.random_controller(parameters)
        return lambda observation: np.array(
            [controller.torque(observation) + controller.noise * noise.standard_normal()]
        )

    recording.record(
        BUILTIN_DATASET,
        gymnasium.make(pendulum.ENVIRONMENT),
        begin,
        seed=seed,
        episodes=num_episodes,
        expert=pendulum.expert,
        algorithm_name="scripted energy pumping and PD, random gains, random action noise",
        code_permalink="efm_jax/data/builtin.py",
        description=f"{num_episodes} episodes of {pendulum.ENVIRONMENT}, "
        f"recorded locally with seed {seed}",
    )
