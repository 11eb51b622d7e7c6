# %% [markdown]
"""
# From data to guided samples

We have samples of a distribution `p` and an energy `E`, low where we want to be. We want samples of
`q(x) ∝ p(x) exp(-beta E(x))`, where the guidance scale `beta >= 0` says how much the energy counts.
Energy-weighted flow matching (Zhang, Zhang, Gu; ICLR 2025) trains a flow for `q` with the data of
`p`: the loss of each is weighted by `exp(-beta E)`, without a gradient of `E` or a second network.

This page is a script of cells for VS Code and Jupyter (by jupytext). In a terminal it is
`python -m experiments.examples.tutorial`, a minute; `docs/pages.py tutorial` makes the page.
"""

# %%
import argparse
from functools import partial
from itertools import accumulate
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

from efm_jax import exact, losses, networks, paths, sampling, weights
from efm_jax.distances import sliced_wasserstein
from experiments import figures
from experiments.paper.toy2d import problems

parser = argparse.ArgumentParser()
parser.add_argument("--output", type=Path, default=Path("runs/tutorial"), help="pictures' folder")
parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that it runs")
options, _ = parser.parse_known_args()  # a notebook's kernel has flags of its own
num_data, num_samples, num_steps = (512, 512, 30) if options.smoke else (8192, 2048, 4000)
plt.rcParams.update(figures.STYLE)


def scatter(axis, x, title, **style):
    """Draw points of the plane in the same window everywhere."""
    axis.set(title=title, xlim=(-2.4, 2.4), ylim=(-2.4, 2.4), aspect="equal")
    return axis.scatter(*np.asarray(x).T, **{"s": 2, **style})


# %% [markdown]
"""
## Data, energy, and how large beta may be

Two moons, and an energy that rises from 0 on the left to 1 on the right. `problem.target` draws
from `q` exactly: since `E >= 0`, it keeps each draw of `p` with probability `exp(-beta E)`.

The weights are normalized over the batch: `g = softmax(-beta E)`. As beta grows, fewer samples
carry the sum. The effective sample size `1 / sum g^2` counts them: at 20%, a batch of 512 is worth
about 100 equal samples. `beta_for_ess` finds the beta for a fraction, which means the same on every
problem; beta has the units of `1 / E`.
"""

# %%
problem = problems()["moons"]
data = problem.sample(jax.random.key(0), num_data)
energy = problem.energy(data)
beta = float(weights.beta_for_ess(energy, 0.2))
target = problem.target(jax.random.key(1), num_samples, beta)
print(f"energies from {energy.min():.2f} to {energy.max():.2f}; 20% effective at beta = {beta:.2f}")

figure, (left, middle, right) = plt.subplots(1, 3, figsize=(10, 3))
points = scatter(left, data, "data, p", c=energy)
figure.colorbar(points, ax=left, label="energy E")
scatter(middle, target, f"wanted, q at beta = {beta:.1f}", color="C1")
betas = np.linspace(0, 20, 41)
ess = jax.vmap(lambda b: weights.effective_sample_size(weights.energy_weights(energy, b)))(betas)
right.plot(betas, ess / num_data)
right.plot(beta, 0.2, "o")
right.set(title="effective sample size / n", xlabel="beta", ylim=(0, 1.05))
figures.save(figure, options.output / "1_problem.png")

# %% [markdown]
"""
## Paths, the direction of time, and the exact field

Here **t = 0 is data and t = 1 is noise**; many libraries have it the other way round. A path mixes
the two, `x_t = mu_t x_0 + sigma_t eps`; the conditional optimal-transport path has `mu = 1 - t` and
`sigma = t`. A flow is a velocity field `u(x, t)`: sampling starts from noise and integrates
`dx/dt = u` from t = 1 to 0.

For finitely many data points `exact.velocity` computes the guided field as a sum over them, whose
log-weights are `-beta E`. It is the oracle for what we train below, not a replacement: it visits
all data at every step, and its samples are the data points again.
"""

# %%
path = paths.conditional_ot()


@jax.jit
def oracle(beta, x, t):
    """Evaluate the exact field of the data at a guidance scale."""
    return exact.velocity(path, x, t, data, -beta * energy)


