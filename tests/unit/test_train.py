"""Training from Python: the page about it, extension, no environment, refusals."""

import dataclasses
import json
import re
import warnings
from pathlib import Path

import jax
import jaxtyping
import numpy as np
import pytest

import efm_jax
from efm_jax.runs.workdir import RunInfo, resolve
from launch.evaluation import print_report
from tests import tiny

PAGE = Path(__file__).parents[2] / "docs" / "python.md"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """What the page's code leaves: its names, its folder, and what it printed."""
    folder, names, printed = tmp_path_factory.mktemp("page"), {}, []
    names["print"] = lambda *words: printed.append(words)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # as of the spread of one episode
        patch.chdir(folder)
        # The checker of shapes knows no symbolic number of observations, as in an export.
        patch.setattr(jaxtyping.config, "jaxtyping_disable", True)
        for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
            exec(compile(code, str(PAGE), "exec"), names)
    return names, folder, printed


def test_the_page_runs(page):
    names, folder, printed = page
    run, observations = names["run"], names["observations"]
    assert [words[:2] for words in printed] == [
        *(("behavior", 20), ("behavior", 40), ("critic", 20), ("critic", 40)),
        *(("policy", 20), ("policy", 100), ("policy", 30), ("behavior", 40), ("policy", 110)),
    ]
    assert run.metrics["total_step"].tolist() == [20, 40, 60, 80, 100, 110, 120, 140]
    assert np.isfinite(run.metrics["loss"]).all()
    assert run.metrics["ess"].notna().tolist() == [False] * 4 + [True] * 4
    # Of 30 policy steps and of 60, those that end where an evaluation is due and the last ones.
    last = run.returns[run.returns["total_step"] == 140]
    assert set(run.returns["total_step"]) == {40, 100, 110, 120, 140}
    assert (last["return"].tolist(), last["length"].tolist()) == (
        [run.result["policy_return"]],
        [50],
    )
    assert json.loads((folder / "runs/python/result.json").read_text()) == run.result
    # One or many, of any leading axes, with a key or the default one.
    actions = np.asarray(run.policy(observations))
    assert np.isfinite(run.policy(np.zeros(3))).all()
    assert actions.shape == (200, 1)
    np.testing.assert_array_equal(run.policy(observations.reshape(2, 100, 3))[1, 3], actions[103])
    np.testing.assert_allclose(run.policy(observations[0].tolist()), actions[0], rtol=1e-5)
    np.testing.assert_array_equal(run.policy(observations, jax.random.key(0)), actions)
    assert np.abs(run.policy(observations, jax.random.key(1)) - actions).max() > 1e-4
    with pytest.raises(ValueError, match=r"expected shape \(3,\) or \(\.\.\., 3\); got \(3, 4\)"):
        run.policy(np.zeros((3, 4)))
    # Loaded and exported.
    np.testing.assert_array_equal(names["policy"](observations), actions)
    exported = names["exported"].call(observations.astype(np.float32), np.uint32(0))
    np.testing.assert_allclose(exported, actions, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="seed_index: expected with a work directory"):
        efm_jax.export_policy(run.policy, seed_index=0)


def test_an_extended_run_is_the_longer_one(page):
    names, _, _ = page
    whole = efm_jax.train(names["dataset"], names["longer"], report=lambda _: None)
    run, observations = names["run"], names["observations"]
    assert whole.workdir is None
    assert whole.result["policy_return"] == run.result["policy_return"]
    for mine, theirs in ((whole.policy, run.policy), (whole.behavior, run.behavior)):
        np.testing.assert_array_equal(mine(observations), theirs(observations))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"policy_steps": 40}, "of 60 policy steps; expected at least as many .* asked for 40"),
        ({"beta": 5.0}, "config.beta = 10.0, asked for 5.0; give another"),
        ({"critic_steps": 50}, "config.critic_steps = 40, asked for 50; give another"),
    ],
)
def test_what_is_no_extension_is_refused(page, changes, words):
    names, folder, _ = page
    config = dataclasses.replace(names["longer"], **changes)
    before = (folder / "runs/python/config.json").read_bytes()
    with pytest.raises(ValueError, match=words) as error:
        efm_jax.train(names["dataset"], config, str(folder / "runs/python"), extend=True)
    assert "\n" not in str(error.value)
    assert (folder / "runs/python/config.json").read_bytes() == before


