"""Argument checks: each raises with the argument's name, what was expected and what came."""

import difflib
from collections.abc import Collection, Iterable
from typing import Any

import jax
import jax.core
import numpy as np


def check_choice(name: str, value: Any, choices: Collection[Any]) -> None:
    """Require ``value`` to be one of ``choices``."""
    if value not in choices:
        expected = ", ".join(str(choice) for choice in choices)
        hint = did_you_mean(value, choices)
        raise ValueError(f"{name}: expected one of {expected}; got {value!r}{hint}")


def did_you_mean(value: Any, choices: Iterable[Any]) -> str:
    """Make the end of an error about ``value``: the choices that are spelled nearly so, if any."""
    close = difflib.get_close_matches(str(value), sorted(set(map(str, choices)) - {str(value)}))
    return f"; did you mean {' or '.join(close)}?" if close else ""


def check_integer(name: str, value: Any, minimum: int) -> None:
    """Require ``value`` to be a whole number of at least ``minimum``."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name}: expected an integer; got {value!r} ({type(value).__name__})")
    if value < minimum:
        raise ValueError(f"{name}: expected an integer >= {minimum}; got {value}")


def check_number(
    name: str,
    value: Any,
    *,
    minimum: float = -np.inf,
    maximum: float = np.inf,
    open_minimum: bool = False,
) -> None:
    """Require a scalar to be finite and in range; a traced one cannot be seen and passes."""
    if isinstance(value, jax.core.Tracer):
        return
    if isinstance(value, (str, bytes)) or np.ndim(value) != 0 or np.iscomplexobj(value):
        raise TypeError(f"{name}: expected a real scalar; got {value!r}")
    number = float(value)
    below = number <= minimum if open_minimum else number < minimum
    if not np.isfinite(number) or below or number > maximum:
        bracket = "(" if open_minimum else "["
        raise ValueError(
            f"{name}: expected a finite number in {bracket}{minimum}, {maximum}]; got {value}"
        )


def check_rank(name: str, array: Any, minimum: int) -> None:
    """Require ``array`` to have at least ``minimum`` axes."""
    if np.ndim(array) < minimum:
        raise ValueError(f"{name}: expected at least {minimum} axes; got shape {np.shape(array)}")


def check_not_empty(name: str, array: Any, axis: int) -> None:
    """Require ``array`` to have an entry along ``axis`` at least."""
    if np.shape(array)[axis] == 0:
        raise ValueError(f"{name}: expected at least one entry; got shape {np.shape(array)}")


def check_shape(name: str, array: Any, expected: tuple[int, ...]) -> None:
    """Require ``array`` to have exactly the shape ``expected``."""
    if np.shape(array) != tuple(expected):
        raise ValueError(f"{name}: expected shape {tuple(expected)}; got {np.shape(array)}")


def check_float(name: str, array: Any) -> None:
    """Require ``array`` to hold real floating-point numbers."""
    dtype = jax.dtypes.result_type(array)
    if not jax.numpy.issubdtype(dtype, np.floating):
        raise TypeError(f"{name}: expected a floating-point array; got dtype {dtype}")
