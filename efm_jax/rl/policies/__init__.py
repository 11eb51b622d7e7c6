"""Policies.  Adding one is a file here and a line in ``POLICIES``."""

from efm_jax.rl.policies.base import Acting, Batch, Policy
from efm_jax.rl.policies.cloning import BehaviorCloning
from efm_jax.rl.policies.gaussian import Gaussian
from efm_jax.rl.policies.guided import QGPO
from efm_jax.rl.policies.qipo import QIPO
from efm_jax.rl.policies.reweighting import Reweighting

# The names of the configuration field `policy`.
POLICIES: dict[str, type[Policy]] = {
    "qipo": QIPO,
    "bc": BehaviorCloning,
    "reweight": Reweighting,
    "qgpo": QGPO,
    "gaussian": Gaussian,
}

__all__ = [
    "POLICIES",
    "QGPO",
    "QIPO",
    "Acting",
    "Batch",
    "BehaviorCloning",
    "Gaussian",
    "Policy",
    "Reweighting",
]
