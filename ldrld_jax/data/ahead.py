"""Makes batches ahead of the step, in threads of the run's process or in worker processes, and chooses between them."""

import os
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from ldrld_jax.data.source import InMemory, whole_of
from ldrld_jax.data.workers import Batch, Job, pool

# Limits for the memory of batches that wait for use, and for that of workers. A thread or a worker has one in hand.
_AHEAD_BYTES, _WORKER_BYTES = 2**28, 2**31

# For what follows, see "Threads or workers" in docs/data_speed.md.
_LOCKED_SECONDS = 5e-4  # about how long a thread holds the interpreter lock for each image
_WORKER_RATE = 0.8  # speed of a worker relative to a thread
_FEW, _MOST = 4, 32  # threads or workers; on few cores there are no workers
_OWN_READERS = ("folders", "tfds_records", "decoded")  # modules whose records can be pickled and hold no images
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
    threads, workers = makers(source, threads, workers, size, one)
    if workers:
        # A thread waits for each worker, and one more has its request ready when a worker is done.
        make, threads = Job(pool(workers), make, source), workers + 1
    fit = _AHEAD_BYTES // size
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(threads, min(4 * threads, fit)))
    return iter(grain.MapDataset.source(items).map(make).to_iter_dataset(options))


class Makers(NamedTuple):
    """Numbers of threads and worker processes; if there are workers, they make the batches."""

    threads: int
    workers: int

    def __str__(self) -> str:
        return f"{self.workers} workers" if self.workers else f"{self.threads} threads"


def makers(
    source: Any,
    threads: int | None = None,
    workers: int | None = None,
    size: int = 1,
    one: Callable[[int], Any] | None = None,
) -> Makers:
    """Chooses what makes the batches of a source.

    Threads share the interpreter lock, which limits the images per second of any number of them. Workers are chosen if
    one on each core but one would exceed that limit, and only for images that this package itself reads from files.

    Args:
      source: the source to read. Images that are kept in memory get no workers, whatever is asked for.
      threads: None for one per core, between 4 and 32, and fewer if batches are large.
      workers: None to choose, or 0 if `threads` is given.
      size: of a batch, in bytes.
      one: makes one image; `source.read` if None.
    """
    cores = available_cores()
    most = min(_MOST, _AHEAD_BYTES // size)
    wanted = max(min(cores, most), _FEW) if threads is None else threads
    if isinstance(source, InMemory):
        return Makers(wanted, 0)
    if workers is None:
        one = one or (lambda index: source.read(np.array([index])))
        enough = threads is not None or cores <= _FEW or not _is_read_here(source)
        if not enough:
            seconds = max(_seconds_per_call(one, len(source)), 1e-6)  # a clock may be coarse
            by_threads, by_workers = 1 / min(seconds, _LOCKED_SECONDS), _WORKER_RATE * (cores - 1) / seconds
            enough = by_workers <= by_threads
        # A worker's batch lies in its own memory, in memory that it shares with the run, and in the run's.
        workers = 0 if enough else max(min(cores - 1, _MOST, _WORKER_BYTES // (3 * size)), _FEW)
    return Makers(wanted, workers)


def available_cores() -> int:
    """Counts the cores that this process may use, by its affinity and by its container's limit."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        used, period = _CPU_MAX.read_text().split()
        return min(cores, max(int(used) // int(period), 1))
    except (OSError, ValueError):  # not Linux, or no limit
        return cores


def _is_read_here(source: Any) -> bool:
    """Returns whether this package reads a source's images from files; a caller's object may not be picklable."""
    records = whole_of(getattr(source, "records", None))
    return type(records).__module__ in {f"ldrld_jax.data.{name}" for name in _OWN_READERS}


def _seconds_per_call(one: Callable[[int], Any], count: int) -> float:
    """Measures the CPU time of one of `count` images: the median of a few, after the first, which opens files."""
    seconds = []
    for index in range(min(count, 9)):
        start = time.thread_time()
        one(index)
        seconds.append(time.thread_time() - start)
    return statistics.median(seconds[1:] or seconds)
