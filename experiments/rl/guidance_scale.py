"""The effective guidance scale of QIPO: how far a policy has really moved after l renewals.

    python -m experiments.rl.guidance_scale [--problems=bandit,pendulum,NAME=ID_OR_FILE] [--arms=...] [--seeds=3]
                                         [--periods=6] [--out=runs/guidance_scale] [--stages=FOLDER]
                                         [--smoke] [--report]

After l renewals the policy should be ``mu exp((l + 1) beta Q) / Z(s)`` (Zhang et al. 2025, eq.
5.4).  Flows have exact likelihoods, so at the end of every period ``log pi_l(a|s) - log mu(a|s)``
is regressed on ``Q(s, a)`` within states; the median of the states' slopes stands beside (l + 1)
beta (one slope for all states, in the files too, is that of the few states whose Q-values have a
cliff).

Actions are drawn from mu and from pi_l, half each: mu alone has few where pi_l has its mass and is
judged by its tails, pi_l alone the reverse, and both together spread the Q-values most.  Slopes
over each half are reported too; where the law holds all three agree.  The sampler clips to [-1, 1]
and a flow's density is on all of R^A, but clipping leaves the density inside as it is: actions are
drawn without clipping, by the solver of the likelihoods, and those outside, or within ``MARGIN`` of
a bound, are left out (the next period is trained on clipped actions, and its flow smears what lies
on the bound).

``reference``, for one-dimensional actions, is the slope of the algorithm itself with perfect
models, at the same actions (see :func:`guidance_scale_regression.reference_log_ratios`): what it is
below (l + 1) beta is due to M actions a set and to the data action; what the policy is beside it,
to learning.

bandit: the true Q and a Gaussian mu; any other problem is a dataset with its preset and trained
  critic.
``--out`` gets slopes.csv, table.md, guidance_scale.png; an arm that is in slopes.csv is not
computed again.
"""

import argparse
import dataclasses
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from efm_jax import sampling
from efm_jax.data import fit_normalizer, load_dataset, preprocess
from efm_jax.rl.algorithm import Algorithm
from efm_jax.rl.config import QIPOConfig
from efm_jax.rl.critics import CRITICS, IQL
from efm_jax.rl.policies import Acting
from efm_jax.rl.trainer import Trainer
from efm_jax.types import Array, Params, Transitions
from experiments.rl import guidance_scale_report
from experiments.rl.guidance_scale_regression import Slope, reference_log_ratios, within_regression
from experiments.rl.study import SMOKE, Study, append_rows, parse_datasets, read_rows

MARGIN = 0.05
REFERENCE_STATES = 64
# Of a grid over actions: what is beyond the bounds is clipped onto them.
_SPACING, _REACH = 0.02, 3.0
_CURVATURE, _STD, _ROWS = 5.0, 0.3, 4096

