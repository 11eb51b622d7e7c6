"""The effective guidance scale of QIPO: how far a policy has really moved after l renewals.

    python -m experiments.rl.guidance_scale [--problems=bandit,pendulum,NAME=ID_OR_FILE]
        [--arms=...] [--seeds=3] [--periods=6] [--out=runs/guidance_scale] [--stages=FOLDER]
        [--smoke] [--report]

After l renewals the policy should be ``mu exp((l + 1) beta Q) / Z(s)`` (Zhang et al. 2025, eq.
5.4).  Flows have exact likelihoods, so at the end of every period ``log pi_l(a|s) - log mu(a|s)``
is regressed on ``Q(s, a)`` within states; the median of the states' slopes stands beside (l + 1)
beta (one slope for all states is that of the few whose Q-values have a cliff).

Actions are drawn from mu and from pi_l, half each, because each alone has few where the other has
its mass; where the law holds the slopes over both and over each half agree.  The sampler clips to
[-1, 1] and a flow's density is on all of R^A: actions are drawn without clipping, which leaves the
density inside as it is, and those outside, or within ``MARGIN`` of a bound, are left out (the next
period is trained on clipped actions, and its flow smears what lies on the bound).

``reference``, for one-dimensional actions, is the slope of the algorithm itself with perfect
models, at the same actions (:func:`guidance_scale_regression.reference_log_ratios`): what it is
below (l + 1) beta is due to M actions a set and to the data action; what the policy is beside it,
to learning.

bandit: the true Q and a Gaussian mu; any other problem is a dataset with its preset and a trained
critic.  ``--out`` gets slopes.csv, table.md, guidance_scale.png; an arm that is in slopes.csv is
not computed again.
"""

import dataclasses
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any, final

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from efm_jax import sampling
from efm_jax.files import write_whole
from efm_jax.losses import Aux
from efm_jax.rl.agents import Agent, AgentParams
from efm_jax.rl.batch import Batch
from efm_jax.rl.config import QIPOConfig
from efm_jax.rl.critics import CRITICS, Critic
from efm_jax.rl.trainer import Trainer
from efm_jax.types import Array, Params, Transitions
from efm_jax.weights import AxisName
from experiments import figures, results
from experiments.rl.guidance_scale_regression import reference_log_ratios, within_regression
from experiments.rl.study import Problem, Progress, Study, make_parser, parse_datasets

MARGIN = 0.05
REFERENCE_STATES = 64
# Of a grid over actions: what is beyond the bounds is clipped onto them.
_SPACING, _REACH = 0.02, 3.0
_GRID = np.linspace(-1, 1, round(2 / _SPACING) + 1)  # from bound to bound
_CURVATURE, _STD, _ROWS = 5.0, 0.3, 4096

_MEASURES = {"mu": "over mu", "pi": "over pi", "reference": "reference"}
_MEASURES |= {"reference pi": "its over pi"}
_NUMBERS = {"r2": "{:.2f}", "pooled": "{:.3g}", "kept": "{:.2f}"}

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


@final
class KnownQ(Critic):
    """``Q(s, a) = -0.5 K (a - s / 2)^2 + 20 s``, the first state and action; nothing is learned."""

    @classmethod
    def from_config(cls, config: QIPOConfig) -> "KnownQ":
        return cls()

    def init(self, key: Array, observation_size: int, action_size: int) -> Params:
        return {}

    def q_values(self, params: Params, observations: Array, actions: Array) -> Array:
        s = observations[..., 0]
        return -0.5 * _CURVATURE * (actions[..., 0] - s / 2) ** 2 + 20 * s

    def loss(
        self, params: Params, target: Params, key: Array, batch: Batch, axis_name: AxisName = None
    ) -> tuple[Array, Aux]:
        return jnp.zeros(()), {}


CRITICS["known"] = KnownQ


def bandit(changes: dict[str, Any]) -> Problem:
    """Draw states uniform on [-1, 1], ``mu = N(s / 10, 0.3^2)`` (0.3% beyond the bounds)."""
    rng = np.random.default_rng(0)
    states = rng.uniform(-1, 1, (_ROWS, 1)).astype(np.float32)
    actions = 0.1 * states + _STD * rng.standard_normal((_ROWS, 1))
    actions = np.clip(actions, -1, 1).astype(np.float32)
    zeros = np.zeros(_ROWS, np.float32)
    fields = {"beta": 1.0, "hidden_dims": (64, 64), "learning_rate": 2e-3, "ema_decay": 0.99}
    fields |= {"batch_size": 128, "behavior_steps": 4000, "renew_every": 1000, "sample_steps": 5}
    config = QIPOConfig(**fields | changes | {"critic": "known", "critic_steps": 1})
    return Problem("bandit", config, Transitions(states, actions, zeros, states, zeros))


