"""One episode of a policy as a video file."""

import contextlib
import io
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Protocol

import gymnasium
import numpy as np
from etils import epath
from gymnasium.envs.registration import EnvSpec

# matplotlib itself requires Pillow, so this adds no run-time dependency.
from PIL import Image

from efm_jax import checks
from efm_jax.envs.environments import make
from efm_jax.envs.flatten import flatten_observation
from efm_jax.envs.rollout import Rollouts, check_finite, one_line, read_spec, step_limit
from efm_jax.files import write_whole
from efm_jax.types import Array

# Of environments that do not say how many steps a second has.
_DEFAULT_FPS = 30


def record_video(
    act: Callable[[np.ndarray, int], Array],
    env_spec: str,
    path: epath.PathLike,
    *,
    seed: int,
    max_steps: int | None = None,
) -> Rollouts:
    """Plays one episode as :func:`efm_jax.envs.evaluate` does, and writes it as a video.

    The video runs in the environment's own time. Where a second has more steps than the format
    shows well (Hopper: 125), every second or third step is rendered, and always the first and the
    last.

    Args:
      act: ``(observations [1, 1, S] float32, step) -> actions [1, 1, A]`` in environment units.
      env_spec: a Gymnasium ``EnvSpec`` as JSON, or the id of a registered environment.
      path: the file, local or on ``gs://``; ``.mp4`` (H.264; needs the extra ``video``) or ``.gif``
        (bigger, 256 colors, needs no extra). It is replaced in one rename, after the episode has
        ended.
      seed: of the environment's initial state and noise.
      max_steps: as for ``evaluate``.

    Returns:
      The episode's return and length, ``[1, 1]`` each: those of ``evaluate`` with
      ``episode_seeds=[seed]``.

    Raises:
      ValueError: another suffix, PyAV or the renderer missing, an environment that renders no
        images, and all that ``evaluate`` refuses. Nothing is written then.
    """
    path = epath.Path(path)
    # Before the episode, whose simulation may take minutes.
    format_ = _format(path)
    checks.check_integer("seed", seed, 0)
    spec = read_spec(env_spec)
    limit = step_limit(spec, max_steps)
    content = io.BytesIO()
    with contextlib.closing(_make(spec)) as environment:
        action_space = environment.action_space
        if not isinstance(action_space, gymnasium.spaces.Box) or len(action_space.shape) != 1:
            raise ValueError(
                f"environment {spec.id}: expected a Box action space [A]; got {action_space}"
            )
        steps_per_second = Fraction(environment.metadata.get("render_fps") or _DEFAULT_FPS)
        stride = math.ceil(steps_per_second / format_.max_fps)
        observation, _ = environment.reset(seed=seed)
        frame = _render(environment, spec)
        total = 0.0
        with format_(content, frame.shape, steps_per_second / stride) as video:
            video.add(frame)
            for step in range(limit):
                flat = flatten_observation(environment.observation_space, observation, 0)
                actions = np.asarray(act(np.asarray(flat, np.float32).reshape(1, 1, -1), step))
                checks.check_shape("actions", actions, (1, 1, *action_space.shape))
                check_finite(actions, np.ones((1, 1), bool), step, [seed])
                action = np.clip(actions[0, 0], action_space.low, action_space.high)
                observation, reward, terminated, truncated, _ = environment.step(
                    action.astype(action_space.dtype)
                )
                total += float(reward)
                ended = terminated or truncated or step + 1 == limit
                if ended or (step + 1) % stride == 0:
                    video.add(_render(environment, spec, frame.shape))
                if ended:
                    break
    write_whole(path, content.getvalue())
    return Rollouts(np.array([[total]]), np.array([[step + 1]]))


def _make(spec: EnvSpec) -> gymnasium.Env:
    spec.kwargs["render_mode"] = "rgb_array"
    try:
        return make(spec, disable_env_checker=True)
    except (
        AssertionError
    ) as error:  # Gymnasium's own template of an environment asserts its render modes
        raise ValueError(f"environment {spec.id}: renders no images: {one_line(error)}") from error


