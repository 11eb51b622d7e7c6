"""Write a trained policy to a file that runs without this package: python -m launch.export
--workdir=DIR

The file (DIR/policy.jax_export by default) holds normalization, sampler and parameters.  With JAX
alone:

  policy = jax.export.deserialize(open("policy.jax_export", "rb").read())
  actions = policy.call(observations, jax.numpy.uint32(seed))  # [b, S] float32 -> [b, A], for any b

The same seed draws the same noise: count it up from step to step.  Exit status: 0 done, 2 bad flags
or run.
"""

import json

from etils import epath

from efm_jax.files import write_whole
from efm_jax.runs.export import export_policy
from efm_jax.runs.workdir import resolve

from . import cli

FLAGS = cli.Flags(cli.FLAGS)
_WORKDIR = FLAGS.string("workdir", None, "The work directory of launch.train.")
_OUT = FLAGS.string("out", None, "The file; default: WORKDIR/policy.jax_export.")
_NAME = FLAGS.enum("name", "policy", ("policy", "behavior"), "What acts.")
_SEED_INDEX = FLAGS.integer("seed_index", 0, "Which of the run's training seeds, from 0.", 0)
_PLATFORMS = FLAGS.list("platforms", ["cpu", "cuda", "tpu"], "Where it will run.")


def main(_: list[str]) -> int:
    """Load, lower, write."""
    with cli.usage_errors():
        if not _WORKDIR.value:
            raise ValueError("--workdir: expected the work directory of a training run; got none")
        workdir = resolve(_WORKDIR.value)
        cli.check_backend()
        out = epath.Path(_OUT.value).expanduser() if _OUT.value else workdir / "policy.jax_export"
        data = export_policy(
            str(workdir),
            platforms=tuple(_PLATFORMS.value),
            name=_NAME.value,
            seed_index=_SEED_INDEX.value,
            report=cli.say,
        )
        write_whole(out, bytes(data))
    print(json.dumps({"file": str(out), "bytes": len(data), "platforms": _PLATFORMS.value}))
    return 0


command = cli.command(main, FLAGS)

if __name__ == "__main__":
    command()
