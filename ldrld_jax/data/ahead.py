"""Makes batches ahead of the step, in threads of the run's process or in worker processes, and chooses between them."""

import os
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from ldrld_jax.data.given import ArrayRecords, ItemRecords
from ldrld_jax.data.source import InMemory, Selected
from ldrld_jax.data.workers import Job, pool

Batch = dict[str, np.ndarray]

# Limit for the memory of batches that wait for use, whatever the size of an image.
_AHEAD_BYTES = 256 * 2**20

# For what follows, see "Threads or workers" in docs/data_speed.md.
_LOCKED_SECONDS = 5e-4  # for which a thread holds the interpreter lock for each image, at most
_WORKER_RATE = 0.8  # images that a worker makes in the time of one by a thread
_FEW_CORES, _MOST = 4, 32
_CPU_MAX = pathlib.Path("/sys/fs/cgroup/cpu.max")  # the limit of a container: microseconds of how many, or "max"


def ahead(
    make: Callable[[int], Batch],
    items: Sequence[int],
    source: Any,
    size: int,
    threads: int | None,
    workers: int | None,
    one: Callable[[int], Any] | None = None,
) -> Iterator[Batch]:
    """Yields `make(item)` for each item, in order, made ahead by threads or worker processes.

    Args:
      make: makes a batch.
      items: the arguments of its calls.
      source: the source that it reads.
      size: of a batch, in bytes.
      threads, workers: see `stream.TrainBatches.iterate`.
      one: makes one image, by which `makers` judges what an image costs; `source.read` if None.
    """
    import grain  # it imports JAX, and a worker imports this module

    if not len(items):
        return iter(())
    threads, workers = makers(source, threads, workers, one)
    if workers:
        # A thread waits for each worker, and one more has its request ready when a worker is done.
        make, threads = Job(pool(workers), make, source), workers + 1
    fit = _AHEAD_BYTES // size
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(threads, min(4 * threads, fit)))
    return iter(grain.MapDataset.source(items).map(make).to_iter_dataset(options))


class Makers(NamedTuple):
    """What makes batches: `workers` processes, or `threads` if there are none."""

    threads: int
    workers: int

    def __str__(self) -> str:
        return f"{self.workers} workers" if self.workers else f"{self.threads} threads"


def makers(
    source: Any,
    threads: int | None = None,
    workers: int | None = None,
    one: Callable[[int], Any] | None = None,
) -> Makers:
    """Chooses what makes the batches of a source.

    Threads share the interpreter lock, which limits the images that they make in a second, however many they are. If a
    worker on each core but one makes more, there are workers. Arrays and data set objects of the caller get threads.

    Args:
      source: the source to read. Images that are kept in memory get no workers, whatever is asked for.
      threads: None for one per core, between 4 and 32.
      workers: None to choose, or 0 if `threads` is given.
      one: makes one image; `source.read` if None.
    """
    cores = available_cores()
    wanted = min(max(cores, 4), _MOST) if threads is None else threads
    if isinstance(source, InMemory):
        return Makers(wanted, 0)
    if workers is None:
        one = one or (lambda index: source.read(np.array([index])))
        enough = threads is not None or cores <= _FEW_CORES or _is_given(source)
        if not enough:
            seconds = _seconds_per_call(one, len(source))
            by_threads, by_workers = 1 / min(seconds, _LOCKED_SECONDS), _WORKER_RATE * (cores - 1) / seconds
            enough = by_workers <= by_threads
        workers = 0 if enough else min(cores - 1, _MOST)
    return Makers(wanted, workers)


def available_cores() -> int:
    """Counts the cores that this process may use, by its affinity and by its container's limit."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        used, period = _CPU_MAX.read_text().split()
        return min(cores, max(int(used) // int(period), 1))
    except (OSError, ValueError):  # not Linux, or no limit
        return cores


def _is_given(source: Any) -> bool:
    """Returns whether a source reads the caller's object, which may not be picklable, or arrays, to be copied."""
    records = getattr(source, "records", None)
    while isinstance(records, Selected):
        records = records.records
    return isinstance(records, ArrayRecords | ItemRecords)


def _seconds_per_call(one: Callable[[int], Any], count: int) -> float:
    """Measures the processor time of one of `count` images: the median of a few, after the first, which opens files."""
    seconds = []
    for index in range(min(count, 9)):
        start = time.thread_time()
        one(index)
        seconds.append(time.thread_time() - start)
    return statistics.median(seconds[1:] or seconds)
