"""What reviewers asked about the energy weights, measured: a table and a figure per question.

gradient  bias and variance of the CEFM gradient: the batch's softmax and the dataset's normalizer
ess       effective sample size against beta, on every problem of ``experiments.paper.toy2d``
fraction  what ``beta_for_ess`` aims at, on fresh data and from batch to batch
noise     energies with an error, as of an imperfect critic: independent noise and a smooth error
data      the same on a finite dataset whose energies were computed once

    python -m experiments.paper.weight_study [--smoke] [--output=runs/weight_study] [--seed=0]

Nothing is trained but the behavior model of the first, the point at which gradients are taken.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

from efm_jax import losses, paths
from efm_jax.distances import sliced_wasserstein
from efm_jax.files import write_whole
from efm_jax.types import Array
from efm_jax.weights import beta_for_ess, effective_sample_size, energy_weights, log_normalizer
from experiments import figures
from experiments.figures import REFERENCE
from experiments.paper import toy2d
from experiments.results import make_parser

PROBLEMS = toy2d.problems()
SWISS_ROLL = PROBLEMS["swiss_roll"]
FRACTIONS = (0.9, 0.5, 0.1, 0.02)
GRADIENT_BETAS, NOISE_BETAS, DATA_BETAS = (1.0, 5.0, 20.0), (1.0, 5.0, 10.0, 20.0), (5.0, 20.0)
KINDS = (("independent",), ("smooth",))
FLOORS = 32  # pairs of exact samples
SIGMAS = (0.0, 0.03, 0.1, 0.3, 1.0)
_HOLLOW = {"marker": "o", "markersize": 5, "markerfacecolor": "white", "linestyle": ""}
_GRAY = "#555555"  # of entries of the legend that hold for all colors
_KINDS = {"independent": "independent noise", "smooth": "smooth error"}
_WEIGHTS = {"softmax": "softmax of the batch", "dataset": "normalizer of the dataset"}


@dataclasses.dataclass(frozen=True)
class Settings:
    """How much is drawn."""

    block: int = 2**16  # samples held at once
    blocks: int = 32  # of gradients
    batch_sizes: tuple[int, ...] = tuple(2**k for k in range(4, 14))
    fitted_from: int = 128  # the smallest batch of the fitted slopes
    problems: tuple[str, ...] = tuple(PROBLEMS)
    ess_sizes: tuple[int, ...] = tuple(4**k for k in range(3, 9))
    noise_problems: tuple[str, ...] = ("swiss_roll", "mixture_8d")
    data_sizes: tuple[int, ...] = tuple(4**k for k in range(5, 10))  # the last: unlimited data
    samples: int = 4096  # of each side of a distance
    draws: int = 6


SMOKE = Settings(
    block=2**13, blocks=16, batch_sizes=(16, 64), fitted_from=16, ess_sizes=(2**6, 2**13),
    problems=("checkerboard", "mixture_8d"), noise_problems=("swiss_roll",),
    data_sizes=(2**10, 2**14), samples=256, draws=4,
)  # fmt: skip


def _table(**columns: Any) -> pd.DataFrame:
    """A row for each element of the columns, broadcast against each other."""
    arrays = np.broadcast_arrays(*columns.values())
    return pd.DataFrame(dict(zip(columns, (a.ravel().tolist() for a in arrays), strict=True)))


def _blocks(function: Callable, key: Array, num: int) -> Any:
    """``function(key)`` of ``num`` keys, stacked; one after the other, as each fills the memory."""
    return jax.jit(lambda keys: jax.lax.map(function, keys))(jax.random.split(key, num))


def _network(params: Array, x: Array, t: Array) -> Array:
    """One hidden layer of 16: 98 parameters, so that a gradient of every sample fits in memory."""
    first, second = params[:64].reshape(4, 16), params[64:].reshape(17, 2)
    hidden = jnp.tanh(jnp.concatenate([x, t[..., None]], axis=-1) @ first[:3] + first[3])
    return hidden @ second[:16] + second[16]


def _draw(params: Array, key: Array, num: int) -> tuple[Array, Array]:
    """Energies ``[num]`` and gradients ``[num, parameters]`` of samples' flow-matching errors."""
    data_key, noise_key, time_key = jax.random.split(key, 3)
    x0 = SWISS_ROLL.sample(data_key, num)
    noise = jax.random.normal(noise_key, x0.shape)
    t = 1 - jax.random.uniform(time_key, (num,))

    def error(params: Array, *sample: Array) -> Array:
        field = functools.partial(_network, params)
        return losses.cfm_error(field, paths.conditional_ot(), *sample)

    return SWISS_ROLL.energy(x0), jax.vmap(jax.grad(error), (None, 0, 0, 0))(params, x0, noise, t)


