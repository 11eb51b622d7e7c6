# %% [markdown]
"""
# Guiding images by an energy

The same loss on images: scikit-learn's 1797 handwritten digits of 8 x 8 pixels. Two energies, each
an ordinary Python function of an image: how much ink it has, and how many holes. The second counts
with `scipy.ndimage`, so it has no gradient at all; energy weighting needs none, because it only
weights the data.

This page is a script of cells for VS Code and Jupyter (by jupytext). In a terminal it is
`python -m experiments.examples.digits`, some minutes; it needs `pip install -e .[docs]`.
"""

# %%
import argparse
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from scipy import ndimage
from sklearn.datasets import load_digits

from efm_jax import losses, networks, paths, sampling, weights
from experiments import figures

parser = argparse.ArgumentParser()
parser.add_argument("--output", type=Path, default=Path("runs/digits"), help="pictures' folder")
parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that it runs")
options, _ = parser.parse_known_args()  # a notebook's kernel has flags of its own
num_steps, width, num_samples = (20, 32, 64) if options.smoke else (4000, 256, 1000)
plt.rcParams.update(figures.STYLE)

images = load_digits().images / 8 - 1  # 0 .. 16 -> -1 .. 1
images = np.random.default_rng(0).permutation(images).reshape(-1, 64).astype(np.float32)
data, held_out = images[:1500], images[1500:]


def show(axis, x, title, columns=16):
    """Draw the first 64 images in a grid."""
    spaced = np.pad(
        np.asarray(x[:64]).reshape(-1, 8, 8), [(0, 0), (1, 1), (1, 1)], constant_values=-1
    )
    rows = spaced.reshape(-1, columns, 10, 10).transpose(0, 2, 1, 3).reshape(-1, 10 * columns)
    axis.imshow(rows, cmap="gray_r", vmin=-1, vmax=1)
    axis.set(title=title, xticks=[], yticks=[])


# %% [markdown]
"""
## Two energies

`ink` is the mean darkness: low for thin digits. `holes` counts the white regions that are closed
in, and its energy is low where there are many: 0, 6, 8 and 9. Each is computed once for all data.
"""


# %%
def ink(x):
    """Mean darkness, from 0 to 1."""
    return (np.asarray(x).mean(-1) + 1) / 2


def no_holes(x):
    """Minus the number of closed white regions."""
    white = np.pad(np.asarray(x).reshape(-1, 8, 8) < -0.25, [(0, 0), (1, 1), (1, 1)], mode="edge")
    white[:, [0, -1]] = white[:, :, [0, -1]] = True  # the margin is outside
    return np.array([1.0 - ndimage.label(image)[1] for image in white], np.float32)


energies = {"ink": ink, "holes": no_holes}
figure, axes = plt.subplots(2, 1, figsize=(8, 5))
for axis, (name, energy) in zip(axes, energies.items(), strict=True):
    order = np.argsort(energy(data), kind="stable")
    show(axis, data[order[:: len(data) // 64]], f"data in the order of {name}, low energy first")
figures.save(figure, options.output / "1_energies.png")
for name, energy in energies.items():
    print(f"{name}: energy from {energy(data).min():.2f} to {energy(data).max():.2f}")

# %% [markdown]
"""
## Training

The flow of the plane's tutorial with a wider network. `beta_for_ess` chooses each guidance scale so
that a fifth of the data counts.
"""

# %%
path, network = paths.conditional_ot(), networks.MLPField((width,) * 3, input_skip=True)
optimizer = optax.adam(optax.cosine_decay_schedule(2e-3, num_steps))


@jax.jit
def train(key, energy, beta):
    """Train on batches of 256; the parameters and the mean effective sample size."""
    init_key, train_key = jax.random.split(key)

    def loss(params, key):
        index_key, loss_key = jax.random.split(key)
        index = jax.random.randint(index_key, (256,), 0, len(data))
        field = partial(network.apply, params)
        return losses.cefm(field, path, loss_key, jnp.asarray(data)[index], energy[index], beta)

    def step(carry, key):
        params, opt_state = carry
        (_, aux), grads = jax.value_and_grad(loss, has_aux=True)(params, key)
        updates, opt_state = optimizer.update(grads, opt_state)
        return (optax.apply_updates(params, updates), opt_state), aux["ess"]

    params = network.init(init_key, data[:1], jnp.zeros(1))
    keys = jax.random.split(train_key, num_steps)
    (params, _), ess = jax.lax.scan(step, (params, optimizer.init(params)), keys)
    return params, ess.mean()


@jax.jit
def generate(params):
    """Draw images in 20 midpoint steps."""
    noise = jax.random.normal(jax.random.key(1), (num_samples, 64))
    return sampling.sample(partial(network.apply, params), noise, solver="midpoint", num_steps=20)


drawn = {}
for name, energy in {"plain": ink, **energies}.items():
    values = jnp.asarray(energy(data))
    beta = 0.0 if name == "plain" else float(weights.beta_for_ess(values, 0.2))
    params, ess = train(jax.random.key(0), values, beta)
    drawn[name] = np.asarray(generate(params)), beta
    print(f"{name}: beta = {beta:.2f}, {ess:.0f} of 256 effective")

# %% [markdown]
"""
## Did it work?

The mean energy that `q` should have is the weighted mean over the data; on the samples the same
Python function is called again. "Nearest" is the median distance to the nearest image of the
training data: for held-out digits, a measure of what is new; for samples, well below it would be
copies.
"""


# %%
def nearest(x):
    """Median distance to the training data."""
    return np.median([np.linalg.norm(data - image, axis=1).min() for image in np.asarray(x)])


figure, axes = plt.subplots(3, 1, figsize=(8, 7.4))
titles = ("beta = 0", "guided to little ink", "guided to holes")
for axis, title, (x, beta) in zip(axes, titles, drawn.values(), strict=True):
    show(axis, x, f"{title}, beta = {beta:.1f}" if beta else title)
figures.save(figure, options.output / "2_samples.png")
print(f"nearest, held-out digits: {nearest(held_out):.2f}")
for name, energy in energies.items():
    x, beta = drawn[name]
    g = np.asarray(weights.energy_weights(jnp.asarray(energy(data)), beta))
    print(
        f"{name:6} mean energy: data {energy(data).mean():.3f}, plain flow "
        f"{energy(drawn['plain'][0]).mean():.3f}, wanted {g @ energy(data):.3f}, "
        f"guided flow {energy(x).mean():.3f}; nearest {nearest(x):.2f}"
    )

# %% [markdown]
"""
Ink ends where it should. Holes move three quarters of the way from the data to what is wanted; what
is missing was not looked into. Neither took a classifier, a gradient of the energy, or a second
network.
"""