def euler_step(x, t, beta):
    """Go back from t to t - 0.02, hence the minus sign."""
    return x - 0.02 * oracle(beta, x, jnp.full(len(x), t))


noise = jax.random.normal(jax.random.key(2), (24, 2))
times = jnp.arange(1.0, 0.02, -0.02)
figure, axes = plt.subplots(1, 2, figsize=(8, 4.1))
for axis, b in zip(axes, (0.0, beta), strict=True):
    visited = np.stack([*accumulate(times, partial(euler_step, beta=b), initial=noise)])
    scatter(axis, data, f"exact field, beta = {b:.1f}", s=1, color="0.8")
    axis.plot(visited[..., 0], visited[..., 1], color="C0", linewidth=0.7)
    axis.scatter(*visited[0].T, s=12, color="black", label="noise, t = 1")
    axis.scatter(*visited[-1].T, s=12, color="C1", zorder=3, label="data, t = 0")
axes[0].legend(loc="upper right")
figures.save(figure, options.output / "2_exact_field.png")

# %% [markdown]
"""
The same 24 noise vectors end on both moons without guidance, and mostly on the left with it.

## Training

`losses.cefm` is conditional flow matching with the weights `softmax(-beta E)`; at `beta = 0` it is
the usual loss. A field is any function of `(x, t)`, here a Flax MLP. The whole training is one
`lax.scan`, and beta is an argument, so that both runs share one compilation.

The loss does not go to 0: its floor is the variance of the conditional velocity, which no field can
predict. The distance to the oracle can: its mean square over the mean square of the exact field, on
noisy points `x_t` of new samples, is the last thing printed. Times below 0.1 are left out: there
the oracle points to the single nearest data point, which a flow should not.
"""

# %%
network = networks.MLPField(hidden_dims=(128, 128, 128))
optimizer = optax.adam(optax.cosine_decay_schedule(5e-3, num_steps))


def flow(params):
    """Return the velocity field of these parameters."""
    return partial(network.apply, params)


@jax.jit
def train(key, beta):
    """Train on batches of 512: parameters, and each batch's loss and effective sample size."""
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


