"""From a dataset's name to the dataset."""

from efm_jax.data import builtin
from efm_jax.data.d4rl import load_d4rl
from efm_jax.data.errors import DataError
from efm_jax.data.minari_source import load_minari
from efm_jax.types import Dataset, Rows, all_rows

_HDF5_ENDINGS = (".hdf5", ".h5")
_PATH_STARTS = ("/", "./", "../", "~")

DATASET_SOURCES = f"""\
{builtin.BUILTIN_DATASET}: the built-in dataset, scripted controllers on Pendulum-v1, recorded at first use;
a Minari id such as D4RL/pointmaze/umaze-v2: read from Minari's local folder, else downloaded;
a path ending in .hdf5 or .h5: a file in D4RL's layout, local or gs://."""


def load_dataset(name: str, *, env: str | None = None, rows: Rows = all_rows) -> Dataset:
    """Read a dataset from one of the ``DATASET_SOURCES``, validated, in the environment's own units.

    Args:
      name: the built-in id, a Minari id, or the path of a D4RL HDF5 file.
      env: a Gymnasium id to evaluate in, instead of the environment that the source names.
      rows: given the number of transitions that the source has, the slice of them to read. Of the rest,
        little more than the rewards is read; what it raises is raised.

    Raises:
      DataError: an unknown name, a failed download, or data that cannot be used; one line, what and where.
    """
    if _is_path(name):
        return load_d4rl(name, env=env, rows=rows)
    if name == builtin.BUILTIN_DATASET:
        builtin.ensure_recorded()
    return load_minari(name, env=env, rows=rows)


def _is_path(name: str) -> bool:
    if name.lower().endswith(_HDF5_ENDINGS):
        return True
    if name.startswith(_PATH_STARTS) or "://" in name:
        raise DataError(f"{name}: unknown dataset: expected a path ending in .hdf5 or .h5")
    return False
