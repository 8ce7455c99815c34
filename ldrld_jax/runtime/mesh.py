"""The device mesh, and the shardings of batches and model states on it."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ldrld_jax.errors import UserError


def make_mesh(data: int = -1, model: int = 1, *, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Makes a mesh `("data", "model")` over the first `data * model` devices, those of each process side by side.

    Args:
      data: number of devices that the batch is split over; -1 for all that `model` leaves.
      model: number of devices that a model is split over.
      devices: devices of a topology that is only compiled for; None for the devices of this machine.

    Raises:
      UserError: if there are too few devices, or several processes would get unequal shares of the batch.

    Example:
      >>> dict(make_mesh(data=1).shape)
      {'data': 1, 'model': 1}
    """
    available = _device_count() if devices is None else len(devices)
    if data == -1 and model > available:
        raise UserError(f"mesh.model must be between 1 and the number of devices ({available}), got {model}.")
    data = available // model if data == -1 and model >= 1 else data
    if data < 1 or model < 1 or data * model > available:
        raise UserError(
            f"mesh.data x mesh.model must be between 1 and the number of devices ({available}), got {data} x {model}."
        )
    # A process reads the rows of a batch that its index names (`shares`), so it must hold these rows of the mesh.
    # jax.make_mesh orders the devices of a TPU slice by their places in it, and refuses GPUs of several machines.
    devices = sorted(
        jax.devices() if devices is None else devices, key=lambda device: (device.process_index, device.id)
    )
    held = Counter(device.process_index for device in devices)
    hosts = len(held)
    if hosts > 1 and (data * model != available or data % hosts or len(set(held.values())) > 1):
        each = " or ".join(map(str, sorted(set(held.values()))))
        raise UserError(
            f"mesh.data x mesh.model must be all {available} devices of the {hosts} processes, mesh.data a multiple "
            f"of {hosts}, and each process must have as many devices, got {data} x {model} with {each} devices in a "
            "process."
        )
    # Auto: shardings are hints for the partitioner. Explicit would put them in the types.
    axis_types = AxisType.Auto, AxisType.Auto
    return Mesh(np.array(devices[: data * model]).reshape(data, model), ("data", "model"), axis_types=axis_types)


def _device_count() -> int:
    try:
        return jax.device_count()
    except (RuntimeError, AssertionError) as error:  # the latter without the platform's plugin
        chosen, why = os.environ.get("JAX_PLATFORMS", ""), str(error) or "its plugin is missing or does not start"
        raise UserError(
            f"JAX finds no device for JAX_PLATFORMS={chosen!r} ({why}). Unset it, or install the extra cuda or tpu."
        ) from None


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that copies an array to every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that splits the first axis over the mesh's data axis."""
    return NamedSharding(mesh, PartitionSpec("data"))


def model_shardings(tree: Any, mesh: Mesh, *, fsdp: bool = False) -> Any:
    """Returns a sharding for each leaf of parameters, optimizer states or averages, chosen from the leaf's shape.

    The last axis, a layer's outputs, is split over "model". With `fsdp` the largest remaining axis is also split
    over "data". An axis whose size the number of devices does not divide stays whole.

    Args:
      tree: arrays or shape structs.
      mesh: from `make_mesh`.
      fsdp: True splits over "data" so that each device holds a part (ZeRO); False keeps a copy on each.

    Example:
      >>> mesh = make_mesh(data=1)
      >>> tuple(model_shardings(jax.ShapeDtypeStruct((3, 3, 16, 32), "float32"), mesh, fsdp=True).spec)
      (None, None, 'data', 'model')
    """

    def sharding(leaf: Any) -> NamedSharding:
        axes: list[str | tuple[str, ...] | None] = [None] * len(leaf.shape)
        if axes and leaf.shape[-1] % mesh.shape["model"] == 0:
            axes[-1] = "model"
        if fsdp:
            free = [i for i, size in enumerate(leaf.shape) if axes[i] is None and size % mesh.shape["data"] == 0]
            if free:
                axes[max(free, key=lambda i: leaf.shape[i])] = "data"
            elif axes and leaf.shape[-1] % (mesh.shape["model"] * mesh.shape["data"]) == 0:
                axes[-1] = ("model", "data")
        return NamedSharding(mesh, PartitionSpec(*axes))

    return jax.tree.map(sharding, tree)


def to_devices(batches: Iterable[dict[str, Any]], mesh: Mesh) -> Iterator[dict[str, jax.Array]]:
    """Yields batches as arrays split over the data axis, transferring one batch ahead of its use."""
    sharding = batch_sharding(mesh)
    ahead = None
    for batch in batches:
        following = {key: jax.make_array_from_process_local_data(sharding, value) for key, value in batch.items()}
        if ahead is not None:
            yield ahead
        ahead = following
    if ahead is not None:
        yield ahead


def shares(mesh: Mesh) -> dict[str, int]:
    """Returns a loader's view of the mesh: the `divisor` of its batches, this `host`'s index, and `hosts`."""
    return dict(divisor=mesh.shape["data"], host=jax.process_index(), hosts=jax.process_count())
