"""Files that attack: none of them runs code, reads another file, or takes all memory."""

import contextlib
import io
import json
import os
import shutil
import sys
import zipfile
from pathlib import Path

import gymnasium
import h5py
import numpy as np
import pytest
from gymnasium import spaces
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from efm_jax.data import DataError, load_dataset, validation
from efm_jax.envs import evaluate, specs
from tests.unit.data_fixtures import box, d4rl_arrays, episode, fails, write_d4rl, write_minari

ROOT = Path(__file__).parents[2]
SPEC = json.loads(gymnasium.spec("Pendulum-v1").to_json())
# Importing this leaves a trace, and so does calling it.
TRAP = "import pathlib\npathlib.Path('sprung').write_text('')\ndef env(*a, **k): pass\n"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.setattr(specs, "_allowed", set())
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "trap.py").write_text(TRAP)
    (tmp_path / "minari").mkdir()
    yield tmp_path
    assert not (tmp_path / "sprung").exists()
    assert "trap" not in sys.modules


def wrapper(entry_point, **kwargs):
    name = entry_point.rpartition(":")[2]
    return {"additional_wrappers": [{"name": name, "entry_point": entry_point, "kwargs": kwargs}]}


NESTED = "[" * 100_000
EVIL_SPECS = {
    "entry point of a module": (SPEC | {"entry_point": "os:system"}, "os:system"),
    "that ends the program": (SPEC | {"entry_point": "os:_exit"}, "os:_exit"),
    "entry point here": (SPEC | {"entry_point": "trap:env"}, "trap:env"),
    "of Gymnasium, but another": (
        SPEC | {"entry_point": "gymnasium.utils.play:play"},
        "gymnasium.utils.play:play",
    ),
    "unknown id": (SPEC | {"id": "Mine-v0", "entry_point": "trap:env"}, "--allow_env=trap"),
    "module in the id": (SPEC | {"id": "trap:Mine-v0"}, "trap:Mine"),
    "bare id with a module": ("trap:Mine-v0", "trap:Mine-v0"),
    "wrapper of a module": (SPEC | wrapper("os:system", command="true"), "os:system"),
    "wrapper here": (SPEC | wrapper("trap:env"), "trap:env"),
    "wrapper that writes": (
        SPEC | wrapper("gymnasium.wrappers:RecordVideo", video_folder="x"),
        "RecordVideo",
    ),
    "argument that is a path": (SPEC | {"kwargs": {"xml_file": "/etc/passwd"}}, "/etc/passwd"),
    "no arguments": (SPEC | {"kwargs": 3}, "keyword arguments"),
    "no limit": (SPEC | {"max_episode_steps": -3}, "max_episode_steps"),
    "deep": ('{"id": ' + NESTED, "RecursionError"),
    "number": (SPEC | {"id": 7}, "EnvSpec"),
}


def text_of(spec):
    return spec if isinstance(spec, str) else json.dumps(spec)


def minari_with(folder, name="test/evil-v0", **changes):
    steps = [episode(2, np.zeros((3, 3), np.float32), actions=np.zeros((2, 1), np.float32))]
    write_minari(name, steps, box(3, np.inf), box(1, 2.0), env="Pendulum-v1")
    path = folder / "minari" / name / "data" / "metadata.json"
    metadata = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in metadata.items() if v is not None}))
    return name


@pytest.mark.parametrize("field", ["env_spec", "eval_env_spec", "no spaces"])
@pytest.mark.parametrize("attack", EVIL_SPECS)
def test_metadata_chooses_no_code(folder, attack, field):
    spec, words = EVIL_SPECS[attack]
    changes = {"eval_env_spec" if field == "eval_env_spec" else "env_spec": text_of(spec)}
    if field == "no spaces":
        changes["observation_space"] = None
    fails(minari_with(folder, **changes), words)


# HDF5 keeps attributes of 64 kB at most.
@pytest.mark.parametrize("attack", [a for a in EVIL_SPECS if a != "deep"])
def test_an_attribute_of_a_file_chooses_no_code(folder, attack):
    spec, words = EVIL_SPECS[attack]
    arrays = d4rl_arrays([0, 0, 1], [0, 0, 0], action_size=1)
    fails(write_d4rl(folder / "a.hdf5", arrays, env_id=text_of(spec)), words)


