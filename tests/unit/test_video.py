"""Videos of an environment that draws its own time, read back."""

import sys
from typing import ClassVar

import gymnasium
import imageio.v2 as imageio
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image

from efm_jax.envs import evaluate
from efm_jax.envs.video import record_video

HEIGHT, WIDTH = 33, 47  # odd: H.264 needs even ones


class Clock(gymnasium.Env):
    """Grey as bright as the time; the reward is the action plus a draw of the seed."""

    metadata: ClassVar = {"render_modes": ["rgb_array"], "render_fps": 100}
    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)

    def __init__(self, render_mode=None, picture="good", end=None):
        # As in Gymnasium's template.
        assert render_mode is None or render_mode in self.metadata["render_modes"]
        self.render_mode, self._picture, self._end = render_mode, picture, end

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self._draw, self._time = self.np_random.uniform(), 0
        return self._observation(), {}

    def step(self, action):
        assert abs(action[0]) <= 1
        self._time += 1
        reward, ended = self._draw + float(action[0]), self._time == self._end
        return self._observation(), reward, ended, False, {}

    def _observation(self):
        return np.array([self._draw, self._time])

    def render(self):
        if self._picture == "broken":
            raise AttributeError("'NoneType' object has no attribute\n'glGetError'")
        if self._picture == "text":
            return "picture"
        width = WIDTH + (self._picture == "grows") * self._time
        return np.full((HEIGHT, width, 3), 10 * self._time, np.uint8)


class Blind(Clock):
    metadata: ClassVar = {"render_modes": []}


class Unhurried(Clock):
    metadata: ClassVar = {"render_modes": ["rgb_array"]}


@pytest.fixture(scope="module", autouse=True)
def environments():
    kinds = {"Clock-v0": Clock, "Blind-v0": Blind, "Unhurried-v0": Unhurried}
    for name, kind in kinds.items():
        gymnasium.register(name, kind, max_episode_steps=20)
    yield
    for name in kinds:
        del gymnasium.registry[name]


def act(observations, step):
    assert (observations.shape, observations.dtype) == ((1, 1, 2), np.float32)
    assert observations[0, 0, 1] == step
    return np.full((1, 1, 1), 0.25 * step)  # beyond the bounds from the fifth step on


@pytest.fixture
def spec_of():
    """An id of the clock with other arguments: a class cannot go into the JSON of a spec."""
    made = []

    def register(**arguments):
        made.append(f"Clock{len(made)}-v0")
        gymnasium.register(made[-1], Clock, max_episode_steps=20, kwargs=arguments)
        return made[-1]

    yield register
    for name in made:
        del gymnasium.registry[name]


def mp4(path):
    """Mean gray of the frames, their size and how many a second has."""
    with imageio.get_reader(path) as video:
        frames = [np.asarray(frame, float) for frame in video]
        about = video.get_meta_data()
    assert (about["codec"], about["pix_fmt"].split("(")[0]) == ("h264", "yuv420p")
    return [frame.mean() for frame in frames], frames[0].shape, about["fps"]


def test_mp4_shows_the_episode_in_its_own_time(tmp_path):
    path = tmp_path / "new" / "episode.mp4"
    played = record_video(act, "Clock-v0", path, seed=7)
    gray, shape, rate = mp4(path)
    # 100 steps a second are more than the format shows: every second one of 20, and the start.
    assert rate == 50
    assert shape == (34, 48, 3)
    assert_allclose(gray, np.arange(0, 201, 20), atol=3)
    expected = evaluate(act, "Clock-v0", episode_seeds=[7])
    assert_array_equal(played.returns, expected.returns)
    assert_array_equal(played.lengths, expected.lengths)
    assert played.returns[0, 0] != record_video(act, "Clock-v0", path, seed=8).returns[0, 0]
    assert [file.name for file in path.parent.iterdir()] == ["episode.mp4"]


def test_last_step_is_shown_where_the_episode_ends(tmp_path, spec_of):
    path = tmp_path / "episode.mp4"
    played = record_video(act, spec_of(end=5), path, seed=7)
    assert_allclose(mp4(path)[0], [0, 20, 40, 50], atol=3)
    assert played.lengths.tolist() == [[5]]
    played = record_video(act, "Clock-v0", path, seed=7, max_steps=3)
    assert_allclose(mp4(path)[0], [0, 20, 30], atol=3)
    assert played.lengths.tolist() == [[3]]


def test_environment_without_a_rate(tmp_path):
    path = tmp_path / "episode.mp4"
    record_video(act, "Unhurried-v0", path, seed=7)
    gray, _, rate = mp4(path)
    assert (rate, len(gray)) == (30, 21)


def test_gif_needs_no_encoder(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    path = tmp_path / "episode.gif"
    record_video(act, "Clock-v0", path, seed=7)
    with Image.open(path) as image:
        assert (image.n_frames, image.size, image.info["loop"]) == (6, (48, 34), 0)
        durations, gray = [], []
        for index in range(image.n_frames):
            image.seek(index)
            durations.append(image.info["duration"])
            gray.append(np.asarray(image.convert("L"), float).mean())
    assert durations == [40] * 6  # 25 a second, every fourth step
    assert_allclose(gray, np.arange(0, 201, 40), atol=1)


def flat(observations, step):
    return np.zeros((1, 1))


def diverged(observations, step):
    return np.full((1, 1, 1), np.nan if step == 3 else 0.0)


REFUSED = {
    "suffix": (act, "Clock-v0", "episode.avi", [".mp4", ".gif", ".avi"]),
    "no suffix": (act, "Clock-v0", "episode", [".mp4"]),
    "unknown environment": (act, "NoSuchEnv-v0", "episode.mp4", ["NoSuchEnv-v0"]),
    "no images": (act, "Blind-v0", "episode.mp4", ["Blind-v0", "renders no images"]),
    "renderer": (act, "broken", "episode.mp4", ["Clock0-v0", "cannot render", "glGet", "[video]"]),
    "no picture": (act, "text", "episode.mp4", ["uint8", "str"]),
    "another size": (act, "grows", "episode.mp4", ["[33, 47, 3]", "(33, 49, 3)"]),
    "not finite": (diverged, "Clock-v0", "episode.mp4", ["non-finite", "step 3"]),
    "shape": (flat, "Clock-v0", "episode.mp4", ["actions", "(1, 1, 1)", "(1, 1)"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_leaves_the_old_file(tmp_path, spec_of, case):
    policy, env, name, words = REFUSED[case]
    path = tmp_path / name
    path.write_text("old")
    with pytest.raises(ValueError) as error:  # noqa: PT011  the words are compared below
        record_video(policy, env if "-" in env else spec_of(picture=env), path, seed=1)
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [(name, "old")]


@pytest.mark.parametrize(("module", "suffix"), [("imageio_ffmpeg", "mp4"), ("imageio.v2", "gif")])
def test_missing_extra_is_said_before_the_episode(tmp_path, monkeypatch, module, suffix):
    monkeypatch.setitem(sys.modules, module, None)

    def unused(*_):
        raise AssertionError("the episode was started")

    with pytest.raises(ValueError, match=r"needs imageio: pip install 'efm-jax\[video\]'"):
        record_video(unused, "Clock-v0", tmp_path / f"episode.{suffix}", seed=1)
    assert list(tmp_path.iterdir()) == []
