"""Measures the speed of the input on its own, and detects runs that wait for it."""

import itertools
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from ml_collections import ConfigDict

from ldrld_jax.data.ahead import makers
from ldrld_jax.data.augment import pad_crop_flip
from ldrld_jax.data.decode import BrokenImageError, open_image, pixels
from ldrld_jax.data.pipeline import made_by, make_train_batches
from ldrld_jax.data.stream import TrainBatches, batch_bytes

logger = logging.getLogger("ldrld_jax")

T = TypeVar("T")
_SECONDS = 5.0  # of a measurement


def measure(data: ConfigDict, batches: TrainBatches, seconds: float = _SECONDS) -> dict[str, float]:
    """Measures the images per second of a config's training input, without training.

    Args:
      data: the `data` block of a config.
      batches: the training batches of that block.
      seconds: approximate duration of each measurement.

    Returns:
      A dict with images per second. With one thread, `read`: encoded images from the disk; `decode`: read and fully
      decoded, but for raw inputs and for channels that no image file has; `augment`: read and transformed as in
      training, which may decode less. Then `pipeline`: batches as in a run, with `data.threads` threads or
      `data.workers`, or from the devices.

    Raises:
      UserError: if the data differ from the block, or an image is broken and `data.on_error` is "raise".
    """
    source = batches.source.uncached  # a cache would hide the cost
    draws, count = batches.draws(0), min(batches.batch_size, len(batches.source))

    def read(at: np.ndarray) -> Any:
        return source.records.__getitems__(at.tolist())

    def decode(at: np.ndarray) -> Any:
        decoded = []
        for index, record in zip(at.tolist(), read(at), strict=True):
            try:
                image = open_image(record["image"])
                decoded.append(pixels(image, channels=source.image_shape[-1], exif=data.exif))
            except BrokenImageError as error:
                source.report(index, error)
        return decoded

    def augment(at: np.ndarray) -> Any:
        return pad_crop_flip(source.read(at)[0], draws.at(at), pad=batches.pad)

    rates, works = {}, {"read": read, "decode": decode, "augment": augment}
    if source.raw or source.image_shape[-1] not in (1, 3):
        del works["decode"]
    for name, work in works.items():
        spans = (np.take(draws.order, range(i, i + count), mode="wrap") for i in itertools.count(0, count))
        rates[name] = count * rate(lambda spans=spans, work=work: work(next(spans)), seconds)  # type: ignore[misc]
    iterator = batches.iterate(**made_by(data))
    warm_up(iterator, batches)
    rates["pipeline"] = count * rate(lambda: jax.block_until_ready(next(iterator)), seconds)
    return rates


def report(data: ConfigDict, *, batch_size: int, views: int = 1) -> str:
    """Formats the result of `measure` as a readable table; a batch has `views` views of each image."""
    batches = make_train_batches(data, batch_size=batch_size, seed=0, views=views)
    rates = measure(data, batches)
    how = {
        "read": "encoded images from the disk, one thread",
        "decode": "read and fully decoded, one thread",
        "augment": "read, cropped, resized, flipped, one thread",
        "pipeline": f"batches of {batch_size}{f', {views} views each' * (views > 1)}, loader {data.loader}"
        + (
            f", {makers(batches.source, **made_by(data), size=batch_bytes(batches))}" if data.loader == "stream" else ""
        ),
    }
    rows = [f"{name:10}{rates[name]:12.0f}  {how[name]}" for name in rates]
    return "\n".join([f"{data.name}, {data.train_split}: images per second", *rows])


def warm_up(iterator: Iterator[Any], batches: TrainBatches) -> None:
    """Takes batches for one epoch, at most 30 seconds, so that caches are filled and programs compiled."""
    until = time.perf_counter() + 30.0
    for _ in range(batches.steps_per_epoch):
        next(iterator)
        if time.perf_counter() > until:
            return


def rate(work: Callable[[], Any], seconds: float) -> float:
    """Measures the calls per second over about `seconds`."""
    work()
    calls, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        work()
        calls += 1
    return calls / elapsed


def watched(
    batches: Iterator[T], *, share: float = 0.1, every: int = 100, clock: Callable[[], float] = time.perf_counter
) -> Iterator[T]:
    """Yields the batches, and warns once if their consumer waits for them for more than `share` of its time.

    Time between two calls belongs to the consumer, time inside a call is waiting. The first batch is not
    counted, because threads start and the step compiles. After it, every `every` batches are judged together.
    """
    yield from itertools.islice(batches, 1)
    told, waited, since, taken = False, 0.0, clock(), 0
    while True:
        before = clock()
        try:
            batch = next(batches)
        except StopIteration:
            return
        waited, taken = waited + clock() - before, taken + 1
        yield batch
        if taken == every:
            total = clock() - since
            if waited > share * total and not told:
                told = True
                logger.warning(
                    "the run waits for its input %.0f %% of the time. Decode the images once, set data.workers, or "
                    "see --mode bench_data.",
                    100 * waited / total,
                )
            waited, since, taken = 0.0, clock(), 0
