"""What training draws at random, and the crops and mirrors made of it: pure functions of (seed, epoch, index)."""

from typing import NamedTuple

import numpy as np


class Draws(NamedTuple):
    """The random numbers of one epoch, an entry per example of the dataset."""

    order: np.ndarray  # [n] the permutation in which the epoch visits the examples
    top: np.ndarray  # [n] crop offsets, 0..2 pad
    left: np.ndarray
    flip: np.ndarray  # [n] bool

    def at(self, indices: np.ndarray) -> "Draws":
        """The entries of the examples at `indices`; their order is `indices` itself."""
        return Draws(indices, self.top[indices], self.left[indices], self.flip[indices])


def draw(seed: int, epoch: int, examples: int, *, pad: int = 0, flip: bool = False) -> Draws:
    """All random numbers of an epoch: the same for any loader, batch size, host or resume.

    Example:
      >>> sorted(draw(0, 3, 5).order.tolist())
      [0, 1, 2, 3, 4]
    """
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, epoch))))
    order = rng.permutation(examples)
    top, left = rng.integers(0, 2 * pad + 1, (2, examples))
    return Draws(order, top, left, (rng.random(examples) < 0.5) & flip)


def generator(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The random numbers of one image in one epoch, for views whose draws depend on the image's size.

    A counter-based generator needs no hashing of its seed: key and counter name the stream, in a
    third of the time.

    Example:
      >>> generator(0, 3, 5).random() == generator(0, 3, 5).random()
      True
    """
    return np.random.Generator(np.random.Philox(key=[seed, epoch], counter=[0, 0, 0, index]))


def pad_crop_flip(images: np.ndarray, draws: Draws, *, pad: int) -> np.ndarray:
    """Crops of the zero-padded images, some mirrored; the offsets and mirrors are those of `draws`.

    Args:
      images: `[n, height, width, channels]`.
      draws: with `[n]` entries.
      pad: zeros on each side.

    Returns:
      An array of the shape and dtype of `images`.

    Example:
      >>> image = np.arange(1, 5).reshape(1, 2, 2, 1)
      >>> moved = Draws(np.array([0]), top=np.array([1]), left=np.array([2]), flip=np.array([True]))
      >>> pad_crop_flip(image, moved, pad=1)[0, ..., 0].tolist()
      [[0, 2], [0, 4]]
    """
    _, height, width, channels = images.shape
    padded = np.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0))) if pad else np.ascontiguousarray(images)
    out = np.empty_like(padded, shape=images.shape)
    # Slices copy whole rows, and a pixel as one item mirrors four times as fast as its channels do.
    pixel = np.dtype((np.void, channels * images.itemsize))
    moves = zip(out.view(pixel), padded.view(pixel), draws.top, draws.left, draws.flip, strict=True)
    for row, image, top, left, flip in moves:
        crop = image[top : top + height, left : left + width]
        row[...] = crop[:, ::-1] if flip else crop
    return out
