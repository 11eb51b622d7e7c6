"""One pure training step made from a loss and an optimizer, and many of them in one scan."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

from efm_jax import checks
from efm_jax.losses import Draws, sample_keys
from efm_jax.training.packing import pack_like, pack_state, unpack_state, unpacked
from efm_jax.training.state import TrainState
from efm_jax.types import Params
from efm_jax.weights import AxisName, psum_if

Batch = Any
Metrics = dict[str, Array]
# (params, average, key, batch) -> (this device's share of the loss, aux): see efm_jax.losses.
LossFn = Callable[[Params, Params, Array, Batch], tuple[Array, Metrics]]
StepFn = Callable[[TrainState, Array, Batch], tuple[TrainState, Metrics]]

# 1.5 MiB of float32: about the best of several sizes at widths 256 and 512 (docs/performance.md).
_CACHED_NUMBERS = 3 << 17
# 16 MiB of float32, of the 100 that a TPU's fast memory has.
_DRAWN_NUMBERS = 1 << 22


def make_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    average_rate: float = 1.0,
    axis_name: AxisName = None,
    part_size: int | None = None,
) -> StepFn:
    """A pure step ``(state, key, batch) -> (state, metrics)``.

    Args:
      loss_fn: returns this device's share of the global loss; shares and their gradients are
        summed.
      optimizer: optax transformation.
      average_rate: the Polyak rate of ``state.average``; 1 keeps it equal to the parameters.
      axis_name: mapped axis over which the batch is split.
      part_size: samples that a device computes at once, at least 1.  Its share of the batch, the
        leading axis of every leaf, is split into equal parts of at most that size, one after the
        other, and their gradients are averaged; None: all at once.  Loss and metrics must be means
        over samples, and a loss that draws must take a (typed) key for each sample, as
        :mod:`efm_jax.losses` do: then only rounding differs.  A share that does not divide into
        less than twice as many parts as needed is computed at once.

    Returns:
      The step; its metrics are ``loss``, ``grad_norm`` and what the loss reports.

    Raises:
      ValueError, TypeError: if ``part_size`` is not a positive integer.

    Example:
      >>> def loss(params, average, key, batch):
      ...     return ((params - batch) ** 2).mean(), {}
      >>> step = make_step(loss, optax.sgd(0.5), part_size=2)
      >>> state = TrainState.create(jnp.zeros(()), optax.sgd(0.5))
      >>> state, metrics = step(state, jax.random.key(0), jnp.ones(4))
      >>> float(state.params), float(metrics["loss"])
      (1.0, 1.0)
    """
    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    if part_size is not None:
        checks.check_integer("part_size", part_size, 1)
        grad_fn = _in_parts(grad_fn, part_size, axis_name)

    def step(state: TrainState, key: Array, batch: Batch) -> tuple[TrainState, Metrics]:
        params, average = unpacked(state.params), unpacked(state.average)
        (loss, aux), grads = grad_fn(params, average, key, batch)
        grads = pack_like(grads, state.params)
        loss, grads = psum_if((loss, grads), axis_name)
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            average = optax.incremental_update(params, state.average, average_rate)
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads), **aux}
        return TrainState(state.step + 1, params, average, opt_state), metrics

    return step


def cached_samples(numbers: int) -> int:
    """Samples of which a CPU's caches hold a layer: the ``part_size`` of :func:`make_step` there.

    On a CPU, passes over activations that its caches do not hold cost a good part of the matrix
    products' time.  An accelerator computes a batch at once.

    Args:
      numbers: activations of the widest layer that is trained, for one sample of one seed: of all
        actions and of a whole ensemble.
    """
    return max(_CACHED_NUMBERS // numbers, 1)


def _in_parts(grad_fn: Callable, part_size: int, axis_name: AxisName) -> Callable:
    def mean_of_parts(params: Params, average: Params, key: Array, batch: Batch) -> Any:
        size = jax.tree.leaves(batch)[0].shape[0]
        least = -(-size // part_size)
        num = next((n for n in range(least, 2 * least) if size % n == 0), 1)
        if num == 1:
            return grad_fn(params, average, key, batch)
        keys = key if isinstance(key, Draws) else sample_keys(key, size, axis_name)
        parts = keys, batch
        parts = jax.tree.map(lambda x: x.reshape(num, size // num, *x.shape[1:]), parts)

        def add(total: Any, part: tuple[Array, Batch]) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, grad_fn(params, average, *part)), None

        shapes = jax.eval_shape(grad_fn, params, average, *jax.tree.map(lambda x: x[0], parts))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        total, _ = lax.scan(add, zeros, parts)
        return jax.tree.map(lambda x: x / num, total)

    return mean_of_parts


def sample_rows(
    key: Array, batch_size: int, num_rows: int, *, num_devices: int = 1, axis_name: AxisName = None
) -> Array:
    """Rows, within this device's shard, of its part ``[batch_size / num_devices]`` of a stratified
    batch.

    Sample i of a batch of B is uniform on the i-th of B equal parts ``[i N / B, (i + 1) N / B)`` of
    the N rows.  A batch's mean stays an unbiased estimate of the dataset's, with at most the
    variance of independent draws; and with contiguous shards every device finds its samples at
    home.  A draw has a key folded from its place in the global batch, so any number of devices
    draws the same global batch.

    Args:
      key: of this step.
      batch_size: samples of the global batch, a multiple of ``num_devices``.
      num_rows: rows of the whole table, a multiple of ``num_devices``.
      num_devices: devices that share batch and table.
      axis_name: their mapped axis.
    """
    share = batch_size // num_devices
    device = 0 if axis_name is None else lax.axis_index(axis_name)
    # (i N + r) // B for r uniform on 0 .. N - 1 is exactly uniform; i N alone can exceed 32 bits.
    products = np.arange(batch_size, dtype=np.int64) * num_rows
    whole = (products // batch_size).reshape(num_devices, share)
    whole -= np.arange(num_devices)[:, None] * (num_rows // num_devices)
    rest = (products % batch_size).reshape(num_devices, share)
    whole, rest = (jnp.asarray(part, jnp.int32)[device] for part in (whole, rest))
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, device * share + jnp.arange(share))
    draws = jax.vmap(lambda key: jax.random.randint(key, (), 0, num_rows, jnp.int32))(keys)
    return whole + (rest + draws) // batch_size


def make_chunk(
    step: StepFn,
    draw_batch: Callable[[Array, Any], Batch],
    num_steps: int,
    *,
    draws: Callable[[Array, Batch], Any] | None = None,
    ahead: int = 1,
    packed: bool = False,
) -> Callable[[TrainState, Array, Any], tuple[TrainState, Metrics]]:
    """``num_steps`` steps in one ``lax.scan``: Python sees a chunk, not a step.

    Args:
      step: from :func:`make_step`.
      draw_batch: ``(key, tables) -> batch``.
      num_steps: length of the scan.
      draws: ``(key, batch) -> key``: what the loss would draw from its key, so that it can be
        drawn ahead, such as :func:`efm_jax.losses.draw`; None: the key itself.
      ahead: steps, a divisor of ``num_steps``, whose batches and noise are drawn together.  On an
        accelerator a step is a few dozen small programs, half of which draw.
      packed: keep parameters, their average and each moment in one buffer while the chunk runs
        (:mod:`efm_jax.training.packing`); for steps of :func:`make_step` and optimizers that treat
        every number alike.

    Returns:
      ``(state, key, tables) -> (state, metrics)``.  Step i uses ``fold_in(key, i)`` with i counted
      from the start of training, so chunks of any length draw the same batches.  Metrics are means
      over the chunk, and ``first_nonfinite`` is the offset of the first step whose loss or gradient
      is not finite, or -1.
    """

    def chunk(state: TrainState, key: Array, tables: Any) -> tuple[TrainState, Metrics]:

        @jax.named_scope("draw")
        def draw(number: Array) -> tuple[Any, Batch]:
            batch_key, loss_key = jax.random.split(jax.random.fold_in(key, number))
            batch = draw_batch(batch_key, tables)
            return loss_key if draws is None else draws(loss_key, batch), batch

        def take(state: TrainState, drawn: tuple[Any, Batch]) -> tuple[TrainState, Metrics]:
            return step(state, *drawn)

        def several(state: TrainState, _: None) -> tuple[TrainState, Metrics]:
            if ahead == 1:
                return take(state, draw(state.step))
            drawn = jax.vmap(draw)(state.step + jnp.arange(ahead))
            # The barrier keeps conversions of rows, to the type of products, from becoming
            # conversions of whole tables before the loop.
            return lax.scan(take, state, lax.optimization_barrier(drawn))

        state = pack_state(state) if packed else state
        state, history = lax.scan(several, state, length=num_steps // ahead)
        state = unpack_state(state)
        # A gradient that is not finite spoils the parameters one step before the loss shows it.
        bad = ~jnp.isfinite(history["loss"] + history["grad_norm"]).ravel()
        first = jnp.where(bad.any(), jnp.argmax(bad), -1)
        return state, {**jax.tree.map(lambda x: x.mean(), history), "first_nonfinite": first}

    return chunk


def steps_ahead(num_steps: int, numbers: int) -> int:
    """The most steps, a divisor of ``num_steps``, whose draws of ``numbers`` each fit a buffer."""
    most = max(_DRAWN_NUMBERS // numbers, 1)
    return max(n for n in range(1, num_steps + 1) if num_steps % n == 0 and n <= most)
