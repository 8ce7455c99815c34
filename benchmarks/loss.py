"""Times value and gradient of LDRLD against KD, an unoptimised LDRLD and the published masked form in PyTorch.

python benchmarks/loss.py                                            # the table of docs/loss_speed.md
python benchmarks/loss.py --sizes 512x262144 --block-rows 16 --contestants copy kd ldrld --repeats 5
python benchmarks/loss.py --top                                      # only ways to find the d + 1 largest classes
python benchmarks/loss.py --calls 20                                 # for a GPU: reduces the share of call latency
python benchmarks/loss.py --plot docs/loss_speed.svg                 # needs matplotlib

Both frameworks use a GPU if there is one. The contestants take turns, so that other load on the machine affects all of
them equally. Two run only on request: "torch compiled" is PyTorch's form under torch.compile, "pallas" LDRLD's kernel.
"least bytes" is the unavoidable traffic, two reads and one write of [B, C] float32; the floor is its time at the
speed of a copy in JAX. "memory" is what the compiled program holds besides inputs and outputs.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import importlib
import itertools
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import ldrld_jax
from ldrld_jax.losses.top import top_classes
from tests.losses import ldrld_reference

torch: Any = None
torch_parts: Any = None
with contextlib.suppress(ImportError):
    torch, torch_parts = map(importlib.import_module, ("torch", "torch_parts"))

CONTESTANTS = ("copy", "kd", "ldrld", "plain", "torch", "torch compiled", "pallas")
TEMPERATURE, DEPTH, ALPHA, BETA = 4.0, 7, 10.5, 7.0


@dataclasses.dataclass
class Entry:
    """One contestant at one size.

    Attributes:
      run: `run(calls=1)` makes that many calls and waits for the last result.
      memory: temporary memory in bytes; None if unknown.
      seconds: seconds per call, for each turn.
    """

    run: Callable[..., Any]
    memory: int | None
    seconds: list[float] = dataclasses.field(default_factory=list)

    def measure(self, calls: int = 1) -> None:
        start = time.perf_counter()
        self.run(calls)
        self.seconds.append((time.perf_counter() - start) / calls)


def kd_loss(teacher: jax.Array, student: jax.Array) -> jax.Array:
    """Computes Hinton's distillation loss in its usual form, to be differentiated by JAX."""
    log_p, log_q = (jax.nn.log_softmax(z / TEMPERATURE) for z in (teacher, student))
    return TEMPERATURE**2 * jnp.mean(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1))


def jax_entry(function: Callable, *arguments: jax.Array) -> Entry:
    compiled = jax.jit(function).lower(*arguments).compile()
    memory = compiled.memory_analysis()

    def run(calls: int = 1) -> Any:
        for _ in range(calls):
            result = compiled(*arguments)
        return jax.block_until_ready(result)

    return Entry(run, memory and memory.temp_size_in_bytes)


def pair_weights() -> list[tuple[int, int, float]]:
    """Returns pairs of ranks with their weights, as numbers that torch.compile treats as constants."""
    weights = np.asarray(ldrld_jax.rank_weights(ldrld_jax.LDRLDConfig(depth=DEPTH)))
    return [(i, j, float(weights[i, j])) for i, j in itertools.combinations(range(DEPTH), 2)]


def torch_loss(teacher, student, pairs: list[tuple[int, int, float]]):
    """Computes the published form at this program's settings."""
    options = dict(temperature=TEMPERATURE, depth=DEPTH, alpha=ALPHA, beta=BETA)
    return torch_parts.published_loss(teacher, student, pairs, **options)


def torch_entry(teacher: np.ndarray, student: np.ndarray, *, compile: bool) -> Entry:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    fixed, trained = (torch.from_numpy(logits).to(device) for logits in (teacher, student))
    trained.requires_grad_()
    pairs = pair_weights()
    loss_of = torch.compile(torch_loss) if compile else torch_loss

    def run(calls: int = 1):
        for _ in range(calls):
            loss = loss_of(fixed, trained, pairs)
            gradient = torch.autograd.grad(loss, trained)
        return loss.item(), *gradient  # .item() waits for all launched work, including the gradient

    return Entry(run, None)


