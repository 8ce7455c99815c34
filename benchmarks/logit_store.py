"""Times a student's epoch without a teacher, with one, and with one whose logits come from a store.

python benchmarks/logit_store.py --cifar_dir DIR --teacher resnet20.pth     # the table of docs/logit_store.md

Trains ResNet8 on the fraction `--fraction` of CIFAR-100 with the loss of `--method`; DIR holds cifar100 as prepared
by TFDS. Whole runs take turns, so that other load on the machine affects all of them equally; their programs are
compiled once for all turns. An epoch's time runs between the metrics lines that end two epochs and includes steps,
input and, if used, the store. The first epoch, which compiles, and the final evaluation are excluded. Processor time
over all cores, which other load affects less, follows the wall-clock time.
"""

import argparse
import itertools
import statistics
import tempfile
import time
from typing import Any

import ldrld_jax
from ldrld_jax import config as config_lib

RUNS = {
    "ce, no teacher": [],
    "the teacher at every step": ["kd"],
    "the first run with a store": ["kd", "store"],
    "later runs with it": ["kd", "store"],
}


def config_of(args: argparse.Namespace, flags: list[str], store: str) -> Any:
    overrides = [f"data.data_dir={args.cifar_dir}", f"data.fraction={args.fraction}", f"epochs={args.epochs}"]
    overrides += [f"eval_every_epochs={args.epochs}", "data.eval_split=test[:256]", "log.tensorboard=False"]
    overrides += [f"log.every_steps={-(-round(50000 * args.fraction) // 64)}"]
    overrides += [f"method={args.method if flags else 'ce'}", f"teacher.checkpoint={args.teacher}"]
    overrides += [f"logits.dir={store}"] if "store" in flags else []
    return config_lib.load("configs/cifar100.py:resnet20-resnet8", overrides)


class Clock:
    """Writer that notes when each line of training is written, on the wall and on the processor, and its loss."""

    def __init__(self):
        self.ends, self.losses = [], []

    def write(self, step, epoch, split, values):
        if split == "train":
            self.ends.append((time.perf_counter(), time.process_time()))
            self.losses.append(values["loss"])


def epochs_of(config: Any) -> tuple[list[tuple[float, float]], list[float]]:
    """Returns wall and processor seconds of each epoch of a run except the first, and the losses of all epochs."""
    clock = Clock()
    with tempfile.TemporaryDirectory() as workdir:
        ldrld_jax.Trainer.from_config(config, workdir, writers=[clock]).fit()
    return [(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(clock.ends)], clock.losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar_dir", required=True)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--method", default="ldrld")
    parser.add_argument("--fraction", type=float, default=0.02)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--turns", type=int, default=2)
    args = parser.parse_args()
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in RUNS}
    losses = {}
    for _ in range(args.turns):
        with tempfile.TemporaryDirectory() as store:
            for name, flags in RUNS.items():
                times, losses[name] = epochs_of(config_of(args, flags, store))
                seconds[name] += times
    base = [statistics.median(times) for times in zip(*seconds["ce, no teacher"], strict=True)]
    for name, pairs in seconds.items():
        cells = [f"{name:26}"]
        for times, first in zip(zip(*pairs, strict=True), base, strict=True):
            middle = statistics.median(times)
            cells += [f"{middle:.3f}", f"{min(times):.3f}..{max(times):.3f}", f"{middle / first:.2f}"]
        print(f"| {' | '.join(cells)} |")
    wrote, read, online = (losses[name] for name in list(RUNS)[2:] + list(RUNS)[1:2])
    apart = [f"{abs(a / b - 1):.1e}" for a, b in zip(read, online, strict=True)]
    print(f"losses of the first run and of later runs: {'equal' if wrote == read else 'NOT EQUAL'}")
    print(f"relative loss difference of later runs to the teacher at every step, per epoch: {', '.join(apart)}")


if __name__ == "__main__":
    main()
