"""The resident loader: bit for bit the batches of the stream, on one device and on eight."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldrld_jax.data.augment import draw, pad_crop_flip
from ldrld_jax.data.resident import ResidentBatches, crop_by_products, crop_by_slices, make_batch
from ldrld_jax.data.sources import open_source
from ldrld_jax.data.stream import TrainBatches
from ldrld_jax.errors import UserError
from ldrld_jax.runtime.mesh import batch_sharding, make_mesh, replicated
from ldrld_jax.train import trainer
from tests.conftest import comparable_lines


class Noise:
    """A source of random images, some of them broken."""

    image_shape, class_names, dtype = (6, 5, 3), tuple("abc"), np.uint8

    def __init__(self, examples: int, broken: tuple[int, ...] = ()):
        rng = np.random.default_rng(0)
        self.images = rng.integers(0, 256, (examples, *self.image_shape), np.uint8)
        self.labels = rng.integers(0, 3, examples, np.int32)
        self.labels[list(broken)], self.images[list(broken)] = -1, 0

    def __len__(self):
        return len(self.labels)

    def read(self, indices, key=(0, 0)):
        return self.images[indices], self.labels[indices]


def both(source, steps, *, start=0, devices=1, **options):
    options = dict(seed=3, pad=2, flip=True, divisor=devices) | options
    sharding = batch_sharding(make_mesh(data=devices))
    resident = ResidentBatches(source, **options, sharding=sharding).iterate(start)
    stream = TrainBatches(source, **options).iterate(start)
    return list(itertools.islice(resident, steps)), list(itertools.islice(stream, steps))


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("batch_size", [8, 13])
def test_the_batches_are_those_of_the_stream_over_epochs(devices, batch_size):
    """Reads 50 images: full batches, remainders, and on eight devices 13 rows padded to 16."""
    resident, stream = both(Noise(50), 20, devices=devices, batch_size=batch_size)
    chex.assert_trees_all_equal(jax.device_get(resident), stream)
    assert {batch["image"].dtype for batch in resident} == {np.dtype(np.uint8)}


def test_a_dropped_remainder_and_a_start_in_the_middle_of_an_epoch():
    resident, stream = both(Noise(50), 12, start=9, batch_size=8, drop_remainder=True)
    chex.assert_trees_all_equal(jax.device_get(resident), stream)
    assert all("mask" not in batch for batch in resident)


def test_skipped_examples_are_masked_in_both():
    resident, stream = both(Noise(50, broken=(3, 17)), 7, batch_size=8, masked=True)
    chex.assert_trees_all_equal(jax.device_get(resident), stream)
    assert sum(int(batch["mask"].sum()) for batch in resident) == 48


def test_double_precision_changes_nothing(x64):
    resident, stream = both(Noise(50), 7, batch_size=8)
    chex.assert_trees_all_equal(jax.device_get(resident), stream)


def test_each_device_holds_its_rows_of_a_batch():
    (batch,), _ = both(Noise(50), 1, devices=8, batch_size=16)
    assert batch["image"].sharding == batch_sharding(make_mesh(data=8))
    assert {shard.data.shape for shard in batch["image"].addressable_shards} == {(2, 6, 5, 3)}


def test_the_devices_make_their_rows_without_talking():
    mesh = make_mesh(data=8)
    images, labels = Noise(50).read(np.arange(50))
    stored, draws = jax.device_put(((images.reshape(50, -1), labels), draw(0, 0, 50)), replicated(mesh))
    make = make_batch(16, images.shape[1:], 0, batch_sharding(mesh))
    program = make.lower(stored, draws, np.int32(0), np.int32(16)).compile().as_text()
    assert not any(word in program for word in ("all-gather", "all-reduce", "all-to-all", "collective-permute"))


@pytest.mark.parametrize("pad", [0, 3])
def test_crops_by_products_are_those_by_slices(pad, rng):
    images = rng.integers(0, 256, (40, 7, 5, 3), np.uint8)
    draws = draw(0, 0, 40, pad=pad, flip=True)
    places = [jnp.asarray(values, jnp.int32) for values in draws[1:]]
    slices = crop_by_slices(images, *places, pad=pad)
    np.testing.assert_array_equal(crop_by_products(images, *places, pad=pad), slices)
    expected = pad_crop_flip(images, draws._replace(order=np.arange(40)), pad=pad)
    np.testing.assert_array_equal(slices, expected)


def test_it_is_for_one_host():
    with pytest.raises(UserError, match="resident works on one host"):
        ResidentBatches(Noise(8), batch_size=4, seed=0, hosts=2)


def test_cifar_crops_are_bitwise_equal(cifar100_dir):
    source = open_source("cifar100", "train[:1000]", cifar100_dir)
    resident, stream = both(source, 18, batch_size=64, pad=4)
    chex.assert_trees_all_equal(jax.device_get(resident), stream)


def test_a_run_is_the_same_with_either_loader(tiny, tmp_path):
    """Compares losses and evaluations on eight devices, bit for bit; each loader knows the other's workdir."""
    lines = {}
    for loader in ("stream", "resident"):
        config = tiny(f"data.loader={loader}", "data.flip=True")
        trainer.train(config, tmp_path / loader)
        lines[loader] = comparable_lines(tmp_path / loader)
    assert lines["stream"] == lines["resident"]
    assert trainer.train(tiny("data.flip=True"), tmp_path / "resident")["steps"] == 6