def _behavior_model(key: Array, num_steps: int = 500) -> Array:
    """Where guided training starts: the network after plain flow matching on the data."""
    start_key, train_key = jax.random.split(key)
    start, optimizer = jax.random.normal(start_key, (98,)) / 2, optax.adam(1e-2)

    def step(carry: tuple, key: Array) -> tuple:
        params, state = carry
        updates, state = optimizer.update(_draw(params, key, 512)[1].mean(0), state)
        return (params + updates, state), None

    keys = jax.random.split(train_key, num_steps)
    train = jax.jit(lambda *carry: jax.lax.scan(step, carry, keys)[0][0])
    return train(start, optimizer.init(start))


def gradient_study(key: Array, settings: Settings) -> pd.DataFrame:
    """Relative bias and relative root-mean-square error of the CEFM gradient against batch size.

    Two independent sets of samples.  The first gives ``log Z`` (the dataset's normalizer) and the
    gradient g.  The second is cut into batches of every size, and into blocks whose spread is the
    error of the means.

    From the deviations the first-order term of their expansion, ``mean w (G - g) / Z`` of the same
    samples, is taken off: it is noise but for the error of g, which goes with it.  Left are the
    softmax's second-order term, which is its bias, and the dataset's ``(mean w / Z - 1) g``.
    """
    model_key, reference_key, batch_key = jax.random.split(key, 3)
    params, betas = _behavior_model(model_key), jnp.array(GRADIENT_BETAS)

    def reference(key: Array) -> tuple[Array, Array, Array]:
        energy, gradients = _draw(params, key, settings.block)
        weights, log_z = (f(energy, betas[:, None]) for f in (energy_weights, log_normalizer))
        return log_z, weights @ gradients, effective_sample_size(weights)

    # Blocks' ratios are put together as one ratio over all samples.
    log_zs, ratios, ess = map(np.asarray, _blocks(reference, reference_key, settings.blocks))
    z = np.exp(log_zs)
    log_z, shares = np.log(z.mean(0)), z / z.mean(0)
    true = (shares[..., None] * ratios).mean(0)

    def deviations(key: Array) -> list[tuple[Array, Array]]:
        """Means ``[2, betas, parameters]`` and mean squares ``[2, betas]``, of every batch size."""
        energy, gradients = _draw(params, key, settings.block)
        whole = energy_weights(energy, betas[:, None], log_normalizer=log_z)
        first_order = whole @ gradients - whole.sum(-1, keepdims=True) * true
        found = []
        for size in settings.batch_sizes:
            energies, beta = energy.reshape(-1, size), betas[:, None, None]
            log_zs = jnp.broadcast_to(log_z[:, None], (len(betas), len(energies)))
            softmax = energy_weights(energies, beta)
            weights = jnp.stack([softmax, energy_weights(energies, beta, log_normalizer=log_zs)])
            batches = jnp.einsum("wknb,nbp->wknp", weights, gradients.reshape(*energies.shape, -1))
            deviation = batches - true[:, None]
            found.append((deviation.mean(2) - first_order, (deviation**2).sum(-1).mean(2)))
        return found

    found = _blocks(deviations, batch_key, settings.blocks)
    # [blocks, 2, betas, ..., batch sizes]
    means, squares = (np.stack(part, axis=-1) for part in zip(*found, strict=True))
    norm = np.linalg.norm(true, axis=-1)[:, None]
    noise = (means.var(0, ddof=1) / settings.blocks).sum(2)
    error_of_z = shares.var(0, ddof=1) / settings.blocks
    noise[1] += error_of_z[:, None] * norm**2
    square = (means.mean(0) ** 2).sum(2)
    return _table(
        problem=SWISS_ROLL.name, beta=betas[:, None], weights=[[["softmax"]], [["dataset"]]],
        batch_size=settings.batch_sizes, ess_fraction=ess.mean(0)[:, None] / settings.block,
        # The squared norm of a noisy mean is too large by the noise's own variance.
        bias=np.sqrt(np.maximum(square - noise, 0)) / norm, bias_noise=np.sqrt(noise) / norm,
        resolved=(square > 9 * noise).astype(int), rms_error=np.sqrt(squares.mean(0)) / norm,
    )  # fmt: skip


