"""Times our training step against PyTorch's, plain, strong and compiled, and ours with XLA's own convolutions.

python benchmarks/train.py                                      # resnet32x4 -> resnet8x4, batch 64, 32 pixels
python benchmarks/train.py --student_only --models resnet8x4 resnet20
python benchmarks/train.py --models imagenet_resnet34,imagenet_resnet18 --sizes 224 --batch 1024 --precision bfloat16

The images are synthetic, 8-bit, and at 32 pixels cropped and mirrored. The contestants take turns in one process, so
that other load on the machine affects all of them equally. "ours" and "torch strong" keep the images on the device;
"torch plain" makes its batches on the host, in one DataLoader without workers. "torch compiled" is strong with
torch.compile, of student, teacher and loss; where that does not work, as on a CPU without a C++ compiler, one line
says so in place of its row. "xla" is ours with XLA's own convolutions on a CPU (elsewhere the two are the
same program). "several", which runs only on request, is ours with all steps of a turn in one dispatch. MFU is XLA's
FLOP count divided by time and the device's peak (`ldrld_jax/runtime/devices.py`), omitted if the peak is unknown.
--seconds limits the turns, not the compilation. "CPU ms" is CPU time, which other load affects least. Both
frameworks use a GPU if there is one.
"""

import argparse
import contextlib
import dataclasses
import importlib
import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs memory of the same device

import jax
import jax.numpy as jnp
import numpy as np

from ldrld_jax import config as config_lib
from ldrld_jax.data.augment import Draws
from ldrld_jax.data.resident import make_batch
from ldrld_jax.models import convolution
from ldrld_jax.runtime.devices import peak_flops
from ldrld_jax.runtime.flops import count_flops
from ldrld_jax.train.dispatch import several_steps
from ldrld_jax.train.networks import Networks
from ldrld_jax.train.objective import make_objective
from ldrld_jax.train.optim import make_optimizer, make_schedule
from ldrld_jax.train.state import TrainState
from ldrld_jax.train.step import make_train_step

torch_step: Any = None
with contextlib.suppress(ImportError):
    torch_step = importlib.import_module("torch_step")

CONTESTANTS = ("ours", "several", "xla", "torch plain", "torch strong", COMPILED := "torch compiled")


@dataclasses.dataclass
class Recipe:
    """Training settings shared by all contestants.

    Attributes:
      student, teacher: names of models; teacher None for cross-entropy alone.
      batch: examples per step.
      size, classes: side of an image in pixels, and number of classes.
      pad: zero padding in pixels before an image is cropped and mirrored; 0 leaves images unchanged.
      precision: "float32" or "bfloat16".
      mean, std: of the pixels, one number per channel.
    """

    student: str
    teacher: str | None
    batch: int
    size: int
    classes: int
    pad: int
    precision: str
    mean: tuple[float, ...]
    std: tuple[float, ...]


def make_config(recipe: Recipe) -> Any:
    method = "ldrld" if recipe.teacher else "ce"
    overrides = [f"student.model={recipe.student}", f"method={method}"]
    return config_lib.resolve(config_lib.load("configs/cifar100.py", overrides))


