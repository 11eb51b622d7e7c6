# %% [markdown]
"""
# From data to guided samples

We have samples of a distribution `p` and an energy `E`, low where we want to be. We want samples of

`q(x) ∝ p(x) exp(-beta E(x))`

where the guidance scale `beta >= 0` says how much the energy counts. At `beta = 0` the answer is
`p` itself. Energy-weighted flow matching (Zhang, Zhang, Gu; ICLR 2025) trains a flow for `q` with
the data of `p`: each sample's loss is weighted by `exp(-beta E)`. It needs no gradient of `E` and
no second network.

This page is `experiments/examples/tutorial.py`, a script of cells for VS Code and Jupyter (by
jupytext).

    python -m experiments.examples.tutorial --output=runs/tutorial    # about a minute on two CPU cores
    python docs/tutorial_page.py                             # writes this page, docs/tutorial.md, anew
"""

# %%
import argparse
import builtins
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import optax

from efm_jax import exact, losses, networks, paths, sampling, weights
from efm_jax.distances import sliced_wasserstein
from experiments.paper.toy2d import problems

if not hasattr(builtins, "__IPYTHON__"):
    matplotlib.use("Agg")  # a script only writes its pictures; a notebook also shows them
parser = argparse.ArgumentParser()
parser.add_argument(
    "--output", type=Path, default=Path("runs/tutorial"), help="folder of the pictures"
)
parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that it runs")
options, _ = parser.parse_known_args()  # a notebook's kernel has flags of its own
options.output.mkdir(parents=True, exist_ok=True)

num_data, num_samples, num_steps = (512, 512, 30) if options.smoke else (8192, 2048, 4000)


def scatter(axis, x, title, **style):
    """Points of the plane, in the same window everywhere."""
    points = axis.scatter(*np.asarray(x).T, **style)
    axis.set(
        title=title,
        xlim=(-2.4, 2.4),
        ylim=(-2.4, 2.4),
        aspect="equal",
        xticks=(-2, 0, 2),
        yticks=(-2, 0, 2),
    )
    return points


# %% [markdown]
"""
## Data and energy

Two moons, and an energy that rises from 0 on the left to 1 on the right. The answer is known:
since `E >= 0`, keeping each draw of `p` with probability `exp(-beta E)` draws from `q` exactly.
That is what `problem.target` does.

## How large may beta be?

The weights are normalized over the batch: `g = softmax(-beta E)`. As beta grows, fewer samples
carry the sum. The effective sample size `1 / sum g^2` counts them: at 20%, a batch of 512 is worth
about 100 equal samples. `beta_for_ess` finds the beta for a chosen fraction. The fraction means the
same on every problem; beta has the units of `1 / E`.
"""

# %%
problem = problems()["moons"]
data = problem.sample(jax.random.key(0), num_data)
energy = problem.energy(data)
beta = float(weights.beta_for_ess(energy, 0.2))
target = problem.target(jax.random.key(1), num_samples, beta)
print(f"energies from {energy.min():.2f} to {energy.max():.2f}; 20% effective at beta = {beta:.2f}")

figure, (left, middle, right) = plt.subplots(1, 3, figsize=(10, 3), layout="constrained")
points = scatter(left, data, "data, p", c=energy, s=2)
figure.colorbar(points, ax=left, label="energy E")
scatter(middle, target, f"wanted, q at beta = {beta:.1f}", s=2, color="tab:orange")
betas = np.linspace(0, 20, 41)
ess = jax.vmap(lambda b: weights.effective_sample_size(weights.energy_weights(energy, b)))(betas)
right.plot(betas, ess / num_data)
right.plot(beta, 0.2, "o", color="tab:orange")
right.set(
    title="effective sample size", xlabel="beta", ylabel="fraction of the data", ylim=(0, 1.05)
)
figure.savefig(options.output / "1_problem.png", dpi=80)

# %% [markdown]
"""
## Paths, and the direction of time

Here **t = 0 is data and t = 1 is noise**; many libraries have it the other way round. A path mixes
the two, `x_t = mu_t x_0 + sigma_t eps`. The conditional optimal-transport path has `mu = 1 - t` and
`sigma = t`. A flow is a velocity field `u(x, t)`: sampling starts from noise and integrates `dx/dt
= u` from t = 1 to 0.

## The exact field of finite data

For finitely many data points the guided field is a sum over them, without training.
`exact.velocity` computes it; the energy enters as the log-weight `-beta E` of each point. It is the
oracle for what we train below. It does not replace training: it visits all data at every step, and
its samples are the data points again.
"""

# %%
path = paths.conditional_ot()


def oracle(beta):
    """The exact field of the data at a guidance scale."""
    return lambda x, t: exact.velocity(path, x, t, data, -beta * energy)


@jax.jit
def trajectories(noise, beta):
    """Euler's method written out, ``[time, sample, 2]``; time falls, hence the minus sign."""
    dt = 0.02

    def step(x, t):
        x = x - dt * oracle(beta)(x, jnp.full(len(x), t))
        return x, x

    _, visited = jax.lax.scan(step, noise, jnp.arange(1.0, dt, -dt))
    return jnp.concatenate([noise[None], visited])


