"""Worker processes: the batches of threads, errors in one line, and no process that outlives its run."""

import itertools
import os
import signal
import subprocess
import sys
import threading

import chex
import numpy as np
import pytest

from ldrld_jax.data import workers
from ldrld_jax.data.given import as_source
from ldrld_jax.data.pipeline import make_eval_source, make_train_batches
from ldrld_jax.data.stream import TrainBatches, eval_batches
from ldrld_jax.errors import UserError
from ldrld_jax.runtime.watchdog import Watchdog
from tests.conftest import ROOT
from tests.data.images import make_image_folder
from tests.data.pipeline_test import block as small


@pytest.fixture(scope="module", autouse=True)
def no_worker_is_left():
    """All tests share the processes of a number of workers."""
    with workers.scope():
        yield


def block(folder, **changes):
    return small(folder, **{"augment": "random_resized_crop", "flip": True} | changes)


def first(iterator, count):
    return list(itertools.islice(iterator, count))


@pytest.mark.parametrize("divisor", [1, 8])
def test_workers_make_the_batches_of_threads_also_after_a_resume(folder, divisor):
    batches = make_train_batches(block(folder, rand_augment=1), batch_size=5, seed=0, divisor=divisor, views=2)
    wanted = first(batches.iterate(threads=2), 7)
    chex.assert_trees_all_equal(first(batches.iterate(workers=2), 7), wanted)
    chex.assert_trees_all_equal(first(batches.iterate(3, workers=2), 4), wanted[3:])
    chex.assert_trees_all_equal(list(batches.parts(1, [2, 0], workers=2)), [wanted[5], wanted[3]])


def test_workers_evaluate_what_threads_do(folder):
    source = make_eval_source(block(folder, cache_mb=0))
    wanted = list(eval_batches(source, 5, divisor=8, threads=2))
    chex.assert_trees_all_equal(list(eval_batches(source, 5, divisor=8, workers=2)), wanted)


@pytest.fixture
def broken(tmp_path):
    """Six training images, the second cat truncated."""
    make_image_folder(tmp_path)
    cat = tmp_path / "train" / "cat" / "1.jpg"
    cat.write_bytes(cat.read_bytes()[:900])
    return tmp_path


def test_a_broken_image_is_named_as_by_threads(broken):
    batches = make_train_batches(block(broken), batch_size=6, seed=0)
    with pytest.raises(UserError) as wanted:
        next(batches.iterate(threads=2))
    with pytest.raises(UserError) as error:
        next(batches.iterate(workers=2))
    assert str(error.value) == str(wanted.value)
    assert "train/cat/1.jpg is broken: image file is truncated" in str(error.value)


def test_skipped_images_are_masked_and_counted_by_the_run(broken, caplog):
    data = block(broken, on_error="skip")
    wanted = first(make_train_batches(data, batch_size=4, seed=0).iterate(threads=2), 6)
    told = caplog.messages
    caplog.clear()
    batches = make_train_batches(data, batch_size=4, seed=0)
    chex.assert_trees_all_equal(first(batches.iterate(workers=2), 6), wanted)
    assert batches.source.broken == {1}
    assert len(told) == 1
    assert caplog.messages == told


def test_too_many_broken_images_end_the_run(broken):
    for path in broken.glob("train/*/*.jpg"):
        path.write_bytes(b"a login page")
    batches = make_train_batches(block(broken, on_error="skip"), batch_size=4, seed=0)
    with pytest.raises(UserError, match="6 of 6 images are broken"):
        first(batches.iterate(workers=2), 40)  # whichever batch was the last to find one


def make_probe():
    class Probe:
        """A dataset that no module holds, whose images say what its process is."""

        num_classes, raw = 2, True

        def __len__(self):
            return 4

        def __getitem__(self, index):
            return np.array([os.getpid(), "jax" in sys.modules]), index % 2

    return Probe()


def test_a_worker_loads_no_jax_and_classes_of_a_script_are_pickled_by_value():
    batches = TrainBatches(as_source(make_probe()), batch_size=4, seed=0)
    pid, jax = next(batches.iterate(workers=2))["image"][0].tolist()
    assert pid in workers.pool(2).pids
    assert jax == 0


def test_arrays_are_shared_and_files_mapped_again(tmp_path, rng):
    images, labels = rng.integers(0, 256, (12, 6, 5, 3), np.uint8), np.arange(12) % 3
    np.save(tmp_path / "images.npy", images)
    mapped = np.load(tmp_path / "images.npy", mmap_mode="r")
    sizes = []
    private = np.load(tmp_path / "images.npy", mmap_mode="c")
    private[0] = 7  # is not in the file
    for given in (images, mapped, mapped[2:], private):
        batches = TrainBatches(as_source((given, labels[-len(given) :])), batch_size=4, seed=0, pad=1, flip=True)
        chex.assert_trees_all_equal(first(batches.iterate(workers=2), 3), first(batches.iterate(), 3))
        sizes.append(workers.Job(workers.pool(2), batches.part, batches.source).memory.sizes)
    assert [images.nbytes in size for size in sizes] == [True, False, False, True]
    assert images[2:].nbytes in sizes[2]