def entries(size: tuple[int, int], names: list[str], block_rows: int | None) -> dict[str, Entry]:
    """Returns the contestants at one size, compiled and run once on the same logits; checks that their losses agree."""
    rng = np.random.default_rng(0)
    teacher, student = (rng.standard_normal(size, np.float32) * 4 for _ in range(2))
    cfg = ldrld_jax.LDRLDConfig(depth=DEPTH, temperature=TEMPERATURE, alpha=ALPHA, beta=BETA)
    losses = {
        "kd": kd_loss,
        "ldrld": lambda t, s: ldrld_jax.ldrld_loss(t, s, cfg, block_rows=block_rows),
        "pallas": lambda t, s: ldrld_jax.ldrld_loss(t, s, cfg, implementation="pallas"),
        "plain": lambda t, s: ldrld_reference.ldrld_loss(t, s, cfg),
    }
    sides = jnp.asarray(teacher), jnp.asarray(student)

    def make(name: str) -> Entry:
        if name == "copy":
            return jax_entry(lambda z: z + 1, sides[0])
        if name.startswith("torch"):
            return torch_entry(teacher, student, compile=name == "torch compiled")
        return jax_entry(jax.value_and_grad(losses[name], 1), *sides)

    with concurrent.futures.ThreadPoolExecutor() as pool:  # GPU programs take seconds to compile
        made = dict(zip(names, pool.map(make, names), strict=True))
    results = {name: entry.run() for name, entry in made.items()}
    values = [float(results[name][0]) for name in CONTESTANTS[2:] if name in results]
    if values and max(values) - min(values) > 1e-4 * values[0]:
        raise ValueError(f"The contestants do not compute the same loss: {values}.")
    return made


def print_top_table(sizes: list[tuple[int, int]], repeats: int, seconds: float) -> None:
    """Prints the median ms of several ways to find the d + 1 largest values of every row."""

    def argmax(row):
        chosen = []
        for _ in range(DEPTH + 1):
            chosen.append(jnp.argmax(row))
            row = jnp.where(jnp.arange(row.size) == chosen[-1], -jnp.inf, row)
        return jnp.stack(chosen)

    ways = {
        "top_classes": jax.vmap(lambda row: top_classes(row, DEPTH + 1)),
        "repeated argmax": jax.vmap(argmax),
        "lax.top_k": lambda z: jax.lax.top_k(z, DEPTH + 1),
        "lax.approx_max_k": lambda z: jax.lax.approx_max_k(z, DEPTH + 1, recall_target=0.99),
    }
    print("| B x C | " + " | ".join(ways) + " |")
    print("| --- |" + " ---: |" * len(ways))
    for rows, classes in sizes:
        logits = jnp.asarray(np.random.default_rng(0).standard_normal((rows, classes), np.float32))
        made = {name: jax_entry(way, logits) for name, way in ways.items()}
        measure(made, repeats, seconds)
        medians = [f"{statistics.median(entry.seconds) * 1e3:.2f}" for entry in made.values()]
        print(f"| {rows} x {classes} | " + " | ".join(medians) + " |", flush=True)


def measure(made: dict[str, Entry], repeats: int, seconds: float, calls: int = 1) -> None:
    """Runs the contestants in turn, each up to `repeats` times or `seconds` in all, but at least 3 times."""
    for round_ in range(repeats):
        for entry in made.values():
            if round_ < 3 or calls * sum(entry.seconds) < seconds:
                entry.measure(calls)


def figures(size: tuple[int, int], made: dict[str, Entry]) -> dict[str, dict[str, float | None]]:
    """Returns the figures of each contestant except the copy; None if the contestant to compare with is missing."""
    array = 4 * size[0] * size[1]
    medians = {name: statistics.median(entry.seconds) for name, entry in made.items()}
    floor = 1.5 * medians["copy"] if "copy" in medians else None  # a copy moves two arrays, value and gradient three
    return {
        name: {
            "median_ms": medians[name] * 1e3,
            "least_ms": min(entry.seconds) * 1e3,
            "over_kd": medians[name] / medians["kd"] if "kd" in medians else None,
            "torch_over": medians["torch"] / medians[name] if "torch" in medians else None,
            "least_bytes_gb_per_second": 3 * array / medians[name] / 1e9,
            "percent_of_copy": 100 * floor / medians[name] if floor else None,
            "memory_arrays": entry.memory / array if entry.memory is not None else None,
        }
        for name, entry in made.items()
        if name != "copy"
    }