def fitted_slope(rows: pd.DataFrame, beta: float, column: str, smallest: int) -> float:
    """Log-log slope of the softmax's ``column`` against batch size; a bias where it is resolved."""
    here = rows.query("beta == @beta and weights == 'softmax' and batch_size >= @smallest")
    if column == "bias":
        here = here.query("resolved == 1")
    logs = np.log(here[["batch_size", column]].to_numpy().T)
    return float(np.polyfit(*logs, 1)[0]) if len(here) > 1 else float("nan")


@functools.partial(jax.jit, static_argnames=("name", "settings"))
def _energies(key: Array, name: str, settings: Settings) -> Array:
    """Nine blocks of energies, ``[9, block]``: one to choose beta on, eight fresh ones."""
    sample, energy = PROBLEMS[name].sample, PROBLEMS[name].energy
    return jax.lax.map(lambda key: energy(sample(key, settings.block)), jax.random.split(key, 9))


@jax.jit
def _ess_fractions(energy: Array, betas: Array) -> Array:
    """Effective sample size over n, of ``energy: [..., n]`` at each beta: ``[betas, ...]``."""
    sizes = jax.lax.map(lambda beta: effective_sample_size(energy_weights(energy, beta)), betas)
    return sizes / energy.shape[-1]


def ess_study(key: Array, settings: Settings) -> pd.DataFrame:
    """Fraction of the data that is effective, against beta, and closed forms (NaN: none known)."""
    tables, betas = [], np.geomspace(0.1, 50, 24)
    uniform = np.tanh(betas / 2) / (betas / 2)  # of energies uniform on [0, 1]
    for index, name in enumerate(settings.problems):
        problem, exact = PROBLEMS[name], np.nan
        if problem.mixture is not None:
            of_beta = functools.partial(problem.mixture.log_normalizer, problem.energy)
            log_z = jax.jit(jax.vmap(of_beta))
            exact = np.exp(2 * log_z(betas) - log_z(2 * betas))
        energy = _energies(jax.random.fold_in(key, index), name, settings).ravel()
        columns = {"ess_fraction": _ess_fractions(energy, betas), "exact": exact}
        tables.append(_table(problem=name, beta=betas, **columns, uniform=uniform))
    return pd.concat(tables)


def fraction_study(key: Array, settings: Settings) -> pd.DataFrame:
    """Betas chosen on one block, then the effective sample size of fresh batches of every size."""
    choose = jax.jit(jax.vmap(beta_for_ess, in_axes=(None, 0)))
    tables = []
    for index, name in enumerate(settings.problems):
        energy = _energies(jax.random.fold_in(key, index), name, settings)
        betas = choose(energy[0], jnp.array(FRACTIONS))
        for size in settings.ess_sizes:
            found = np.asarray(_ess_fractions(energy[1:].reshape(-1, size), betas))
            columns = {"mean": found.mean(1), "std": found.std(1, ddof=1)}
            asked = {"problem": name, "fraction": FRACTIONS, "beta": betas, "batch_size": size}
            tables.append(_table(**asked, **columns))
    return pd.concat(tables)


