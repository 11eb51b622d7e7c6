"""The same network, batch and optimizer in PyTorch, and in a JAX loop fed from the host.

Parameters are copied into PyTorch and both networks' outputs compared before anything is timed.
PyTorch is optional: where it is not installed or fails, all rows without it come first.  On a GPU
both compute float32 products in TF32.
"""

import functools
import importlib
import json
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from efm_jax import losses, paths, sampling
from efm_jax.networks import UNetField
from efm_jax.training.state import TrainState
from efm_jax.training.step import (
    cached_samples,
    make_chunk,
    make_step,
    sample_rows,
    steps_ahead,
)
from efm_jax.types import Array, Field, Params
from experiments.systems.benchmarks.timing import Rows, Tables, in_turns

STEPS = 15
LEARNING_RATE = 1e-3
OBSERVATION_SIZE, ACTION_SIZE = 17, 6


class Sizes(NamedTuple):
    """What shrinks in a quick run."""

    hidden_dims: tuple[int, ...]
    batches: tuple[int, ...]  # of a training step
    states: tuple[int, ...]  # for which actions are sampled
    chunk_rows: int  # samples that one timed call of the scan trains on
    rows: int  # of the dataset
    seconds: float  # of the clock, for each alternative
    compiles: bool  # with torch.compile, which takes half a minute for each program


Way = tuple[Callable[[], Any], int]
FULL = Sizes((512, 256, 128), (256, 4096), (256, 4096), 8192, 100_000, 3.0, True)
QUICK = Sizes((32, 16), (64,), (64,), 512, 1000, 0.2, False)
DEVICE = FULL._replace(states=(1, 256, 4096), chunk_rows=100 * 4096)
SIZES = {"full": FULL, "quick": QUICK, "device": DEVICE, "smoke": QUICK}