_DIGITS = (3, 3, 2, 1, 1, 0, 2)  # decimal places of each figure


def table(size: tuple[int, int], made: dict[str, Entry]) -> list[str]:
    """Returns one Markdown line per contestant."""
    lines = []
    for name, values in figures(size, made).items():
        pairs = zip(values.values(), _DIGITS, strict=True)
        cells = ["" if value is None else f"{value:.{digits}f}" for value, digits in pairs]
        lines.append("| " + " | ".join([f"{size[0]} x {size[1]}", name, *cells]) + " |")
    return lines


HEADER = [
    "| B x C | | median ms | least ms | median / KD's | PyTorch's / median | least bytes GB/s | % of the copy's speed "
    "| memory, B x C |",
    "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
]


def plot(path: pathlib.Path, results: dict[tuple[int, int], dict[str, Entry]]) -> None:
    """Plots the median nanoseconds per logit of every contestant at every size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    labels = {"copy": "copy x 1.5 (the floor)", "kd": "KD", "ldrld": "LDRLD", "plain": "LDRLD, plain"}
    labels |= {"torch": "LDRLD as published, PyTorch", "torch compiled": "the same, compiled", "pallas": "the kernel"}
    figure, axes = plt.subplots(figsize=(9, 4), layout="constrained")
    names = list(next(iter(results.values())))
    for place, name in enumerate(names):
        scale = 1.5 if name == "copy" else 1
        heights = [scale * 1e9 * statistics.median(made[name].seconds) / (b * c) for (b, c), made in results.items()]
        axes.bar(np.arange(len(results)) + place / (len(names) + 1), heights, 1 / (len(names) + 1), label=labels[name])
    axes.set_xticks(np.arange(len(results)) + 0.35, [f"{b}\nx {c}" for b, c in results])
    axes.set(yscale="log", ylabel="value and gradient, ns per logit", xlabel="B x C")
    axes.legend(ncols=3, fontsize="small")
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def parse_size(text: str) -> tuple[int, int]:
    rows, _, classes = text.partition("x")
    return int(rows), int(classes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default_sizes = [(b, c) for c in (100, 1000, 21841) for b in (64, 256, 1024)]
    parser.add_argument("--sizes", nargs="+", type=parse_size, default=default_sizes, metavar="BxC")
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS[:5]))
    parser.add_argument("--repeats", type=int, default=50, help="maximum runs of each contestant at each size")
    parser.add_argument("--seconds", type=float, default=2.0, help="approximate time of each contestant at each size")
    parser.add_argument("--calls", type=int, default=1, help="calls of each contestant per turn")
    parser.add_argument("--block-rows", type=int, default=None, help="ldrld_loss(..., block_rows=)")
    parser.add_argument("--top", action="store_true", help="compare the ways to find the largest classes instead")
    parser.add_argument("--torch-limit", type=int, default=6_000_000, help="maximum number of logits for PyTorch")
    parser.add_argument("--torch-threads", type=int, default=None, help="default: PyTorch's own choice")
    parser.add_argument("--plot", type=pathlib.Path, default=None, help="also write a plot to this file")
    flags = parser.parse_args()
    if flags.top:
        print_top_table(flags.sizes, flags.repeats, flags.seconds)
        return
    names = list(flags.contestants)
    if torch is None and any(name.startswith("torch") for name in names):
        print("PyTorch is not installed: skipping the published form (pip install torch).\n")
        names = [name for name in names if not name.startswith("torch")]
    elif flags.torch_threads:
        torch.set_num_threads(flags.torch_threads)
    device = jax.devices()[0]
    print(f"jax {jax.__version__} on {device.platform} ({device.device_kind}); d = {DEPTH}, T = {TEMPERATURE:g}\n")
    print("\n".join(HEADER))
    results = {}
    for size in flags.sizes:
        small = size[0] * size[1] <= flags.torch_limit
        fitting = [name for name in names if small or not name.startswith("torch")]
        made = entries(size, fitting, flags.block_rows)
        measure(made, flags.repeats, flags.seconds, flags.calls)
        print("\n".join(table(size, made)), flush=True)
        results[size] = {
            name: Entry(lambda: None, None, made[name].seconds if name in made else [float("nan")]) for name in names
        }
    if flags.plot:
        plot(flags.plot, results)


if __name__ == "__main__":
    main()
