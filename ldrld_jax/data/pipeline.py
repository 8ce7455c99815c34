"""Builds the data of a run from the `data` block of its config; the trainer's only entry point to the data."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from jax.sharding import NamedSharding
from ml_collections import ConfigDict

from ldrld_jax.data import hard
from ldrld_jax.data.decoded import DecodedRecords
from ldrld_jax.data.rand_augment import RandAugment
from ldrld_jax.data.resident import ResidentBatches
from ldrld_jax.data.source import InMemory, Source
from ldrld_jax.data.sources import open_source
from ldrld_jax.data.stream import Readable, TrainBatches
from ldrld_jax.data.views import AsStored, CentreCrop, RandomResizedCrop, RandomRotation, View
from ldrld_jax.errors import UserError

Open = Callable[..., Source]  # like `sources.open_source`


def make_train_batches(
    data: ConfigDict,
    *,
    batch_size: int,
    seed: int,
    divisor: int = 1,
    host: int = 0,
    hosts: int = 1,
    views: int = 1,
    cycle: int | None = None,
    sharding: NamedSharding | None = None,
    open_source: Open = open_source,
) -> TrainBatches:
    """Returns the training batches, indexed by step.

    Args:
      data: the `data` block of a config, see `ldrld_jax.config`.
      batch_size: size of the whole batch, over all hosts.
      seed: seed of the order, and of the augmentation unless `data.augment_seed` is set.
      divisor, host, hosts, views, cycle: see `stream.TrainBatches`.
      sharding: sharding of a batch over the devices, for the resident loader.
      open_source: opens a split; a `described.Describer` for data that are not on this machine.

    Raises:
      UserError: if the block or the data are invalid; names the first problem.
    """
    source = opened(data, data.train_split, open_source)
    _check_unset(source, data)
    records = hard.select(source.records, data, classes=len(source.class_names))
    view = _train_view(source.image_shape, data)
    if data.rand_augment:
        view = RandAugment(view, data.rand_augment, data.rand_magnitude)
    source = source.of(records, view)
    common: dict[str, Any] = dict(
        batch_size=batch_size,
        seed=seed,
        pad=data.pad if data.augment == "pad_crop" else 0,
        flip=data.flip,
        drop_remainder=data.remainder == "drop",
        divisor=divisor,
        host=host,
        hosts=hosts,
        # One program for all batches of a run: the last one of an epoch may have padding.
        masked=data.on_error == "skip"
        or bool(source.label_shape)
        or (data.remainder == "keep" and len(source) % batch_size != 0),
        views=views,
        augment_seed=data.augment_seed,
        cycle=cycle,
    )
    if data.loader == "resident":
        if source.view.random:
            raise UserError(
                f"data.loader=resident cannot apply data.augment={data.augment} with data.rand_augment="
                f"{data.rand_augment}. Set data.augment=pad_crop and data.rand_augment=0, or data.loader=stream."
            )
        if source.changes:
            raise UserError(
                "data.loader=resident would keep one draw of images that differ each time they are read. Set "
                "data.loader=stream."
            )
        batches: TrainBatches = ResidentBatches(source, **common, sharding=sharding)
    else:
        batches = TrainBatches(_remembered(source, data), **common)
    if batches.steps_per_epoch == 0:
        raise UserError(
            f"batch_size must be at most the number of training images ({len(source)}) when the remainder is "
            f"dropped, got {batch_size}. Lower it, or set data.remainder=keep."
        )
    return batches


def make_eval_source(data: ConfigDict, *, open_source: Open = open_source) -> Readable:
    """Opens the evaluation data: `data.eval_split`, or the part of the training split that `data.held_out` puts aside.

    Raises:
      UserError: if the block or the data are invalid; names the first problem.
    """
    split = data.train_split if data.held_out else data.eval_split
    source = opened(data, split, open_source)
    records = source.records
    if source.changes:
        raise UserError(
            "the images to evaluate on differ each time they are read. Give evaluation data without random transforms."
        )
    if data.held_out:
        records = hard.select(records, data, classes=len(source.class_names), held_out=True)
        if not len(records):
            raise UserError(f"data.held_out={data.held_out} holds out less than half an image per class. Raise it.")
    return _remembered(source.of(records, _eval_view(source.image_shape, data)), data)


def made_by(data: ConfigDict) -> dict[str, Any]:
    """Returns the arguments of a loader that say who makes its batches, from a `data` block."""
    return {"threads": data.threads, "workers": data.workers}


def _check_unset(source: Source, data: ConfigDict) -> None:
    """Raises a UserError if the config asks for an operation that does not exist for such data."""
    shape = source.image_shape
    unset: dict[str, Any] = {"crop_size": None, "rand_augment": 0}
    if source.raw or source.label_shape:
        unset = {"loader": "stream", "augment": "pad_crop", "mixup": 0.0, **unset}
        unset |= {"resize_size": None, "image_size": None}
        if source.raw:
            unset |= {"mean": (0.5,), "std": (0.5,)}
        if len(shape) != 3 or source.label_shape:
            unset |= {"pad": 0, "flip": False}
    if source.raw:
        only = (
            f"pixels, and the data are raw: {np.dtype(source.dtype)} of shape {shape}. Unset it, or give images "
            "[n, height, width, channels] uint8."
        )
    elif source.label_shape:
        only = f"images with one label each, and these have labels of shape {source.label_shape}. Unset it."
    elif shape[-1] not in (1, 3):
        only = (
            f"images of 1 or 3 channels, and these have {shape[-1]}. Unset it; data.image_size resizes images of any "
            "channels."
        )
    else:
        return
    for key, value in unset.items():
        if data[key] != value:
            raise UserError(f"data.{key}={data[key]} is for {only}")


def opened(data: ConfigDict, split: str, open_source: Open) -> Source:
    """Opens a split of a `data` block.

    Raises:
      UserError: if there is none, or its images were decoded with another `data.exif`.
    """
    source = open_source(
        data.name,
        split,
        data.data_dir,
        train_split=data.train_split,
        on_error=data.on_error,
        max_skipped=data.max_skipped,
        exif=data.exif,
    )
    if isinstance(source.records, DecodedRecords) and source.records.exif != data.exif:
        raise UserError(
            f"the images in {data.data_dir} were decoded with data.exif={source.records.exif}, and the run has "
            f"data.exif={data.exif}. Set data.exif={source.records.exif}, or decode them again."
        )
    return source


def _train_view(stored: tuple[Any, Any, int], data: ConfigDict) -> View:
    if data.augment == "random_resized_crop":
        return RandomResizedCrop(data.crop_size, stored[-1], area=tuple(data.crop_area), exif=data.exif)
    base = _eval_view(stored, data)
    return RandomRotation(base, data.rotate_degrees) if data.augment == "rotate" else base


def _eval_view(stored: tuple[Any, Any, int], data: ConfigDict) -> AsStored | CentreCrop:
    if data.crop_size is not None:
        return CentreCrop(data.resize_size or data.crop_size, data.crop_size, stored[-1], data.exif)
    if None in stored:
        raise UserError(f"the images of {data.name} may differ in size. Set data.crop_size, to 224 for example.")
    return AsStored(stored, data.exif)


def _remembered(source: Source, data: ConfigDict) -> Readable:
    """Caches the decoded images in memory if they are not random and fit into `data.cache_mb`."""
    fits = len(source) * math.prod(source.image_shape) * np.dtype(source.dtype).itemsize <= data.cache_mb * 2**20
    return InMemory(source) if fits and not source.view.random and not source.changes else source