class Ours:
    """Network, parameters and data, which are the same for all, and our ways to train and sample.

    A way is a call and how many steps it takes.
    """

    def __init__(self, sizes: Sizes):
        self.sizes = sizes
        self.network = UNetField(sizes.hidden_dims)
        random = np.random.default_rng(0)
        self.observations = random.standard_normal((sizes.rows, OBSERVATION_SIZE), np.float32)
        self.actions = random.uniform(-1, 1, (sizes.rows, ACTION_SIZE)).astype(np.float32)
        inputs = jnp.zeros((1, ACTION_SIZE)), jnp.zeros(1), jnp.zeros((1, OBSERVATION_SIZE))

        def noisy(leaf: Array) -> Array:  # biases start at 0; a comparison of outputs must see them
            return leaf + 0.02 * random.standard_normal(leaf.shape, np.float32)

        params = jax.jit(self.network.init)(jax.random.key(0), *inputs)
        self.params: Params = jax.tree.map(noisy, params)
        self.optimizer = optax.adam(LEARNING_RATE)
        self.on_cpu = jax.default_backend() == "cpu"
        part_size = cached_samples(max(sizes.hidden_dims)) if self.on_cpu else None
        self.step = make_step(self.loss, self.optimizer, part_size=part_size)

    def field(self, params: Params, observations: Array) -> Field:
        return lambda x, t: self.network.apply(params, x, t, observations)

    def loss(self, params: Params, _: Params, key: Array, batch: tuple[Array, Array]) -> tuple:
        """The loss of a training step, on observations and actions."""
        return losses.cfm(self.field(params, batch[0]), paths.conditional_ot(), key, batch[1])

    def fresh(self) -> TrainState:
        """A state of its own: the steps donate theirs."""
        return TrainState.create(jax.tree.map(jnp.copy, self.params), self.optimizer)

    def train_scan(self, batch: int) -> Way:
        """Data on the device, many steps in a scan, as the trainer makes them."""
        steps, state = max(1, min(100, self.sizes.chunk_rows // batch)), self.fresh()
        drawn = batch * (OBSERVATION_SIZE + 2 * ACTION_SIZE + 1)
        ahead = 1 if self.on_cpu else steps_ahead(steps, drawn)
        data = jnp.asarray(self.observations), jnp.asarray(self.actions)

        def draw(key: Array, tables: tuple[Array, Array]) -> tuple[Array, Array]:
            indices = sample_rows(key, batch, self.sizes.rows)
            return tables[0][indices], tables[1][indices]

        def noise(key: Array, batch: tuple[Array, Array]) -> losses.Draws:
            return losses.draw(key, batch[1])

        options = {"draws": noise, "ahead": ahead, "packed": not self.on_cpu}
        chunk = jax.jit(make_chunk(self.step, draw, steps, **options), donate_argnums=0)

        def call() -> Array:
            nonlocal state
            state, metrics = chunk(state, jax.random.key(0), data)
            return metrics["loss"]

        return call, steps

    def train_host(self, batch: int) -> Way:
        """The usual JAX loop: NumPy draws a batch, one jitted step, its loss back to the host."""
        step, random = jax.jit(self.step, donate_argnums=0), np.random.default_rng(0)
        state, key = self.fresh(), jax.random.key(0)

        def call() -> float:
            nonlocal state, key
            rows = random.integers(self.sizes.rows, size=batch)
            key, step_key = jax.random.split(key)
            state, metrics = step(state, step_key, (self.observations[rows], self.actions[rows]))
            return float(metrics["loss"])

        return call, 1

    def sample(self, batch: int) -> Way:
        """Euler steps in one compiled call."""

        @jax.jit
        def draw(params: Params, observations: Array, noise: Array) -> Array:
            field = self.field(params, observations)
            return sampling.sample(field, noise, solver="euler", num_steps=STEPS)

        noise = jax.random.normal(jax.random.key(0), (batch, ACTION_SIZE))
        inputs = self.params, jnp.asarray(self.observations[:batch]), noise
        return functools.partial(draw, *inputs), STEPS


class Torch:
    """PyTorch's side: functions on a tree of tensors, which spares it the overhead of modules.

    Calls return the object itself, for which the clock waits as for a JAX array.
    """

    def __init__(self, torch: Any, ours: Ours):
        self.torch, self.ours = torch, ours
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        torch.manual_seed(0)
        torch.set_default_device("cuda" if torch.cuda.is_available() else "cpu")
        self.observations = torch.tensor(ours.observations)
        self.actions = torch.tensor(ours.actions)
        self.check()
        torch.set_float32_matmul_precision("high")  # TF32 on a GPU

    def block_until_ready(self) -> "Torch":
        if self.torch.cuda.is_available():
            self.torch.cuda.synchronize()
        return self

    def parameters(self) -> Any:
        """A copy of the Flax parameters in PyTorch's layout, ``[out, in]``."""

        tensor = functools.partial(self.torch.tensor, requires_grad=True)
        arrays = jax.device_get(self.ours.params["params"])
        return jax.tree.map(lambda leaf: tensor(np.ascontiguousarray(leaf.T)), arrays)

    def field(self, params: Any, x: Any, t: Any, observations: Any) -> Any:
        """:class:`UNetField`, layer by layer."""
        torch = self.torch
        linear, silu = torch.nn.functional.linear, torch.nn.functional.silu

        def dense(layer: Any, h: Any) -> Any:
            return linear(h, layer["kernel"], layer.get("bias"))

        def block(layer: Any, h: Any) -> Any:
            inner = silu(dense(layer["Dense_0"], h) + dense(layer["Dense_1"], embedding))
            skip = dense(layer["Dense_3"], h) if "Dense_3" in layer else h
            return silu(dense(layer["Dense_2"], inner)) + skip

        first, depth = params["embedding"], len(self.ours.sizes.hidden_dims)
        octaves = 2.0 ** torch.arange(self.ours.network.time_features // 2)
        angles = t[:, None] * (torch.pi / 2 * octaves)
        features = torch.stack([angles.cos(), angles.sin()], -1).flatten(1)
        joint = torch.cat([features, observations], 1)
        embedding = silu(linear(joint, first["kernel"], first["bias"]))
        skips, h = [], x
        for i in range(depth):
            h = block(params[f"_ResidualBlock_{i}"], h)
            skips.append(h)
        for i, skip in enumerate(reversed(skips[:-1])):
            h = block(params[f"_ResidualBlock_{depth + i}"], dense(params[f"Dense_{i}"], h) + skip)
        return dense(params["out"], h)

    def loss(self, params: Any, x0: Any, noise: Any, t: Any, observations: Any) -> Any:
        """Conditional flow matching on the OT path."""
        x = (1 - t)[:, None] * x0 + t[:, None] * noise
        return ((self.field(params, x, t, observations) - (noise - x0)) ** 2).sum(-1).mean()

    def check(self) -> None:
        """Both networks agree, in full float32."""
        torch, ours, size = self.torch, self.ours, 64
        x, observations = ours.actions[:size], ours.observations[:size]
        t = np.linspace(0, 1, size, dtype=np.float32)
        with jax.default_matmul_precision("highest"):
            expected = ours.field(ours.params, observations)(x, t)
        with torch.inference_mode():
            found = self.field(self.parameters(), *map(torch.tensor, (x, t, observations)))
        np.testing.assert_allclose(found.cpu().numpy(), expected, rtol=0, atol=1e-4)

    def train(self, batch: int, *, compiled: bool, fused: bool = False) -> Way:
        """One step a call, data and batches in memory."""
        torch, params = self.torch, self.parameters()
        optimizer = torch.optim.Adam(jax.tree.leaves(params), lr=LEARNING_RATE, fused=fused)
        loss_fn = torch.compile(self.loss, dynamic=False) if compiled else self.loss

        def call() -> Any:
            rows = torch.randint(self.ours.sizes.rows, (batch,))
            x0, observations = self.actions[rows], self.observations[rows]
            loss = loss_fn(params, x0, torch.randn_like(x0), 1 - torch.rand(batch), observations)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return self

        return call, 1

    def ways(self, way: Callable[..., Way], batch: int, what: str) -> dict[str, bool]:
        """The names of the ways that work here, and whether each is compiled.

        ``torch.compile`` needs a C++ compiler, and a Python that it knows.
        """
        found = {"PyTorch, eager": False}
        if self.ours.sizes.compiles:
            try:
                way(batch, compiled=True)[0]()
                found["PyTorch, torch.compile"] = True
            except Exception as error:  # of any kind, from the compiler or from PyTorch
                name, reason = type(error).__name__, str(error).strip().partition("\n")[0]
                print(f"peers: torch.compile fails for {what} {batch}: {name}: {reason}")
        return found

    def sample(self, batch: int, *, compiled: bool) -> Way:
        """Euler steps from t = 1 to 0."""
        torch, params = self.torch, self.parameters()
        field = torch.compile(self.field, dynamic=False) if compiled else self.field
        observations, noise = self.observations[:batch], torch.randn(batch, ACTION_SIZE)

        @torch.no_grad()
        def call() -> Any:
            x = noise
            for i in range(STEPS):
                x = x - field(params, x, torch.full((batch,), 1 - i / STEPS), observations) / STEPS
            return self

        return call, STEPS


def training(ours: Ours, peer: Torch | None, batch: int) -> dict[str, Way]:
    """Every way to train."""
    programs = {"efm_jax, scan of steps": ours.train_scan(batch)}
    programs["JAX, batches from the host"] = ours.train_host(batch)
    if peer is not None:
        for name, compiled in peer.ways(peer.train, batch, "a training step of").items():
            programs[name] = peer.train(batch, compiled=compiled)
            programs[f"{name}, fused Adam"] = peer.train(batch, compiled=compiled, fused=True)
    return programs


def euler(ours: Ours, peer: Torch | None, batch: int) -> dict[str, Way]:
    """Every way to sample."""
    programs = {"efm_jax": ours.sample(batch)}
    if peer is not None:
        for name, compiled in peer.ways(peer.sample, batch, "sampling").items():
            programs[name] = peer.sample(batch, compiled=compiled)
    return programs


def measure(programs: dict[str, Way], batch: int, seconds: float) -> Rows:
    """Milliseconds of a step in every way, the first of them ours."""
    times = in_turns({name: call for name, (call, _) in programs.items()}, seconds)
    step = {name: times[name].best / steps for name, (_, steps) in programs.items()}
    ours = next(iter(step.values()))
    return [
        {"what": name, "batch": batch, "ms a step": 1e3 * time, "ratio to ours": time / ours}
        for name, time in step.items()
    ]


def run(sizes: Sizes) -> Tables:
    """A table of training and one of sampling.

    Raises:
      Exception: why an installed PyTorch does not work here, after all rows without it.
    """
    ours, peer, failure = Ours(sizes), None, None
    try:
        peer = Torch(importlib.import_module("torch"), ours)
    except Exception as error:  # of any kind; what follows is measured all the same
        failure = error
    dims = "/".join(map(str, sizes.hidden_dims))
    for batch in sizes.batches:
        found = measure(training(ours, peer, batch), batch, sizes.seconds)
        yield f"CFM training step with Adam, U-shaped {dims}", found
    for states in sizes.states:
        found = measure(euler(ours, peer, states), states, sizes.seconds)
        yield f"Sampling, {STEPS} Euler steps, U-shaped {dims}", found
    if isinstance(failure, ModuleNotFoundError):  # not done, but nothing failed
        print(json.dumps({"reason": f"{failure}: pip install torch", "status": "incomplete"}))
    elif failure is not None:
        raise failure