# A bare id, in Python, is the user's own.
@pytest.mark.parametrize("attack", [a for a in EVIL_SPECS if a[:4] != "bare"])
def test_a_spec_in_a_configuration_chooses_no_code(attack):
    spec, words = EVIL_SPECS[attack]
    with pytest.raises(DataError) as caught:
        evaluate(lambda observations, step: None, text_of(spec), episode_seeds=[0])
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_plain_id_in_a_configuration_is_no_spec():
    assert specs.id_of('{"id": "Pendulum-v1"}') == "Pendulum-v1"
    for text in ("trap:Mine-v0", "Pendulum-v1", '{"id": 7}', "[]", "{}", NESTED):
        assert specs.id_of(text) is None


def test_what_the_user_allows_or_names_is_made(folder):
    (folder / "mine.py").write_text(
        "import gymnasium\nfrom gymnasium.envs.classic_control import PendulumEnv\n"
        "class Mine(PendulumEnv): pass\n"
        "gymnasium.register('Mine-v3', entry_point='mine:Mine', max_episode_steps=4)\n"
    )
    spec = SPEC | {"id": "Mine-v3", "entry_point": "mine:Mine", "max_episode_steps": 4}
    name = minari_with(folder, env_spec=json.dumps(spec))
    try:
        fails(name, "'mine:Mine'", "--allow_env=mine")
        named = load_dataset(name, env="mine:Mine-v3")
        assert json.loads(named.env_spec)["entry_point"] == "mine:Mine"
        assert load_dataset(name).env_spec == named.env_spec  # named, so allowed from now on
        specs._allowed.clear()
        fails(name, "--allow_env=mine")
        specs.allow(["mine"])
        assert load_dataset(name).env_spec == named.env_spec
        # What is allowed is what is registered, not what the file says of it.
        fails(
            minari_with(
                folder, "test/b-v0", env_spec=json.dumps(spec | {"entry_point": "mine:json"})
            ),
            "mine:json",
        )
        act = lambda observations, step: np.zeros((1, 1, 1))  # noqa: E731
        assert evaluate(act, named.env_spec, episode_seeds=[0]).lengths.tolist() == [[4]]
        import mine

        assert evaluate(act, mine.Mine, episode_seeds=[0], max_steps=3).lengths.tolist() == [[3]]
    finally:
        gymnasium.registry.pop("Mine-v3", None)
        sys.modules.pop("mine", None)


def test_gymnasiums_own_wrappers_are_applied(folder):
    spec = SPEC | wrapper(
        "gymnasium.wrappers.transform_action:RescaleAction", min_action=-1.0, max_action=1.0
    )
    dataset = load_dataset(minari_with(folder, env_spec=json.dumps(spec)))
    env = gymnasium.make(specs.stated("test", dataset.env_spec))
    assert env.action_space == spaces.Box(-1.0, 1.0, (1,))


def test_wrappers_of_an_allowed_package_are_applied(folder):
    (folder / "mywrap").mkdir()
    (folder / "mywrap" / "__init__.py").write_text("")
    (folder / "mywrap" / "half.py").write_text(
        "from os import system\nimport gymnasium\n"
        "from gymnasium.wrappers import RecordVideo\n"
        "class Half(gymnasium.ActionWrapper, gymnasium.utils.RecordConstructorArgs):\n"
        "    def __init__(self, env, factor):\n"
        "        gymnasium.utils.RecordConstructorArgs.__init__(self, factor=factor)\n"
        "        super().__init__(env)\n"
        "        self.factor = factor\n"
        "    def action(self, action): return self.factor * action\n"
    )

    def asking(entry_point, **kwargs):
        shutil.rmtree(folder / "minari" / "test", ignore_errors=True)
        return minari_with(folder, env_spec=json.dumps(SPEC | wrapper(entry_point, **kwargs)))

    try:
        fails(asking("mywrap.half:Half", factor=0.5), "'mywrap.half:Half'", "--allow_env=PACKAGE")
        assert "mywrap" not in sys.modules
        specs.allow(["mywrap"])
        dataset = load_dataset(asking("mywrap.half:Half", factor=0.5))
        env = gymnasium.make(specs.stated("test", dataset.env_spec))
        assert env.get_wrapper_attr("factor") == 0.5
        # Neither others, nor what is no wrapper of the package, nor files.
        fails(asking("trap:env"), "trap:env")
        for name in ("system", "RecordVideo", "gymnasium", "absent"):
            fails(asking(f"mywrap.half:{name}"), name)
        fails(asking("mywrap.trap:env"), "cannot be imported")
        fails(asking("mywrap.half:Half", factor="/etc/passwd"), "/etc/passwd")
        fails(asking("mywrapper:Half"), "mywrapper:Half")
    finally:
        for name in ("mywrap", "mywrap.half"):
            sys.modules.pop(name, None)


