"""The resident loader: all images on the devices as uint8, order, crop and mirror applied there."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from ldrld_jax.data.augment import Draws
from ldrld_jax.data.stream import TrainBatches
from ldrld_jax.errors import UserError

DeviceBatch = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class ResidentBatches(TrainBatches):
    """The very batches of `TrainBatches`, made on the devices: for sets that fit in each one's memory.

    Attributes:
      sharding: how a batch lies on the devices; None for the default device.

    Raises:
      UserError: with more than one host, or more than one view.
    """

    sharding: NamedSharding | None = None

    def __post_init__(self) -> None:
        if self.hosts > 1:
            raise UserError("data.loader=resident works on one host. Set data.loader=stream.")
        if self.views > 1:
            raise UserError(
                f"data.loader=resident makes one view of an image, not {self.views}. Set data.loader=stream."
            )

    def iterate(self, start: int = 0, *, threads: int = 4) -> Iterator[DeviceBatch]:  # type: ignore[override]
        """The batches from step `start` on, dispatched one by one; `threads` is not needed."""
        return map(self.on_devices().batch, itertools.count(start))

    def on_devices(self) -> "Images":
        """Reads all images and puts them there."""
        images, labels = self.source.read(np.arange(len(self.source)))
        padded = np.pad(images, ((0, 0), (self.pad, self.pad), (self.pad, self.pad), (0, 0)))
        return Images(self, self.put((padded, labels)))

    def put(self, tree: Any) -> Any:
        """Arrays to every device."""
        replicated = self.sharding and NamedSharding(self.sharding.mesh, PartitionSpec())
        return jax.device_put(tree, replicated)

    @property
    def rows(self) -> int:
        """Of a batch: `batch_size` rounded up to the devices."""
        return -(-self.batch_size // self.divisor) * self.divisor


class Images:
    """A training set on the devices, of which any batch is made there.

    Args:
      batches: what a batch is.
      stored: all images, with their padding, and labels; None if no batch is made and only the programs are wanted.

    Attributes:
      make: the program of one batch, see `make_batch`.
    """

    def __init__(self, batches: ResidentBatches, stored: tuple[jax.Array, jax.Array] | None):
        self._batches, self._stored = batches, stored
        self._draws: tuple[int, Any] = (-1, None)
        self.make = make_batch(batches.batch_size, batches.rows, batches.source.image_shape[:2], batches.sharding)

    def batch(self, step: int) -> DeviceBatch:
        """The batch of `step`: one dispatch."""
        stored, draws, position = self.at(step)
        start = int(position) * self._batches.batch_size
        count = min(self._batches.batch_size, len(self._batches.source) - start)
        return self._padding_known(self.make(stored, draws, np.int32(start), np.int32(count)), count)

    def at(self, step: int) -> tuple[Any, Draws, np.int32]:
        """What the batch of `step` is made of: the images, the epoch's draws and the batch's place in the epoch."""
        epoch, position = divmod(step, self._batches.steps_per_epoch)
        if self._draws[0] != epoch:
            draws = Draws(*(values.astype(np.int32) for values in self._batches.draws(epoch)))
            self._draws = epoch, self._batches.put(draws)
        return self._stored, self._draws[1], np.int32(position)

    def whole(self, stored: Any, draws: Draws, position: jax.Array) -> DeviceBatch:
        """A batch without missing examples, of what `at` gives: for use inside a program."""
        count = self._batches.batch_size
        batch = self.make(stored, draws, position * count, jnp.int32(count))
        return self._padding_known(batch, count)

    def _padding_known(self, batch: DeviceBatch, count: int) -> DeviceBatch:
        """The batch, without its mask where nothing can be masked."""
        if count == self._batches.rows and not self._batches.masked:
            del batch["mask"]
        return batch


@functools.lru_cache(maxsize=4)
def make_batch(
    batch_size: int, rows: int, crop: tuple[int, int], sharding: NamedSharding | None
) -> Callable[..., DeviceBatch]:
    """`make(stored, draws, start, count)`: the `count` examples from place `start` of an epoch's order.

    Args:
      batch_size: examples of a whole batch.
      rows: `batch_size` rounded up to the devices.
      crop: height and width of an image; those that are `stored` have their padding.
      sharding: of the batch.

    Returns:
      A jitted function; `image` `[rows, height, width, channels]` uint8, `label` `[rows]` and `mask`
      `[rows]`, of which the last `rows - count` are 0 and False.
    """

    def make(stored, draws, start, count):
        images, labels = stored
        place = jnp.arange(rows, dtype=jnp.int32)
        if sharding is not None:  # each device gathers its own rows, from its own copy
            place = jax.lax.with_sharding_constraint(place, sharding)
        index = draws.order[jnp.minimum(start + place, draws.order.shape[0] - 1)]
        mask = (place < count) & (labels[index] >= 0)
        crops = _crops(images, draws.at(index), crop)
        batch = {"image": jnp.where(mask[:, None, None, None], crops, 0), "label": jnp.where(mask, labels[index], 0)}
        return batch | {"mask": mask}

    return jax.jit(make, out_shardings=sharding)


def _crops(images: jax.Array, draws: Draws, crop: tuple[int, int]) -> jax.Array:
    def one(index, top, left, flip):
        image = jax.lax.dynamic_slice(images, (index, top, left, jnp.zeros_like(index)), (1, *crop, images.shape[-1]))[
            0
        ]
        return jnp.where(flip, image[:, ::-1], image)

    return jax.vmap(one)(*draws)
