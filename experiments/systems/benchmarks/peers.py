"""The same network, batch and optimizer in PyTorch, and in a JAX loop that feeds every batch from
the host.

Parameters are copied into PyTorch and both networks' outputs compared before anything is timed.
PyTorch is optional: its rows are left out where it is not installed.
"""

import dataclasses
import functools
import importlib
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from efm_jax import losses, paths, sampling
from efm_jax.networks import UNetField
from efm_jax.training.state import TrainState
from efm_jax.training.step import StepFn, cached_samples, make_chunk, make_step, sample_rows
from efm_jax.types import Array, Params
from experiments.systems.benchmarks import timing

STEPS = 15
LEARNING_RATE = 1e-3
OBSERVATION_SIZE, ACTION_SIZE = 17, 6
_OURS = "efm_jax, scan of steps"


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What shrinks in a quick run."""

    hidden_dims: tuple[int, ...]
    batches: tuple[int, ...]
    chunk_rows: int  # samples that one timed call of the scan trains on
    rows: int  # of the dataset
    seconds: float  # of the clock, for each alternative
    compiles: bool  # with torch.compile, which takes half a minute for each program


FULL = Sizes((512, 256, 128), (256, 4096), 8192, 100_000, 3.0, True)
QUICK = Sizes((32, 16), (64,), 512, 1000, 0.2, False)


class Problem:
    """Network, parameters and data, the same for all."""

    def __init__(self, sizes: Sizes):
        self.sizes, self.path = sizes, paths.conditional_ot()
        self.network = UNetField(sizes.hidden_dims)
        rng = np.random.default_rng(0)
        self.observations = rng.standard_normal((sizes.rows, OBSERVATION_SIZE), np.float32)
        self.actions = rng.uniform(-1, 1, (sizes.rows, ACTION_SIZE)).astype(np.float32)
        inputs = jnp.zeros((1, ACTION_SIZE)), jnp.zeros(1), jnp.zeros((1, OBSERVATION_SIZE))
        params = jax.jit(self.network.init)(jax.random.key(0), *inputs)
        # Biases start at 0; a comparison of outputs must see them.
        noisy = [
            leaf + 0.02 * rng.standard_normal(leaf.shape, np.float32)
            for leaf in jax.tree.leaves(params)
        ]
        self.params: Params = jax.tree.unflatten(jax.tree.structure(params), noisy)

    def field(self, params: Params, observations: Array) -> Callable[[Array, Array], Array]:
        """Our velocity field."""
        return lambda x, t: self.network.apply(params, x, t, observations)

    def loss(self, params: Params, _: Params, key: Array, batch: tuple[Array, Array]) -> tuple:
        """Ours, of a training step."""
        observations, actions = batch
        return losses.cfm(self.field(params, observations), self.path, key, actions)


def train_scan(problem: Problem, batch: int) -> tuple[Callable[[], Any], int]:
    """Ours: data on the device, many steps in a scan.  A call, and how many steps it takes."""
    optimizer, steps = optax.adam(LEARNING_RATE), max(1, problem.sizes.chunk_rows // batch)
    data = jnp.asarray(problem.observations), jnp.asarray(problem.actions)

    def draw(key: Array, tables: tuple[Array, Array]) -> tuple[Array, Array]:
        indices = sample_rows(key, batch, problem.sizes.rows)
        return tables[0][indices], tables[1][indices]

    chunk = jax.jit(make_chunk(_step(problem, optimizer), draw, steps), donate_argnums=0)
    state = _fresh(problem, optimizer)

    def call() -> Array:
        nonlocal state
        state, metrics = chunk(state, jax.random.key(0), data)
        return metrics["loss"]

    return call, steps


def train_host(problem: Problem, batch: int) -> tuple[Callable[[], Any], int]:
    """The usual JAX loop: NumPy draws a batch, one jitted step, its loss back to the host."""
    optimizer, rng = optax.adam(LEARNING_RATE), np.random.default_rng(0)
    step = jax.jit(_step(problem, optimizer), donate_argnums=0)
    state, key = _fresh(problem, optimizer), jax.random.key(0)

    def call() -> float:
        nonlocal state, key
        rows = rng.integers(problem.sizes.rows, size=batch)
        key, step_key = jax.random.split(key)
        state, metrics = step(state, step_key, (problem.observations[rows], problem.actions[rows]))
        return float(metrics["loss"])

    return call, 1


def _step(problem: Problem, optimizer: optax.GradientTransformation) -> StepFn:
    return make_step(
        problem.loss, optimizer, part_size=cached_samples(max(problem.sizes.hidden_dims))
    )


def _fresh(problem: Problem, optimizer: optax.GradientTransformation) -> TrainState:
    # A copy: the steps donate their state.
    return TrainState.create(jax.tree.map(jnp.copy, problem.params), optimizer)


def sample_ours(problem: Problem, batch: int) -> Callable[[], Array]:
    """Euler steps in one compiled call."""

    @jax.jit
    def sample(params: Params, observations: Array, noise: Array) -> Array:
        return sampling.sample(
            problem.field(params, observations), noise, solver="euler", num_steps=STEPS
        )

    noise = jax.random.normal(jax.random.key(0), (batch, ACTION_SIZE))
    return functools.partial(
        sample, problem.params, jnp.asarray(problem.observations[:batch]), noise
    )


class Torch:
    """PyTorch's side: functions on a tree of tensors, which spares it the overhead of modules."""

    def __init__(self, torch: ModuleType, problem: Problem):
        self.torch, self.problem = torch, problem
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        torch.manual_seed(0)
        self.observations = torch.from_numpy(problem.observations)
        self.actions = torch.from_numpy(problem.actions)

    def parameters(self) -> Any:
        """A copy of the Flax parameters in PyTorch's layout, ``[out, in]``."""

        def convert(tree: Any) -> Any:
            if isinstance(tree, dict):
                return {name: convert(leaf) for name, leaf in tree.items()}
            return self.torch.tensor(np.ascontiguousarray(np.asarray(tree).T), requires_grad=True)

        return convert(self.problem.params["params"])

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

        first, depth = params["embedding"], len(self.problem.sizes.hidden_dims)
        angles = t[:, None] * (
            torch.pi / 2 * 2.0 ** torch.arange(self.problem.network.time_features // 2)
        )
        features = torch.stack([angles.cos(), angles.sin()], -1).flatten(1)
        embedding = silu(
            linear(features, first["kernel_0"], first["bias"])
            + linear(observations, first["kernel_1"])
        )
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
        """Both networks agree."""
        torch, problem, size = self.torch, self.problem, 64
        x, observations = problem.actions[:size], problem.observations[:size]
        t = np.linspace(0, 1, size, dtype=np.float32)
        ours = problem.field(problem.params, observations)(x, t)
        with torch.inference_mode():
            theirs = self.field(self.parameters(), *map(torch.from_numpy, (x, t, observations)))
        np.testing.assert_allclose(theirs.numpy(), ours, rtol=0, atol=1e-4)

    def train(self, batch: int, *, fused: bool, compiled: bool) -> tuple[Callable[[], Any], int]:
        """One step a call, data and batches in memory."""
        torch, params = self.torch, self.parameters()
        optimizer = torch.optim.Adam(jax.tree.leaves(params), lr=LEARNING_RATE, fused=fused)
        loss_fn = torch.compile(self.loss, dynamic=False) if compiled else self.loss

        def call() -> Any:
            rows = torch.randint(self.problem.sizes.rows, (batch,))
            x0, observations = self.actions[rows], self.observations[rows]
            loss = loss_fn(params, x0, torch.randn_like(x0), 1 - torch.rand(batch), observations)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return loss.detach()

        return call, 1

    def sample(self, batch: int, *, compiled: bool) -> Callable[[], Any]:
        """Euler steps from t = 1 to 0."""
        torch, params = self.torch, self.parameters()
        field = torch.compile(self.field, dynamic=False) if compiled else self.field
        observations, noise = self.observations[:batch], torch.randn(batch, ACTION_SIZE)

        @torch.no_grad()
        def call() -> Any:
            x = noise
            for i in range(STEPS):
                x = x - field(params, x, torch.full((batch,), 1 - i / STEPS), observations) / STEPS
            return x

        return call


def load_torch(problem: Problem) -> Torch | None:
    """PyTorch's side, checked against ours, or None and a line that says how to get it."""
    try:
        torch = importlib.import_module("torch")
    except ImportError:
        print(
            "peers: PyTorch is not installed, its rows are left out; pip install torch==2.13.0",
            flush=True,
        )
        return None
    peer = Torch(torch, problem)
    peer.check()
    return peer


def compiles(call: Callable[[], Any], what: str) -> bool:
    """Whether ``torch.compile`` works here: it needs a C++ compiler, and a Python that it knows."""
    try:
        call()
    except Exception as error:  # of any kind, from the compiler or from PyTorch
        reason = str(error).strip().splitlines() or [""]
        print(
            f"peers: torch.compile does not work for {what}: {type(error).__name__}: {reason[0]}",
            flush=True,
        )
        return False
    return True


def training(problem: Problem, peer: Torch | None, batch: int) -> list[dict[str, Any]]:
    """Milliseconds of a step in every way."""
    programs = {
        _OURS: train_scan(problem, batch),
        "JAX, batches from the host": train_host(problem, batch),
    }
    if peer is not None:
        programs["PyTorch, eager"] = peer.train(batch, fused=False, compiled=False)
        programs["PyTorch, eager, fused Adam"] = peer.train(batch, fused=True, compiled=False)
        first = peer.train(batch, fused=False, compiled=True)[0]
        if problem.sizes.compiles and compiles(first, f"a training step of {batch}"):
            programs["PyTorch, torch.compile"] = peer.train(batch, fused=False, compiled=True)
            programs["PyTorch, torch.compile, fused Adam"] = peer.train(
                batch, fused=True, compiled=True
            )
    times = timing.in_turns(
        {name: call for name, (call, _) in programs.items()}, problem.sizes.seconds
    )
    return _rows({name: times[name].best / steps for name, (_, steps) in programs.items()}, batch)


def euler(problem: Problem, peer: Torch | None, batch: int) -> list[dict[str, Any]]:
    """Milliseconds of one Euler step in every way."""
    calls: dict[str, Callable[[], Any]] = {"efm_jax": sample_ours(problem, batch)}
    if peer is not None:
        calls["PyTorch, eager"] = peer.sample(batch, compiled=False)
        compiled = peer.sample(batch, compiled=True)
        if problem.sizes.compiles and compiles(compiled, f"sampling {batch}"):
            calls["PyTorch, torch.compile"] = compiled
    times = timing.in_turns(calls, problem.sizes.seconds)
    return _rows({name: time.best / STEPS for name, time in times.items()}, batch)


def _rows(seconds: dict[str, float], batch: int) -> list[dict[str, Any]]:
    ours = next(iter(seconds.values()))
    return [
        {"what": name, "batch": batch, "ms a step": 1e3 * time, "ratio to ours": time / ours}
        for name, time in seconds.items()
    ]


def run(quick: bool) -> dict[str, list[dict[str, Any]]]:
    """The tables of this row of the suite."""
    problem = Problem(QUICK if quick else FULL)
    peer = load_torch(problem)
    dims = "/".join(map(str, problem.sizes.hidden_dims))
    titles = (
        f"CFM training step with Adam, U-shaped {dims}",
        f"Sampling, {STEPS} Euler steps, U-shaped {dims}",
    )
    tables: dict[str, list[dict[str, Any]]] = {title: [] for title in titles}
    for function, rows in zip((training, euler), tables.values(), strict=True):
        for batch in problem.sizes.batches:
            rows += function(problem, peer, batch)
    return tables