trained = {}
for b in (0.0, beta):
    trained[b], (values, ess) = train(jax.random.key(3), b)
    first, last = values[: num_steps // 20].mean(), values[-num_steps // 20 :].mean()
    print(f"beta {b:.1f}: loss {first:.3f} -> {last:.3f}, {ess.mean():.0f} of 512 effective")

t = jax.random.uniform(jax.random.key(4), (256,), minval=0.1)
for flow_beta, oracle_beta in ((0.0, 0.0), (beta, beta), (0.0, beta)):
    x0 = problem.target(jax.random.key(5), 256, oracle_beta)  # not the training data
    x = path.sample(x0, jax.random.normal(jax.random.key(6), x0.shape), t)
    truth, found = oracle(oracle_beta, x, t), flow(trained[flow_beta])(x, t)
    error = jnp.mean((found - truth) ** 2) / jnp.mean(truth**2)
    print(f"flow at beta = {flow_beta:.1f}, oracle at {oracle_beta:.1f}: {error:.3f}")

# %% [markdown]
"""
## Sampling

`sampling.sample` has Euler, midpoint, Heun and RK4 in equal steps, and adaptive Dopri5. Below, the
distance to exact samples of `q` (sliced Wasserstein) against the calls of the network. Two exact
samples of `q` are some way apart as well: that is the floor, and a lower number is luck.

A smooth field cannot tear the noise apart: a few samples of each flow stay between the moons.
"Stray" counts those farther than 0.15 from all data; the sliced Wasserstein distance hardly sees
them.
"""

# %%
noise = jax.random.normal(jax.random.key(7), (num_samples, 2))
# The distance takes the same directions every time.
distance = jax.jit(lambda x: sliced_wasserstein(jax.random.key(8), x, target))


def generate(params, **how):
    """Integrate the flow from the noise to data."""
    return jax.jit(lambda params: sampling.sample(flow(params), noise, **how))(params)


unguided, guided = (generate(trained[b], solver="dopri5") for b in (0.0, beta))
floor, adaptive = distance(problem.target(jax.random.key(9), num_samples, beta)), distance(guided)
print(f"two exact samples {floor:.3f}, dopri5 {adaptive:.3f}")
figure, axis = plt.subplots(figsize=(6, 3.6))
calls = [8] if options.smoke else [4, 8, 16, 32, 64]
for solver, stages in {"euler": 1, "midpoint": 2, "heun": 2, "rk4": 4}.items():
    draws = (generate(trained[beta], solver=solver, num_steps=n // stages) for n in calls)
    distances = [distance(x) for x in draws]
    print(f"{solver:8}", *(f"{n} calls {d:.3f} " for n, d in zip(calls, distances, strict=True)))
    axis.semilogx(calls, distances, "o-", label=solver)
axis.axhline(adaptive, color="black", linewidth=1, label="dopri5")
axis.axhline(floor, **figures.REFERENCE, label="two exact samples")
axis.set(xlabel="calls of the network", ylabel="sliced Wasserstein distance to q")
axis.set_xticks(calls, calls)
axis.set_xticks([], minor=True)
figures.log_numbers(axis)
axis.legend()
figures.save(figure, options.output / "3_solvers.png")

new = problem.sample(jax.random.key(10), num_samples)
shown = {"flow, beta = 0": unguided, f"flow, beta = {beta:.1f}": guided, "exact q": target}
figure, axes = plt.subplots(1, 3, figsize=(10, 3.5))
for axis, color, (name, x) in zip(axes, ("C0", "C1", "0.4"), shown.items(), strict=True):
    scatter(axis, x, name, color=color)
figures.save(figure, options.output / "4_samples.png")
for name, x in {"new data": new, **shown}.items():
    nearest = jnp.linalg.norm(x[:, None] - data, axis=-1).min(1)
    stray, mean = jnp.mean(nearest > 0.15), problem.energy(x).mean()
    print(f"{name:16}  mean energy {mean:.3f}  stray {stray:.2%}")

# %% [markdown]
"""
## Does the likelihood agree?

If both flows were exact, `log q - log p + beta E` would be one number everywhere: `-log Z`, with
`Z = E_p[exp(-beta E)]`. `sampling.log_likelihood` gives `log p` and `log q`, here with the exact
divergence. The standard deviation of the sum says, in nats, how far from that the flows are.
"""

# %%
log_z = float(jax.nn.logsumexp(-beta * energy) - jnp.log(num_data))
log_density = jax.jit(lambda params, x: sampling.log_likelihood(flow(params), x, num_steps=50))
print(f"-log Z = {-log_z:.2f}; log q - log p + beta E of the flows:")
figure, axis = plt.subplots(figsize=(6, 3.6))
for name, x in {"samples of p": new, "samples of q": target}.items():
    log_ratio = log_density(trained[beta], x) - log_density(trained[0.0], x)
    constant = np.asarray(log_ratio + beta * problem.energy(x))
    low, median, high = np.percentile(constant, [5, 50, 95])
    print(f"{name}: mean {constant.mean():.2f}, standard deviation {constant.std():.2f}, ", end="")
    print(f"median {median:.2f}, from {low:.2f} (5%) to {high:.2f} (95%)")
    axis.scatter(problem.energy(x), log_ratio, s=3, alpha=0.5, label=name)
axis.plot([0, 1], [-log_z, -beta - log_z], color="black", linewidth=1, label="-beta E - log Z")
axis.set(xlabel="energy E", ylabel="log q - log p of the flows", ylim=(-1.7 * beta, 5))
axis.legend()
figures.save(figure, options.output / "5_likelihood.png")

# %% [markdown]
"""
Where `q` has mass the flows follow the line to a few tenths of a nat. At high energy the weights
are close to 0, the guided flow sees almost no data, and its density is off by a nat or more.

## Where to go next

- Your own model: `experiments/examples/` has Flax NNX, Equinox and a plain function.
- Diffusion: `losses.ced` with a score network on `paths.vp_linear()`, and `sampling.sample_dpmpp`.
- Offline reinforcement learning: with `E = -Q(s, a)`, weights per state, and actions drawn anew
  from the improving policy, this is QIPO: `python -m launch.train`.
- Several devices: every loss takes `axis_name` and normalizes its weights over the global batch.
"""