@pytest.mark.parametrize("name", ["os.path;x", "../trap", "no_such_module"])
def test_what_is_allowed_is_a_module(name):
    with pytest.raises(ValueError, match=r"^allow_env: "):
        specs.allow([name])


# HDF5: other files, and types that are no numbers.


def virtual(file, other):
    layout = h5py.VirtualLayout((3,), "f4")
    layout[:] = h5py.VirtualSource(other, "rewards", (3,))
    file.create_virtual_dataset("rewards", layout)


def external_storage(file, other):
    file.create_dataset("rewards", (3,), "f4", external=[("/etc/passwd", 0, 12)])


def references(file, other):
    file.create_dataset("rewards", (3,), h5py.ref_dtype)


def through_a_soft_link(file, other):
    file["out"] = h5py.ExternalLink(other, "/")
    file["rewards"] = h5py.SoftLink("/out/rewards")


def objects(file, other):
    file.create_dataset(
        "rewards", data=np.array(["a", "b", "c"], object), dtype=h5py.string_dtype()
    )


def vlen(file, other):
    file.create_dataset("rewards", (3,), h5py.vlen_dtype(np.float32))


def loop(file, other):
    file["rewards"] = h5py.SoftLink("/rewards")


def dangling(file, other):
    file["rewards"] = h5py.SoftLink("/nothing")


def unknown_filter(file, other):
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_chunk((3,))
    properties.set_filter(32015, h5py.h5z.FLAG_OPTIONAL)
    space = h5py.h5s.create_simple((3,))
    h5py.h5d.create(file.id, b"rewards", h5py.h5t.NATIVE_FLOAT, space, properties)


HDF5_ATTACKS = {
    "external link": (
        lambda file, other: file.__setitem__("rewards", h5py.ExternalLink(other, "/rewards")),
        "a link out of the file",
    ),
    "soft link out of the file": (through_a_soft_link, "a link out of the file"),
    "soft links in a circle": (loop, "soft links"),
    "soft link to nothing": (dangling, "not there"),
    "virtual dataset": (virtual, "other files"),
    "external storage": (external_storage, "other files"),
    "references": (references, "type object"),
    "texts": (objects, "type object"),
    "arrays of any length": (vlen, "type object"),
    "compound": (
        lambda file, other: file.create_dataset("rewards", (3,), np.dtype([("a", "f4")])),
        "expected real numbers",
    ),
    "complex": (lambda file, other: file.create_dataset("rewards", (3,), "c8"), "complex64"),
    "group": (lambda file, other: file.create_group("rewards"), "is a group"),
    "filter": (unknown_filter, "unknown filter 32015"),
}


@pytest.mark.parametrize("attack", HDF5_ATTACKS)
def test_hdf5_that_reads_other_things(folder, attack):
    change, words = HDF5_ATTACKS[attack]
    arrays = d4rl_arrays([0, 0, 1], [0, 0, 0])
    other = write_d4rl(folder / "other.hdf5", arrays)
    del arrays["rewards"]
    path = write_d4rl(folder / "a.hdf5", arrays)
    with h5py.File(path, "a") as file:
        change(file, other)
    fails(path, words)
    # The same in a Minari dataset.
    name = minari_with(folder)
    with h5py.File(folder / "minari" / name / "data" / "main_data.hdf5", "a") as file:
        del file["episode_0/rewards"]
        change(file["episode_0"], other)
        if attack.startswith("soft"):
            return  # the links are to places of the other file
    fails(name, words)


