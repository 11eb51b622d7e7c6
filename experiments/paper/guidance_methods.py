"""The guidance methods of the comparison, each trained on the same data, steps and network size.

Every method is brought to the same form, a score field on its path, and sampled by the same
sampler. Data are drawn afresh on the device at every step.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import struct

from efm_jax import exact, guidance, losses, networks, paths
from efm_jax.training.state import TrainState
from efm_jax.training.step import make_chunk, make_step
from efm_jax.types import Array, Field, Params
from experiments.paper.toy2d import Problem

VP, OT, COSINE = paths.vp_linear(), paths.conditional_ot(), paths.vp_cosine()
PATHS = {"ot": OT, "cosine": COSINE, "vp": VP}

# Labels of classifier-free guidance: c = 1 is "low energy", drawn with p(c | x) = exp(-E(x)).
_LOW_ENERGY, _NULL_LABEL, _NUM_LABELS = 1, 2, 3
_DROP_RATE = 0.2
# Samples that contrastive energy prediction contrasts at one time t.
_CONTRAST = 64
# Draws of the data that training-free guidance compares.
_MONTE_CARLO = 1024
_static = functools.partial(struct.field, pytree_node=False)


@dataclasses.dataclass(frozen=True)
class Training:
    """What all methods share."""

    hidden_dims: tuple[int, ...] = (64, 64, 64)
    batch_size: int = 512
    num_steps: int = 6000
    learning_rate: float = 3e-3  # of Adam, falling to 0 along a cosine
    dtype: str | None = None  # what the fields of EFM and ED compute in


class Guided(struct.PyTreeNode):
    """A method at one guidance scale, trained or exact; programs take it as an argument."""

    method: str = _static()
    beta: float
    path: paths.GaussianPath = _static()
    score_fn: Callable[[Params, Array], Field] = _static()  # of params and beta; one for all scales
    params: Params
    num_params: int = 0  # of all networks that are evaluated to sample
    num_auxiliary: int = 0  # of those, in networks that only guide
    train_seconds: float | None = None  # for this scale, networks that scales share included

    @property
    def score(self) -> Field:
        return self.score_fn(self.params, self.beta)


class Task(NamedTuple):
    """What one of :data:`FAMILIES` trains its methods for, at every guidance scale."""

    problem: Problem
    betas: Sequence[float]
    training: Training
    key: Array


def _energy_weighted(method: str, path: paths.GaussianPath, task: Task) -> list[Guided]:
    """Energy-weighted flow matching (velocity), or on the VP path diffusion (noise prediction)."""
    width, dtype = task.training.hidden_dims, task.training.dtype
    network, diffusion = networks.MLPField(width, input_skip=True, dtype=dtype), path is VP

    def score_fn(params: Params, beta: Array) -> Field:
        del beta  # it is in the weights of the loss, and so in the parameters

        def score(x: Array, t: Array) -> Array:
            prediction = network.apply(params, x, t)
            if diffusion:
                return path.score(prediction, t)
            return path.score_from_velocity(prediction, x, t)

        return score

    def loss(params: Params, key: Array, x0: Array, energy: Array, beta: Array) -> tuple:
        if diffusion:
            return losses.ced(score_fn(params, beta), path, key, x0, energy, beta)
        field = functools.partial(network.apply, params)
        return losses.cefm(field, path, key, x0, energy, beta)

    params, seconds = _train(network, loss, task, task.betas)
    return [
        Guided(method, beta, path, score_fn, p, _size(p), 0, seconds)
        for beta, p in zip(task.betas, params, strict=True)
    ]


def _diffusion_family(task: Task) -> list[Guided]:
    """On the linear VP path: energy-weighted diffusion, CEP, classifier and classifier-free."""
    found = _energy_weighted("ed", VP, task)
    # The energy-weighted model at beta = 0 is the plain one, which the guided methods start from.
    plain = found[list(task.betas).index(0.0)]
    scalar = networks.LogRatio(task.training.hidden_dims)

    def scalar_fn(params: Params) -> Callable[[Array, Array], Array]:
        return functools.partial(scalar.apply, params)

    def plain_score(params: Params) -> Field:
        return plain.score_fn(params, 0.0)

    def cep_loss(params: Params, key: Array, x0: Array, energy: Array, beta: Array) -> tuple:
        group = math.gcd(_CONTRAST, x0.shape[0])
        x0, energy = x0.reshape(-1, group, x0.shape[-1]), energy.reshape(-1, group)
        return losses.cep(scalar_fn(params), VP, key, x0, energy, beta)

    def classifier_loss(params: Params, key: Array, x0: Array, energy: Array, _: Array) -> tuple:
        return guidance.classifier_loss(scalar_fn(params), VP, key, x0, jnp.exp(-energy))

    def contrastive(params: Params, beta: Array) -> Field:
        del beta
        return guidance.contrastive_guided(plain_score(params[0]), scalar_fn(params[1]))

    def classifier(params: Params, beta: Array) -> Field:
        return guidance.classifier_guided(plain_score(params[0]), scalar_fn(params[1]), beta)

    log_ratios, cep_seconds = _train(scalar, cep_loss, task, task.betas)
    (classifier_params,), cg_seconds = _train(scalar, classifier_loss, task, (1.0,))
    auxiliary = _size(classifier_params)
    sizes = plain.num_params + auxiliary, auxiliary
    for beta, log_ratio in zip(task.betas, log_ratios, strict=True):
        for method, score_fn, params, seconds in (
            ("cep", contrastive, log_ratio, cep_seconds),
            ("cg", classifier, classifier_params, cg_seconds),
        ):
            params, seconds = (plain.params, params), seconds + plain.train_seconds
            found.append(Guided(method, beta, VP, score_fn, params, *sizes, seconds))
    return found + _classifier_free(task)


def _classifier_free(task: Task) -> list[Guided]:
    network = networks.MLPField(task.training.hidden_dims, input_skip=True)

    def score(params: Params, labels: Array) -> Field:
        def field(x: Array, t: Array) -> Array:
            every = jnp.broadcast_to(labels, t.shape)
            condition = jax.nn.one_hot(every, _NUM_LABELS, dtype=x.dtype)
            return VP.score(network.apply(params, x, t, condition), t)

        return field

    def loss(params: Params, key: Array, x0: Array, energy: Array, _: Array) -> tuple:
        label_key, drop_key, loss_key = jax.random.split(key, 3)
        labels = jax.random.bernoulli(label_key, jnp.exp(-energy)).astype(jnp.int32)
        labels = guidance.drop_labels(drop_key, labels, _DROP_RATE, _NULL_LABEL)
        return losses.dsm(score(params, labels), VP, loss_key, x0)

    def guided(params: Params, beta: Array) -> Field:
        fields = (score(params, jnp.asarray(label)) for label in (_NULL_LABEL, _LOW_ENERGY))
        return guidance.classifier_free_guided(*fields, beta)

    (params,), seconds = _train(network, loss, task, (1.0,), jnp.zeros((1, _NUM_LABELS)))
    size = _size(params)
    return [Guided("cfg", beta, VP, guided, params, size, 0, seconds) for beta in task.betas]


def _monte_carlo(task: Task) -> list[Guided]:
    """Training-free guidance: draws of the data tilt the posterior mean of the plain OT flow."""
    (plain,) = _energy_weighted("monte_carlo", OT, task._replace(betas=(0.0,)))
    data = task.problem.sample(jax.random.fold_in(task.key, 1), _MONTE_CARLO)

    def guided(params: Params, beta: Array) -> Field:
        field, known = plain.score_fn(params[0], 0.0), (OT, *params[1:])
        return guidance.monte_carlo_guided(field, *known, beta, prediction="score")

    more = {"score_fn": guided, "params": (plain.params, data, task.problem.energy(data))}
    return [plain.replace(beta=beta, **more) for beta in task.betas]


def _train(
    network: networks.MLPField | networks.LogRatio,
    loss: Callable[..., tuple[Array, losses.Aux]],
    task: Task,
    betas: Sequence[float],
    *condition: Array,
) -> tuple[list[Params], float]:
    """One network for each scale, in one program on the same batches: parameters, seconds each."""
    problem, _, training, key = task
    optimizer = optax.adam(optax.cosine_decay_schedule(training.learning_rate, training.num_steps))

    def draw_batch(key: Array, beta: Array) -> tuple[Array, Array, Array]:
        x0 = problem.sample(key, training.batch_size)
        return x0, problem.energy(x0), beta

    step = make_step(lambda params, _, key, batch: loss(params, key, *batch), optimizer)
    # The step counter has no axis of its own, so that data, times and noise are drawn once for all
    # scales.
    axes = TrainState(step=None, params=0, average=0, opt_state=0)
    chunk = jax.vmap(make_chunk(step, draw_batch, training.num_steps), (axes, None, 0), (axes, 0))
    init_key, train_key = jax.random.split(key)

    def create(_: Array) -> TrainState:
        params = network.init(init_key, jnp.zeros((1, problem.dim)), jnp.zeros(1), *condition)
        return TrainState.create(params, optimizer)

    scales = jnp.asarray(betas)
    states = jax.vmap(create, out_axes=axes)(scales)
    compiled = jax.jit(chunk).lower(states, train_key, scales).compile()
    start = time.perf_counter()
    states, metrics = jax.block_until_ready(compiled(states, train_key, scales))
    seconds = (time.perf_counter() - start) / len(betas)
    first = metrics["first_nonfinite"]
    if (first >= 0).any():
        raise FloatingPointError(f"{problem.name}: the loss is not finite from step {first}")
    return [jax.tree.map(lambda x, i=i: x[i], states.params) for i in range(len(betas))], seconds


def _size(params: Params) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def oracles(
    problem: Problem, betas: Sequence[float], num_data: int, key: Array
) -> tuple[list[Guided], Callable[[Array, int, float], Array]]:
    """Exact guided fields on all paths, and classifier guidance with an exact classifier (eq. 4.6).

    In closed form for a mixture; otherwise on ``num_data`` points, which are then the whole
    distribution.  With exact draws ``(key, num, beta) -> [num, d]`` of what they should give.
    """
    if problem.mixture is not None:
        mixture, energy, target = problem.mixture, problem.energy, problem.target

        def exact_score(path: paths.GaussianPath, _: Params, beta: Array) -> Field:
            return functools.partial(mixture.guided(energy, beta).score, path)

        def classifier_score(_: Params, beta: Array) -> Field:
            return lambda x, t: mixture.cg_score(VP, x, t, energy, beta)

    else:
        data = problem.sample(key, num_data)
        energies = problem.energy(data)

        def exact_score(path: paths.GaussianPath, _: Params, beta: Array) -> Field:
            return lambda x, t: exact.score(path, x, t, data, -beta * energies)

        def classifier_score(_: Params, beta: Array) -> Field:
            return lambda x, t: exact.cg_score(VP, x, t, data, jnp.exp(-energies), beta)

        def target(key: Array, num: int, beta: float) -> Array:
            return data[jax.random.categorical(key, -beta * energies, shape=(num,))]

    fields = [
        (f"exact_{n}", path, functools.partial(exact_score, path)) for n, path in PATHS.items()
    ]
    fields.append(("exact_cg", VP, classifier_score))
    found = [Guided(name, beta, *field, ()) for name, *field in fields for beta in betas]
    return found, target


FAMILIES: dict[str, Callable[[Task], list[Guided]]] = {
    "ot": functools.partial(_energy_weighted, "efm_ot", OT),
    "cosine": functools.partial(_energy_weighted, "efm_cosine", COSINE),
    "vp": _diffusion_family,
    "monte_carlo": _monte_carlo,
}
