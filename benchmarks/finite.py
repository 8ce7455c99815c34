"""Times the check that a step's weights and statistics are finite, as a share of the step that includes it.

python benchmarks/finite.py configs/digits.py
python benchmarks/finite.py configs/cifar100.py:resnet32x4-resnet8x4 data.data_dir=DIR

The check is timed as a program of its own, in turns with the whole step: inside the step it can only cost less. The
teacher has random weights, unless `teacher.checkpoint=FILE` is given.
"""

import argparse
import pathlib
import statistics
import time

import jax

from ldrld_jax import config as config_lib
from ldrld_jax.train.loop import dispatcher, make_step
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
    state = run.placement.put_state(run.first_state(variables, optimizer))
    advance = dispatcher(run, make_step(run, network, teacher, optimizer), state, teacher, 0, lambda what: None)
    check = jax.jit(all_finite)
    step, seconds = 0, dict[str, list[float]](step=[], check=[])
    for turn in range(args.turns + 2):
        begun = time.perf_counter()
        step, state, metrics = advance(step % run.batches.steps_per_epoch, state, weights_of(teacher))
        jax.block_until_ready((state, metrics))
        stepped = time.perf_counter()
        check((state.student, state.method_params)).block_until_ready()
        if turn > 1:  # the first ones compile
            seconds["step"].append(stepped - begun)
            seconds["check"].append(time.perf_counter() - stepped)
    shares = [100 * check / step for step, check in zip(seconds["step"], seconds["check"], strict=True)]
    medians = {name: 1000 * statistics.median(times) for name, times in seconds.items()}
    print(
        f"{run.config.student.model}: step {medians['step']:.2f} ms, check {medians['check']:.3f} ms, "
        f"{statistics.median(shares):.2f} % of the step (median of {args.turns} turns)"
    )


if __name__ == "__main__":
    main()
