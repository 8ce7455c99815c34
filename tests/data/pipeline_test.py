"""Batches of encoded images from a config: the same after a resume, with any threads, with or without cache."""

import itertools

import chex
import numpy as np
import pytest

from ldrld_jax import config as config_lib
from ldrld_jax.data.given import as_source
from ldrld_jax.data.pipeline import make_eval_source, make_train_batches
from ldrld_jax.data.source import InMemory
from ldrld_jax.errors import UserError


def block(folder, **changes):
    data = config_lib.load("configs/image_folder.py").data
    data.update(data_dir=str(folder), crop_size=16, resize_size=18, **changes)
    return data


@pytest.mark.parametrize("augment", ["random_resized_crop", "rotate", "pad_crop"])
def test_a_resume_gives_the_batches_that_were_left(folder, augment):
    data = block(folder, augment=augment, pad=2, rand_augment=1)
    batches = make_train_batches(data, batch_size=5, seed=0)
    straight = list(itertools.islice(batches.iterate(threads=3), 9))
    resumed = make_train_batches(data, batch_size=5, seed=0).iterate(4, threads=1)
    chex.assert_trees_all_equal(list(itertools.islice(resumed, 5)), straight[4:])
    first, again = (straight[i] for i in (0, 3))  # of two epochs
    assert (first["image"] != again["image"]).any()


def test_the_cache_changes_nothing(folder):
    kept, fresh = (make_eval_source(block(folder, cache_mb=mb)) for mb in (1024, 0))
    assert isinstance(kept, InMemory)
    assert not isinstance(fresh, InMemory)
    for _ in range(2):
        chex.assert_trees_all_equal(kept.read(np.arange(12)), fresh.read(np.arange(12)))


def test_the_cache_counts_bytes(folder):
    numbers = as_source((np.zeros((8, 64, 64, 8), np.float32), np.arange(8) % 2))  # 1 MiB
    opened = lambda *name, **options: numbers  # noqa: E731
    data = config_lib.default().data
    for mb, kept in ((1, True), (0, False)):
        data.cache_mb = mb
        assert isinstance(make_eval_source(data, open_source=opened), InMemory) is kept
    data.cache_mb, numbers = 1, as_source((np.zeros((9, 64, 64, 8), np.float32), np.arange(9) % 2))
    assert not isinstance(make_eval_source(data, open_source=opened), InMemory)


@pytest.mark.parametrize(("key", "value"), [("crop_size", 4), ("rand_augment", 1)])
@pytest.mark.parametrize("channels", [2, 4])
def test_what_is_done_to_grey_and_colours_alone_is_refused_for_other_channels(key, value, channels):
    images = as_source((np.zeros((8, 8, 8, channels), np.uint8), np.arange(8) % 2))
    data = config_lib.default().data
    data[key] = value
    with pytest.raises(UserError) as error:
        make_train_batches(data, batch_size=4, seed=0, open_source=lambda *name, **options: images)
    assert str(error.value) == (
        f"data.{key}={value} is for images of 1 or 3 channels, and these have {channels}. Unset it; data.image_size "
        "resizes images of any channels."
    )


def test_only_images_that_are_always_the_same_are_kept(folder):
    sources = {
        a: make_train_batches(block(folder, augment=a), batch_size=4, seed=0).source for a in ("rotate", "pad_crop")
    }
    assert [isinstance(source, InMemory) for source in sources.values()] == [False, True]
