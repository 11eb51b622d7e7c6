"""Argument checks: the message names the argument, what was expected and what came."""

import importlib
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Float, TypeCheckError, jaxtyped

from efm_jax import checks
from tests.shapes import SHAPED, checked_with_the_result


def test_choice():
    checks.check_choice("solver", "euler", ["euler", "heun"])
    with pytest.raises(ValueError, match=r"solver: expected one of euler, heun; got 'rk9'"):
        checks.check_choice("solver", "rk9", ["euler", "heun"])
    with pytest.raises(ValueError, match=r"got 'eulr'; did you mean euler\?$"):
        checks.check_choice("solver", "eulr", ["euler", "heun"])
    assert checks.did_you_mean("euler", ["euler"]) == ""


def test_integer():
    for value in (1, 7, np.int64(3), np.int32(1)):
        checks.check_integer("num_steps", value, 1)
    bad = {0: ValueError, -3: ValueError, 1.5: TypeError, "2": TypeError}
    for value, error in [*bad.items(), (1.0, TypeError), (True, TypeError)]:
        with pytest.raises(error, match=r"num_steps: expected an integer.*got"):
            checks.check_integer("num_steps", value, 1)


def test_number():
    for value in (0.0, 1, 0.5, np.float32(0.25), np.asarray(1.0)):
        checks.check_number("fraction", value, minimum=0.0, maximum=1.0)
    for value in (-0.1, 1.1, np.nan, np.inf, -np.inf):
        with pytest.raises(ValueError, match=r"fraction: .*\[0.0, 1.0\]; got"):
            checks.check_number("fraction", value, minimum=0.0, maximum=1.0)
    checks.check_number("fraction", 1e-9, minimum=0.0, open_minimum=True)
    with pytest.raises(ValueError, match=r"\(0.0"):
        checks.check_number("fraction", 0.0, minimum=0.0, open_minimum=True)
    for value in ("1", b"1", [1.0], np.ones(2), 1j):
        with pytest.raises(TypeError, match="beta: expected a real scalar"):
            checks.check_number("beta", value)


def test_number_lets_a_traced_value_pass():
    def function(x):
        checks.check_number("x", x, minimum=0.0)
        return x

    assert jax.jit(function)(-1.0) == -1.0
    jax.vmap(function)(-jnp.ones(2))
    jax.grad(function)(-1.0)


def test_rank_and_shape():
    checks.check_rank("x", np.ones((2, 3)), 2)
    with pytest.raises(ValueError, match=r"x: expected at least 3 axes; got shape \(2, 3\)"):
        checks.check_rank("x", np.ones((2, 3)), 3)
    checks.check_shape("x", np.ones((2, 3)), (2, 3))
    checks.check_shape("x", jnp.ones(()), ())
    with pytest.raises(ValueError, match=r"x: expected shape \(3, 2\); got \(2, 3\)"):
        checks.check_shape("x", np.ones((2, 3)), (3, 2))


def test_float():
    for value in (1.0, np.ones(2, np.float32), jnp.ones(2), jnp.ones(2, jnp.bfloat16)):
        checks.check_float("x", value)
    for value in (1, np.ones(2, np.int32), np.ones(2, bool), np.ones(2, np.complex64)):
        with pytest.raises(TypeError, match=r"x: expected a floating-point array; got dtype"):
            checks.check_float("x", value)


# --- annotations, which the tests alone check ---


@jaxtyped(typechecker=checked_with_the_result)
def widened(x: Float[np.ndarray, "n d"], by: int) -> Float[np.ndarray, "n d+1"]:
    checks.check_rank("x", x, 2)
    return np.concatenate([x] + by * [x[:, :1]], axis=-1)


def test_annotations_are_checked_after_our_own_checks():
    assert widened(np.ones((3, 2)), 1).shape == (3, 3)
    with pytest.raises(ValueError, match="x: expected at least 2 axes"):
        widened(np.ones(3), 1)
    for x, by in ((np.ones((3, 2), int), 1), (np.ones((3, 2)), 2)):
        with pytest.raises(TypeCheckError):
            widened(x, by)


@pytest.mark.parametrize("name", SHAPED)
def test_the_functions_of_these_modules_are_checked(name):
    functions = inspect.getmembers(importlib.import_module(name), inspect.isfunction)
    own = [function for _, function in functions if function.__module__ == name]
    assert own
    assert all(inspect.unwrap(function) is not function for function in own)
