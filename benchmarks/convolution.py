"""Times the three passes of a convolution on a CPU: XLA's own, and the models' form with separated rows.

python benchmarks/convolution.py                                # the second table of docs/train_speed.md
"""

import argparse
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ldrld_jax.models.convolution import plain, spread

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
        "by input": lambda x, w, y: jax.linear_transpose(lambda x: convolution(x, w, *at), x)(y)[0],
        "by kernel": lambda x, w, y: jax.linear_transpose(lambda w: convolution(x, w, *at), w)(y)[0],
    }
    compiled = {name: jax.jit(function).lower(x, w, y).compile() for name, function in functions.items()}
    return {name: lambda run=run: jax.block_until_ready(run(x, w, y)) for name, run in compiled.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    flags = parser.parse_args()
    columns = [f"{name}: {way}" for name in ("forward", "by input", "by kernel") for way in ("XLA", "apart")]
    print("| side, channels, features, kernel, stride; ms | " + " | ".join(columns) + " |\n| --- |" + " ---: |" * 6)
    for shape in SHAPES:
        made = {way: passes(way, shape, flags.batch) for way in (plain, spread)}
        taken: dict[tuple[str, Any], list[float]] = {}
        for _ in range(flags.repeats + 1):
            for name in made[plain]:
                for way, functions in made.items():
                    start = time.perf_counter()
                    functions[name]()
                    taken.setdefault((name, way), []).append(1e3 * (time.perf_counter() - start))
        cells = [f"{statistics.median(times[1:]):.1f}" for times in taken.values()]
        print(f"| {', '.join(map(str, shape))} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