class Capture(Progress):
    """The betas of all renewals and the parameters at the end of every period."""

    def __init__(self, problem: str, arm: str):
        super().__init__(problem, arm)
        self.betas: list[np.ndarray] = []
        self.params: list[AgentParams] = []

    def on_renewal(self, step: int, summary: dict[str, np.ndarray]) -> None:
        self.betas.append(np.asarray(summary["beta"], np.float64))

    def on_evaluate(self, step: int, params: AgentParams) -> None:
        self.params.append(jax.tree.map(np.asarray, params))


def make_measure(agent: Agent, settings: Settings) -> Callable[..., tuple[Array, Array, Array]]:
    """Compile ``(params, observations [n, S], noise [n, 2m, A]) -> ...`` of one seed.

    It returns m actions of mu, then m of pi, in each state, without clipping, ``[n, 2m, A]``; their
    Q-values; and ``log pi - log mu``.
    """

    def measure(params: AgentParams, observations: Array, noise: Array) -> tuple:
        states = observations[:, None]
        of_mu, of_pi = jnp.split(noise, 2, axis=1)
        drawn, how = [], {"solver": "rk4", "num_steps": settings.steps, "event_ndim": 1}
        for model, start in ((params.behavior, of_mu), (params.policy, of_pi)):
            field = agent.model.field(model, states)
            drawn.append(sampling.sample(field, start, **how))
        actions = jnp.concatenate(drawn, axis=1)
        at = states, actions, settings.steps
        log_pi, log_mu = (log_density(agent, p, *at) for p in (params.policy, params.behavior))
        q_values = agent.critic.q_values(params.critic, states, actions)
        return actions, q_values, log_pi - log_mu

    return jax.jit(measure)


def log_density(agent: Agent, params: Params, states: Array, actions: Array, steps: int) -> Array:
    """Compute ``log p(a|s)`` of actions ``[n, m, A]`` at states ``[n, 1, S]``: rk4, no estimate."""
    flat = actions.reshape(-1, actions.shape[-1])
    states = jnp.repeat(states[:, 0], actions.shape[1], axis=0)
    field = agent.model.field(params, states)
    values = sampling.log_likelihood(field, flat, solver="rk4", num_steps=steps)
    return values.reshape(actions.shape[:2])


def make_grid(agent: Agent, settings: Settings) -> Callable[..., tuple[Array, Array]]:
    """Compile ``(params, observations [n, S]) -> (masses of the clipped mu, Q-values) [n, K]``."""
    wide = jnp.arange(-_REACH, _REACH + _SPACING / 2, _SPACING)
    beyond = (wide.size - _GRID.size) // 2

    def on_grid(params: AgentParams, observations: Array) -> tuple[Array, Array]:
        states = observations[:, None]

        def everywhere(grid: Array) -> Array:
            return jnp.broadcast_to(grid[:, None], (len(states), grid.size, 1))

        log_mu = log_density(agent, params.behavior, states, everywhere(wide), settings.steps)
        below, masses, above = jnp.split(jnp.exp(log_mu), [beyond, beyond + _GRID.size], axis=1)
        masses = masses.at[:, 0].add(below.sum(1)).at[:, -1].add(above.sum(1))
        q_values = agent.critic.q_values(params.critic, states, everywhere(jnp.asarray(_GRID)))
        return masses / masses.sum(1, keepdims=True), q_values

    return jax.jit(on_grid)


def slopes_of(
    problem: Problem, trainer: Trainer, hooks: Capture, settings: Settings
) -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
    """Find the slopes of every seed, period and measure, and the points of seed 0 at the end."""
    agent, config = trainer.agent, trainer.config
    rng = np.random.default_rng(0)
    places = rng.choice(problem.data.size, min(settings.states, problem.data.size), replace=False)
    observations = np.asarray(problem.data.observations)[places]
    shape = len(places), 2 * settings.actions, agent.action_size
    noise = rng.standard_normal(shape, np.float32)
    of_pi = np.arange(2 * settings.actions) >= settings.actions
    measure, on_grid = make_measure(agent, settings), make_grid(agent, settings)
    rows, points = [], {}
    for seed, betas in enumerate(np.array(hooks.betas).T):
        of_seed = [jax.tree.map(lambda leaf: leaf[seed], params) for params in hooks.params]  # noqa: B023
        if agent.action_size == 1:
            grid = map(np.asarray, on_grid(of_seed[0], observations[:REFERENCE_STATES]))
            sizes = config.support_size, config.data_copies, settings.draws
            reference = reference_log_ratios(*grid, betas, *sizes)
        for period, params in enumerate(of_seed):
            actions, q, log_ratios = map(np.asarray, measure(params, observations, noise))
            keep = (np.abs(actions) <= 1 - MARGIN).all(-1) & np.isfinite(log_ratios)
            # Independent kinds of evidence for one number: see the module's docstring.
            used = {"both": keep, "mu": keep & ~of_pi, "pi": keep & of_pi}
            slopes = {m: within_regression(log_ratios, q, kept) for m, kept in used.items()}
            if agent.action_size == 1:
                at = zip(actions[..., 0], reference[period], strict=False)
                exact = np.stack([np.interp(state, _GRID, values) for state, values in at])
                some = slice(len(exact))
                for m, kept in (("reference", keep), ("reference pi", used["pi"])):
                    slopes[m] = within_regression(exact, q[some], kept[some])
            key = {"seed": seed, "renewals": period, "total_beta": betas[: period + 1].sum()}
            rows += [key | {"measure": m} | slope._asdict() for m, slope in slopes.items()]
            if seed == 0:
                points = {"q": q, "log_ratio": log_ratios, "keep": keep, "of_pi": of_pi}
    return pd.DataFrame(rows), points


