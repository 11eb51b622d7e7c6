"""Errors in one line: data that cannot be used, another library's, a package that is missing."""


class DataError(ValueError):
    """Unusable data; ``str(error)`` is one line that says what is wrong and where.

    Line breaks of a wrapped library's message are folded, so that a launcher can print it as it is.
    """

    def __init__(self, message: str):
        super().__init__(" ".join(str(message).split()))


def reason(error: BaseException, limit: int = 300) -> str:
    """Another library's error within a one-line message: its type, and its text up to ``limit``."""
    text = " ".join(str(error).split())
    if len(text) > limit:
        text = text[:limit] + "..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def install(extra: str) -> str:
    """Write the command that installs the packages of one of this package's extras."""
    return f"pip install 'efm-jax[{extra}]'"
