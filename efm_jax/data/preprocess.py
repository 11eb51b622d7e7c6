"""From a dataset in the environment's units to what networks are trained on."""

from collections.abc import Callable, Iterator

import numpy as np

from efm_jax import checks
from efm_jax.data.dataset import Dataset, check_dataset
from efm_jax.errors import DataError
from efm_jax.types import Gather, Normalizer, Transitions, one_host

# An observation dimension that varies less than this, relative to max(1, |its mean|), is a constant
# up to float32 rounding: it is centered only (std 1), for dividing by its std would amplify nothing
# but rounding.
CONSTANT_TOLERANCE = 1e-6
# A dimension with a value farther than this many standard deviations hardly varies but for rare
# events, and its std is no scale of them: it is divided so that the farthest lies at _FARTHEST.
_RARE = 50.0
_FARTHEST = 10.0
# A dimension whose float32 numbers are farther apart than this share of its std has lost some of
# it, as a time in seconds since 1970 has, whose float32 steps are 128.
_COARSE = 0.01


def fit_normalizer(
    dataset: Dataset, gather: Gather = one_host, notes: list[str] | None = None
) -> Normalizer:
    """Mean and scale of the observations, ``[S]`` float32, and the action bounds, ``[A]``.

    The scale is the standard deviation, but 1 in a (nearly) constant dimension
    (``CONSTANT_TOLERANCE``), and a tenth of the farthest value's distance from the mean where that
    is more than 50 standard deviations, or 10 in a dimension that is constant but for its size, as
    a date is.  Where each host has some of the rows, ``gather`` brings
    their sums together and the result is that of the whole dataset.  ``notes`` get a line on
    dimensions that are scaled by their farthest value or that float32 is too coarse for.

    Raises:
      DataError: what :func:`.dataset.check_dataset` refuses.
    """
    check_dataset(dataset)
    # A column at a time, because that keeps the float64 copies small.
    columns = dataset.transitions.observations.T
    count = np.sum(gather(np.asarray(float(columns.shape[1]))))
    sums = np.array([column.sum(dtype=np.float64) for column in columns])
    mean = np.sum(gather(sums), axis=0) / count
    squares = [np.sum((column - m) ** 2) for column, m in zip(columns, mean, strict=True)]
    std = np.sqrt(np.sum(gather(np.array(squares)), axis=0) / count)
    ends = [(column.min(), column.max()) for column in columns]
    low, high = np.array(ends, np.float64).reshape(-1, 2).T
    far = np.max(gather(np.maximum(high - mean, mean - low)), axis=0)
    constant = std <= CONSTANT_TOLERANCE * np.maximum(1.0, np.abs(mean))
    rare = far > np.where(constant, _FARTHEST, _RARE * std)
    if notes is not None:
        apart = np.spacing(np.abs(mean).astype(np.float32))
        # Neighbors in float32 are rounding where they are near each other, as they are not far out.
        varies = far > np.where(apart >= 1, 0.4, 2.0) * apart
        notes.extend(_notes(rare, (apart > _COARSE * std) & varies))
    scale = np.where(rare, far / _FARTHEST, np.where(constant, 1.0, std))
    return Normalizer(
        observation_mean=mean.astype(np.float32),
        observation_std=scale.astype(np.float32),
        action_low=np.asarray(dataset.action_low, np.float32),
        action_high=np.asarray(dataset.action_high, np.float32),
    )


def _notes(rare: np.ndarray, coarse: np.ndarray) -> Iterator[str]:
    if rare.any():
        yield (
            f"observation dimensions {named(rare)} hardly vary but for values farther than "
            f"{_RARE:g} standard deviations from their mean: they are scaled to at most "
            f"{_FARTHEST:g}, not to a deviation of 1"
        )
    if coarse.any():
        yield (
            f"observation dimensions {named(coarse)} lie so far from 0 that float32 loses more "
            f"than {_COARSE:.0%} of their variation: subtract a constant from them, in the data "
            "and in the environment"
        )


def named(chosen: np.ndarray, most: int = 8) -> str:
    """The indices that are chosen in ``[D]`` bool, or the first of them and how many more."""
    indices = np.flatnonzero(chosen)
    more = len(indices) - most
    first = ", ".join(str(i) for i in indices[:most].tolist())
    return first + (f" and {more} more" if more > 0 else "")


def gather_episodes(dataset: Dataset, gather: Gather) -> Dataset:
    """The dataset of a host that read some of the rows, with all episodes' returns and lengths."""
    return dataset._replace(
        episode_returns=np.concatenate(gather(dataset.episode_returns)),
        episode_lengths=np.concatenate(gather(dataset.episode_lengths)),
    )


