"""Run-time checks of the shapes and types that annotations state, by jaxtyping and beartype."""

from typing import Any

import beartype

# Modules whose annotations the whole test run checks at every call of their functions.
SHAPED = [
    f"efm_jax.{name}"
    for name in (
        "arrays",
        "paths",
        "weights",
        "losses",
        "exact",
        "solvers",
        "sampling",
        "networks",
        "guidance",
        "distances",
    )
]

_CHECK = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))  # ints are floats


def checked_with_the_result(function):
    """Check arguments together with the result, so that our own refusal of an argument comes first.

    For each function jaxtyping makes one stub of its arguments, called before the function, whose
    result is Any; and one of arguments and result, called after it.  Only the second is checked.
    """
    return function if function.__annotations__["return"] is Any else _CHECK(function)
