"""Agents: one final class a file, and one entry of ``AGENTS``."""

from efm_jax import checks
from efm_jax.rl.agents.agent import Agent, AgentParams, State, player
from efm_jax.rl.agents.cloning import BehaviorCloning
from efm_jax.rl.agents.gaussian import Gaussian
from efm_jax.rl.agents.qgpo import QGPO
from efm_jax.rl.agents.qipo import QIPO
from efm_jax.rl.agents.reweighting import Reweighting
from efm_jax.rl.config import QIPOConfig

__all__ = ["AGENTS", "Agent", "AgentParams", "State", "make_agent", "player"]

# The names of the configuration field `policy`.
AGENTS: dict[str, type[Agent]] = {
    "qipo": QIPO,
    "bc": BehaviorCloning,
    "reweight": Reweighting,
    "qgpo": QGPO,
    "gaussian": Gaussian,
}


def make_agent(config: QIPOConfig, observation_size: int, action_size: int) -> Agent:
    """The agent of a configuration.

    Raises:
      ValueError, TypeError: a field out of range, or a name that is in no registry.
    """
    checks.check_choice("policy", config.policy, AGENTS)
    return AGENTS[config.policy](config.validate(), observation_size, action_size)