def run(
    study: Study, problem: Problem, arms: list[str], settings: Settings, path: pathlib.Path
) -> None:
    """Run every arm of one problem that is not in slopes.csv yet."""
    for arm in arms:
        rows = results.read_rows(path, ["problem", "arm"])
        if len(rows.query("problem == @problem.name and arm == @arm")):
            continue
        started = time.perf_counter()
        config = dataclasses.replace(problem.config, **ARMS[arm](problem.config)).validate()
        trainer, hooks = study.trainer(config, problem), Capture(problem.name, arm)
        stages = study.trained(problem, problem.config, hooks)
        hooks.on_evaluate(config.policy_steps, study.improve(trainer, stages, hooks))
        rows, points = slopes_of(problem, trainer, hooks, settings)
        results.write_arrays(points_file(study.out, problem.name, arm), points)
        rows.insert(0, "problem", problem.name)
        rows.insert(1, "arm", arm)
        results.append_rows(path, rows)
        for row in rows.query("seed == 0 and measure in ('both', 'reference')").itertuples():
            hooks.say(
                f"l = {row.renewals}, (l + 1) beta = {row.total_beta:.3g}, {row.measure}: "
                f"slope {row.slope:.3g} [{row.low:.3g}, {row.high:.3g}], R2 {row.r2:.2f}, "
                f"pooled {row.pooled:.3g}, kept {row.kept:.2f}"
            )
        hooks.say(f"{time.perf_counter() - started:.0f} s")


def points_file(out: pathlib.Path, problem: str, arm: str) -> pathlib.Path:
    """Name the file of the points of seed 0 at the end of an arm."""
    return out / f"points-{problem}-{arm.replace(' ', '').replace('/', 'over')}.npz"


def curves(rows: pd.DataFrame) -> pd.DataFrame:
    """Summarize seeds: means for each problem, arm, renewal and measure.

    ``least`` and ``most`` are the range of slopes over seeds, or where there is one seed the
    bootstrap interval over states; ``low`` and ``high`` the ends of all intervals.
    """
    seeds = rows.groupby(["problem", "arm", "renewals", "measure"], sort=False)
    low, high, several = seeds["low"].min(), seeds["high"].max(), seeds.size() > 1
    least = seeds["slope"].min().where(several, low)
    most = seeds["slope"].max().where(several, high)
    return seeds.mean().assign(low=low, high=high, least=least, most=most)


def table(found: pd.DataFrame) -> str:
    """Lay out a row for each problem, arm and renewal: slopes of every measure."""
    both = found.xs("both", level="measure")
    cells = both[["total_beta"]].map("{:.3g}".format).set_axis(["(l + 1) beta"], axis=1)
    ends = zip(both["slope"], both["least"], both["most"], strict=True)
    cells["slope"] = ["{:.3g} [{:.3g}, {:.3g}]".format(*each) for each in ends]
    for measure, name in _MEASURES.items():
        slopes = found.loc[found.index.get_level_values("measure") == measure, "slope"]
        cells[name] = slopes.droplevel("measure").map("{:.3g}".format)
    for column, form in _NUMBERS.items():
        cells[{"r2": "R2"}.get(column, column)] = both[column].map(form.format)
    cells = cells.fillna("").reset_index().rename(columns={"renewals": "l"})
    return cells.to_markdown(index=False, disable_numparse=True)


def _plot_slopes(axes: Axes, found: pd.DataFrame) -> None:
    furthest = found["total_beta"].max()
    slopes = found[found.index.isin(["both", "reference"], level="measure")]
    for arm, here in slopes.groupby("arm", sort=False):
        both = here.xs("both", level="measure")
        line = both["total_beta"], both["slope"], both["low"], both["high"]
        figures.banded(axes, *line, label=arm)
        reference = here[here.index.get_level_values("measure") == "reference"]
        color = axes.lines[-1].get_color()
        axes.plot(reference["total_beta"], reference["slope"], "--", color=color, linewidth=1)
    axes.plot([0, furthest], [0, furthest], color="black", linewidth=0.8, label="(l + 1) beta")
    axes.plot([], [], "--", color="gray", linewidth=1, label="reference: perfect models")
    axes.set_ylim(0, 1.1 * slopes["high"].max())  # the law may leave the figure
    axes.set(xlabel="(l + 1) beta", ylabel="median slope of log pi - log mu on Q")
    axes.legend()


