"""`python -m opsd.plan`: what a run of `python -m opsd.train` with the same settings will need.

For example `python -m opsd.plan device=cuda cluster.nodes=2 student.path=Qwen/Qwen3-4B teacher.path=Qwen/Qwen3-8B ...`.
No weights are loaded and no Ray is started; models may be folders with a config.json or names in opsd/conf/model. With
`simulate.run=FOLDER` or `simulate.gpu=h100` it also says how long a step takes and which split of the GPUs is the best;
no rate of a GPU was measured here.
"""

from opsd.config.run import RunConfig
from opsd.plan.program import launch


def main() -> None:
    launch(RunConfig, "opsd.conf", "run")


if __name__ == "__main__":
    main()
