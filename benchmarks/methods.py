"""Times each method relative to KD, and plots each method's gradient for one example.

python benchmarks/methods.py                                  # the table of docs/methods.md
python benchmarks/methods.py --plot docs/method_gradients.svg # its plot; needs matplotlib

The methods take turns, so that other load on the machine affects all of them equally.
"""

import argparse
import pathlib
import statistics
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from loss import Entry, jax_entry, measure, parse_size  # benchmarks/loss.py

from ldrld_jax.losses import METHODS, Method


def entries(rows: int, classes: int) -> dict[str, Entry]:
    """Returns value and gradient of every method with its defaults, compiled and run once."""
    rng = np.random.default_rng(0)
    teacher, student = (jnp.asarray(rng.standard_normal((rows, classes), np.float32) * 4) for _ in range(2))
    labels = jnp.asarray(rng.integers(0, classes, rows), jnp.int32)
    made = {}
    for name, method in METHODS.items():
        made[name] = jax_entry(jax.value_and_grad(loss_of(method), 1), teacher, student, labels)
        made[name].run()
    return made


def loss_of(method: Method) -> Callable[..., jax.Array]:
    """Returns the loss of a method with its defaults as a function of teacher, student and labels.

    For a method that compares two views, the first half of the rows is the first view, the second half the second.
    """
    cfg = method.config()

    def loss(teacher: jax.Array, student: jax.Array, labels: jax.Array) -> jax.Array:
        if method.views(cfg) == 2:
            teacher, student, labels = (x.reshape(2, -1, *x.shape[1:]) for x in (teacher, student, labels))
        params = None
        if method.from_teacher is not None:  # neighbouring classes get similar weights
            angle = jnp.linspace(0, jnp.pi / 2, teacher.shape[-1])
            params = method.from_teacher(jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=1))
        return method.loss(teacher, student, labels, cfg, params=params)

    return loss


def print_table(sizes: list[tuple[int, int]], repeats: int, seconds: float) -> None:
    """Prints the median time of each method divided by KD's, by size."""
    columns = []
    for rows, classes in sizes:
        made = entries(rows, classes)
        measure(made, repeats, seconds)
        kd = statistics.median(made["kd"].seconds)
        columns.append({name: statistics.median(entry.seconds) / kd for name, entry in made.items()})
    print("| | " + " | ".join(f"{rows} x {classes}" for rows, classes in sizes) + " |")
    print("| --- |" + " ---: |" * len(sizes))
    for name in METHODS:
        print(f"| {name} | " + " | ".join(f"{column[name]:.2f}" for column in columns) + " |")


def plot(path: pathlib.Path) -> None:
    """Plots the gradient of each method with respect to the student's logits as small bar charts.

    The example has ten classes, sorted by the teacher. The student swaps the second and third classes
    and is overconfident of the label, class 0.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    teacher = jnp.asarray([[9.0, 6.5, 5.0, 3.0, 2.0, 1.0, 0.0, -1.0, -2.0, -3.0]])
    student = jnp.asarray([[10.0, 4.5, 6.0, 2.0, 3.0, 0.5, 0.0, -2.0, -1.0, -3.5]])
    # dist, mlkd, skd and luminet compare whole batches: add the mirrored example and a shifted one.
    batch = [jnp.concatenate([z, z[:, ::-1], jnp.roll(z, 3, axis=1)]) for z in (teacher, student)]
    labels = jnp.array([0, 9, 3])
    figure, axes = plt.subplots(5, 4, figsize=(12, 10), sharex=True, layout="constrained")
    for axis, (name, method) in zip(axes.flat, METHODS.items(), strict=False):
        twice = (method.views(method.config()), 1)  # both views alike
        rows = [jnp.tile(z, twice) for z in batch]
        gradient = jax.grad(loss_of(method), 1)(*rows, jnp.tile(labels, twice[0]))[0]
        axis.bar(range(10), -gradient, color=["tab:red"] + ["tab:blue"] * 9)
        axis.axhline(0, color="black", linewidth=0.5)
        axis.set_title(name, fontsize=10)
        axis.tick_params(labelsize=7)
    for axis in axes.flat[len(METHODS) :]:
        axis.bar(np.arange(10) - 0.2, teacher[0], 0.4, label="teacher", color="black")
        axis.bar(np.arange(10) + 0.2, student[0], 0.4, label="student", color="gray")
        axis.set_title("logits", fontsize=10)
        axis.legend(fontsize=7)
    figure.supxlabel("class, in the teacher's order; 0 is the label", fontsize=9)
    figure.supylabel("where a step of descent moves the student's logit", fontsize=9)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", type=parse_size, default=[(64, 100), (256, 1000)], metavar="BxC")
    parser.add_argument("--repeats", type=int, default=100, help="maximum runs of each method at each size")
    parser.add_argument("--seconds", type=float, default=1.0, help="approximate time of each method at each size")
    parser.add_argument("--plot", type=pathlib.Path, default=None, help="plot the gradients to this file instead")
    args = parser.parse_args()
    if args.plot:
        plot(args.plot)
    else:
        print_table(args.sizes, args.repeats, args.seconds)


if __name__ == "__main__":
    main()
