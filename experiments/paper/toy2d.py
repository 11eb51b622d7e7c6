"""Sampling problems with a known answer: data, an energy, exact draws of ``q ∝ p exp(-beta E)``.

Six sets in the plane that the literature draws, each with an energy in [0, 1], and Gaussian
mixtures in 2, 8 and 32 dimensions whose guided densities and fields are closed forms.  Everything
is drawn on the device.

    python -m experiments.paper.toy2d --output=runs/toy2d.png   # a picture of the sets and targets
"""

import argparse
import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from efm_jax import exact
from efm_jax.types import Array
from experiments import figures


@dataclasses.dataclass(frozen=True)
class Problem:
    """Data and an energy."""

    name: str
    dim: int
    sample: Callable[[Array, int], Array]  # (key, n) -> [n, d], draws of p
    energy: Callable[[Array], Array]  # [..., d] -> [...], at least 0
    mixture: exact.GaussianMixture | None = None  # the data, where it is a mixture

    def target(self, key: Array, num: int, beta: float) -> Array:
        """``num`` independent exact draws of ``q ∝ p exp(-beta E)``, ``[num, d]``.

        In closed form for a mixture, by rejection otherwise: energies are at least 0, so a draw of
        p is kept with probability ``exp(-beta E)``.
        """
        if self.mixture is not None:
            return _sample_mixture(self.mixture.guided(self.energy, beta), key, num)
        found, total = [], 0
        while total < num:
            key, draw_key = jax.random.split(key)
            points, keep = _propose(self.sample, self.energy, 8 * num, draw_key, beta)
            found.append(np.asarray(points)[np.asarray(keep)])
            total += len(found[-1])
        return jnp.asarray(np.concatenate(found)[:num])


_sample_mixture = jax.jit(exact.GaussianMixture.sample, static_argnums=2)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _propose(
    sample: Callable, energy: Callable, num: int, key: Array, beta: Array
) -> tuple[Array, Array]:
    point_key, keep_key = jax.random.split(key)
    points = sample(point_key, num)
    return points, jax.random.uniform(keep_key, (num,)) < jnp.exp(-beta * energy(points))


def _polar(radius: Array, angle: Array) -> Array:
    return jnp.stack([radius * jnp.cos(angle), radius * jnp.sin(angle)], axis=-1)


def _radius(x: Array) -> Array:
    return jnp.sqrt(jnp.sum(x**2, axis=-1))


def _ramp(value: Array, low: float, high: float) -> Array:
    """0 below ``low``, 1 above ``high``, linear between."""
    return jnp.clip((value - low) / (high - low), 0, 1)


def swiss_roll(key: Array, num: int) -> Array:
    """A spiral of one and a half turns, standard deviation of the noise 0.07."""
    u_key, noise_key = jax.random.split(key)
    angle = 1.5 * math.pi * (1 + 2 * jax.random.uniform(u_key, (num,)))
    return _polar(angle / 7, angle) + 0.07 * jax.random.normal(noise_key, (num, 2))


def eight_gaussians(key: Array, num: int) -> Array:
    """Eight Gaussians of standard deviation 0.15 on a circle of radius 1.5."""
    mode_key, noise_key = jax.random.split(key)
    angle = jax.random.randint(mode_key, (num,), 0, 8) * (math.pi / 4)
    return _polar(1.5, angle) + 0.15 * jax.random.normal(noise_key, (num, 2))


def moons(key: Array, num: int) -> Array:
    """Two interleaving half circles, standard deviation of the noise 0.1."""
    moon_key, u_key, noise_key = jax.random.split(key, 3)
    upper = jax.random.bernoulli(moon_key, shape=(num,))
    angle = math.pi * jax.random.uniform(u_key, (num,))
    arc = _polar(1.0, angle)
    points = jnp.where(upper[:, None], arc, jnp.array([1.0, 0.5]) - arc)
    points = (points - jnp.array([0.5, 0.25])) * jnp.array([1.2, 2.0])
    return points + 0.1 * jax.random.normal(noise_key, (num, 2))