# Fields that an arm changes.
ARMS: dict[str, Callable[[QIPOConfig], dict[str, Any]]] = {
    "preset": lambda c: {},
    "no data action": lambda c: {"data_copies": 1e-3},
    "8 data copies": lambda c: {"data_copies": 8.0},
    "M = 64": lambda c: {"support_size": 64},
    "beta / 10": lambda c: {"beta": c.beta / 10},
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """How much is measured."""

    states: int = 256
    actions: int = 16  # from each of the two policies
    steps: int = 40  # of rk4
    draws: int = 2000  # support sets of the reference


class Problem(NamedTuple):
    """Data, and the configuration that all arms change."""

    name: str
    config: QIPOConfig
    data: Transitions


@dataclasses.dataclass(frozen=True)
class KnownQ(IQL):
    """``Q(s, a) = -0.5 K (a - s / 2)^2 + 20 s``, the first state and action; nothing of it is learned."""

    def q_values(self, params: Params, observations: Array, actions: Array) -> Array:
        s = observations[..., 0]
        return -0.5 * _CURVATURE * (actions[..., 0] - s / 2) ** 2 + 20 * s


def bandit(changes: dict[str, Any]) -> Problem:
    """States uniform on [-1, 1], ``mu = N(s / 10, 0.3^2)`` (0.3% of it beyond the bounds), a known Q."""
    CRITICS["known"] = KnownQ
    rng = np.random.default_rng(0)
    states = rng.uniform(-1, 1, (_ROWS, 1)).astype(np.float32)
    actions = np.clip(0.1 * states + _STD * rng.standard_normal((_ROWS, 1)), -1, 1).astype(
        np.float32
    )
    zeros = np.zeros(_ROWS, np.float32)
    config = QIPOConfig(
        beta=1.0, hidden_dims=(64, 64), critic_hidden_dims=(4,), learning_rate=2e-3, ema_decay=0.99,
        batch_size=128, behavior_steps=4000, renew_every=1000, sample_steps=5,
    )  # fmt: skip
    config = dataclasses.replace(config, **changes)
    config = dataclasses.replace(config, critic="known", critic_steps=1)
    return Problem("bandit", config, Transitions(states, actions, zeros, states, zeros))


def from_dataset(name: str, source: str, study: Study) -> Problem:
    """A dataset with its family's preset."""
    dataset = load_dataset(source)
    config = study.config(dataset)
    return Problem(
        name, config, preprocess(dataset, fit_normalizer(dataset), config.reward_transform)
    )


class Capture:
    """Hooks that keep the betas of all renewals and the parameters at the end of every period."""

    def __init__(self, name: str):
        self.name, self.betas, self.acting = name, [], []

    def on_phase(self, phase: str, done: int, total: int) -> None:
        print(f"{self.name}: {phase}, {total - done} steps", flush=True)

    def on_renewal(self, step: int, summary: dict[str, np.ndarray]) -> None:
        self.betas.append(np.asarray(summary["beta"], np.float64))

    def on_evaluate(self, step: int, acting: Acting) -> None:
        self.acting.append(jax.tree.map(np.asarray, acting))

    def on_table(self, name: str, done: int, total: int) -> None:
        pass

    def on_metrics(self, phase: str, step: int, values: dict[str, np.ndarray]) -> None:
        pass

    def on_checkpoint(self, state: Any) -> None:
        pass

    def stop_requested(self) -> bool:
        return False


class Measured(NamedTuple):
    """Of m actions of mu, then m of pi, at n states; without clipping."""

    actions: np.ndarray  # [n, 2m, A]
    q_values: np.ndarray  # [n, 2m]
    log_ratios: np.ndarray  # [n, 2m], log pi - log mu


def make_measure(algorithm: Algorithm, settings: Settings) -> Callable[..., Any]:
    """Jitted ``(acting, observations [n, S], noise [n, 2m, A]) -> Measured`` of one seed."""

    def measure(acting: Acting, observations: Array, noise: Array) -> Measured:
        states = observations[:, None]

        def draw(params: Params, noise: Array) -> Array:
            field = algorithm.model.field(params, states)
            return sampling.sample(field, noise, solver="rk4", num_steps=settings.steps)

        half = noise.shape[1] // 2
        actions = [draw(acting.behavior, noise[:, :half]), draw(acting.policy, noise[:, half:])]
        actions = jnp.concatenate(actions, axis=1)
        densities = [
            log_density(algorithm, params, states, actions, settings.steps)
            for params in (acting.policy, acting.behavior)
        ]
        q_values = algorithm.critic.q_values(acting.critic, states, actions)
        return Measured(actions, q_values, densities[0] - densities[1])

    return jax.jit(measure)


def log_density(
    algorithm: Algorithm, params: Params, states: Array, actions: Array, steps: int
) -> Array:
    """``log p(a|s)`` of actions ``[n, m, A]`` at ``states [n, 1, S]``, by rk4 and the exact divergence."""
    flat = actions.reshape(-1, actions.shape[-1])
    states = jnp.broadcast_to(states, (*actions.shape[:2], states.shape[-1])).reshape(len(flat), -1)
    field = algorithm.model.field(params, states)
    return sampling.log_likelihood(field, flat, solver="rk4", num_steps=steps).reshape(
        actions.shape[:2]
    )


def make_grid(algorithm: Algorithm, settings: Settings) -> Callable[..., Any]:
    """Jitted ``(acting, observations [n, S]) -> (masses of the clipped mu, Q-values)``, ``[n, K]`` each."""
    wide = jnp.arange(-_REACH, _REACH + _SPACING / 2, _SPACING)
    inside = grid_points()
    beyond = (wide.size - inside.size) // 2

    def on_grid(acting: Acting, observations: Array) -> tuple[Array, Array]:
        states, count = observations[:, None], observations.shape[0]
        actions = jnp.broadcast_to(wide[:, None], (count, wide.size, 1))
        density = jnp.exp(log_density(algorithm, acting.behavior, states, actions, settings.steps))
        masses = density[:, beyond : beyond + inside.size]
        masses = masses.at[:, 0].add(density[:, :beyond].sum(1))
        masses = masses.at[:, -1].add(density[:, beyond + inside.size :].sum(1))
        actions = jnp.broadcast_to(inside[:, None], (count, inside.size, 1))
        q_values = algorithm.critic.q_values(acting.critic, states, actions)
        return masses / masses.sum(1, keepdims=True), q_values

    return jax.jit(on_grid)


def grid_points() -> np.ndarray:
    """The grid from bound to bound."""
    return np.linspace(-1, 1, round(2 / _SPACING) + 1)


def train(
    problem: Problem, config: QIPOConfig, study: Study, label: str
) -> tuple[Trainer, Capture]:
    """The policy phase on the problem's shared behavior model and critic."""
    trainer, hooks = Trainer(config, problem.data, range(study.num_seeds)), Capture(label)
    stages = study.trained(problem.name, problem.config, problem.data, hooks)
    state = trainer.init_state().replace(behavior=stages.behavior, critic=stages.critic)
    state = trainer.run(state, hooks)
    hooks.on_evaluate(config.policy_steps, state.acting())
    return trainer, hooks


def slopes_of(
    problem: Problem, trainer: Trainer, hooks: Capture, settings: Settings
) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """Rows of slopes.csv (without problem and arm), and the centered points of seed 0 at the end."""
    algorithm, config = trainer.algorithm, trainer.config
    rng = np.random.default_rng(0)
    places = rng.choice(problem.data.size, min(settings.states, problem.data.size), replace=False)
    observations = np.asarray(problem.data.observations)[places]
    noise = rng.standard_normal(
        (len(places), 2 * settings.actions, algorithm.action_size), np.float32
    )
    measure, on_grid = make_measure(algorithm, settings), make_grid(algorithm, settings)
    betas = np.array(hooks.betas)  # [L, seeds]
    rows: list[dict[str, Any]] = []
    points: dict[str, np.ndarray] = {}
    for seed in range(betas.shape[1]):
        of_seed = [jax.tree.map(lambda leaf: leaf[seed], acting) for acting in hooks.acting]  # noqa: B023
        reference = None
        if algorithm.action_size == 1:
            grid = map(np.asarray, on_grid(of_seed[0], observations[:REFERENCE_STATES]))
            reference = reference_log_ratios(
                *grid, betas[:, seed], config.support_size, config.data_copies, settings.draws
            )
        for period, acting in enumerate(of_seed):
            found = Measured(*map(np.asarray, measure(acting, observations, noise)))
            keep = (np.abs(found.actions) <= 1 - MARGIN).all(-1)
            keep &= np.isfinite(found.log_ratios)
            of_pi = np.arange(keep.shape[1]) >= settings.actions
            # Independent kinds of evidence for one number: see the module's docstring.
            slopes: dict[str, Slope] = {
                "both": within_regression(found.log_ratios, found.q_values, keep),
                "mu": within_regression(found.log_ratios, found.q_values, keep & ~of_pi),
                "pi": within_regression(found.log_ratios, found.q_values, keep & of_pi),
            }
            if reference is not None:
                exact = np.stack(
                    [
                        np.interp(actions, grid_points(), values)
                        for actions, values in zip(
                            found.actions[..., 0], reference[period], strict=False
                        )
                    ]
                )
                q, used = found.q_values[: len(exact)], keep[: len(exact)]
                slopes["reference"] = within_regression(exact, q, used)
                slopes["reference pi"] = within_regression(exact, q, used & of_pi)
            rows += [
                {
                    "seed": seed,
                    "renewals": period,
                    "total_beta": float(betas[: period + 1, seed].sum()),
                    "measure": name,
                    **slope._asdict(),
                }
                for name, slope in slopes.items()
            ]
            if seed == 0:
                points = {
                    "q": found.q_values,
                    "log_ratio": found.log_ratios,
                    "keep": keep,
                    "of_pi": of_pi,
                }
    return rows, points


def run(
    study: Study, problem: Problem, arms: list[str], settings: Settings, table: pathlib.Path
) -> None:
    """Every arm of one problem that is not in the table yet."""
    for arm in arms:
        done = {(row["problem"], row["arm"]) for row in read_rows(table)}
        if (problem.name, arm) in done:
            continue
        started = time.perf_counter()
        config = dataclasses.replace(problem.config, **ARMS[arm](problem.config)).validate()
        trainer, hooks = train(problem, config, study, f"{problem.name}, {arm}")
        rows, points = slopes_of(problem, trainer, hooks, settings)
        np.savez_compressed(
            guidance_scale_report.points_file(table.parent, problem.name, arm), **points
        )
        rows = [{"problem": problem.name, "arm": arm, **row} for row in rows]
        append_rows(table, tuple(rows[0]), rows)
        for row in rows:
            if row["seed"] == 0 and row["measure"] in ("both", "reference"):
                print(
                    f"{problem.name}, {arm}: l = {row['renewals']}, (l + 1) beta = "
                    f"{row['total_beta']:.3g}, "
                    f"{row['measure']}: slope {row['slope']:.3g} [{row['low']:.3g}, "
                    f"{row['high']:.3g}], "
                    f"R2 {row['r2']:.2f}, pooled {row['pooled']:.3g}, kept {row['kept']:.2f}"
                )
        print(f"{problem.name}, {arm}: {time.perf_counter() - started:.0f} s", flush=True)


def main(argv: list[str] | None = None) -> int:
    """Run what is missing, then the table and the figure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--problems", default="bandit,pendulum", help="bandit, pendulum, NAME=ID_OR_FILE"
    )
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--periods", type=int, default=6, help="l + 1 of the last policy")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/guidance_scale"))
    parser.add_argument("--stages", type=pathlib.Path, help="trained behavior models and critics")
    parser.add_argument("--smoke", action="store_true", help="every part, in about a minute")
    parser.add_argument("--report", action="store_true", help="only make the table and the figure")
    args = parser.parse_args(argv)
    arms = args.arms.split(",")
    unknown = [arm for arm in arms if arm not in ARMS]
    if unknown:
        parser.error(f"--arms: unknown {unknown[0]!r}; expected {', '.join(ARMS)}")
    settings = Settings(states=32, actions=4, steps=4, draws=100) if args.smoke else Settings()
    study = Study(args.out, args.seeds, SMOKE if args.smoke else {}, args.stages)
    table = args.out / "slopes.csv"
    if not args.report:
        for name, source in parse_datasets(args.problems).items():
            try:
                problem = (
                    bandit(study.changes) if name == "bandit" else from_dataset(name, source, study)
                )
            except ValueError as error:
                parser.error(f"--problems: {error}")
            config = problem.config
            if config.path != "ot":
                parser.error(
                    f"--problems: expected a preset with path 'ot'; that of {name} is "
                    f"{config.path!r}"
                )
            # An evaluation at the end of every period hands its parameters over.
            every = config.renew_every
            config = dataclasses.replace(
                config, policy_steps=args.periods * every, eval_every=every
            )
            run(study, problem._replace(config=config.validate()), arms, settings, table)
    guidance_scale_report.write(read_rows(table), args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