def smooth_error(key: Array, x: Array) -> Array:
    """A random smooth function at ``x: [n, d]``, of mean 0 and variance 1 over them: ``[n]``.

    Random Fourier features of a Gaussian kernel (Rahimi and Recht 2007) of length ``sqrt(d / 2)``,
    as distances between samples grow like ``sqrt(d)``.
    """
    draws = jax.random.normal(key, (x.shape[-1] + 2, 32))
    phase = x @ draws[2:] / (x.shape[-1] / 2) ** 0.5
    value = jnp.cos(phase) @ draws[0] + jnp.sin(phase) @ draws[1]
    return (value - value.mean()) / value.std()


@functools.partial(jax.jit, static_argnames=("name", "size", "num"))
def _noisy_targets(key: Array, beta: Array, sigmas: Array, name: str, size: int, num: int) -> tuple:
    """``num`` samples of the target under noisy energies of fresh data, and the weights' ESS.

    Two kinds of error times sigmas: ``[kinds * sigmas, num, d]``, ``[kinds * sigmas]``.
    """
    data_key, error_key, sample_key = jax.random.split(key, 3)
    x = PROBLEMS[name].sample(data_key, size)
    energy = PROBLEMS[name].energy(x)

    def of_error(error: Array) -> tuple[Array, Array]:
        weights = energy_weights(energy + error, beta)
        return jax.random.choice(sample_key, x, (num,), p=weights), effective_sample_size(weights)

    units = jnp.stack([jax.random.normal(error_key, (size,)), smooth_error(error_key, x)])
    return jax.lax.map(of_error, (sigmas[:, None] * units[:, None]).reshape(-1, size))


_distance = jax.jit(functools.partial(sliced_wasserstein, num_projections=50))


def _error_table(
    key: Array, name: str, settings: Settings, betas: Sequence[float], sizes: Sequence[int]
) -> pd.DataFrame:
    """Distance to the true target of the target under noisy energies, over the noise floor.

    No field is trained.  The minimizer of the loss on n points is the field of the weighted points
    (``efm_jax.exact``), which ends at those points with their probabilities: resampling them
    samples from it. The floor is the distance between two exact samples of the target.
    """
    tables = []
    draws, num, shape = settings.draws, settings.samples, (settings.draws, len(KINDS), len(SIGMAS))
    for index, beta in enumerate(betas):
        target_key, slice_key, draw_key = jax.random.split(jax.random.fold_in(key, index), 3)
        exact = np.asarray(PROBLEMS[name].target(target_key, (draws + 2 * FLOORS) * num, beta))
        targets, *pairs = np.split(exact.reshape(-1, num, exact.shape[-1]), (draws, draws + FLOORS))
        floors = np.array([_distance(slice_key, *pair) for pair in zip(*pairs, strict=True)])
        of_floor = {"floor": floors.mean(), "floor_error": floors.std(ddof=1) / FLOORS**0.5}
        for size in sizes:
            distances, ess = [], []
            for draw, target in zip(jax.random.split(draw_key, draws), targets, strict=True):
                found = _noisy_targets(draw, beta, np.array(SIGMAS), name, size, num)
                distances += [_distance(slice_key, samples, target) for samples in found[0]]
                ess.append(found[1])
            ratio = np.reshape(distances, shape) / floors.mean()
            found = {"ratio": ratio.mean(0), "ratio_std": ratio.std(0, ddof=1)}
            found |= {"ess": np.reshape(ess, shape).mean(0)}
            of_all = {"problem": name, "beta": beta, "data": size, "error": KINDS, "sigma": SIGMAS}
            tables.append(_table(**of_all, samples=num, **of_floor, **found))
    return pd.concat(tables)


def noise_study(key: Array, settings: Settings) -> pd.DataFrame:
    """Errors of the energy with data that are as good as unlimited."""
    names, sizes = settings.noise_problems, settings.data_sizes[-1:]
    pairs = zip(jax.random.split(key, len(names)), names, strict=True)
    return pd.concat(_error_table(*pair, settings, NOISE_BETAS, sizes) for pair in pairs)


