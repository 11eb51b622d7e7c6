"""Eight virtual CPU devices for the whole test run, and 64-bit numbers for the tests that ask for them."""

import os

_COUNT = "--xla_force_host_platform_device_count"
if _COUNT not in os.environ.get("XLA_FLAGS", ""):  # the user's own flags stay in front, his own count wins
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_COUNT}=8".strip()
# Tests compile hundreds of programs and run each for a moment.
os.environ["XLA_FLAGS"] += " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402  the environment above comes first
import pytest  # noqa: E402


@pytest.fixture(autouse=True, scope="module")
def fewer_programs():
    """Forget compiled programs: each keeps memory maps, and the system allows a process 65,530 of them."""
    yield
    jax.clear_caches()


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
