"""Times the three passes of a convolution on a CPU: XLA's own, with separated rows, as a product, and oneDNN's.

python benchmarks/convolution.py                                # the second table of docs/train_speed.md
python benchmarks/convolution.py --cpu --ways apart product --shapes 2,64,64,3,1 4,64,64,3,1
python benchmarks/convolution.py --cpu --ways apart oneDNN --shapes 32,16,16,3,1 16,32,32,3,1 8,64,64,3,1

A first line gives the speed of a matrix product, the peak that a convolution can reach. oneDNN's are PyTorch's, in the
channels-last layout; "forward" there is the forward pass alone, and each gradient is computed alone.
"""

import argparse
import contextlib
import importlib
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ldrld_jax.models.convolution import plain, product, spread

torch: Any = None
with contextlib.suppress(ImportError):
    torch = importlib.import_module("torch")

WAYS = {"XLA": plain, "apart": spread, "product": product, "oneDNN": None}

# (side, channels, features, kernel, stride) of layers of resnet8x4, then resnet20, then MobileNetV2.
SHAPES = [
    *[(32, 3, 32, 3, 1), (32, 32, 64, 3, 1), (32, 64, 64, 3, 1), (32, 64, 128, 3, 2), (16, 128, 128, 3, 1)],
    *[(16, 128, 256, 3, 2), (8, 256, 256, 3, 1), (32, 32, 64, 1, 1), (32, 64, 128, 1, 2)],
    *[(32, 16, 16, 3, 1), (16, 32, 32, 3, 1), (8, 64, 64, 3, 1), (8, 80, 480, 1, 1)],
]


def passes(convolution: Any, shape: tuple[int, ...], batch: int) -> dict[str, Any]:
    """Returns the compiled passes by name, as functions without arguments."""
    side, channels, features, kernel, stride = shape
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((batch, side, side, channels), np.float32))
    w = jnp.asarray(rng.standard_normal((kernel, kernel, channels, features), np.float32))
    at = (stride, stride), ((kernel // 2,) * 2,) * 2
    y = plain(x, w, *at)
    functions = {
        "forward": lambda x, w, y: convolution(x, w, *at),
        "input gradient": lambda x, w, y: jax.linear_transpose(lambda x: convolution(x, w, *at), x)(y)[0],
        "weight gradient": lambda x, w, y: jax.linear_transpose(lambda w: convolution(x, w, *at), w)(y)[0],
    }
    compiled = {name: jax.jit(function).lower(x, w, y).compile() for name, function in functions.items()}
    return {name: lambda run=run: jax.block_until_ready(run(x, w, y)) for name, run in compiled.items()}


def passes_of_torch(shape: tuple[int, ...], batch: int) -> dict[str, Any]:
    """Returns PyTorch's passes by name, as functions without arguments."""
    side, channels, features, kernel, stride = shape
    x = torch.randn(batch, channels, side, side).to(memory_format=torch.channels_last)
    w = torch.randn(features, channels, kernel, kernel).to(memory_format=torch.channels_last)
    at = dict(stride=(stride,) * 2, padding=(kernel // 2,) * 2, dilation=(1, 1), groups=1)
    y = torch.nn.functional.conv2d(x, w, **at)
    backward, whole = (
        torch.ops.aten.convolution_backward,
        dict(transposed=False, output_padding=(0, 0), bias_sizes=None),
    )
    return {
        "forward": lambda: torch.nn.functional.conv2d(x, w, **at),
        "input gradient": lambda: backward(y, x, w, **whole, **at, output_mask=(True, False, False)),
        "weight gradient": lambda: backward(y, x, w, **whole, **at, output_mask=(False, True, False)),
    }


def peak(size: int = 1536) -> dict[str, Any]:
    """Returns a matrix product of XLA and one of oneDNN, with 2 size^3 operations."""
    a = np.random.default_rng(0).standard_normal((size, size), np.float32)
    ours, x = jax.jit(jnp.matmul), jnp.asarray(a)
    works = {"XLA": lambda: jax.block_until_ready(ours(x, x))}
    return works | ({"oneDNN": lambda: torch.from_numpy(a) @ torch.from_numpy(a)} if torch else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["XLA", "apart"])
    parser.add_argument("--shapes", nargs="+", type=lambda text: tuple(map(int, text.split(","))), default=SHAPES)
    parser.add_argument("--cpu", action="store_true", help="CPU time, which other load affects least")
    flags = parser.parse_args()
    if "oneDNN" in flags.ways and not torch:
        parser.error("oneDNN is called through PyTorch, which is not installed")
    clock = time.process_time if flags.cpu else time.perf_counter

    def milliseconds(works: dict[Any, Any]) -> list[float]:
        """Returns the median of each function, in turns."""
        taken: dict[Any, list[float]] = {key: [] for key in works}
        for _ in range(flags.repeats + 1):
            for key, work in works.items():
                start = clock()
                work()
                taken[key].append(1e3 * (clock() - start))
        return [statistics.median(times[1:]) for times in taken.values()]

    names, products = ("forward", "input gradient", "weight gradient"), peak()
    speeds = [f"{name} {2 * 1536**3 / 1e6 / ms:.0f}" for name, ms in zip(products, milliseconds(products), strict=True)]
    print(f"a matrix product, GFLOP per second of {'processor' if flags.cpu else 'wall'} time: {', '.join(speeds)}\n")
    columns = [f"{name}: {way}" for name in names for way in flags.ways]
    print("| side, channels, features, kernel, stride; ms | " + " | ".join(columns) + " |")
    print("| --- |" + " ---: |" * len(columns))
    for shape in flags.shapes:
        made = {
            way: passes_of_torch(shape, flags.batch) if way == "oneDNN" else passes(WAYS[way], shape, flags.batch)
            for way in flags.ways
        }
        found = milliseconds({(name, way): made[way][name] for name in names for way in flags.ways})
        print(f"| {', '.join(map(str, shape))} | " + " | ".join(f"{ms:.1f}" for ms in found) + " |", flush=True)


if __name__ == "__main__":
    main()
