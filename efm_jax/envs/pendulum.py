"""Scripted controllers of Gymnasium's ``Pendulum-v1``, from clumsy to good.

Below the top a controller pumps energy: torque along the motion, in proportion to the energy that
is missing. Near the top it is a PD controller.  The pendulum has mass 1, length 1 and g = 10, so
``theta'' = 15 sin(theta) + 3 torque`` with ``theta = 0`` upright, and ``theta'^2 / 2 + 15
cos(theta)`` is conserved without torque; upright and at rest it is 15.
"""

import math
from dataclasses import dataclass

import numpy as np

ENVIRONMENT = "Pendulum-v1"

_UPRIGHT_ENERGY = 15.0


@dataclass(frozen=True)
class Controller:
    """Gains of one controller, and the standard deviation of the noise on its torque."""

    pump_gain: float
    position_gain: float
    velocity_gain: float
    catch_angle: float
    noise: float

    def torque(self, observation: np.ndarray) -> float:
        """Torque without noise or bounds for ``observation [3]`` (cos, sin, angular velocity)."""
        cosine, sine, velocity = (float(x) for x in observation)
        angle = math.atan2(sine, cosine)
        if abs(angle) < self.catch_angle:
            return -self.position_gain * angle - self.velocity_gain * velocity
        missing = _UPRIGHT_ENERGY - (0.5 * velocity**2 + _UPRIGHT_ENERGY * cosine)
        return self.pump_gain * missing * math.copysign(1.0, velocity)


# The best of a grid of 750 noiseless controllers on 200 starts (pump gain 0.1 to 2, position gain 6
# to 20, velocity gain 1 to 4, catch angle 0.2 to 0.8): mean return about -160.
BEST = Controller(pump_gain=2.0, position_gain=14.0, velocity_gain=4.0, catch_angle=0.4, noise=0.0)


def expert(observation: np.ndarray) -> np.ndarray:
    """The action ``[1]`` of the best controller."""
    return np.array([BEST.torque(observation)])


def random_controller(rng: np.random.Generator) -> Controller:
    """One controller of mixed quality: many swing up late, catch badly or shake, few are good."""
    return Controller(
        pump_gain=math.exp(rng.uniform(math.log(0.05), math.log(1.0))),
        position_gain=rng.uniform(3.0, 14.0),
        velocity_gain=rng.uniform(0.3, 3.0),
        catch_angle=rng.uniform(0.25, 0.6),
        noise=rng.uniform(0.0, 1.5),
    )