def rings(key: Array, num: int) -> Array:
    """Four circles of radii 0.5, 1, 1.5, 2, equally likely, deviation of the noise 0.05."""
    ring_key, u_key, noise_key = jax.random.split(key, 3)
    radius = 0.5 * (1 + jax.random.randint(ring_key, (num,), 0, 4))
    angle = 2 * math.pi * jax.random.uniform(u_key, (num,))
    return _polar(radius, angle) + 0.05 * jax.random.normal(noise_key, (num, 2))


def checkerboard(key: Array, num: int) -> Array:
    """The eight dark squares of a 4 x 4 board on [-2, 2]^2."""
    square_key, u_key = jax.random.split(key)
    square = jax.random.randint(square_key, (num,), 0, 8)
    row, column = square // 2, 2 * (square % 2) + (square // 2) % 2
    return jnp.stack([column, row], axis=-1) - 2 + jax.random.uniform(u_key, (num, 2))


def two_spirals(key: Array, num: int) -> Array:
    """Two arms of one and a half turns, radius at most 2, standard deviation of the noise 0.06."""
    arm_key, u_key, noise_key = jax.random.split(key, 3)
    along = jnp.sqrt(jax.random.uniform(u_key, (num,), minval=0.01))
    turn = math.pi * jax.random.bernoulli(arm_key, shape=(num,))
    noise = jax.random.normal(noise_key, (num, 2))
    return _polar(2 * along, 3 * math.pi * along + turn) + 0.06 * noise


def _mixture_problem(dim: int) -> Problem:
    """Five Gaussians and a quadratic energy around one of them, of mean one half under the data."""
    mean_key, variance_key = jax.random.split(jax.random.key(dim))
    means = jax.random.normal(mean_key, (5, dim))
    variances = jax.random.uniform(variance_key, (5,), minval=0.05, maxval=0.3)
    mixture = exact.GaussianMixture(jnp.zeros(5), means, variances)
    spread = jnp.mean(jnp.sum((means - means[0]) ** 2, axis=-1) + dim * variances)
    energy = exact.QuadraticEnergy(means[0], 1 / spread)
    return Problem(f"mixture_{dim}d", dim, mixture.sample, energy, mixture)


def problems() -> dict[str, Problem]:
    """All problems by name, the plane's first; energies rise outwards, rightwards or around."""

    def turn(x: Array) -> Array:
        # The cut falls between two modes.
        return jnp.mod(jnp.arctan2(x[..., 1], x[..., 0]) / (2 * jnp.pi) + 1 / 16, 1.0)

    plane = (
        (swiss_roll, lambda x: _ramp(_radius(x), 0.6, 2.1)),
        (eight_gaussians, turn),
        (moons, lambda x: _ramp(x[..., 0], -2.0, 2.0)),
        (rings, lambda x: _ramp(_radius(x), 0.4, 2.1)),
        (checkerboard, lambda x: _ramp(x[..., 0], -2.0, 2.0)),
        (two_spirals, lambda x: _ramp(_radius(x), 0.1, 2.1)),
    )
    found = [Problem(sample.__name__, 2, sample, energy) for sample, energy in plane]
    return {problem.name: problem for problem in (*found, *map(_mixture_problem, (2, 8, 32)))}


def main(argv: list[str] | None = None) -> None:
    """Draw the six sets of the plane, colored by energy, and below each its target at beta = 10."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("runs/toy2d.png"))
    output = parser.parse_args(argv).output
    plane = [problem for problem in problems().values() if problem.mixture is None]
    with figures.drawn(output, 2 * len(plane), 3.9) as figure:
        panels = figure.subplots(2, len(plane), sharex=True, sharey=True)
        for column, problem in zip(panels.T, plane, strict=True):
            draws = (problem.target(jax.random.key(0), 4000, beta) for beta in (0.0, 10.0))
            for axes, x in zip(column, draws, strict=True):
                points = axes.scatter(*x.T, c=problem.energy(x), s=1, vmin=0, vmax=1)
                axes.set_aspect("equal")
            column[0].set_title(problem.name)
        figure.colorbar(points, ax=panels, label="energy E", shrink=0.6)
        panels[0, 0].set_ylabel("data, p")
        panels[1, 0].set_ylabel("target, q at beta = 10")
    print(f"wrote {output}")


if __name__ == "__main__":
    main()