class OurStep:
    """The trainer's step over images on the device; the counterpart of `torch_step.Step`.

    One dispatch takes `together` steps; the count given to `run` must be a multiple of it.
    """

    def __init__(self, recipe: Recipe, images: np.ndarray, labels: np.ndarray, together: int = 1):
        config = make_config(recipe)
        config.data.mean, config.data.std = recipe.mean, recipe.std
        networks = Networks(recipe.classes, 3, recipe.precision)
        student, variables = networks.random(recipe.student, config.data, seed=0)
        teacher, self.frozen = None, None
        if recipe.teacher:
            teacher, self.frozen = networks.random(recipe.teacher, config.data, seed=0)
        self.objective = make_objective(config)
        schedule = make_schedule(config.optim, steps_per_epoch=100, epochs=240)
        optimizer = make_optimizer(config.optim, schedule)
        step = make_train_step(student, teacher, self.objective, optimizer, schedule=schedule, steps_per_epoch=100)
        self.state = TrainState.first(variables, optimizer, method_params={}, averaged=False)
        self.recipe, self.together = recipe, together
        self.inputs = self._resident(images, labels)
        if together > 1:
            step = several_steps(step, self._batch, together)
        arguments = self.state, self.frozen, *next(self.inputs)
        self.step = jax.jit(step, donate_argnums=0).lower(*arguments).compile()
        self.flops = count_flops(step, *arguments)

    def run(self, count: int) -> float:
        for _ in range(count // self.together):
            self.state, metrics = self.step(self.state, self.frozen, *next(self.inputs))
        return float(jnp.sum(metrics["loss"].total))

    def _batch(self, stored: Any, draws: Draws, position: Any) -> dict[str, jax.Array]:
        recipe, count = self.recipe, self.recipe.batch
        make = make_batch(count, (recipe.size, recipe.size, 3), recipe.pad, None)
        batch = make(stored, draws, position * count, jnp.int32(count))
        return {key: batch[key] for key in ("image", "label")}

    def _resident(self, images: np.ndarray, labels: np.ndarray) -> Iterator[tuple[Any, ...]]:
        """Yields the further arguments of a dispatch: a batch, or the stored images and draws of several batches."""
        n, pad = len(images), self.recipe.pad
        stored = jax.device_put((images.reshape(n, -1), labels))
        rng = np.random.default_rng(0)
        while True:
            top, left = rng.integers(0, 2 * pad + 1, (2, n), np.int32)
            draws = Draws(rng.permutation(n).astype(np.int32), top, left, (rng.random(n) < 0.5) & (pad > 0))
            draws = jax.device_put(Draws(*(value.astype(np.int32) for value in draws)))
            for start in range(0, n // self.recipe.batch - self.together + 1, self.together):
                at = stored, draws, np.int32(start)
                yield ({}, *at) if self.together > 1 else (self._batch(*at),)


def loss_alone(recipe: Recipe, objective: Any) -> Callable[[int], Any]:
    """Returns a function that computes value and gradient of the distillation terms in the student's logits."""
    rng = np.random.default_rng(0)
    teacher, student = (jnp.asarray(rng.standard_normal((recipe.batch, recipe.classes), np.float32)) for _ in range(2))
    labels = jnp.zeros(recipe.batch, jnp.int32)
    ((method, cfg, _),) = objective.methods.values()
    graded = jax.jit(jax.value_and_grad(lambda z: method.loss(teacher, z, labels, cfg)))

    def run(count: int) -> Any:
        for _ in range(count):
            result = graded(student)
        return jax.block_until_ready(result)

    return run


def contestants(recipe: Recipe, names: list[str], images: int, steps: int) -> tuple[dict[str, Any], float | None]:
    """Returns the contestants' functions, compiled and warm, by name, and our step's FLOPs; a turn is `steps` steps."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (images, recipe.size, recipe.size, 3), np.uint8)
    labels = rng.integers(0, recipe.classes, images).astype(np.int32)
    made: dict[str, Any] = {}
    flops = None
    for name in names:
        if name == "ours":
            step = OurStep(recipe, pixels, labels)
            made[name], flops = step.run, step.flops
            if recipe.teacher:
                made["loss alone"] = loss_alone(recipe, step.objective)
        elif name == "several":
            made[name] = OurStep(recipe, pixels, labels, together=steps).run
        elif name == "xla":
            by_xla = lambda function, *arrays, on_cpu: function(convolution.plain, *arrays)  # noqa: E731
            with mock.patch.object(convolution, "_by_platform", by_xla):
                made[name] = OurStep(recipe, pixels, labels).run
        elif torch_step and {recipe.student, recipe.teacher or recipe.student} <= set(torch_step.MODELS):
            options = dict(strong=name != "torch plain", compile=name == COMPILED)
            made[name] = torch_step.Step(recipe, pixels, labels, **options).run
    for name, run in made.items():
        run(steps if name == "several" else 2)
    return made, flops


def measure(made: dict[str, Any], seconds: float, steps: int) -> dict[str, tuple[float, float]]:
    """Returns the median wall and processor seconds per step, over turns of `steps` for at least `seconds`."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in made}
    begun = time.perf_counter()
    while len(taken[next(iter(made))]) < 2 or time.perf_counter() - begun < seconds:
        for name, run in made.items():
            start = time.perf_counter(), time.process_time()
            run(steps)
            after = time.perf_counter(), time.process_time()
            taken[name].append(((after[0] - start[0]) / steps, (after[1] - start[1]) / steps))
    clocks = {name: zip(*times, strict=True) for name, times in taken.items()}
    return {name: tuple(map(statistics.median, both)) for name, both in clocks.items()}


def figures(
    recipe: Recipe, seconds: dict[str, tuple[float, float]], flops: float | None
) -> dict[str, dict[str, float | None]]:
    """Returns the figures of each contestant; None where one does not apply or is unknown."""
    kind = jax.devices()[0].device_kind
    ours = seconds.get("ours")
    out = {}
    for name, (wall, cpu) in seconds.items():
        whole = name != "loss alone"
        half = recipe.precision == "bfloat16" and name != "torch plain"
        peak = peak_flops(kind, "bfloat16" if half else "float32")
        out[name] = {
            "step_ms": 1e3 * wall,
            "cpu_ms": 1e3 * cpu,
            "examples_per_second": recipe.batch / wall if whole else None,
            "over_ours": wall / ours[0] if ours else None,
            "cpu_over_ours": cpu / ours[1] if ours else None,
            "mfu_percent": 100 * flops / wall / peak if whole and flops and peak else None,
        }
    return out


_FORMATS = ("{:.2f}", "{:.2f}", "{:.1f}", "{:.3g}", "{:.3g}", "{:.1f} %")  # of each figure


def lines(recipe: Recipe, seconds: dict[str, tuple[float, float]], flops: float | None) -> list[str]:
    """Returns one Markdown line per contestant."""
    title = f"{recipe.teacher} -> {recipe.student}" if recipe.teacher else recipe.student
    out = []
    for name, values in figures(recipe, seconds, flops).items():
        pairs = zip(values.values(), _FORMATS, strict=True)
        cells = ["" if value is None else form.format(value) for value, form in pairs]
        out.append("| " + " | ".join([f"{title}, {recipe.size} pixels", name, *cells]) + " |")
    return out


HEADER = """\
| models | | ms a step | CPU ms | examples/s | time / ours | CPU time / ours | MFU |
| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |"""


def make_recipe(models: str, *, batch: int, size: int, precision: str) -> Recipe:
    """Returns the recipe of "TEACHER,STUDENT" or "STUDENT"."""
    teacher, _, student = models.rpartition(",")
    large = student.startswith("imagenet")
    return Recipe(
        student=student,
        teacher=teacher or None,
        batch=batch,
        size=size,
        classes=1000 if large else 100,
        pad=0 if large else 4,
        precision=precision,
        mean=(0.485, 0.456, 0.406) if large else (0.5071, 0.4867, 0.4408),
        std=(0.229, 0.224, 0.225) if large else (0.2675, 0.2565, 0.2761),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet32x4,resnet8x4"], metavar="[TEACHER,]STUDENT")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--sizes", nargs="+", type=int, default=[32], help="side of an image in pixels")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--student_only", action="store_true", help="train with cross-entropy, without the teacher")
    parser.add_argument(
        "--contestants", nargs="+", choices=CONTESTANTS, default=[name for name in CONTESTANTS if name != "several"]
    )
    parser.add_argument("--seconds", type=float, default=30.0, help="time of the turns of each pair, after the warm-up")
    parser.add_argument("--steps", type=int, default=None, help="steps per turn (default: 1 on a CPU, 10 elsewhere)")
    parser.add_argument("--images", type=int, default=2048, help="number of synthetic images, at least a batch")
    flags = parser.parse_args()
    if flags.images < flags.batch:
        sys.exit(f"--images must be at least the batch, {flags.batch}, got {flags.images}. Give more images.")
    device = jax.devices()[0]
    steps = flags.steps or (1 if device.platform == "cpu" else 10)
    names = [name for name in CONTESTANTS if name in flags.contestants]
    other = f"torch {torch_step.torch.__version__}" if torch_step else "torch is missing"
    print(f"jax {jax.__version__}, {other} on {device.device_kind}, {flags.precision}\n")
    print(HEADER)
    for models, size in itertools.product(flags.models, flags.sizes):
        models = models.rpartition(",")[2] if flags.student_only else models
        recipe = make_recipe(models, batch=flags.batch, size=size, precision=flags.precision)
        made, flops = contestants(recipe, [name for name in names if name != COMPILED], flags.images, steps)
        if COMPILED in names:
            try:
                made |= contestants(recipe, [COMPILED], flags.images, steps)[0]
            except Exception as error:  # its compilers raise many types
                print(f"{COMPILED} is left out: {type(error).__name__}: {error}".splitlines()[0], file=sys.stderr)
        print("\n".join(lines(recipe, measure(made, flags.seconds, steps), flops)), flush=True)


if __name__ == "__main__":
    main()
