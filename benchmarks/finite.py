"""Times what it costs a train step to look whether its weights and statistics are finite.

python benchmarks/finite.py configs/digits.py
python benchmarks/finite.py configs/cifar100.py:resnet32x4-resnet8x4 data.data_dir=DIR

Two programs take turns on the same batch: the step, and the step without that look. The teacher has random weights,
unless `teacher.checkpoint=FILE` is given.
"""

import argparse
import pathlib
import statistics
import time
from unittest import mock

import jax
import jax.numpy as jnp

from ldrld_jax import config as config_lib
from ldrld_jax.runtime.mesh import to_devices
from ldrld_jax.train.loop import make_step
from ldrld_jax.train.plan import Run
from ldrld_jax.train.teacher import teacher_at_hand, weights_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--turns", type=int, default=100)
    args = parser.parse_args()
    run = Run.plan(config_lib.resolve(config_lib.load(args.config, args.overrides)), pathlib.Path())  # type: ignore[arg-type]
    network, variables = run.make_student()
    teacher = teacher_at_hand(run, network) if run.objective.methods else None
    optimizer = run.make_optimizer()
    state = run.placement.put_state(run.first_state(variables, optimizer))
    batch = next(to_devices(run.batches.iterate(threads=1), run.mesh))
    step = make_step(run, network, teacher, optimizer)
    compiled = {"with": jax.jit(step).lower(state, weights_of(teacher), batch).compile()}
    with mock.patch("ldrld_jax.train.step.all_finite", lambda tree: jnp.array(True)):  # seen when the step is traced
        compiled["without"] = jax.jit(lambda *a: step(*a)).lower(state, weights_of(teacher), batch).compile()
    seconds: dict[str, list[float]] = {name: [] for name in compiled}
    for turn in range(args.turns + 2):
        for name, program in compiled.items():
            begun = time.perf_counter()
            jax.block_until_ready(program(state, weights_of(teacher), batch))
            if turn > 1:
                seconds[name].append(time.perf_counter() - begun)
    medians = {name: 1000 * statistics.median(times) for name, times in seconds.items()}
    share = statistics.median(a / b - 1 for a, b in zip(seconds["with"], seconds["without"], strict=True))
    print(
        f"{run.config.student.model}: {medians['with']:.2f} ms a step, {medians['without']:.2f} without the look: "
        f"{100 * share:+.2f} % (median of {args.turns} turns)"
    )


if __name__ == "__main__":
    main()