def data_study(key: Array, settings: Settings) -> pd.DataFrame:
    """Errors of the energy on datasets of several sizes."""
    return _error_table(key, SWISS_ROLL.name, settings, DATA_BETAS, settings.data_sizes)


STUDIES = {"gradient": gradient_study, "ess": ess_study, "fraction": fraction_study}
STUDIES |= {"noise": noise_study, "data": data_study}


def write(path: Path, table: pd.DataFrame) -> None:
    """Write the table as CSV, and beside it the figure of what the file says."""
    write_whole(path, table.to_csv(index=False, float_format="%.6g"))
    rows = pd.read_csv(path)
    draw, size, title, label = _FIGURES[path.stem]
    with figures.drawn(path.with_suffix(".png"), *size) as figure:
        draw(figure, rows)
        figure.suptitle(title.format(**rows.iloc[0]))
        handles, _ = figure.axes[-1].get_legend_handles_labels()
        figure.legend(handles=handles, loc="outside lower center", ncols=6)
        for axes in figure.axes:
            figures.log_numbers(axes)
            axes.set_xlabel(label if axes.get_subplotspec().is_last_row() else "")


def _gradient(figure: Figure, rows: pd.DataFrame) -> None:
    """Bias above, root-mean-square error below; a column for each beta."""
    grid = figure.subplots(2, rows["beta"].nunique(), sharex=True, sharey="row")
    for (above, below), (beta, of_beta) in zip(grid.T, rows.groupby("beta"), strict=True):
        for i, (name, here) in enumerate(of_beta.groupby("weights", sort=False)):
            size, rms = here["batch_size"], here["rms_error"]
            seen, hidden = here[here["resolved"] == 1], here[here["resolved"] == 0]
            above.errorbar("batch_size", "bias", "bias_noise", data=seen, color=f"C{i}", marker="o")
            # What cannot be told from zero is an upper limit, not a point.
            limits = hidden["batch_size"], 3 * hidden["bias_noise"]
            above.plot(*limits, "v", color=f"C{i}", fillstyle="none")
            below.plot(size, rms, "o-", color=f"C{i}", label=_WEIGHTS[name])
            if name == "softmax":
                middle = here.iloc[len(here) // 2]
                ratio = middle["batch_size"] / size
                above.plot(size, middle["bias"] * ratio, **REFERENCE)
                below.plot(size, middle["rms_error"] * ratio**0.5, **REFERENCE)
        above.set_title(f"beta = {beta:g} (ESS {of_beta['ess_fraction'].iloc[0]:.2f} of n)")
    below.set_xscale("log", base=2)
    grid[0, 0].set_ylabel("relative bias\n" + r"$\|E\,g_B - g\|\,/\,\|g\|$")
    grid[1, 0].set_ylabel("relative error\n" + r"$\sqrt{E\|g_B - g\|^2}\,/\,\|g\|$")
    below.plot([], [], "v", color=_GRAY, fillstyle="none", label="less than this (3 std errors)")
    below.plot([], [], **REFERENCE, label="slopes -1 (above) and -1/2 (below)")


def _ess(figure: Figure, rows: pd.DataFrame) -> None:
    """A line for each problem; crosses are closed forms."""
    axes = figure.subplots()
    for i, (name, here) in enumerate(rows.groupby("problem", sort=False)):
        axes.plot("beta", "ess_fraction", data=here, color=f"C{i}", label=name)
        axes.plot(here["beta"], here["exact"], "x", color=f"C{i}")
    axes.plot(here["beta"], here["uniform"], "k--", linewidth=2, label="uniform energies")
    axes.plot([], [], "x", color=_GRAY, label="closed form")
    axes.set(xscale="log", ylabel="effective sample size / n")
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))


