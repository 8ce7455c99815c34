"""The choice between threads and worker processes by cores, by what an image costs and by who wrote its reader."""

import itertools
import time

import chex
import numpy as np
import pytest

from ldrld_jax.data import ahead, workers
from ldrld_jax.data.ahead import Makers, available_cores, makers
from ldrld_jax.data.given import as_source
from ldrld_jax.data.pipeline import make_eval_source, make_train_batches
from ldrld_jax.data.source import Selected, Source
from tests.data.pipeline_test import block


@pytest.fixture
def on(monkeypatch):
    """Returns a function that gives the machine a number of cores, and each image a number of milliseconds."""

    def having(cores, milliseconds=2.5):
        monkeypatch.setattr(ahead, "available_cores", lambda: cores)
        # 0.01 s is what the first image takes, which opens files.
        ticks = itertools.chain([0.0, 0.01], itertools.cycle([0.0, milliseconds / 1000]))
        monkeypatch.setattr(time, "thread_time", lambda: next(ticks))

    return having


@pytest.fixture
def source(folder):
    return make_train_batches(block(folder, augment="random_resized_crop"), batch_size=5, seed=0).source


@pytest.mark.parametrize(
    ("cores", "milliseconds", "chosen"),
    [
        (1, 2.5, Makers(4, 0)),
        (7, 2.5, Makers(7, 0)),
        (8, 2.5, Makers(8, 7)),
        (16, 2.5, Makers(16, 15)),
        (16, 10.0, Makers(16, 0)),  # large photographs spend almost no time under the lock
        (27, 10.0, Makers(27, 26)),
        (4, 0.9, Makers(4, 0)),
        (5, 0.9, Makers(5, 4)),
        (5, 0.1, Makers(5, 4)),
        (224, 2.5, Makers(32, 32)),
    ],
)
def test_makers_are_chosen_by_cores_and_by_the_cost_of_an_image(source, on, cores, milliseconds, chosen):
    on(cores, milliseconds)
    assert makers(source) == chosen


@pytest.mark.parametrize(
    ("megabytes", "chosen"), [(1, Makers(32, 32)), (77, Makers(4, 8)), (1000, Makers(4, 4)), (16, Makers(16, 32))]
)
def test_large_batches_have_fewer_makers(source, on, megabytes, chosen):
    on(64)
    assert makers(source, size=megabytes * 2**20) == chosen
    assert makers(source, 3, 5, size=megabytes * 2**20) == Makers(3, 5)


def test_what_the_config_says_is_kept(source, on):
    on(64)
    assert makers(source, 3) == Makers(3, 0)
    assert makers(source, None, 0) == Makers(32, 0)
    assert makers(source, None, 2) == Makers(32, 2)
    assert makers(source, 3, 2) == Makers(3, 2)


class Own:
    """Records of a caller's own source, which may hold what cannot be pickled."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)


class Callers:
    """A dataset object as a caller writes it."""

    num_classes = 2

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index], index % 2


def test_images_in_memory_and_data_sets_of_the_caller_get_threads(folder, on):
    on(64)
    in_memory = make_eval_source(block(folder, augment="random_resized_crop"))
    assert makers(in_memory) == makers(in_memory, None, 2) == Makers(32, 0)
    images = np.zeros((6, 4, 4, 3), np.uint8)
    given = as_source(Callers(images))
    assert makers(given) == makers(given.of(Selected(given.records, np.arange(3)), given.view)) == Makers(32, 0)
    assert makers(as_source((images, np.arange(6) % 2))) == Makers(32, 0)
    own = Source(Own(images), ("a", "b"), (4, 4, 3))
    assert makers(own) == Makers(32, 0)
    assert makers(own, None, 2) == Makers(32, 2)
    assert makers(given, None, 2) == Makers(32, 2)


def test_chosen_workers_make_the_batches_of_threads(folder, on):
    batches = make_train_batches(block(folder, augment="random_resized_crop", flip=True), batch_size=5, seed=0)
    wanted = list(itertools.islice(batches.iterate(threads=2), 4))
    on(5, 0.9)
    with workers.scope():
        chex.assert_trees_all_equal(list(itertools.islice(batches.iterate(), 4)), wanted)
        assert len(workers.pool(4)) == 4
        assert [len(pool) for pool in workers._pools.values()] == [4]


@pytest.mark.parametrize(
    ("text", "limit"),
    [("200000 100000", 2), ("150000 100000", 1), ("50000 100000", 1), ("9900000 100000", 6), ("max 100000", 6)],
)
def test_the_limit_of_a_container_counts(tmp_path, monkeypatch, text, limit):
    (tmp_path / "cpu.max").write_text(f"{text}\n")
    monkeypatch.setattr(ahead, "_CPU_MAX", tmp_path / "cpu.max")
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(6)), raising=False)
    assert available_cores() == limit
    monkeypatch.setattr(ahead, "_CPU_MAX", tmp_path / "missing")
    assert available_cores() == 6
