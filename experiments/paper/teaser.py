"""The picture on the first page: one energy, three guidance scales, three ways to guide.

Classifier guidance and contrastive energy prediction (CEP) guide a diffusion model by a second
network; energy weighting trains one flow for each guidance scale, on the same data and steps.

    python -m experiments.paper.teaser --output=docs/teaser.png    # minutes on 2 CPU cores
"""

import argparse
from pathlib import Path

import jax

from efm_jax import sampling
from experiments import figures
from experiments.paper.guidance_methods import FAMILIES, Task, Training
from experiments.paper.toy2d import problems

COLUMNS = {
    "truth": "truth",
    "cg": "classifier guidance",
    "cep": "contrastive energy (CEP)",
    "efm_ot": "energy weighting",
}
BETAS = (0.0, 3.0, 10.0)
NUM_SAMPLES = 2000


def main(argv: list[str] | None = None) -> None:
    """Train, sample and draw."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("runs/teaser.png"))
    parser.add_argument("--problem", choices=list(problems()), default="eight_gaussians")
    parser.add_argument("--steps", type=int, default=Training.num_steps, help="of training")
    options = parser.parse_args(argv)
    problem, training = problems()[options.problem], Training(num_steps=options.steps)
    task = Task(problem, BETAS, training, jax.random.key(0))
    noise = jax.random.normal(jax.random.key(1), (NUM_SAMPLES, problem.dim))
    drawn = {("truth", b): problem.target(jax.random.key(2), NUM_SAMPLES, b) for b in BETAS}
    for model in (*FAMILIES["vp"](task), *FAMILIES["ot"](task)):
        if model.method in COLUMNS:
            drawn[model.method, model.beta] = sampling.sample_dpmpp(
                model.score, model.path, noise, num_steps=40
            )
    with figures.drawn(options.output, 9, 6.6) as figure:
        panels = figure.subplots(len(BETAS), len(COLUMNS), sharex=True, sharey=True)
        for row, beta in zip(panels, BETAS, strict=True):
            for axes, (method, name) in zip(row, COLUMNS.items(), strict=True):
                x = drawn[method, beta]
                points = axes.scatter(*x.T, c=problem.energy(x), s=2, vmin=0, vmax=1, linewidth=0)
                axes.set(xlim=(-2.3, 2.3), ylim=(-2.3, 2.3), xticks=[], yticks=[], aspect="equal")
                axes.set_title(name if beta == BETAS[0] else "")
                axes.spines[:].set_visible(False)
            row[0].set_ylabel(f"beta = {beta:g}")
        figure.colorbar(points, ax=panels, label="energy E", shrink=0.4, aspect=30)
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