def _fraction(figure: Figure, rows: pd.DataFrame) -> None:
    """The mean and the spread over batches against their size; the largest is that of the fit."""
    means, spreads = figure.subplots(1, 2, sharex=True)
    rows = rows.assign(found=rows["mean"] / rows["fraction"], spread=rows["std"] / rows["mean"])
    for asked, here in rows.groupby("fraction", sort=False):
        for axes, name in ((means, "found"), (spreads, "spread")):
            line = here.groupby("batch_size")[name].agg(["median", "min", "max"])
            figures.banded(axes, line.index, *line.to_numpy().T, label=f"{asked:g} asked for")
    means.axhline(1, **REFERENCE)
    spreads.plot(line.index, 2 / np.sqrt(line.index), **REFERENCE, label="slope -1/2")
    means.set(ylabel="mean fraction / asked for", title="Mean over fresh batches")
    spreads.set(ylabel="std of the fraction / its mean", title="Spread over fresh batches")
    means.set_xscale("log", base=2)


def _errors(figure: Figure, rows: pd.DataFrame, panel: str, x: str, each: str) -> Axes:
    """Distance over floor against column x: a panel for each kind of error and value of a column.

    A line for each value of another.
    """
    panels = rows.groupby([panel, "error"], sort=False)
    grid = figure.subplots(len(panels) // 2, 2, sharex=True, sharey=True, squeeze=False)
    for axes, ((value, kind), of_panel) in zip(grid.flat, panels, strict=True):
        for i, (of_each, here) in enumerate(of_panel.groupby(each)):
            ratio, std = here["ratio"], here["ratio_std"]
            label = f"{each} = {of_each:g}"
            figures.banded(axes, here[x], ratio, ratio - std, ratio + std, label=label)
            few = here[here["ess"] < here["samples"]]
            axes.plot(few[x], few["ratio"], color=f"C{i}", **_HOLLOW)
        axes.axhline(1, **REFERENCE)
        axes.set_title(f"{_KINDS[kind]}, {panel} {value}")
    axes.plot([], [], color=_GRAY, label=f"ESS below {rows['samples'].iloc[0]}", **_HOLLOW)
    figure.supylabel("distance to the true target / distance of two samples of it")
    return axes


def _noise(figure: Figure, rows: pd.DataFrame) -> None:
    axes = _errors(figure, rows, "problem", "sigma", "beta")
    axes.set_xscale("symlog", linthresh=0.03, linscale=0.4)
    axes.set_xticks(rows["sigma"].unique(), [f"{value:g}" for value in rows["sigma"].unique()])
    axes.set_xticks([], minor=True)


def _data(figure: Figure, rows: pd.DataFrame) -> None:
    _errors(figure, rows, "beta", "data", "sigma").set_xscale("log", base=2)


_BAND = "(band: std over draws)"
_FIGURES = {  # drawn by, size in inches, title, x axis
    "gradient": (_gradient, (10, 5.6), "The CEFM gradient of a batch ({problem})", "batch size B"),
    "ess": (_ess, (8, 5), "How much of the data is left", "beta"),
    "fraction": (_fraction, (9, 4.2), "beta_for_ess (problems: median, range)", "batch size"),
    "noise": (_noise, (9, 7), f"Energies with an error {_BAND}", "sigma, std of the error"),
    "data": (_data, (9, 6.5), f"Errors on finite data of {{problem}} {_BAND}", "dataset size n"),
}


def main(argv: list[str] | None = None) -> None:
    """Answer every question and write what it found."""
    parser = make_parser(__doc__)
    parser.add_argument("--smoke", action="store_true", help="seconds: only shows that all works")
    parser.add_argument("--output", type=Path, default=Path("runs/weight_study"), help="folder")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    settings = SMOKE if arguments.smoke else Settings()
    for index, (name, study) in enumerate(STUDIES.items()):
        start, path = time.perf_counter(), arguments.output / f"{name}.csv"
        rows = study(jax.random.fold_in(jax.random.key(arguments.seed), index), settings)
        write(path, rows)
        print(f"{path}: {len(rows)} rows in {time.perf_counter() - start:.1f} s", flush=True)
        smallest = settings.fitted_from
        for beta in GRADIENT_BETAS if name == "gradient" else ():
            bias, error = (fitted_slope(rows, beta, c, smallest) for c in ("bias", "rms_error"))
            print(f"beta={beta:g}, B >= {smallest}: slopes {bias:.3f} (bias), {error:.3f} (error)")


if __name__ == "__main__":
    main()