def test_a_soft_link_in_the_file_is_followed(folder):
    path = write_d4rl(folder / "a.hdf5", d4rl_arrays([0, 0, 1], [0, 0, 0]))
    with h5py.File(path, "a") as file:
        file.move("rewards", "group/inside")
        file["rewards"] = h5py.SoftLink("group/inside")
    np.testing.assert_array_equal(load_dataset(path).transitions.rewards, [1, 2, 4])


# Sizes that are only declared.


def declared(name, shape, **options):
    def write(folder):
        path = write_d4rl(folder / "a.hdf5", d4rl_arrays([0, 0, 1], [0, 0, 0]))
        with h5py.File(path, "a") as file:
            del file[name]
            file.create_dataset(name, shape, "f4", **options)
        return path

    return write


def all_long(folder):
    path = folder / "a.hdf5"
    with h5py.File(path, "w") as file:
        for name, width in (("observations", (3,)), ("actions", (2,)), ("rewards", ()),
                            ("terminals", ()), ("timeouts", ())):  # fmt: skip
            file.create_dataset(
                name, (10**12, *width), "f4", chunks=(1000, *width), compression="gzip"
            )
    return str(path)


def growing_chunk(folder):
    """A chunk of 12 bytes that is stored in a megabyte, which may unpack to a gigabyte."""
    path = write_d4rl(folder / "a.hdf5", d4rl_arrays([0, 0, 1], [0, 0, 0]))
    with h5py.File(path, "a") as file:
        del file["rewards"]
        stored = file.create_dataset("rewards", (3,), "f4", chunks=(3,), compression="gzip")
        stored.id.write_direct_chunk((0,), bytes(2**20))
    return path


def npz(folder, compression=zipfile.ZIP_DEFLATED, **members):
    """An npz file whose members are what is given: bytes, or arrays."""
    arrays = {
        "observations": np.zeros((4, 3), np.float32),
        "actions": np.zeros((4, 2), np.float32),
        "terminals": np.array([0, 0, 0, 1], np.float32),
        "rewards": np.zeros(4, np.float32),
        "masks": np.ones(4, np.float32),
    } | members
    with zipfile.ZipFile(folder / "a.npz", "w", compression) as archive:
        for name, content in arrays.items():
            if isinstance(content, np.ndarray):
                buffer = io.BytesIO()
                np.save(buffer, content, allow_pickle=True)
                content = buffer.getvalue()
            archive.writestr(f"{name}.npy", content)
    return str(folder / "a.npz")


def header(shape, dtype="<f4", rest=b"", version=1):
    text = f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape!r}, }}\n".encode()
    size = len(text).to_bytes(2 if version == 1 else 4, "little")
    return b"\x93NUMPY" + bytes([version, 0]) + size + text + rest


def zip_bomb(folder):
    """A gigabyte of zeros in a megabyte."""
    path = npz(folder)
    with (
        zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive,
        archive.open("qpos.npy", "w", force_zip64=True) as file,
    ):
        for _ in range(16):
            file.write(bytes(2**26))
    return path


SIZES = {
    "many rows": (all_long, "GB"),
    "2^40 columns": (declared("observations", (3, 2**40), chunks=(1, 1000)), "GB"),
    "2^40 actions": (declared("actions", (3, 2**40), chunks=(1, 1000)), "GB"),
    "one large chunk": (
        declared("rewards", (3,), chunks=(2**30 - 1,), maxshape=(None,), compression="gzip"),
        "GB",
    ),
    "a chunk that grows": (growing_chunk, "a chunk of 12 bytes"),
    "npy header of 1e13": (lambda folder: npz(folder, rewards=header((10**13,))), "GB"),
    "npy header of 2^40 columns": (
        lambda folder: npz(folder, observations=header((4, 2**40))), "GB",
    ),
    "npy header of more than there is": (
        lambda folder: npz(folder, rewards=header((4,), rest=bytes(8))), "8",
    ),
    "npy of version 2": (
        lambda folder: npz(folder, rewards=header((10**13,), version=2)), "GB",
    ),
    "zip bomb": (zip_bomb, "GB"),
    "lzma": (lambda folder: npz(folder, zipfile.ZIP_LZMA), "deflate"),
    "pickled objects": (
        lambda folder: npz(folder, rewards=np.array([print] * 4, object)), "object",
    ),
    "deep header": (
        lambda folder: npz(folder, rewards=header((4,)).replace(b"(4,)", b"(" * 900)), "a.npz",
    ),
}  # fmt: skip


