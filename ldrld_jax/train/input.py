"""The data of a run: its training batches, padded to suit its mesh and microbatches, and its evaluation split."""

import math

from jax.sharding import Mesh
from ml_collections import ConfigDict

from ldrld_jax.data.described import Describer
from ldrld_jax.data.pipeline import make_eval_source, make_train_batches
from ldrld_jax.data.sources import open_source
from ldrld_jax.data.stream import Readable, TrainBatches
from ldrld_jax.errors import UserError
from ldrld_jax.runtime.hosts import in_turn
from ldrld_jax.runtime.mesh import batch_sharding, shares


def open_input(config: ConfigDict, mesh: Mesh, *, views: int, absent: bool) -> tuple[TrainBatches, Readable]:
    """Opens both splits of a resolved config.

    Args:
      config: resolved.
      mesh: of the run.
      views: the number of augmentations of an image that the methods compare.
      absent: True for devices that are not here; the data are then only described, and no image is read.

    Raises:
      UserError: if the data are not as the config says.
    """
    with in_turn("data"):
        batches = make_train_batches(
            config.data,
            batch_size=config.batch_size,
            seed=config.seed,
            views=views,
            cycle=config.logits.get("views"),
            sharding=batch_sharding(mesh),
            open_source=Describer(config.compile, "train_images") if absent else open_source,
            **(shares(mesh) | {"divisor": _divisor(config, mesh)}),
        )
        eval_source = make_eval_source(
            config.data, open_source=Describer(config.compile, "eval_images") if absent else open_source
        )
    padded = not batches.drop_remainder or batches.masked or config.batch_size % batches.divisor
    if config.data.mixup and padded:
        raise UserError(
            f"data.mixup blends the images of a batch, which may hold no padding: got {config.data.mixup}. Set "
            "data.remainder=drop, data.on_error=raise and a batch_size that the devices divide, or data.mixup=0."
        )
    return batches, eval_source


def _divisor(config: ConfigDict, mesh: Mesh) -> int:
    """Returns the divisor of a padded batch: each device and each group takes equally many rows of a microbatch."""
    return config.accumulate * math.lcm(mesh.shape["data"], batch_norm_groups(config))


def batch_norm_groups(config: ConfigDict) -> int:
    """Returns the number of groups in a microbatch, each normalised by its own batch statistics."""
    micro = config.batch_size // config.accumulate
    return 1 if config.batch_norm_group is None else micro // config.batch_norm_group
