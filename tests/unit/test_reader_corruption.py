"""Any damage to what a run left is one line that names the file, or is read as a run's."""

import contextlib
import json
import math
import re

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from efm_jax.errors import DataError
from efm_jax.runs.reader import Run, read_result, read_seconds
from tests.unit.test_runs import sample_run

FILES = ("metrics.csv", "returns.csv", "evaluations.csv", "config.json")
FILES += ("result.json", "seconds.json")
RESULT = {
    "dataset": "data",
    "seeds": 2,
    "steps": 10,
    "policy_return": -3.5,
    "policy_interval": [-4.0, -3.0],
    "evaluations": {"policy": "train-policy-1000"},
}
# What stands for a cell, a value or any bytes: other types, numbers without end, another's rows.
STRANGE = [b"", b"\x00", b'"', b"\n", b"\r", b",", b"\xff", b"-1", b"1.5", b"1e999", b"NaN", b"inf"]
STRANGE += [b"9" * 5000, b"1" + b"0" * 400, b"true", b"null", b"{}", b'"x"', b'"\\ud800"', b"[1]"]
STRANGE += [b"[" * depth + b"]" * depth for depth in (500, 3000)] + [b"[" * 100_000]
STRANGE += ["\u0661".encode(), b"1_0", b"0x10", b"policy", b"\n1,2,3\n", b"a,b\n1,2\n"]
TOKEN = re.compile(rb'"[^"]*"|[^,\s:{}\[\]"]+')


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder of a run, and the bytes of its files."""
    folder = tmp_path_factory.mktemp("corrupted") / "run"
    sample_run(folder, ["behavior", "policy"], 2, True)
    (folder / "result.json").write_text(json.dumps(RESULT, indent=2) + "\n")
    (folder / "seconds.json").write_text('{\n  "seconds": 12.5\n}\n')
    return folder, {name: (folder / name).read_bytes() for name in FILES}


@st.composite
def damage(draw):
    """What to do to a file's bytes."""
    place, strange = draw(st.floats(0, 1, exclude_max=True)), draw(st.sampled_from(STRANGE))
    length, flip = draw(st.integers(0, 30)), draw(st.integers(1, 255))

    def value(data):
        tokens = list(TOKEN.finditer(data))
        start, end = tokens[int(place * len(tokens))].span()
        return data[:start] + strange + data[end:]

    def anywhere(data):
        start = int(place * len(data))
        return data[:start] + strange + data[start + length :]

    def flipped(data):
        start = int(place * len(data))
        return data[:start] + bytes([data[start] ^ flip]) + data[start + 1 :]

    def cut(data):
        return data[: int(place * len(data))]

    def twice(data):
        lines = data.splitlines(keepends=True)
        return b"".join([*lines, lines[int(place * len(lines))]])

    return draw(st.sampled_from([value, anywhere, flipped, cut, twice]))


def check_numbers(value):
    """Refuse what no run writes, whatever the reader says of it."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for each in value:
            check_numbers(each)
    elif isinstance(value, float):
        assert math.isfinite(value)


def check_read(folder):
    run = Run.read(folder)
    assert run.info.seeds
    integers = {"total_step", "step", "seed", "episode_seed", "length", "episodes"}
    for row in [*run.metrics, *run.returns]:
        for name, cell in row.items():
            if name in integers:
                assert 0 <= int(cell) < 2**53
            elif name not in ("phase", "policy", "evaluation") and cell:
                float(cell)
    for name, field in (read_result(folder) or {}).items():
        if name.endswith(("return", "score", "interval", "steps")):
            check_numbers(field)
    assert 0 <= read_seconds(folder) < 1e300


@pytest.mark.parametrize("name", FILES)
def test_damage_is_one_line_or_a_right_reading(run, name):
    folder, contents = run

    @settings(
        max_examples=150,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )
    @given(changes=st.lists(damage(), min_size=1, max_size=2))
    @example(changes=[lambda _: b""])
    @example(changes=[lambda _: b"[" * 900 + b"]" * 900])
    @example(changes=[lambda data: data.replace(b"1", b"9" * 400, 1)])
    def check(changes):
        data = contents[name]
        for change in changes:
            with contextlib.suppress(IndexError):  # nothing is left to change
                data = change(data)
        (folder / name).write_bytes(data)
        try:
            return check_read(folder)
        except ValueError as caught:
            error = caught
        assert type(error) in (ValueError, DataError)
        text = str(error)
        # A damaged evaluations.csv may show in the returns that it no longer fits.
        assert str(folder / name) in text or str(folder / "returns.csv") in text
        assert not set("\n\r\x00") & set(text)
        assert len(text) < 1000

    try:
        check()
    finally:
        (folder / name).write_bytes(contents[name])