def test_what_cannot_be_pickled_is_refused_in_one_line():
    probe = make_probe()
    probe.lock = threading.Lock()
    with pytest.raises(UserError, match=r"workers=2 .* cannot be pickled: .*lock.* set data.workers=0\.$") as error:
        TrainBatches(as_source(probe), batch_size=4, seed=0).iterate(workers=2)
    assert "\n" not in str(error.value)


def test_what_a_worker_cannot_unpickle_is_said_in_one_line():
    probe = make_probe()
    type(probe).__reduce__ = lambda self: (int, ("no number",))
    with pytest.raises(UserError, match=r"cannot make the dataset again: ValueError: .* set data\.workers=0"):
        next(TrainBatches(as_source(probe), batch_size=4, seed=0).iterate(workers=2))


def test_an_error_of_the_users_code_arrives_with_its_traceback():
    probe = make_probe()
    source = as_source(probe)
    type(probe).__getitem__ = lambda self, index: {}["absent"]
    with pytest.raises(KeyError, match="absent") as error:
        next(TrainBatches(source, batch_size=4, seed=0).iterate(workers=2))
    assert "In a worker process" in error.value.__notes__[0]


def test_a_stopped_worker_is_named_and_a_killed_one_ends_the_run_in_one_line(folder, tmp_path):
    batches = make_train_batches(block(folder), batch_size=5, seed=0)
    (pid,) = workers.pool(1).pids
    os.kill(pid, signal.SIGSTOP)
    made, path = batches.iterate(workers=1), tmp_path / "told"
    threading.Timer(0.5, os.kill, [pid, signal.SIGCONT]).start()
    with path.open("w") as file, Watchdog(0.1, file, workers.describe) as watchdog:
        watchdog.at("waiting for the input of step 1")
        chex.assert_trees_all_equal(next(made), batches[0])
    assert f"ldrld_jax: worker 1 (process {pid}) has made its batch for 0 s; it is stopped" in path.read_text()
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(UserError, match=rf"worker 1 of data.workers=1 \(process {pid}\) was killed.*it resumes\."):
        first(made, 20)
    chex.assert_trees_all_equal(next(batches.iterate(workers=1)), batches[0])  # by another process


RUN = """
import os, time
from ldrld_jax.data import workers
class Source: pass
def make(): print("making, JAX on", os.environ["JAX_PLATFORMS"], flush=True); time.sleep(60)
job = workers.Job(workers.pool(1), make, Source())  # at the top level, behind no guard
print(*workers.pool(1).pids, flush=True)
job()
"""


@pytest.mark.parametrize("ending", ["kill", "interrupt", "interrupt, the worker stopped", "terminate"])
def test_no_worker_outlives_its_run(ending):
    options = dict(cwd=ROOT, stdout=-1, stderr=-1, text=True, start_new_session=True)
    run = subprocess.Popen([sys.executable, "-c", RUN], env={**os.environ, "JAX_PLATFORMS": "cuda"}, **options)
    pid = int(run.stdout.readline())
    assert run.stdout.readline() == "making, JAX on cpu\n"
    if "stopped" in ending:
        os.kill(pid, signal.SIGSTOP)
    if "interrupt" in ending:
        os.killpg(run.pid, signal.SIGINT)  # as a terminal does
    elif ending == "kill":
        run.kill()
    else:
        os.killpg(run.pid, signal.SIGTERM)
    said = run.communicate(timeout=5)[1]  # until the worker, which has the other end of these pipes too, has ended
    assert said.count("KeyboardInterrupt") == ("interrupt" in ending)


def test_workers_end_with_the_last_of_the_scopes_and_serve_no_empty_list(folder):
    """A callback may evaluate another run while one trains."""
    batches = make_train_batches(block(folder), batch_size=5, seed=0)
    with workers.scope():
        iterator = batches.iterate(workers=1)
        wanted = first(iterator, 1)
        with workers.scope():
            chex.assert_trees_all_equal(first(batches.iterate(workers=1), 1), wanted)
        (pid,) = workers.pool(1).pids
        assert len(first(iterator, 3)) == 3
    os.kill(pid, 0)  # the module's own scope is the last
    assert list(batches.parts(0, [], workers=7)) == []
    assert 7 not in {count for _, count in workers._pools}
