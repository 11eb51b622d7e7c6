"""Package definition; requirements.txt is the one place that names versions of run-time needs."""

import re
from pathlib import Path

from setuptools import find_namespace_packages, find_packages, setup

HERE = Path(__file__).parent


def requirements() -> list[str]:
    """The requirements without their comments."""
    lines = (
        line.split("#")[0].strip() for line in (HERE / "requirements.txt").read_text().splitlines()
    )
    return [line for line in lines if line]


MUJOCO = [
    "mujoco>=3.2,<5",  # Gymnasium's Hopper, HalfCheetah, Walker2d, Ant
    "imageio>=2.28,<3",  # which gymnasium.envs.mujoco imports
]
ROBOTICS = [
    "gymnasium-robotics>=1.4,<2",  # PointMaze, AntMaze, Adroit, kitchen
    *MUJOCO,
]
OGBENCH = ["ogbench>=1.2,<2"]  # its tasks, rewards and scripted experts; brings dm_control
# Its labmaze has no wheel for later Pythons, and is built with Bazel there.
OGBENCH_IN_TESTS = [f"{need}; python_version < '3.13'" for need in OGBENCH]
VIDEO = [
    "imageio[ffmpeg]>=2.28,<3",  # H.264 and GIF for launch.evaluate --video
    "pygame-ce>=2.5,<3",  # which Gymnasium draws Pendulum with
]
# Loggers of launch.train beside CSV and TensorBoard.
WANDB = ["wandb>=0.19.10,<1"]  # since then several runs in one process
MLFLOW = [
    "mlflow-skinny>=2.15,<4",  # the client, without MLflow's server and its libraries
    "sqlalchemy>=2,<3",  # the store that MLflow 3 makes where none is named, mlflow.db
    "alembic>=1.13,<2",  # likewise
]
EXPORT = ["flatbuffers>=24.3,<26"]  # the file format of jax.export
STUDY = [
    "rliable>=1.2,<2",  # aggregates of experiments.rl.offline_rl: IQM, stratified bootstrap
    "pandas<3",  # for arch, which rliable needs and which does not import with pandas 3
]
# Compilers for machines that are not here (launch.train --compile_only --topology=...).
TPU_COMPILE = ["jax[tpu]>=0.10,<0.14"]  # libtpu: 700 MB, under Google Cloud's terms
H100_COMPILE = [
    "jax[cuda12-local]>=0.10,<0.14",  # XLA for CUDA without CUDA's libraries
    "nvidia-cuda-nvcc-cu12>=12.6,<13",  # ptxas
]
GCS = ["etils[epath-gcs]>=1.12,<2"]  # work directories and files on gs://
DIGITS = ["scikit-learn>=1.4,<2"]  # the images of experiments.examples.digits
DOCS = [
    "mkdocs>=1.6,<2",  # the site; version 2 is another program
    "mkdocs-material>=9.6,<10",  # its theme
    "mkdocstrings[python]>=1,<2",  # the API from docstrings
    "latex2mathml>=3.78,<4",  # formulas without a script
    *DIGITS,
]
TEST = [
    "pytest>=8,<10",  # test runner
    "pytest-xdist>=3.6,<4",  # tests on every core
    "hypothesis>=6.100,<7",  # property tests
    "equinox>=0.11,<0.14",  # a second framework for the losses; diffrax brings it
    "scipy>=1.13,<2",  # independent references: logsumexp, root finding, quadrature
    "beartype>=0.20,<1",  # checks jaxtyping's shapes while the tests run
    "ruff>=0.11,<0.18",  # lint
    "pyright[nodejs]>=1.1.400,<2",  # lint: types; with node in a wheel
    "pandas-stubs>=2.2,<4",  # types of pandas, for pyright
    "pyyaml>=6,<7",  # reads the job files of clusters
    "build>=1.2,<2",  # make wheel: sdist and wheel
    "setuptools>=77,<90",  # make wheel, without a download; what setup.py says, in a test
    *DIGITS,
    *ROBOTICS,
    *OGBENCH_IN_TESTS,
    *VIDEO,
    *EXPORT,
    *STUDY,
]

# The checkout's launch/ and experiments/configs/ are installed inside efm_jax, because packages of
# other people are called launch and experiments too.
PLACES = {"efm_jax.launch": "launch", "efm_jax.experiments": "experiments"}
PACKAGES = [
    *find_packages(include=["efm_jax", "efm_jax.*"]),
    *(f"efm_jax.{name}" for name in find_packages(include=["launch", "launch.*"])),
    *(f"efm_jax.{name}" for name in find_namespace_packages(include=["experiments.configs*"])),
]
COMMANDS = ("train", "evaluate", "inspect", "collect", "export", "sweep", "reproduce")

setup(
    name="efm-jax",
    version=re.findall('__version__ = "(.*)"', (HERE / "efm_jax/__init__.py").read_text())[0],
    description="Energy-weighted flow matching and diffusion, and QIPO offline RL, in JAX",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license_expression="MIT",
    license_files=["LICENSE"],
    # No address of the source: it has no public one yet.
    project_urls={"Paper": "https://arxiv.org/abs/2503.04975"},
    keywords=["flow matching", "diffusion", "offline reinforcement learning", "jax"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    packages=PACKAGES,
    package_dir=PLACES,
    package_data={
        "efm_jax": ["py.typed"],
        "efm_jax.launch": ["cluster/*"],
        "efm_jax.launch.report": ["report.html.j2", "style.css"],
    },
    entry_points={
        "console_scripts": [
            *(f"efm-{name} = efm_jax.launch.{name}:command" for name in COMMANDS),
            "efm-report = efm_jax.launch.report.__main__:command",
        ]
    },
    install_requires=requirements(),
    extras_require={
        "mujoco": MUJOCO,
        "robotics": ROBOTICS,
        "video": VIDEO,
        "ogbench": OGBENCH,
        "wandb": WANDB,
        "mlflow": MLFLOW,
        "export": EXPORT,
        "study": STUDY,
        "gcs": GCS,
        "docs": DOCS,
        "tpu-compile": TPU_COMPILE,
        "h100-compile": H100_COMPILE,
        "test": TEST,
    },
)