noise = jax.random.normal(jax.random.key(2), (24, 2))
figure, axes = plt.subplots(1, 2, figsize=(8, 4.1), layout="constrained")
for axis, b in zip(axes, (0.0, beta), strict=True):
    visited = np.asarray(trajectories(noise, b))
    scatter(axis, data, f"exact field, beta = {b:.1f}", s=1, color="0.8")
    axis.plot(visited[..., 0], visited[..., 1], color="tab:blue", linewidth=0.7)
    axis.scatter(*visited[0].T, s=12, color="black", label="noise, t = 1")
    axis.scatter(*visited[-1].T, s=12, color="tab:orange", zorder=3, label="data, t = 0")
axes[0].legend(loc="upper right", fontsize=8)
figure.savefig(options.output / "2_exact_field.png", dpi=80)

# %% [markdown]
"""
The same 24 noise vectors end on both moons without guidance, and mostly on the left with it.

## Training

`losses.cefm` is conditional flow matching with the weights `softmax(-beta E)`. Nothing else differs
from the usual loss, and at `beta = 0` it is the usual loss. A field is any function of `(x, t)`,
here a Flax MLP. The whole training is one `lax.scan`. Beta is an argument, so both runs share one
compilation.
"""

# %%
network = networks.MLPField(hidden_dims=(128, 128, 128))
optimizer = optax.adam(optax.cosine_decay_schedule(5e-3, num_steps))


@jax.jit
def train(key, beta):
    """Parameters after all batches of 512, with the loss and effective sample size of each."""
    init_key, train_key = jax.random.split(key)

    def loss(params, key):
        index_key, loss_key = jax.random.split(key)
        index = jax.random.randint(index_key, (512,), 0, num_data)
        return losses.cefm(flow(params), path, loss_key, data[index], energy[index], beta)

    def step(carry, key):
        params, opt_state = carry
        (value, aux), grads = jax.value_and_grad(loss, has_aux=True)(params, key)
        updates, opt_state = optimizer.update(grads, opt_state)
        return (optax.apply_updates(params, updates), opt_state), (value, aux["ess"])

    params = network.init(init_key, data[:1], jnp.zeros(1))
    keys = jax.random.split(train_key, num_steps)
    (params, _), history = jax.lax.scan(step, (params, optimizer.init(params)), keys)
    return params, history


def flow(params):
    """The field with these parameters."""
    return lambda x, t: network.apply(params, x, t)


