"""How fast everything is, as ratios: ``python -m experiments.systems.benchmarks``."""

import importlib
import time
from typing import Any

Rows = list[dict[str, Any]]  # of a table of results


def measure(name: str, quick: bool) -> tuple[str, float, dict[str, Rows]]:
    """Name, seconds and tables of one module's measurements."""
    start = time.perf_counter()
    tables = importlib.import_module(f"{__name__}.{name}").run(quick)
    return name, round(time.perf_counter() - start, 1), tables
