"""The resident loader: all images stay on the devices as uint8, and ordering, crops and flips run there."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import platform_dependent
from jax.sharding import NamedSharding, PartitionSpec

from ldrld_jax.data.augment import Draws
from ldrld_jax.data.stream import TrainBatches
from ldrld_jax.errors import UserError

DeviceBatch = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class ResidentBatches(TrainBatches):
    """The same batches as `TrainBatches`, made on the devices; for datasets that fit in each device's memory.

    Attributes:
      sharding: sharding of a batch over the devices; None for the default device.

    Raises:
      UserError: if there is more than one host or more than one view.
    """

    sharding: NamedSharding | None = None

    def __post_init__(self) -> None:
        if self.hosts > 1:
            raise UserError("data.loader=resident works on one host. Set data.loader=stream.")
        if self.views > 1:
            raise UserError(
                f"data.loader=resident makes one view of an image, not {self.views}. Set data.loader=stream."
            )

    def iterate(  # type: ignore[override]
        self, start: int = 0, *, threads: int | None = None, workers: int | None = None
    ) -> Iterator[DeviceBatch]:
        """Yields the batches from step `start` on, dispatched one at a time; without threads or workers."""
        return map(self.on_devices().batch, itertools.count(start))

    def on_devices(self) -> "Images":
        """Reads all images and copies them to the devices."""
        images, labels = self.source.read(np.arange(len(self.source)))
        return Images(self, self.put((images.reshape(len(images), -1), labels)))

    def put(self, tree: Any) -> Any:
        """Copies arrays to every device."""
        replicated = self.sharding and NamedSharding(self.sharding.mesh, PartitionSpec())
        return jax.device_put(tree, replicated)


class Images:
    """A training set on the devices, which makes any batch there.

    Args:
      batches: the definition of the batches.
      stored: all images, one per row, and labels; None if only the programs are needed and no batch is made.

    Attributes:
      make: the program of one batch, see `make_batch`.
    """

    def __init__(self, batches: ResidentBatches, stored: tuple[jax.Array, jax.Array] | None):
        self._batches, self._stored = batches, stored
        self._draws: tuple[int, Any] = (-1, None)
        shape = batches.source.image_shape
        self.make = make_batch(batches.rows, shape, batches.pad, batches.sharding)

    def batch(self, step: int) -> DeviceBatch:
        """Makes the batch of `step` with one dispatch."""
        stored, draws, position = self.at(step)
        start = int(position) * self._batches.batch_size
        count = min(self._batches.batch_size, len(self._batches.source) - start)
        return self._padding_known(self.make(stored, draws, np.int32(start), np.int32(count)), count)

    def at(self, step: int) -> tuple[Any, Draws, np.int32]:
        """Returns the inputs of the batch of `step`: images, the epoch's draws and its position in the epoch."""
        epoch, position = divmod(step, self._batches.steps_per_epoch)
        if self._draws[0] != epoch:
            draws = Draws(*(values.astype(np.int32) for values in self._batches.draws(epoch)))
            self._draws = epoch, self._batches.put(draws)
        return self._stored, self._draws[1], np.int32(position)

    def whole(self, stored: Any, draws: Draws, position: jax.Array) -> DeviceBatch:
        """Makes a batch without missing examples from the result of `at`, for use inside a program."""
        count = self._batches.batch_size
        batch = self.make(stored, draws, position * count, jnp.int32(count))
        return self._padding_known(batch, count)

    def _padding_known(self, batch: DeviceBatch, count: int) -> DeviceBatch:
        """Removes the mask of a batch in which nothing can be masked."""
        if count == self._batches.rows and not self._batches.masked:
            del batch["mask"]
        return batch


@functools.lru_cache(maxsize=4)
def make_batch(
    rows: int, shape: tuple[int, int, int], pad: int, sharding: NamedSharding | None
) -> Callable[..., DeviceBatch]:
    """Returns `make(stored, draws, start, count)`, which makes a batch of `count` examples of an epoch.

    The batch starts at position `start` of the order. `stored` images are flat, `[n, height * width * channels]`: a TPU
    gathers their rows in place, but with four axes would copy all images to another layout at every step.

    Args:
      rows: number of examples of a whole batch, rounded up to a multiple of the devices.
      shape: height, width and channels of an image.
      pad: number of zeros around the image that a crop may include.
      sharding: sharding of the batch.

    Returns:
      A jitted function that returns `image` `[rows, height, width, channels]` uint8, `label` `[rows]` and
      `mask` `[rows]`, of which the last `rows - count` are 0 and False.
    """

    def make(stored, draws, start, count):
        images, labels = stored
        place = jnp.arange(rows, dtype=jnp.int32)
        if sharding is not None:  # each device gathers its own rows, from its own copy
            place = jax.lax.with_sharding_constraint(place, sharding)
        index = draws.order[jnp.minimum(start + place, draws.order.shape[0] - 1)]
        mask = (place < count) & (labels[index] >= 0)
        _, *draw = draws.at(index)
        crops = platform_dependent(
            images[index].reshape(rows, *shape),
            *draw,
            tpu=functools.partial(crop_by_products, pad=pad),
            default=functools.partial(crop_by_slices, pad=pad),
        )
        batch = {"image": jnp.where(mask[:, None, None, None], crops, 0), "label": jnp.where(mask, labels[index], 0)}
        return batch | {"mask": mask}

    return jax.jit(make, out_shardings=sharding)


def crop_by_slices(images: jax.Array, top: jax.Array, left: jax.Array, flip: jax.Array, *, pad: int) -> jax.Array:
    """Crops zero-padded images, each at its own position, and flips some.

    Args:
      images: `[n, height, width, channels]` uint8.
      top, left: `[n]` int32, 0 to 2 `pad`, the crop's corner in the padded image.
      flip: `[n]`, whether to flip the image horizontally.
      pad: number of zeros on each side.

    Returns:
      `[n, height, width, channels]` uint8.
    """
    padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))

    def one(image, top, left, flip):
        crop = jax.lax.dynamic_slice(image, (top, left, jnp.zeros_like(top)), images.shape[1:])
        return jnp.where(flip, crop[:, ::-1], crop)

    return jax.vmap(one)(padded, top, left, flip)


def crop_by_products(images: jax.Array, top: jax.Array, left: jax.Array, flip: jax.Array, *, pad: int) -> jax.Array:
    """Computes `crop_by_slices` by matrix products, because slices at many positions are a loop on a TPU.

    A product with rows that hold one 1 and zeros selects entries, and bfloat16 represents all integers up to 256.
    """
    height, width = images.shape[1:3]
    rows = top[:, None] + jnp.arange(height, dtype=jnp.int32)[None, :]
    across = jnp.arange(width, dtype=jnp.int32)[None, :]
    columns = left[:, None] + jnp.where(flip[:, None], width - 1 - across, across)
    picked = jnp.einsum("nij,njwc->niwc", _picks(rows - pad, height), images.astype(jnp.bfloat16))
    picked = jnp.einsum("nij,nhjc->nhic", _picks(columns - pad, width), picked)
    return picked.astype(images.dtype)


def _picks(places: jax.Array, size: int) -> jax.Array:
    """Returns `[n, k, size]` bfloat16 with a 1 at each of the places `[n, k]`, none for places outside `size`."""
    return (places[:, :, None] == jnp.arange(size, dtype=places.dtype)[None, None, :]).astype(jnp.bfloat16)