def preprocess(
    dataset: Dataset, normalizer: Normalizer, reward_transform: str = "none"
) -> Transitions:
    """The dataset's transitions, all float32 on the host, ready for training.

    Observations and next observations ``[N, S]`` are standardized, actions ``[N, A]`` scaled from
    their bounds to [-1, 1], rewards ``[N]`` transformed by ``REWARD_TRANSFORMS[reward_transform]``.

    Raises:
      ValueError: unknown ``reward_transform``, or a normalizer of other sizes.
      DataError: the transform cannot be applied to this dataset, or its arrays are refused by
        :func:`.dataset.check_dataset`.
    """
    check_dataset(dataset)
    checks.check_choice("reward_transform", reward_transform, REWARD_TRANSFORMS)
    checks.check_shape(
        "normalizer.observation_mean", normalizer.observation_mean, (dataset.observation_size,)
    )
    checks.check_shape("normalizer.action_low", normalizer.action_low, (dataset.action_size,))
    data = dataset.transitions
    actions = normalizer.scale_actions(data.actions)
    return Transitions(
        observations=_float32(normalizer.normalize_observations(data.observations)),
        actions=_float32(
            np.clip(actions, -1.0, 1.0)
        ),  # rounding in the scaling can leave the interval
        rewards=_float32(REWARD_TRANSFORMS[reward_transform](dataset)),
        next_observations=_float32(normalizer.normalize_observations(data.next_observations)),
        terminated=_float32(data.terminated),
    )


def n_step(data: Transitions, n: int, discount: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rewards, next observations and discounts of targets ``n`` steps ahead in the data.

    For n > 1 a target follows the behavior policy for n steps, so values travel n times faster and
    are those of a policy that is greedy only every n steps (Sutton and Barto 2018, Sec. 7.1).  Rows
    i and i + 1 are one trajectory where the next observation of i is the observation of i + 1;
    where a trajectory is truncated, or a step is missing, the target looks ahead as far as it goes.

    Args:
      data: ``N`` transitions on the host, those of an episode in order.
      n: steps, at least 1.
      discount: of one step, in [0, 1].

    Returns:
      Discounted sums of the next n rewards ``[N]``, observations after them ``[N, S]``, and
      ``discount ** n`` or 0 where the episode terminated on the way ``[N]``; of the data's types.
    """
    checks.check_integer("n_step", n, 1)
    rewards = np.asarray(data.rewards, np.float64)
    ended, goes_on = np.asarray(data.terminated) == 1, _goes_on(data)
    last = np.arange(len(rewards))  # the last step that a row's target covers
    total, factor = rewards.copy(), np.full(len(rewards), float(discount))
    for _ in range(n - 1):
        more = goes_on[last]
        last = last + more
        total += np.where(more, factor * rewards[last], 0.0)
        factor = np.where(more, factor * discount, factor)
        if not more.any():
            break
    dtype = np.asarray(data.rewards).dtype
    next_observations = np.asarray(data.next_observations)[last]
    return total.astype(dtype), next_observations, np.where(ended[last], 0.0, factor).astype(dtype)


def first_rows(data: Transitions) -> np.ndarray:
    """The rows with which episodes begin, as :func:`n_step` finds them."""
    return np.flatnonzero(np.concatenate([[True], ~_goes_on(data)[:-1]]))


def _goes_on(data: Transitions) -> np.ndarray:
    """Whether the next row is the next step of the same episode, ``[N]``."""
    goes_on = np.zeros(data.size, bool)
    followed = (data.next_observations[:-1] == data.observations[1:]).all(axis=1)
    goes_on[:-1] = followed & (np.asarray(data.terminated)[:-1] != 1)
    return goes_on


def _float32(array) -> np.ndarray:
    return np.asarray(array, np.float32)


def _none(dataset: Dataset) -> np.ndarray:
    return dataset.transitions.rewards


def _locomotion(dataset: Dataset) -> np.ndarray:
    """Rewards x 1000 / (max - min episode return), as IQL and QGPO have on D4RL's locomotion."""
    returns = dataset.episode_returns
    if len(returns) < 2:
        raise DataError(
            f"{dataset.name}: reward transform 'locomotion' needs at least 2 episodes; got "
            f"{len(returns)}"
        )
    spread = float(returns.max() - returns.min())
    if spread == 0.0:
        raise DataError(
            f"{dataset.name}: reward transform 'locomotion' divides by max - min episode return, "
            "and every "
            f"episode returned {returns.max():g}"
        )
    return dataset.transitions.rewards * (1000.0 / spread)


def _antmaze(dataset: Dataset) -> np.ndarray:
    """Rewards - 1: a cost for every step until the goal."""
    return dataset.transitions.rewards - 1.0


# Name -> function of the dataset to rewards [N].
REWARD_TRANSFORMS: dict[str, Callable[[Dataset], np.ndarray]] = {
    "none": _none,
    "locomotion": _locomotion,
    "antmaze": _antmaze,
}
