"""The streaming loader: threads or worker processes read, decode and augment batches ahead of the step."""

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence

import numpy as np

from ldrld_jax.data.ahead import ahead
from ldrld_jax.data.augment import Draws, draw, pad_crop_flip
from ldrld_jax.data.source import InMemory, Source
from ldrld_jax.data.workers import Batch

Readable = Source | InMemory


@dataclasses.dataclass(frozen=True)
class TrainBatches:
    """The batches of a training run by step: `batches[step]` is a pure function of (seed, step).

    The state of the loader is therefore the number of the next step. It can resume at any step, and every
    host can make its own share of a batch.

    Attributes:
      source: the source of images and labels, with its view.
      batch_size: size of the whole batch, over all hosts.
      seed: seed of the order, and of the augmentation unless `augment_seed` is given.
      pad, flip: see `augment.draw`.
      drop_remainder: drop an epoch's last partial batch.
      divisor: batches are padded to a multiple of this, the number of devices that share them.
      host, hosts: this host's number and the number of hosts, which select the share of each batch.
      masked: give every batch a mask, because some have padding, or examples or labels may be left out.
      views: number of augmentations of each image; if above 1, `image` is `[rows, views, ...]`.
      augment_seed: seed of crops, flips and random views, so that runs with different orders see the same images.
      cycle: number of epochs after which the augmentations repeat; None for new ones in each epoch.
    """

    source: Readable
    batch_size: int
    seed: int
    pad: int = 0
    flip: bool = False
    drop_remainder: bool = False
    divisor: int = 1
    host: int = 0
    hosts: int = 1
    masked: bool = False
    views: int = 1
    augment_seed: int | None = None
    cycle: int | None = None

    @property
    def rows(self) -> int:
        """The number of rows of a batch over all hosts: `batch_size` rounded up to a multiple of `divisor`."""
        return padded_rows(self.batch_size, self.divisor)

    @property
    def padded(self) -> bool:
        """True if a batch may have padding, or labels that are left out."""
        return self.masked or self.rows != self.batch_size

    @property
    def steps_per_epoch(self) -> int:
        batches = len(self.source) / self.batch_size
        return math.floor(batches) if self.drop_remainder else math.ceil(batches)

    def __len__(self) -> int:
        return 2**62  # unlimited: the trainer stops

    def __getitem__(self, step: int) -> Batch:
        return self.part(*divmod(step, self.steps_per_epoch))

    def part(self, epoch: int, position: int) -> Batch:
        """Makes the batch at a position of an epoch; the position after the last holds the dropped remainder."""
        kept, shown, seed = self.share(epoch, position), self.shown(epoch), self.augmented_by
        images, labels = self._view(kept.indices, shown, seed)
        if self.views > 1:  # each further view augments the same images with another seed
            others = [self._view(kept.indices, shown, seed + (view << 32))[0] for view in range(1, self.views)]
            images = np.stack([images, *others], axis=1)
        return kept.batch(images, labels)

    def share(self, epoch: int, position: int) -> "Share":
        """Returns the examples of this host's rows of `part(epoch, position)`."""
        indices = self.draws(epoch).order[position * self.batch_size : (position + 1) * self.batch_size]
        return share(indices, self.batch_size, self.divisor, self.host, self.hosts, masked=self.masked)

    def shown(self, epoch: int) -> int:
        """Returns the epoch whose augmentations `epoch` uses."""
        return epoch % self.cycle if self.cycle else epoch

    @property
    def augmented_by(self) -> int:
        """The seed of crops, flips and random views."""
        return self.seed if self.augment_seed is None else self.augment_seed

    def _view(self, indices: np.ndarray, epoch: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the images at `indices`, augmented by `seed` and `epoch`, and their labels."""
        draws = _draws(seed, epoch, len(self.source), self.pad, self.flip).at(indices)
        images, labels = self.source.read(indices, (seed, epoch))
        return pad_crop_flip(images, draws, pad=self.pad), labels

    def draws(self, epoch: int) -> Draws:
        """Returns the order, crops and flips of an epoch, which are the same for every loader."""
        examples = len(self.source)
        shown = _draws(self.augmented_by, self.shown(epoch), examples, self.pad, self.flip)
        return shown._replace(order=_draws(self.seed, epoch, examples, self.pad, self.flip).order)

    def parts(
        self, epoch: int, positions: Sequence[int], *, threads: int | None = None, workers: int | None = None
    ) -> Iterator[Batch]:
        """Yields `part(epoch, position)` for each position, made as by `iterate`."""
        return ahead(functools.partial(self.part, epoch), positions, self.source, batch_bytes(self), threads, workers)

    def iterate(self, start: int = 0, *, threads: int | None = None, workers: int | None = None) -> Iterator[Batch]:
        """Yields the batches from step `start` on, made ahead of their use.

        Args:
          start: the first step.
          threads: the threads that make them, without workers; None to choose, see `ahead.makers`.
          workers: the processes that make them, see `workers`; None to choose. Images that are kept in memory get none.
        """
        return ahead(self.__getitem__, range(start, len(self)), self.source, batch_bytes(self), threads, workers)


def batch_bytes(batches: "TrainBatches | _EvalBatches") -> int:
    """Returns the size of the images of a batch."""
    source, views = batches.source, getattr(batches, "views", 1)
    return batches.batch_size * views * math.prod(source.image_shape) * np.dtype(source.dtype).itemsize


@functools.lru_cache(maxsize=8)  # this epoch and the next: order, augmentation, a second view
def _draws(seed, epoch, examples, pad, flip):
    return draw(seed, epoch, examples, pad=pad, flip=flip)


@dataclasses.dataclass(frozen=True)
class Share:
    """One host's rows of a batch: `indices` of real examples, padded to `rows` rows."""

    indices: np.ndarray
    rows: int
    masked: bool

    def batch(self, images: np.ndarray, labels: np.ndarray) -> Batch:
        """Returns `image`, `label` and, if the whole batch may have padding, `mask`: True for labels that count.

        A label of -1 marks a skipped example, which becomes padding, or a label of several that is left out.
        """
        missing = self.rows - len(labels)

        def padded(x: np.ndarray) -> np.ndarray:
            return np.pad(x, ((0, missing), *((0, 0),) * (x.ndim - 1))) if missing else x

        batch = {"image": padded(images), "label": padded(np.maximum(labels, 0))}
        return batch | {"mask": padded(labels >= 0)} if self.masked else batch


def padded_rows(batch_size: int, divisor: int) -> int:
    """Returns `batch_size` rounded up to a multiple of `divisor`."""
    return -(-batch_size // divisor) * divisor


def share(indices: np.ndarray, batch_size: int, divisor: int, host: int, hosts: int, *, masked: bool = False) -> Share:
    """Returns one host's rows of a batch of `indices`, padded to `batch_size` rounded up to `divisor`.

    Partial batches are padded to the full size, so that all batches have one shape on any number of devices.
    """
    total = padded_rows(batch_size, divisor)
    rows = total // hosts
    return Share(indices[host * rows : (host + 1) * rows], rows, masked or len(indices) < total)


@dataclasses.dataclass(frozen=True)
class _EvalBatches:
    """The batches of an evaluation, called with the index of their first example."""

    source: Readable
    batch_size: int
    divisor: int
    host: int
    hosts: int

    def __call__(self, start: int) -> Batch:
        indices = np.arange(start, min(start + self.batch_size, len(self.source)))
        kept = share(indices, self.batch_size, self.divisor, self.host, self.hosts, masked=True)
        return kept.batch(*self.source.read(kept.indices))


def eval_batches(
    source: Readable,
    batch_size: int,
    *,
    divisor: int = 1,
    host: int = 0,
    hosts: int = 1,
    threads: int | None = None,
    workers: int | None = None,
) -> Iterator[Batch]:
    """Yields every example once, in order, always with a `mask`, so that the step is traced once."""
    batches = _EvalBatches(source, batch_size, divisor, host, hosts)
    return ahead(batches, range(0, len(source), batch_size), source, batch_bytes(batches), threads, workers)