trained = {}
for b in (0.0, beta):
    trained[b], history = train(jax.random.key(3), b)
    values, ess = map(np.asarray, history)
    first, last = values[: num_steps // 20].mean(), values[-num_steps // 20 :].mean()
    print(
        f"beta {b:.1f}: loss {first:.3f} -> {last:.3f}, effective sample size {ess.mean():.0f} of "
        "512"
    )

# %% [markdown]
"""
The loss does not go to 0: its floor is the variance of the conditional velocity, which no field can
predict. The distance to the oracle can. Below is the mean squared error over the mean square of the
exact field, on noisy points `x_t` of new samples. The unguided flow against the guided oracle gives
the scale. Times below 0.1 are left out: there the oracle points to the single nearest data point, a
flow should not.
"""


# %%
@jax.jit
def relative_error(params, b, x, t):
    """Mean squared distance to the oracle over the oracle's mean square."""
    truth = oracle(b)(x, t)
    return jnp.mean((flow(params)(x, t) - truth) ** 2) / jnp.mean(truth**2)


t = jax.random.uniform(jax.random.key(4), (256,), minval=0.1)
for name, flow_beta, oracle_beta in (
    ("unguided flow, unguided oracle", 0.0, 0.0),
    ("guided flow, guided oracle", beta, beta),
    ("unguided flow, guided oracle", 0.0, beta),
):
    x0 = problem.target(jax.random.key(5), 256, oracle_beta)  # not the training data
    x = path.sample(x0, jax.random.normal(jax.random.key(6), x0.shape), t)
    print(f"{name}: {relative_error(trained[flow_beta], oracle_beta, x, t):.3f}")

# %% [markdown]
"""
## Sampling

`sampling.sample` has Euler, midpoint, Heun and RK4 in equal steps, and adaptive Dopri5. Below, each
one's distance to exact samples of `q` (sliced Wasserstein) against its number of calls of the
network. Two exact samples of `q` are some way apart as well. That is the floor; a lower number is
luck.
"""

# %%
generate = jax.jit(
    lambda params, noise, solver, steps: sampling.sample(
        flow(params), noise, solver=solver, num_steps=steps
    ),
    static_argnames=("solver", "steps"),
)
noise = jax.random.normal(jax.random.key(7), (num_samples, 2))


@jax.jit
def distance(x):
    """To exact samples of q, along the same directions every time."""
    return sliced_wasserstein(jax.random.key(8), x, target)


guided = generate(trained[beta], noise, "dopri5", None)
floor, adaptive = distance(problem.target(jax.random.key(9), num_samples, beta)), distance(guided)
print(f"two exact samples {floor:.3f}, dopri5 {adaptive:.3f}")
figure, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
calls = [8] if options.smoke else [4, 8, 16, 32, 64]
for solver, calls_per_step in {"euler": 1, "midpoint": 2, "heun": 2, "rk4": 4}.items():
    distances = [
        distance(generate(trained[beta], noise, solver, n // calls_per_step)) for n in calls
    ]
    print(f"{solver:8}", *(f"{n} calls {d:.3f} " for n, d in zip(calls, distances, strict=True)))
    axis.loglog(calls, distances, "o-", markersize=4, label=solver)
axis.axhline(adaptive, color="black", linewidth=1, label="dopri5")
axis.axhline(floor, color="0.5", linestyle="--", linewidth=1, label="two exact samples")
axis.set(xlabel="calls of the network", ylabel="sliced Wasserstein distance to q")
axis.set_xticks(calls, calls)
axis.set_yticks([0.03, 0.05, 0.1, 0.2], [0.03, 0.05, 0.1, 0.2])
axis.minorticks_off()
axis.legend(fontsize=8)
figure.savefig(options.output / "3_solvers.png", dpi=80)

# %% [markdown]
"""
## Guided samples

The flow at `beta = 0`, which should look like the data; the guided flow; exact samples of `q`.
A smooth field cannot tear the noise apart: a few samples of each flow stay between the moons.
"Stray" counts those farther than 0.15 from all data; the sliced Wasserstein distance hardly sees
them.
"""

# %%
unguided = generate(trained[0.0], noise, "dopri5", None)
figure, (left, middle, right) = plt.subplots(1, 3, figsize=(10, 3.5), layout="constrained")
scatter(left, unguided, "flow, beta = 0", s=2, color="tab:blue")
scatter(middle, guided, f"flow, beta = {beta:.1f}", s=2, color="tab:orange")
scatter(right, target, f"exact q, beta = {beta:.1f}", s=2, color="0.4")
figure.savefig(options.output / "4_samples.png", dpi=80)


@jax.jit
def stray(x):
    """The fraction of points farther than 0.15 from all data."""
    return jnp.mean(jnp.min(jnp.linalg.norm(x[:, None] - data, axis=-1), axis=1) > 0.15)


new_data = problem.sample(jax.random.key(10), num_samples)
for name, x in {
    "new data": new_data,
    "flow, beta = 0": unguided,
    "exact q": target,
    "guided flow": guided,
}.items():
    print(f"{name:14}  mean energy {np.mean(problem.energy(x)):.3f}  stray {stray(x):.2%}")

# %% [markdown]
"""
## Does the likelihood agree?

If both flows were exact, `log q - log p + beta E` would be one number everywhere: `-log Z`, with
`Z = E_p[exp(-beta E)]`. `sampling.log_likelihood` gives `log p` and `log q`, here with the exact
divergence. The standard deviation of the sum over points says, in nats, how far from that the two
flows are.
"""

# %%
log_z = float(jax.nn.logsumexp(-beta * energy) - jnp.log(num_data))
log_density = jax.jit(lambda params, x: sampling.log_likelihood(flow(params), x, num_steps=50))
print(f"-log Z = {-log_z:.2f}; log q - log p + beta E of the flows:")
figure, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
for name, x, color in (
    ("samples of p", new_data, "tab:blue"),
    ("samples of q", target, "tab:orange"),
):
    log_ratio = np.asarray(log_density(trained[beta], x) - log_density(trained[0.0], x))
    constant = log_ratio + beta * np.asarray(problem.energy(x))
    low, median, high = np.percentile(constant, [5, 50, 95])
    print(f"{name}: mean {constant.mean():.2f}, standard deviation {constant.std():.2f}, ", end="")
    print(f"median {median:.2f}, from {low:.2f} (5%) to {high:.2f} (95%)")
    axis.scatter(problem.energy(x), log_ratio, s=3, color=color, alpha=0.5, label=name)
axis.plot([0, 1], [-log_z, -beta - log_z], color="black", linewidth=1, label="-beta E - log Z")
axis.set(xlabel="energy E", ylabel="log q - log p of the flows", ylim=(-1.7 * beta, 5))
axis.legend(fontsize=8)
figure.savefig(options.output / "5_likelihood.png", dpi=80)

# %% [markdown]
"""
Where `q` has mass the flows follow the line to a few tenths of a nat. At high energy the weights
are close to 0, the guided flow sees almost no data, and its density is off by a nat or more.

## Where to go next

- Your own model: `experiments/examples/` trains a Flax NNX model, an Equinox model and a plain
  function.
- Diffusion: `losses.ced` with a score network on `paths.vp_linear()`, and `sampling.sample_dpmpp`.
- Offline reinforcement learning: with `E = -Q(s, a)`, weights per state, and actions drawn anew
  from the improving policy, this is QIPO. `python -m launch.train` runs it on a dataset that it
  records itself.
- Several devices: every loss takes `axis_name` and normalizes its weights over the global batch.
"""
