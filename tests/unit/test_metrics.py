import csv
import struct

import matplotlib.image
import numpy as np
import pytest
from etils import epath
from tensorboardX.proto import event_pb2

from efm_jax.runs.learning_curve import plot_learning_curve
from efm_jax.runs.metrics import CsvTable, MetricsWriter, read_table, return_rows, write_returns


def events(workdir):
    """Events of all files, which TensorBoard reads by name: length, its checksum, data, its checksum."""
    found = []
    for path in sorted((workdir / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            found.append(event_pb2.Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return found


def scalars(workdir):
    return {
        (value.tag, event.step): value.simple_value
        for event in events(workdir)
        for value in event.summary.value
    }


def test_header_is_the_union_and_missing_cells_are_empty(tmp_path):
    writer = MetricsWriter(epath.Path(tmp_path), None)
    writer.write(10, "behavior", 10, {"loss": [0.5, 0.25], "steps_per_second": 100.0})
    writer.write(20, "critic", 10, {"loss": np.float32([0.1, np.nan]), "q_data": [-1.0, None]})
    writer.write(30, "critic", 20, {"loss": [1.0, 2.0]})
    writer.close()
    text = (tmp_path / "metrics.csv").read_text()
    assert text == (
        "total_step,step,phase,seed,loss,steps_per_second,q_data\n"
        "10,10,behavior,0,0.5,100.0,\n"
        "10,10,behavior,1,0.25,100.0,\n"
        "20,10,critic,0,0.1,,-1.0\n"
        "20,10,critic,1,nan,,\n"
        "30,20,critic,0,1.0,,\n"
        "30,20,critic,1,2.0,,\n"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.csv", "tensorboard"]


def test_rows_are_on_disk_before_close(tmp_path):
    writer = MetricsWriter(tmp_path, None)
    writer.write(1, "behavior", 1, {"loss": [3.0]})
    assert len(read_table(tmp_path / "metrics.csv")) == 1
    assert scalars(tmp_path) == {("behavior/loss", 1): 3.0}
    writer.close()


def test_tensorboard_holds_means_over_seeds_at_the_total_step(tmp_path):
    writer = MetricsWriter(tmp_path, None)
    writer.write(10, "behavior", 10, {"loss": [1.0, 2.0]})
    writer.write(
        110, "policy", 100, {"loss": [np.nan, 2.0], "ess": [None, 4.0], "top_weight": None}
    )
    writer.close()
    found = scalars(tmp_path)
    assert found[("behavior/loss", 10)] == 1.5
    assert found[("policy/ess", 110)] == 4.0
    assert np.isnan(found[("policy/loss", 110)])
    assert len(found) == 3


def test_resume_drops_what_lies_beyond_the_checkpoint(tmp_path):
    def log(writer, steps):
        for step in steps:
            writer.write(
                step,
                "policy",
                step,
                {"loss": [float(step), 0.0]} | ({"q": 1.0} if step > 20 else {}),
            )
            write_returns(
                tmp_path,
                return_rows(step, "policy", np.full((2, 1), step), np.ones((2, 1), int), [5]),
            )

    writer = MetricsWriter(tmp_path, None)
    log(writer, [10, 20, 30, 40])
    writer.close()
    expected = [(tmp_path / name).read_text() for name in ("metrics.csv", "returns.csv")]
    # A process killed while it wrote: half a line, whose cut total step (4 of 40) must not pass for
    # an earlier one.
    for name in ("metrics.csv", "returns.csv"):
        with (tmp_path / name).open("a") as file:
            file.write("4")
    writer = MetricsWriter(tmp_path, 20)
    for name in ("metrics.csv", "returns.csv"):
        assert [int(row["total_step"]) for row in read_table(tmp_path / name)] == [10, 10, 20, 20]
    log(writer, [30, 40])
    writer.close()
    assert [(tmp_path / name).read_text() for name in ("metrics.csv", "returns.csv")] == expected
    # TensorBoard hides the first run's events from step 21 on.
    starts = [event.step for event in events(tmp_path) if event.HasField("session_log")]
    assert starts == [0, 21]


def test_a_run_without_checkpoint_starts_anew(tmp_path):
    for _ in range(2):
        writer = MetricsWriter(tmp_path, None)
        writer.write(1, "behavior", 1, {"loss": [1.0]})
        write_returns(tmp_path, return_rows(1, "behavior", [[1.0]], [[1]], [0]))
        writer.close()
    assert len(read_table(tmp_path / "metrics.csv")) == 1
    assert len(read_table(tmp_path / "returns.csv")) == 1


def test_repeated_evaluation_replaces_its_rows(tmp_path):
    write_returns(tmp_path, return_rows(10, "behavior", [[1.0, 2.0]], [[3, 4]], [7, 8]))
    write_returns(tmp_path, return_rows(10, "policy", [[5.0, 6.0]], [[3, 4]], [7, 8]))
    write_returns(tmp_path, return_rows(10, "behavior", [[1.5, 1 / 3]], [[3, 4]], [7, 8]))
    assert (tmp_path / "returns.csv").read_text() == (
        "total_step,policy,seed,episode_seed,return,length\n"
        "10,policy,0,7,5.0,3\n"
        "10,policy,0,8,6.0,4\n"
        "10,behavior,0,7,1.5,3\n"
        f"10,behavior,0,8,{1 / 3!r},4\n"
    )


def test_a_failed_rewrite_leaves_the_old_table(tmp_path, monkeypatch):
    table = CsvTable(tmp_path / "t.csv", ["total_step"])
    table.append([{"total_step": 1}])

    def fail(path, content):
        with open(path, "wb") as file:
            file.write(content[:5])
        raise OSError("disk full")

    monkeypatch.setattr(type(epath.Path(tmp_path)), "write_bytes", fail)
    with pytest.raises(OSError, match="disk full"):
        table.append([{"total_step": 2, "new": 1}])
    assert read_table(tmp_path / "t.csv") == [{"total_step": "1"}]


def test_an_unfinished_last_line_is_removed_before_the_next_row(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("total_step,loss\n10,0.5\n20,0.2")
    CsvTable(path, ["total_step"]).append([{"total_step": 20, "loss": 0.25}])
    assert path.read_text() == "total_step,loss\n10,0.5\n20,0.25\n"
    path.write_text("total_st")
    CsvTable(path, ["total_step"]).append([{"total_step": 1}])
    assert path.read_text() == "total_step\n1\n"


def test_text_with_commas_survives(tmp_path):
    table = CsvTable(tmp_path / "t.csv", ["total_step"])
    table.append([{"total_step": 1, "note": 'a, "b"'}])
    with (tmp_path / "t.csv").open() as file:
        assert list(csv.DictReader(file)) == [{"total_step": "1", "note": 'a, "b"'}]


def test_bad_input_is_refused(tmp_path):
    writer = MetricsWriter(tmp_path / "run", None)
    with pytest.raises(ValueError, match="one value per seed"):
        writer.write(1, "policy", 1, {"loss": [1.0, 2.0], "ess": [1.0]})
    with pytest.raises(ValueError, match="'seed' is an index column"):
        writer.write(1, "policy", 1, {"seed": [1.0]})
    writer.close()
    with pytest.raises(ValueError, match="expected the keys"):
        write_returns(tmp_path, [{"total_step": 1, "return": 2.0}])
    (tmp_path / "metrics.csv").write_text("a,b\n1,2\n")
    with pytest.raises(
        ValueError, match=r"metrics\.csv: expected a table with a column 'total_step'"
    ):
        MetricsWriter(tmp_path, 5)


def sample_run(workdir, phases, seeds, evaluated):
    writer = MetricsWriter(workdir, None)
    total = 0
    for phase in phases:
        for step in range(100, 1100, 100):
            values = {"loss": 1.0 / (step + 100 * np.arange(seeds)), "steps_per_second": 5.0}
            if phase == "policy":
                values |= {
                    "ess": np.full(seeds, 900.0 / step),
                    "top_weight": [0.5] * seeds,
                    "q_support": step,
                }
            if phase != "behavior":
                values["q_data"] = np.linspace(1.0, 2.0, seeds)
            writer.write(total + step, phase, step, values)
            if evaluated and phase == "policy":
                returns = np.add.outer(step + np.arange(seeds), np.arange(4.0))
                write_returns(
                    workdir,
                    return_rows(
                        total + step, "policy", returns, np.ones((seeds, 4), int), range(4)
                    ),
                )
        total += 1000
        if evaluated and phase == "behavior":
            returns = return_rows(
                total, "behavior", np.ones((seeds, 4)), np.ones((seeds, 4), int), range(4)
            )
            write_returns(workdir, returns)
    writer.close()


@pytest.mark.parametrize(
    ("phases", "seeds", "evaluated", "shape"),
    [
        (["behavior", "critic", "policy"], 3, True, (2, 2)),
        (["behavior", "critic"], 2, True, (1, 3)),
        (["behavior"], 1, False, (1, 1)),
        (["policy"], 1, False, (1, 3)),
    ],
)
def test_learning_curve_shows_every_panel_it_has(tmp_path, phases, seeds, evaluated, shape):
    sample_run(tmp_path, phases, seeds, evaluated)
    output = tmp_path / "learning_curve.png"
    plot_learning_curve(
        tmp_path / "metrics.csv", tmp_path / "returns.csv", output, dataset_return=3.0, title="run"
    )
    image = matplotlib.image.imread(output)[..., :3]
    rows, columns = shape
    height, width = image.shape[0] / rows, image.shape[1] / columns
    for row in range(rows):
        for column in range(columns):
            top, left = int((row + 0.15) * height), int((column + 0.15) * width)
            panel = image[top : top + int(0.7 * height), left : left + int(0.7 * width)]
            # Colored curves, not only gray grid lines and text.
            assert np.sum(panel.max(axis=-1) - panel.min(axis=-1) > 0.2) > 50
    assert not (tmp_path / "learning_curve.png.tmp").exists()


def test_curve_survives_non_finite_and_negative_values(tmp_path):
    writer = MetricsWriter(tmp_path, None)
    writer.write(1, "policy", 1, {"loss": [-1.0, np.inf], "ess": [np.nan, np.nan]})
    writer.write(2, "policy", 2, {"loss": [np.nan, np.nan], "ess": [np.nan, 2.0]})
    writer.close()
    plot_learning_curve(tmp_path / "metrics.csv", tmp_path / "none.csv", tmp_path / "out.png")
    assert matplotlib.image.imread(tmp_path / "out.png").std() > 0.01


def test_nothing_to_draw_is_an_error(tmp_path):
    writer = MetricsWriter(tmp_path, None)
    writer.write(1, "policy", 1, {"loss": [np.nan]})
    writer.close()
    with pytest.raises(ValueError, match="no finite number"):
        plot_learning_curve(
            tmp_path / "metrics.csv", tmp_path / "returns.csv", tmp_path / "out.png"
        )
    with pytest.raises(FileNotFoundError):
        plot_learning_curve(tmp_path / "absent.csv", tmp_path / "returns.csv", tmp_path / "out.png")
    assert not (tmp_path / "out.png").exists()