def test_a_run_is_not_extended_unasked_or_under_a_schedule(page):
    info = RunInfo.read(resolve(page[1] / "runs/python"))
    folder = page[1]
    steps = info.phase_steps | {"policy": 90}
    longer = dataclasses.replace(info.config, policy_steps=90)
    asked = dataclasses.replace(info, config=longer, phase_steps=steps)
    with pytest.raises(ValueError, match=r"policy_steps = 60, asked for 90; give --extend"):
        asked.check_same(info, folder)
    asked.check_same(info, folder, extend=True)
    cosine = {"learning_rate_schedule": "cosine"}
    asked, info = (
        dataclasses.replace(each, config=dataclasses.replace(each.config, **cosine))
        for each in (asked, info)
    )
    with pytest.raises(ValueError, match=r"60 policy steps cannot be extended to 90: .* cosine"):
        asked.check_same(info, folder, extend=True)
    info.check_same(info, folder, extend=True)


def test_a_run_whose_guard_judged_early_is_not_extended(page):
    info = RunInfo.read(resolve(page[1] / "runs/python"))

    def run(steps):
        config = dataclasses.replace(info.config, guard=1.0, renew_every=40, policy_steps=steps)
        phases = info.phase_steps | {"policy": steps}
        return dataclasses.replace(info, config=config, phase_steps=phases)

    run(120).check_same(run(80), page[1], extend=True)
    with pytest.raises(ValueError, match="60 policy steps cannot be extended to 80: its guard"):
        run(80).check_same(run(60), page[1], extend=True)


def arrays(**more):
    names = ["observations", "actions", "rewards", "next_observations", "terminated"]
    data = dict(zip(names, tiny.transitions(), strict=True))
    return efm_jax.Dataset.from_arrays(**data, truncated=np.zeros(tiny.ROWS), **more)


def test_without_an_environment_nothing_is_evaluated(tmp_path):
    rows, lines = [], []
    config = tiny.config(policy="bc", max_transitions=64, ema_decay=0.0)
    run = efm_jax.train(
        arrays(),
        config,
        str(tmp_path / "run"),
        num_seeds=2,
        callbacks=(lambda kind, row: rows.append((kind, row)),),
        report=lines.append,
    )
    assert (lines, len(run.returns), run.result["policy_return"]) == ([], 0, None)
    info = RunInfo.read(resolve(tmp_path / "run"))
    assert (info.transitions, info.env_spec) == (64, None)
    with pytest.raises(ValueError, match="names no environment to play in; give --env=ID"):
        info.environment()
    assert {kind for kind, _ in rows} == {"metrics"}
    assert [row["loss"] for _, row in rows] == pytest.approx(run.metrics["loss"].tolist())
    assert [policy(np.zeros((2, 3))).shape for policy in run.policies] == [(2, 2)] * 2
    assert np.abs(run.policies[0](np.zeros(3)) - run.policies[1](np.zeros(3))).max() > 1e-4


@pytest.mark.parametrize(
    ("error", "words", "fields", "arguments"),
    [
        (TypeError, "dataset: expected a Dataset", {}, {"dataset": np.zeros(3)}),
        (TypeError, "callbacks: expected functions", {}, {"callbacks": (3,)}),
        (ValueError, "max_transitions: expected at most the 96", {"max_transitions": 97}, {}),
        (ValueError, "policy: expected one of qipo", {"policy": "none"}, {}),
        (ValueError, "seed, num_seeds: the last", {}, {"seed": 2**32 - 1, "num_seeds": 2}),
        (ValueError, "action dimension 0 has bounds", {}, {"env": "Pendulum-v1"}),
    ],
)
def test_arguments_are_refused_before_anything_is_written(
    tmp_path, error, words, fields, arguments
):
    config = dataclasses.replace(tiny.config(), **fields)
    with pytest.raises(error, match=words):
        efm_jax.train(**{"dataset": arrays()} | arguments, config=config, workdir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_table_shows_no_interval_of_one_episode(page, capsys):
    names, folder, _ = page
    info = RunInfo.read(resolve(folder / "runs/python"))
    line = names["run"].result
    assert line["policy_interval"] == [line["policy_return"]] * 2
    print_report(info, line)
    assert " to " not in capsys.readouterr().out
    print_report(info, line | {"episodes": 2})
    assert capsys.readouterr().out.count(" to ") == 2