def _render(
    environment: gymnasium.Env, spec: EnvSpec, shape: tuple[int, ...] = (None, None, 3)
) -> np.ndarray:
    try:
        frame = environment.render()
    # Renderers are native libraries behind bindings: on a machine without a display or a driver
    # they raise gymnasium's, MuJoCo's or OpenGL's errors, or an AttributeError.
    except Exception as error:
        raise ValueError(
            f"environment {spec.id} cannot render here: {one_line(error)}; {_hint(spec)}"
        ) from error
    fits = isinstance(frame, np.ndarray) and frame.dtype == np.uint8 and frame.ndim == 3
    if not fits or any(
        size not in (None, found) for size, found in zip(shape, frame.shape, strict=True)
    ):
        got = (
            f"{frame.dtype} {frame.shape}"
            if isinstance(frame, np.ndarray)
            else type(frame).__name__
        )
        wanted = ", ".join("?" if size is None else str(size) for size in shape)
        raise ValueError(f"environment {spec.id}: expected images uint8 [{wanted}]; got {got}")
    return frame


def _hint(spec: EnvSpec) -> str:
    if "mujoco" in str(spec.entry_point) or "robotics" in str(spec.entry_point):
        return "without a display MuJoCo needs MUJOCO_GL=egl or MUJOCO_GL=osmesa, and that library"
    return "install what it draws with: pip install -e .[video]"


class _Format(Protocol):
    """Writes a video into memory; a context, at whose end the content is complete."""

    max_fps: int

    def __init__(self, content: io.BytesIO, shape: tuple[int, ...], fps: Fraction) -> None: ...
    def add(self, frame: np.ndarray) -> None: ...


def _format(path: epath.Path) -> type[_Format]:
    formats = {".mp4": _Mp4, ".gif": _Gif}
    checks.check_choice(f"video {path}: suffix", path.suffix, tuple(formats))
    if path.suffix == ".mp4":
        try:
            import av  # noqa: F401  an extra
        except ImportError as error:
            raise ValueError(f"video {path}: needs PyAV: pip install -e .[video]") from error
    return formats[path.suffix]


class _Mp4:
    """H.264, which every browser plays."""

    max_fps = 50

    def __init__(self, content: io.BytesIO, shape: tuple[int, ...], fps: Fraction) -> None:
        import av

        self._new_frame = av.VideoFrame.from_ndarray
        self._container = av.open(content, "w", format="mp4")
        self._stream = self._container.add_stream("libx264", rate=fps)
        # x264's own default; PyAV's is a bit rate, which may differ by version.
        self._stream.options = {"crf": "23"}
        # This pixel format, the only one that every player knows, has one color for 2 x 2 pixels.
        self._stream.pix_fmt = "yuv420p"
        self._padding = [(0, size % 2) for size in shape[:2]] + [(0, 0)]
        self._stream.height, self._stream.width = (size + size % 2 for size in shape[:2])

    def add(self, frame: np.ndarray) -> None:
        image = self._new_frame(np.pad(frame, self._padding, mode="edge"), format="rgb24")
        self._container.mux(self._stream.encode(image))

    def __enter__(self) -> "_Mp4":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        with contextlib.closing(self._container):
            if kind is None:
                self._container.mux(self._stream.encode(None))  # what the encoder still holds


class _Gif:
    """Pillow's; frames last a whole number of hundredths of a second."""

    max_fps = 25

    def __init__(self, content: io.BytesIO, shape: tuple[int, ...], fps: Fraction) -> None:
        self._content = content
        self._milliseconds = 10 * round(100 / fps)
        self._images: list[Image.Image] = []

    def add(self, frame: np.ndarray) -> None:
        self._images.append(Image.fromarray(frame).quantize())

    def __enter__(self) -> "_Gif":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is None:
            first, *rest = self._images
            first.save(
                self._content,
                format="GIF",
                save_all=True,
                append_images=rest,
                duration=self._milliseconds,
                loop=0,
            )
