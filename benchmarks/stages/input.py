"""Measures the input of `benchmarks/data.py`: images/s by threads, and by processes for PyTorch."""

import functools
import os
import statistics
from collections.abc import Callable, Iterator, Sequence

import data as benchmark  # benchmarks/data.py

from stages import piece
from stages.piece import Values, Work


def photos(work: Work) -> Iterator[Values]:
    """Measures random resized crops to 224 of 500x375 JPEGs: the stream by threads, PyTorch by processes."""
    root = work.scratch / "photos"
    if not root.exists():
        benchmark.make_folder(root, 8 if work.shrink else 256, 97)
    about = benchmark.photos(root)
    return _by_workers(work, lambda threads: benchmark.stream(threads, **about), lambda: benchmark.Photos(root))


def cifar(work: Work) -> Iterator[Values]:
    """Measures CIFAR-100, padded, cropped and mirrored; its data must be present."""
    about = dict(name="cifar100", data_dir=str(work.folder / "data"), pad=4)
    images, _ = benchmark.make_train_batches(
        benchmark.config_data(**about), batch_size=benchmark.BATCH, seed=0
    ).source.read(benchmark.np.arange(500 if work.shrink else 10_000))
    if work.shrink:
        about |= dict(train_split="train[:500]")
    more = {"resident": lambda: benchmark.resident(**about)}
    make = lambda threads: benchmark.stream(threads, **about)  # noqa: E731
    return _by_workers(work, make, lambda: benchmark.Cifar(images), more)


def _by_workers(
    work: Work,
    stream: Callable[[int], Iterator],
    dataset: Callable[[], Sequence],
    more: dict[str, Callable[[], Iterator]] | None = None,
) -> Iterator[Values]:
    """Measures the contestants one after another, each with all cores; yields medians of three turns."""
    cores = len(os.sched_getaffinity(0))
    counts = [1, 2] if work.shrink else [n for n in (1, 2, 4, 8, 16) if n <= cores]
    makers: dict[str, Callable[[], Iterator]] = dict(more or {})
    makers |= {f"stream, {n} threads": functools.partial(stream, n) for n in reversed(counts)}
    values = work.before
    if benchmark.torch is None:
        values["left_out"] = "PyTorch is not installed."
    else:
        makers |= {
            f"PyTorch, {n} workers": functools.partial(lambda n: benchmark.torch_batches(dataset(), n), n)
            for n in reversed(counts)
        }
    seconds = 0.1 if work.shrink else min(1.5, work.seconds / len(makers) / 6)
    for name, make in makers.items():
        if name not in values:
            (rates,) = benchmark.take_turns({name: make()}, turns=3, seconds=seconds).values()
            values[name] = {"images_per_second": statistics.median(rates), "min": min(rates), "max": max(rates)}
            yield values


if __name__ == "__main__":
    piece.main("input", {"photos": photos, "cifar": cifar})
