"""One episode of a policy as a video file."""

import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, SupportsFloat

import gymnasium
import numpy as np
from etils import epath
from gymnasium.envs.registration import EnvSpec

from efm_jax import checks
from efm_jax.envs.environments import spec_of
from efm_jax.envs.rollout import Rollouts, evaluate, make_quietly
from efm_jax.errors import install, reason
from efm_jax.files import write_whole
from efm_jax.types import Array

# The most frames a second that players of a format show well.
_MAX_FPS = {".mp4": 50, ".gif": 25}
# The frames a second of an environment that does not say how many it has.
_DEFAULT_FPS = 30


def record_video(
    act: Callable[[np.ndarray, int], Array],
    env_spec: str | EnvSpec | Callable[[], gymnasium.Env],
    path: epath.PathLike,
    *,
    seed: int,
    max_steps: int | None = None,
) -> Rollouts:
    """Play one episode as :func:`efm_jax.envs.evaluate` does, and write it as a video.

    The video runs in the environment's own time. Where a second has more steps than the format
    shows well (Hopper: 125), every second or third step is rendered, and always the first and the
    last.

    Args:
      act: ``(observations [1, 1, S] float32, step) -> actions [1, 1, A]`` in environment units.
      env_spec: as for ``evaluate``.
      path: the file, local or on ``gs://``; ``.mp4`` (H.264) or ``.gif`` (bigger, 256 colors). It
        is replaced in one rename, after the episode has ended.
      seed: of the environment's initial state and noise.
      max_steps: as for ``evaluate``.

    Returns:
      The episode's return and length, ``[1, 1]`` each: those of ``evaluate`` with
      ``episode_seeds=[seed]``.

    Raises:
      ValueError: another suffix, imageio or the renderer missing, an environment that renders no
        images, and all that ``evaluate`` refuses. Nothing is written then.
    """
    path = epath.Path(path)
    checks.check_choice(f"video {path}: suffix", path.suffix, tuple(_MAX_FPS))
    try:  # before the episode, because its simulation may take minutes
        import imageio.v2 as imageio

        if path.suffix == ".mp4":
            import imageio_ffmpeg  # noqa: F401
    except ImportError as error:
        raise ValueError(f"video {path}: needs imageio: {install('video')}") from error

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"video{path.suffix}"

        def open_video(fps: float) -> Any:
            if path.suffix == ".gif":  # in whole hundredths of a second, in milliseconds
                return imageio.get_writer(file, duration=10 * round(100 / fps), loop=0)
            # crf=23 is x264's own default of the quality.
            options = {"quality": None, "output_params": ["-crf", "23"], "macro_block_size": 2}
            return imageio.get_writer(file, fps=fps, **options)

        rollouts = evaluate(
            act,
            env_spec,
            episode_seeds=[seed],
            max_steps=max_steps,
            make=lambda spec: _Filmed(_make(spec), open_video, _MAX_FPS[path.suffix]),
        )
        write_whole(path, file.read_bytes())
    return rollouts


class _Filmed(gymnasium.Wrapper):
    """An environment whose pictures go into a video, which is complete when it is closed."""

    def __init__(
        self, env: gymnasium.Env, open_video: Callable[[float], Any], max_fps: int
    ) -> None:
        super().__init__(env)
        steps_per_second = float(env.metadata.get("render_fps") or _DEFAULT_FPS)
        self._stride = math.ceil(steps_per_second / max_fps)
        self._video = open_video(steps_per_second / self._stride)
        self._steps = 0
        self._shape: tuple[int, ...] | None = None

    def reset(self, **arguments: Any) -> tuple[Any, dict]:
        result = self.env.reset(**arguments)
        self._show()
        return result

    def step(self, action: Any) -> tuple[Any, SupportsFloat, bool, bool, dict]:
        result = self.env.step(action)
        self._steps += 1
        if result[2] or result[3] or self._steps % self._stride == 0:
            self._show()
        return result

    def close(self) -> None:
        self._video.close()
        super().close()

    def _render(self) -> Any:
        """Make a picture, an array if the environment keeps to what is asked of it."""
        try:
            return self.env.render()
        # Everything, because renderers are native libraries behind bindings: without a display or a
        # driver they raise gymnasium's, MuJoCo's or OpenGL's errors, or an AttributeError.
        except Exception as error:
            spec = spec_of(self.env)
            raise ValueError(
                f"environment {spec.id} cannot render here: {reason(error)}; {_hint(spec)}"
            ) from error

    def _show(self) -> None:
        frame = self._render()
        shape, dtype = np.shape(frame), getattr(frame, "dtype", type(frame).__name__)
        if dtype != np.uint8 or shape != (self._shape or (*shape[:2], 3)):
            wanted = list(self._shape or ("height", "width", 3))
            name = f"environment {spec_of(self.env).id}"
            raise ValueError(f"{name}: expected images uint8 {wanted}; got {dtype} {shape}")
        self._shape = shape
        # Even sizes, because H.264 as every player knows it has one color for 2 x 2 pixels.
        odd = [(0, size % 2) for size in shape[:2]]
        self._video.append_data(np.pad(frame, [*odd, (0, 0)], mode="edge"))


def _make(spec: EnvSpec) -> gymnasium.Env:
    spec.kwargs["render_mode"] = "rgb_array"
    try:
        return make_quietly(spec)
    except ValueError as error:
        if not isinstance(error.__cause__, AssertionError):
            raise
        # Gymnasium's own template asserts its render modes.
        raise ValueError(f"environment {spec.id}: renders no images: {reason(error)}") from error


def _hint(spec: EnvSpec) -> str:
    if "mujoco" in str(spec.entry_point) or "robotics" in str(spec.entry_point):
        return "without a display MuJoCo needs MUJOCO_GL=egl or MUJOCO_GL=osmesa, and that library"
    return f"install what it draws with: {install('video')}"
