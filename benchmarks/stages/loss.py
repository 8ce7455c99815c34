"""Measures the table of `benchmarks/loss.py`, size by size."""

from collections.abc import Iterator, Sequence

import loss as benchmark  # benchmarks/loss.py

from stages import piece
from stages.piece import Values, Work

SIZES = ((64, 100), (1024, 1000), (64, 21841), (256, 1000), (1024, 100), (1024, 21841), (64, 1000), (256, 100))


def table(work: Work) -> Iterator[Values]:
    """Measures LDRLD, KD, the copy, the unoptimised LDRLD and the published form in PyTorch."""
    sizes = ((8, 20), (8, 40)) if work.shrink else SIZES
    return _measured(work, sizes, ("copy", "kd", "ldrld", "plain", "torch"))


def pallas(work: Work) -> Iterator[Values]:
    """Measures LDRLD by its Pallas kernel and by XLA, and KD; compares the values of LDRLD."""
    return _measured(work, ((8, 20),) if work.shrink else SIZES, ("copy", "kd", "ldrld", "pallas"))


def compiled(work: Work) -> Iterator[Values]:
    """Measures the published form under torch.compile (half a minute per size to compile), LDRLD and KD."""
    sizes = ((8, 20),) if work.shrink else SIZES[:2]
    return _measured(work, sizes, ("copy", "kd", "ldrld", "torch", "torch compiled"))


def _measured(work: Work, sizes: Sequence[tuple[int, int]], names: Sequence[str]) -> Iterator[Values]:
    values = work.before
    here = [name for name in names if benchmark.torch is not None or not name.startswith("torch")]
    if len(here) < len(names):
        values["left_out"] = "PyTorch is not installed."
    for size in sizes:
        title = f"{size[0]}x{size[1]}"
        if title in values:
            continue
        made = benchmark.entries(size, here, None)
        calls, repeats = (1, 3) if work.shrink else (20, 30)
        benchmark.measure(made, repeats, work.seconds / len(sizes) / len(here) / 2, calls)
        found = benchmark.figures(size, made)
        values[title] = {**found, "calls": calls, "repeats": {name: len(entry.seconds) for name, entry in made.items()}}
        yield values


if __name__ == "__main__":
    piece.main("loss", {"table": table, "pallas": pallas, "compiled": compiled})
