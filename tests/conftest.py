"""Eight virtual CPU devices for the whole test run, 64-bit numbers on demand, shapes checked."""

import contextlib
import ctypes
import gc
import itertools
import os
import resource
import shutil
import tempfile
from pathlib import Path

from tests.programs import QUICK_TO_COMPILE, share
from tests.shapes import SHAPED

_COUNT = "--xla_force_host_platform_device_count"
if _COUNT not in os.environ.get("XLA_FLAGS", ""):  # the user's flags stay in front, his count wins
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_COUNT}=8".strip()
os.environ["XLA_FLAGS"] += f" {QUICK_TO_COMPILE}"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

_OWN_PROGRAMS = None
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # make test keeps them in a folder of its own
    _OWN_PROGRAMS = tempfile.mkdtemp(prefix="efm_jax-programs-")
os.environ.update(share(os.environ.get("JAX_COMPILATION_CACHE_DIR", _OWN_PROGRAMS)))

import jax  # noqa: E402  the environment above comes first
import jaxtyping  # noqa: E402
import pytest  # noqa: E402

# Importing them, as the search for examples in docstrings does, would register them here.
collect_ignore = ["extension"]

# Before the first import of these modules, whose functions it wraps.
jaxtyping.install_import_hook(SHAPED, "tests.shapes.checked_with_the_result")


def pytest_collection_finish():
    """Look for garbage less often, and not in what the imports left: 6% of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 50, 100)


def pytest_unconfigure():
    if _OWN_PROGRAMS is not None:
        shutil.rmtree(_OWN_PROGRAMS, ignore_errors=True)


_ended = itertools.count()  # tests: not after each, because the kernel writes maps slowly
_cleared = 0.0  # the memory that was left when programs were last forgotten


def crowded():
    """Whether this process has many memory maps, or much more memory than was left last time."""
    maps, size = Path("/proc/self/maps"), Path("/proc/self/statm")
    if not maps.exists():
        return False
    resident = int(size.read_text().split()[1]) * resource.getpagesize()
    return resident > max(1.2e9, _cleared + 3e8) or maps.read_bytes().count(b"\n") > 15_000


@pytest.fixture(autouse=True)
def fewer_programs():
    """Forget compiled programs: each keeps memory, and maps, of which a process may have 65,530."""
    global _cleared
    yield
    if next(_ended) % 8 == 0 and crowded():
        jax.clear_caches()
        gc.collect()
        with contextlib.suppress(AttributeError):  # not glibc
            ctypes.CDLL(None).malloc_trim(0)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        _cleared = pages * resource.getpagesize()


@pytest.fixture
def x64():
    """Run one test with 64-bit types enabled."""
    if hasattr(jax, "enable_x64"):
        context = jax.enable_x64(True)
    else:
        from jax.experimental import enable_x64

        context = enable_x64()
    with context:
        yield


@pytest.fixture
def devices():
    """The four virtual devices that the tests of `pmap` and `shard_map` run on."""
    found = jax.devices()
    if len(found) < 4:
        pytest.skip(f"needs 4 devices; XLA_FLAGS of the caller gives {len(found)}")
    return found[:4]