def _plot_points(axes: Axes, last: pd.Series, file: pathlib.Path) -> None:
    """Draw the points of seed 0 at the end, each less its state's mean; ``last`` is its row."""
    points = results.read_arrays(file)
    keep, of_pi = points["keep"], points["of_pi"]
    used = [np.ma.masked_array(points[name], ~keep) for name in ("q", "log_ratio")]
    x, y = ((v - v.mean(axis=1, keepdims=True)).data for v in used)
    for name, chosen, color in (("mu", keep & ~of_pi, "gray"), ("pi", keep & of_pi, "blue")):
        style = {"markersize": 2, "alpha": 0.4, "color": figures.COLORS[color]}
        axes.plot(x[chosen], y[chosen], ".", label=f"actions of {name}", **style)
    ends = np.quantile(x[keep], [0.02, 0.98])  # a few states reach far beyond
    label = f"median slope {last['slope']:.3g}"
    axes.plot(ends, last["slope"] * ends, color=figures.COLORS["red"], label=label)
    label = f"(l + 1) beta = {last['total_beta']:.3g}"
    axes.plot(ends, last["total_beta"] * ends, color="black", linewidth=0.8, label=label)
    axes.set(xlabel="Q less its mean in the state", ylabel="log pi - log mu, likewise")
    axes.set(xlim=ends, ylim=np.quantile(y[keep], [0.02, 0.98]) + np.array([-1, 1]))
    axes.legend(markerscale=4)


def report(rows: pd.DataFrame, out: pathlib.Path) -> None:
    """Write table.md and guidance_scale.png of what is finished."""
    if rows.empty:
        print("no arm is finished yet")
        return
    found = curves(rows)
    text = "Slopes: medians over states, means over seeds; brackets: range over seeds, of one 95%."
    text += f"\n\n{table(found)}\n"
    write_whole(out / "table.md", text)
    first = rows.query("seed == 0 and measure == 'both'").groupby("problem", sort=False)
    with figures.drawn(out / "guidance_scale.png", 14, 4.2 * len(first)) as figure:
        panels = figure.subplots(len(first), 3, squeeze=False)
        for (left, middle, right), (problem, seed0) in zip(panels, first, strict=True):
            here, arm = found.loc[[problem]], seed0["arm"].iloc[0]
            _plot_slopes(left, here)
            for _, line in here.xs("both", level="measure").groupby("arm", sort=False):
                middle.plot(line["total_beta"], line["r2"], "o-")
            file = points_file(out, problem, arm)
            if file.exists():
                _plot_points(right, seed0[seed0["arm"] == arm].iloc[-1], file)
            else:  # slopes.csv was copied alone
                right.set_axis_off()
            left.set_title(problem)
            middle.set(xlabel="(l + 1) beta", ylabel="median R2 within states", ylim=(-0.02, 1.02))
            middle.set_title(f"{problem}: fit")
            right.set_title(f"{problem}: {arm}, seed 0, at the end")
    print(text, end="")


def main(argv: list[str] | None = None) -> int:
    """Run what is missing, then the table and the figure."""
    parser = make_parser(__doc__, "runs/guidance_scale")
    known = "bandit, pendulum, NAME=ID_OR_FILE"
    parser.add_argument("--problems", default="bandit,pendulum", help=known)
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--periods", type=int, default=6, help="l + 1 of the last policy")
    args = parser.parse_args(argv)
    arms = results.parse_names(parser, "--arms", args.arms, ARMS)
    settings = Settings(states=32, actions=4, steps=4, draws=100) if args.smoke else Settings()
    study, path = Study.from_args(args), args.out / "slopes.csv"
    problems = {} if args.report else parse_datasets(args.problems)
    for name, source in problems.items():
        try:
            is_bandit = name == "bandit"
            problem = bandit(study.changes) if is_bandit else study.load(name, source)
        except ValueError as error:
            parser.error(f"--problems: {error}")
        config = problem.config
        if config.path != "ot":
            parser.error(f"--problems: {name}: expected a preset of path 'ot'; got {config.path!r}")
        # An evaluation at the end of every period hands its parameters over.
        every = config.renew_every
        config = dataclasses.replace(config, policy_steps=args.periods * every, eval_every=every)
        run(study, problem._replace(config=config.validate()), arms, settings, path)
    report(results.read_rows(path, []), args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