@pytest.mark.parametrize("attack", SIZES)
def test_declared_sizes_are_compared_with_the_memory(folder, attack, monkeypatch):
    write, words = SIZES[attack]
    # As on a machine with half a gigabyte, so that no test takes more.
    monkeypatch.setattr(validation, "available_memory", lambda: 2**29)
    fails(write(folder), words)


@pytest.mark.parametrize(
    "changes",
    [
        {"total_episodes": 10**13},
        {"total_episodes": "many"},
        {"observation_space": json.dumps(
            {"type": "Box", "dtype": "float32", "shape": [2**40], "low": -1.0, "high": 1.0}
        )},
        {"observation_space": json.dumps({"type": "Dict", "subspaces": {"a": {
            "type": "Box", "dtype": "float32", "shape": [2**20, 2**20], "low": -1, "high": 1}}})},
        {"observation_space": NESTED},
        {"observation_space": 3},
        {"observation_space": json.dumps({"type": "Nothing"})},
        {"data_format": "arrow"},
        {"env_spec": 7},
    ],
    ids=repr,
)  # fmt: skip
def test_metadata_that_lies(folder, changes):
    fails(minari_with(folder, **changes))


@pytest.mark.parametrize("text", ["", "[]", "{", NESTED, "\x00", "7", "\ud800"])
def test_metadata_that_is_none(folder, text):
    name = minari_with(folder)
    path = folder / "minari" / name / "data" / "metadata.json"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    fails(name, "metadata" if text == "[]" else "cannot read")


def test_steps_that_metadata_invents(folder):
    name = minari_with(folder)
    for steps in (10**12, -1, "x", np.ones(10**5), np.nan):
        with h5py.File(folder / "minari" / name / "data" / "main_data.hdf5", "a") as file:
            file["episode_0"].attrs["total_steps"] = 3 if isinstance(steps, np.ndarray) else steps
        fails(name, "episode 0")


def test_the_memory_of_this_machine():
    free = validation.available_memory()
    assert 2**20 < free <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


# Anything else that a file may be.

RELAXED = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
mangled = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=9)))


def refused_or_read(source):
    """A file that is damaged where it does not matter may be read; no other error comes.

    That a :class:`DataError` is one line is its own doing.
    """
    with contextlib.suppress(DataError):
        load_dataset(source)


def mangle(whole, changes, cut):
    data = bytearray(whole)
    for place, content in changes:
        start = int(place * len(data))
        data[start : start + len(content)] = content
    return bytes(data[: int(cut * len(data))])


@RELAXED
@given(ending=st.sampled_from([".hdf5", ".npz"]), content=st.binary(max_size=200))
def test_any_bytes(folder, ending, content):
    (folder / f"any{ending}").write_bytes(content)
    with pytest.raises(DataError):
        load_dataset(str(folder / f"any{ending}"))


@pytest.fixture
def whole(folder):
    """A good file of every kind: what it is loaded by, its path, its bytes."""
    arrays = d4rl_arrays([0, 0, 1, 0], [0, 0, 0, 1], action_size=1)
    with h5py.File(folder / "a.hdf5", "w") as file:
        for name, array in arrays.items():
            file.create_dataset(name, data=array, chunks=True, compression="gzip")
        file.attrs["env_id"] = "Pendulum-v1"
    name = minari_with(folder)
    data = folder / "minari" / name / "data"
    files = {
        "hdf5": (str(folder / "a.hdf5"), folder / "a.hdf5"),
        "npz": (npz(folder), folder / "a.npz"),
        "minari": (name, data / "main_data.hdf5"),
        "metadata": (name, data / "metadata.json"),
    }
    return {kind: (*pair, pair[1].read_bytes()) for kind, pair in files.items()}


@pytest.mark.parametrize("kind", ["hdf5", "npz", "minari", "metadata"])
def test_mangled_files(whole, kind):
    source, path, content = whole[kind]

    @RELAXED
    @given(changes=mangled, cut=st.floats(0.3, 1) | st.just(1.0))
    def check(changes, cut):
        path.write_bytes(mangle(content, changes, cut))
        refused_or_read(source)

    check()
