"""Times the look at whether a step's weights and statistics are finite, as a share of the whole step.

python benchmarks/finite.py configs/digits.py
python benchmarks/finite.py configs/cifar100.py:resnet32x4-resnet8x4 data.data_dir=DIR

The step takes turns with the look as a program of its own, which includes a dispatch of its own: inside the step it
costs less. The teacher has random weights, unless `teacher.checkpoint=FILE` is given.
"""

import argparse
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax

from ldrld_jax import config as config_lib
from ldrld_jax.runtime.mesh import to_devices
from ldrld_jax.train.loop import make_step
from ldrld_jax.train.plan import Run
from ldrld_jax.train.step import all_finite
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
    state = run.make_state(variables, optimizer)
    batch = next(to_devices(run.batches.iterate(threads=1), run.mesh))
    step, look = jax.jit(make_step(run, network, teacher, optimizer)), jax.jit(all_finite)
    works: dict[str, Callable[[], Any]] = {
        "step": lambda: step(state, weights_of(teacher), batch),
        "look": lambda: look((state.student, state.method_params)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(args.turns + 1):
        for name, work in works.items():
            begun = time.perf_counter()
            jax.block_until_ready(work())
            if turn:  # the first compiles
                seconds[name].append(time.perf_counter() - begun)
    medians = {name: 1000 * statistics.median(times) for name, times in seconds.items()}
    share = statistics.median(look / step for step, look in zip(seconds["step"], seconds["look"], strict=True))
    print(
        f"{run.config.student.model}: {medians['step']:.2f} ms a step, {medians['look']:.3f} ms the look at it, "
        f"{100 * share:.2f} % (medians of {args.turns} turns)"
    )


if __name__ == "__main__":
    main()
