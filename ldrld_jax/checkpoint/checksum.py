"""Checksums of arrays that do not depend on the layout over devices and hosts."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

# Path of an array -> its dtype, shape and checksum.
Described = dict[str, tuple[str, tuple[int, ...], int]]


def leaves_by_path(tree: Any) -> dict[str, Any]:
    """Returns the arrays of a tree by path, such as `conv1/kernel`."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def describe(tree: Any) -> Described:
    """Returns dtype, shape and checksum of each array in a tree, by path.

    A checksum is the sum of the array's bits, read as unsigned integers of at least 32 bits, each
    times 2 i + 1 where i is its position, modulo 2^32 (2^64 for 64-bit types). The odd weights ensure that
    a change of any one element changes the sum. Each host reads the data on its own devices, without
    compilation, and several hosts add up their sums.

    Example:
      >>> describe({"w": np.float32([0.0, 1.0])})
      {'w': ('float32', (2,), 3196059648)}
    """
    arrays = leaves_by_path(tree)
    sums = np.array([_sum_here(array) for array in arrays.values()], np.uint64)
    spread = np.array(
        [isinstance(array, jax.Array) and not array.is_fully_addressable for array in arrays.values()], bool
    )
    if spread.any():
        sums = np.where(spread, _over_hosts(sums), sums)
    return {
        path: (str(array.dtype), tuple(array.shape), int(total) % 2 ** (8 * _width(array.dtype)))
        for (path, array), total in zip(arrays.items(), sums, strict=True)
    }


def _width(dtype: np.dtype) -> int:
    """Returns the size in bytes of the integers that are summed."""
    return max(np.dtype(dtype).itemsize, 4)


def _sum_here(array: Any) -> np.uint64:
    total = np.zeros(1, np.uint64)  # an array, because a scalar warns when it wraps around
    for block, index in _blocks(array):
        total += _weighted_sum(block, index, array.shape)
    return total[0]


def _blocks(array: Any) -> Iterator[tuple[np.ndarray, tuple[slice, ...]]]:
    """Yields this host's blocks of an array and their indices; over all hosts each block occurs once."""
    if isinstance(array, np.ndarray):
        yield array, (slice(None),) * array.ndim
        return
    for shard in array.addressable_shards:
        if shard.replica_id == 0:
            yield np.asarray(shard.data), shard.index


def _weighted_sum(block: np.ndarray, index: tuple[slice, ...], shape: tuple[int, ...]) -> np.uint64:
    kind = np.dtype(f"u{_width(block.dtype)}")
    position = np.zeros((), kind)
    for part, size in zip(index, shape, strict=True):
        start, stop, _ = part.indices(size)
        position = position[..., None] * kind.type(size) + np.arange(start, stop, dtype=kind)
    bits = np.ascontiguousarray(block).view(f"u{block.dtype.itemsize}").reshape(block.shape)
    return np.sum(bits * (2 * position + kind.type(1)), dtype=kind).astype(np.uint64)


def _over_hosts(sums: np.ndarray) -> np.ndarray:
    from jax.experimental import multihost_utils

    halves = np.stack([sums >> np.uint64(32), sums & np.uint64(2**32 - 1)]).astype(np.uint32)  # x64 may be off
    high, low = np.asarray(multihost_utils.process_allgather(halves)).astype(np.uint64).sum(axis=0)
    return (high << np.uint64(32)) + low
