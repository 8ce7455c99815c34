"""The data of a run: its training batches, padded to suit its mesh and microbatches, and its evaluation split."""

import dataclasses
import math
from typing import Any

import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ldrld_jax.data.described import Describer
from ldrld_jax.data.pipeline import Open, make_eval_source, make_train_batches
from ldrld_jax.data.source import Source
from ldrld_jax.data.sources import open_source
from ldrld_jax.data.stream import Readable, TrainBatches
from ldrld_jax.errors import UserError
from ldrld_jax.record.reader import read_data
from ldrld_jax.runtime.hosts import in_turn
from ldrld_jax.runtime.mesh import batch_sharding, shares
from ldrld_jax.train.given import NOTHING, Given


def open_input(
    config: ConfigDict, mesh: Mesh, *, views: int, absent: bool, given: Given = NOTHING
) -> tuple[TrainBatches, Readable]:
    """Opens both splits of a resolved config.

    Args:
      config: resolved.
      mesh: of the run.
      views: the number of augmentations of an image that the methods compare.
      absent: True for devices that are not here; the data are then only described, and no image is read.
      given: the splits, if they are objects.

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
            open_source=Describer(config.compile, "train_images") if absent else opener(given.train),
            # Each device and each group takes equally many rows of a microbatch.
            **(shares(mesh) | {"divisor": config.accumulate * math.lcm(mesh.shape["data"], batch_norm_groups(config))}),
        )
        described = Describer(config.compile, "eval_images") if absent else None
        eval_source = open_evaluation(config, given, described)
    _check_alike(batches.source, eval_source)
    if config.data.mixup and batches.padded:
        raise UserError(
            f"data.mixup blends the images of a batch, which may hold no padding: got {config.data.mixup}. Set "
            "data.remainder=drop, data.on_error=raise and a batch_size that the devices divide, or data.mixup=0."
        )
    return batches, eval_source


def _check_alike(train: Readable, evaluation: Readable) -> None:
    """Raises a UserError if a network that is trained on one split could not be evaluated on the other."""
    ours, theirs = form_of(train), form_of(evaluation)
    if ours != theirs:
        raise UserError(
            f"the training data are {_shown(ours)}, and the evaluation data {_shown(theirs)}. Give both alike."
        )


def form_of(source: Readable) -> dict[str, Any]:
    """Returns the form of the inputs of a network, as JSON; images may differ in size, and texts in length."""
    shape, dtype = source.image_shape, np.dtype(source.dtype)
    return {
        "numbers": "uint8" if dtype == np.uint8 else "fractions" if dtype.kind == "f" else "whole numbers",
        "raw": bool(source.raw),
        "axes": len(shape),
        "channels": shape[-1] if len(shape) > 2 else None,
        "label_axes": len(source.label_shape),
    }


def _shown(form: dict[str, Any]) -> str:
    channels = "" if form["channels"] is None else f", {form['channels']} channels"
    labels = f"labels of {form['label_axes']} axes" if form["label_axes"] else "one label each"
    kind = f"{form['numbers']} {'raw' if form['raw'] else 'pixels'}"
    return f"{kind} ({form['axes']} axes{channels}) with {labels}"


def check_form(workdir: epath.PathLike, here: dict[str, Any]) -> None:
    """Raises a UserError if the run in a workdir was trained on data of another form, see `form_of`."""
    there = (read_data(workdir) or {}).get("form", here)
    if not isinstance(there, dict) or there.keys() != here.keys():
        raise UserError(f"{workdir}/data.json is not a valid data.json. Restore it, or choose another workdir.")
    if there != here:
        raise UserError(
            f"the run in {workdir} was trained on data of {_shown(there)}, and these are {_shown(here)}. Give them "
            "alike."
        )


def open_evaluation(config: ConfigDict, given: Given = NOTHING, open_split: Open | None = None) -> Readable:
    """Opens the evaluation split of a resolved config; see `open_input`."""
    split = given.train if config.data.held_out else given.evaluation
    return make_eval_source(config.data, open_source=open_split or opener(split))


def opener(split: Source | None) -> Open:
    """Returns a function like `open_source` that returns a split that is given as an object; itself without one."""
    if split is None:
        return open_source
    return lambda *name, train_split, exif, **on_error: dataclasses.replace(split, **on_error)


def batch_norm_groups(config: ConfigDict) -> int:
    """Returns the number of groups in a microbatch, each normalised by its own batch statistics."""
    micro = config.batch_size // config.accumulate
    return 1 if config.batch_norm_group is None else micro // config.batch_norm_group
