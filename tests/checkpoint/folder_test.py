"""Checkpoints: kept by policy, restored as they were on any devices, what is damaged told from what is whole."""

import errno
import functools
import itertools
import json
import logging
import pathlib
import shutil
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ldrld_jax.checkpoint import orbax_io
from ldrld_jax.checkpoint.checksum import describe
from ldrld_jax.checkpoint.folder import Checkpoints, load_model
from ldrld_jax.errors import UserError
from tests.checkpoint.saved import contents, flip, largest, names, save, trees


@pytest.mark.parametrize(
    ("policy", "kept"),
    [
        ({"keep_last": 1}, ["2", "5"]),
        ({}, ["2", "4", "5"]),
        ({"keep_last": 3}, ["2", "3", "4", "5"]),
        ({"keep_last": 1, "keep_every": 3}, ["2", "3", "5"]),
    ],
    ids=str,
)
def test_the_last_ones_the_best_and_every_so_many_are_kept(tmp_path, policy, kept):
    assert save(tmp_path, (1, 50.0), (2, 70.0), (3, 60.0), (4, None), (5, None), **policy) == kept
    checkpoints = Checkpoints(tmp_path)
    assert (checkpoints.best_step, checkpoints.latest_step) == (2, 5)


def test_only_what_is_named_by_a_number_is_a_checkpoint(tmp_path):
    for name in ("\u00b2", "\u0663", "1a", "-1"):
        (tmp_path / name).mkdir()
    assert Checkpoints(tmp_path).steps == []


@pytest.mark.parametrize("name", ["a[1]", "a*b", "a?b", "a b"])
def test_a_folder_whose_name_is_a_pattern_holds_whole_checkpoints(tmp_path, name):
    assert save(tmp_path / name, (1, 50.0)) == ["1"]
    restored = Checkpoints(tmp_path / name).resume(trees(0))
    chex.assert_trees_all_equal(restored.trees, trees(1))


HELD = {  # steps saved with their top-1, and what lies on disk before and after the end
    "the last and the best": ([(1, 50.0), (2, 70.0), (3, 60.0), (4, None), (5, None)], {"keep_last": 1}, "1", "2 5"),
    "equal ones": ([(1, 70.0), (2, 70.0), (3, 70.0)], {"keep_last": 1}, "1", "3"),
    "the first is the best": ([(1, 70.0), (2, 60.0), (3, 65.0)], {"keep_last": 2}, "1", "1 2 3"),
    "kept for good": ([(1, 9.0), (2, 8.0), (3, 7.0)], {"keep_last": 1, "keep_every": 2}, "1 2", "1 2 3"),
}


@pytest.mark.parametrize("case", HELD)
def test_steps_in_quick_succession_are_held_until_the_end_and_end_as_if_each_was_written(tmp_path, case):
    saved, policy, before, after = HELD[case]
    saver = Checkpoints(tmp_path, min_seconds=np.inf, **policy)
    for step, top1 in saved:
        state = trees(step)
        saver.save(step, state, {"note": step / 3}, top1)
        jax.tree.map(lambda array: array.delete(), state)  # as donation does
    saver._finish()
    assert " ".join(names(tmp_path)) == before
    saver.close()
    assert " ".join(names(tmp_path)) == after
    at_once = save(tmp_path / "at once", *saved, **policy)
    assert at_once == after.split()
    for step in at_once:
        like, restored = trees(0), Checkpoints(tmp_path).restore(int(step), trees(0))
        chex.assert_trees_all_equal(restored, trees(int(step)))
        assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(lambda x: x.sharding, like)
        note = {path: json.loads((path / step / "_CHECKPOINT_METADATA").read_text())["custom_metadata"]
                for path in (tmp_path, tmp_path / "at once")}  # fmt: skip
        assert note[tmp_path]["arrays"] == note[tmp_path / "at once"]["arrays"]


def test_a_held_step_is_saved_once_and_gets_the_accuracy_that_it_lacks(tmp_path):
    saver = Checkpoints(tmp_path, min_seconds=np.inf)
    for step, top1 in ((1, None), (2, None), (2, 70.0), (2, None), (2, 10.0)):
        saver.save(step, trees(step), {"note": top1}, top1)
    saver.close()
    checkpoints = Checkpoints(tmp_path)
    assert (checkpoints.steps, checkpoints.best_step, checkpoints.host(2)) == ([1, 2], 2, {"note": 70.0})


def test_few_are_held_and_the_newest_is_written_first(tmp_path, monkeypatch):
    written, write = [], orbax_io.write
    monkeypatch.setattr(orbax_io, "write", lambda path, *rest: written.append(path.name) or write(path, *rest))
    saver = Checkpoints(tmp_path, keep_last=9, min_seconds=np.inf)
    for step in range(1, 5):
        saver.save(step, trees(step), {})
    assert written == ["1"]
    saver.save(5, trees(5), {})
    assert written == ["1", "5", "4", "3", "2"]
    saver.save(6, trees(6), {})
    saver.save(7, trees(7), {})
    saver.close()
    assert written[5:] == ["7", "6"]
    assert Checkpoints(tmp_path).steps == [*range(1, 8)]


def test_a_held_step_that_cannot_be_written_is_tried_again(tmp_path, monkeypatch):
    saver = Checkpoints(tmp_path, min_seconds=np.inf)
    saver.save(1, trees(1), {})
    saver.save(2, trees(2), {})
    with monkeypatch.context() as patch:
        patch.setattr(orbax_io, "write", lambda *rest: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
        with pytest.raises(OSError, match="full"):
            saver.close()
    saver.close()
    assert Checkpoints(tmp_path).steps == [1, 2]


def test_a_step_after_the_interval_is_written_with_those_that_were_held(tmp_path, monkeypatch):
    now = types.SimpleNamespace(monotonic=lambda: 100.0)
    monkeypatch.setattr("ldrld_jax.checkpoint.folder.time", now)
    saver = Checkpoints(tmp_path, keep_last=2, min_seconds=10.0)
    saver.save(1, trees(1), {}, 50.0)
    now.monotonic = lambda: 109.9
    saver.save(2, trees(2), {}, 40.0)
    saver._finish()
    assert names(tmp_path) == ["1"]
    saver.write_due()
    assert names(tmp_path) == ["1"]
    now.monotonic = lambda: 110.0
    saver.write_due()
    assert names(tmp_path) == ["1", "2"]
    now.monotonic = lambda: 120.0
    saver.save(3, trees(3), {}, 30.0)
    saver._finish()
    assert names(tmp_path) == ["1", "2", "3"]


def test_what_is_kept_for_good_stays_when_it_resumes_with_another_interval(tmp_path):
    save(tmp_path, *((step, None) for step in range(1, 6)), keep_last=1, keep_every=2)
    assert names(tmp_path) == ["2", "4", "5"]
    Checkpoints(tmp_path, keep_last=1).resume(trees(0))
    assert names(tmp_path) == ["2", "4", "5"]
    assert save(tmp_path, *((step, None) for step in range(6, 10)), keep_last=1, keep_every=3) == ["2", "4", "6", "9"]


def test_what_a_killed_run_left_too_many_is_removed_on_resume_only(tmp_path):
    for name, step, top1 in (("a", 1, 50.0), ("b", 2, 70.0), ("c", 3, 60.0)):
        save(tmp_path / name, (step, top1))
    for name, step in (("b", "2"), ("c", "3")):
        (tmp_path / name / step).rename(tmp_path / "a" / step)
    for half in ("4.orbax-checkpoint-tmp", "0.deleted"):
        shutil.copytree(tmp_path / "a" / "1", tmp_path / "a" / half)
    checkpoints = Checkpoints(tmp_path / "a", keep_last=1)
    assert names(tmp_path / "a") == ["0.deleted", "1", "2", "3", "4.orbax-checkpoint-tmp"]
    assert checkpoints.resume(trees(0)).step == 3
    assert names(tmp_path / "a") == ["2", "3"]


def test_of_equal_accuracies_the_later_is_the_best(tmp_path):
    assert save(tmp_path, (1, 70.0), (2, 70.0), (3, 60.0), keep_last=1) == ["2", "3"]


def test_arrays_and_host_state_come_back_bitwise(tmp_path):
    save(tmp_path, (7, 12.5))
    step, restored, host = Checkpoints(tmp_path).resume(trees(0))
    chex.assert_trees_all_equal(restored, trees(7))
    assert (step, host) == (7, {"note": 7 / 3})


def test_the_model_is_read_without_the_optimizer(tmp_path):
    save(tmp_path, (1, 70.0), (2, 60.0))
    chex.assert_trees_all_equal(load_model(tmp_path, trees(0)["model"]), trees(1)["model"])


def test_a_step_that_is_saved_already_is_left_alone_but_for_its_missing_accuracy(tmp_path):
    for value, top1 in (("first", None), ("second", 50.0), ("third", 60.0)):
        checkpoints = Checkpoints(tmp_path)
        checkpoints.save(1, trees(1), {"note": value}, top1)
        checkpoints.close()
    checkpoints = Checkpoints(tmp_path)
    assert (checkpoints.best_step, checkpoints.resume(trees(0)).host) == (1, {"note": "second"})


@pytest.mark.parametrize(
    ("like", "said"),
    [
        ({"params": {"w": jnp.zeros((2, 2))}, "batch_stats": {"mean": jnp.zeros(2)}}, r"w is float32\[3, 2\] there"),
        ({"params": {"v": jnp.zeros((3, 2))}, "batch_stats": {"mean": jnp.zeros(2)}}, "v is absent there and float32"),
        ({"params": {"w": jnp.zeros((3, 2))}}, r"batch_stats/mean is float32\[2\] there and absent here, 1 of 2"),
    ],
    ids=["shape", "name", "missing"],
)
def test_a_model_that_does_not_fit_is_refused(tmp_path, like, said):
    save(tmp_path, (1, 70.0))
    with pytest.raises(UserError, match=f"does not fit: .*{said}"):
        load_model(tmp_path, like)


def test_a_run_of_another_dtype_is_refused_and_a_model_of_another_is_converted(tmp_path):
    save(tmp_path, (1, 70.0))
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), trees(1)["model"])
    with pytest.raises(UserError, match=r"batch_stats/mean is float32\[2\] there and bfloat16\[2\] here"):
        Checkpoints(tmp_path).resume({**trees(0), "model": narrow})
    chex.assert_trees_all_equal(load_model(tmp_path, narrow), narrow)


def test_an_empty_folder_and_none_at_all(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        assert Checkpoints(path).resume(trees(0)) is None
        with pytest.raises(UserError, match="there is no checkpoint in"):
            load_model(path, trees(0)["model"])
    assert not (tmp_path / "nowhere").exists()


def test_the_checkpoint_of_another_run_is_no_model_of_this_one(tmp_path):
    save(tmp_path, (1, 70.0))
    assert load_model(tmp_path, trees(0)["model"], run={"seed": 0, "epochs": 2})
    with pytest.raises(UserError, match="1 belongs to another run than the config beside it"):
        load_model(tmp_path, trees(0)["model"], run={"seed": 1, "epochs": 1})


def tampered(checkpoint: pathlib.Path, change) -> None:
    """The checkpoint with `change`d arrays under the note of the old ones: what no decoder can notice."""
    host, other = Checkpoints(checkpoint.parent).host(int(checkpoint.name)), checkpoint.parent / "other"
    changed = Checkpoints(other)
    changed.save(0, change, host)
    changed.close()
    shutil.rmtree(checkpoint / "model")
    (other / "0" / "model").rename(checkpoint / "model")
    shutil.rmtree(other)


def one_bit(step):
    changed = trees(step)
    bits = np.asarray(changed["model"]["params"]["w"]).view(np.uint32).copy()
    bits[2, 1] ^= 1
    changed["model"]["params"]["w"] = jnp.asarray(bits.view(np.float32))
    return changed


DAMAGE = {
    "a bit of an array": (lambda c: tampered(c, one_bit(2)), "model/params/w has changed since it was saved"),
    "a truncated file": (lambda c: largest(c).write_bytes(largest(c).read_bytes()[:-9]), "it cannot be read"),
    "an empty file": (lambda c: largest(c).write_bytes(b""), "it cannot be read"),
    "a byte of a file": (lambda c: flip(largest(c), 60), "it cannot be read"),
    "a missing tree": (lambda c: shutil.rmtree(c / "model"), "it cannot be read"),
    "a missing manifest": (lambda c: (c / "model" / "manifest.ocdbt").unlink(), "it cannot be read"),
    "no metadata": (lambda c: (c / "_CHECKPOINT_METADATA").unlink(), "it has no _CHECKPOINT_METADATA"),
    "torn metadata": (lambda c: flip(c / "_CHECKPOINT_METADATA", 0), "its _CHECKPOINT_METADATA is torn"),
    "other metadata": (
        lambda c: (c / "_CHECKPOINT_METADATA").write_text(
            (c / "_CHECKPOINT_METADATA").read_text().replace('"note": 0.6', '"note": 0.7')
        ),
        "its _CHECKPOINT_METADATA has changed since it was saved",
    ),
    "nothing in it": (lambda c: [shutil.rmtree(c), c.mkdir()], "it has no _CHECKPOINT_METADATA"),
}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Checkpoints 1 and 2, of which the second is the best."""
    path = tmp_path_factory.mktemp("two")
    save(path, (1, 50.0), (2, 70.0))
    return path


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(tmp_path, two, caplog, damage):
    shutil.copytree(two, tmp_path, dirs_exist_ok=True)
    do, said = DAMAGE[damage]
    do(tmp_path / "2")
    before = contents(tmp_path)
    chex.assert_trees_all_equal(load_model(tmp_path, trees(0)["model"]), trees(1)["model"])
    assert contents(tmp_path) == before  # a reader changes nothing
    step, restored, host = Checkpoints(tmp_path).resume(trees(0))
    chex.assert_trees_all_equal(restored, trees(1))
    assert (step, host) == (1, {"note": 1 / 3})
    assert names(tmp_path) == ["1", "2.corrupt"]
    reader, writer = (record.getMessage() for record in caplog.records)
    assert f"2 is damaged ({said}" in reader
    assert reader.endswith("using step 1 instead.")
    assert f"2 is damaged ({said}" in writer
    assert writer.endswith("set aside as 2.corrupt, going on from step 1.")
    assert "\n" not in reader + writer


def test_what_is_set_aside_is_in_nobodys_way(tmp_path, two):
    shutil.copytree(two, tmp_path, dirs_exist_ok=True)
    for aside in (["2.corrupt"], ["2.corrupt", "2.corrupt2"]):
        flip(tmp_path / "2" / "_CHECKPOINT_METADATA", 0)
        checkpoints = Checkpoints(tmp_path)
        assert checkpoints.resume(trees(0)).step == 1
        checkpoints.save(2, trees(2), {})
        checkpoints.close()
        assert names(tmp_path) == ["1", "2", *aside]


def test_if_no_checkpoint_is_whole_nothing_is_touched(tmp_path, two):
    shutil.copytree(two, tmp_path, dirs_exist_ok=True)
    for step in ("1", "2"):
        largest(tmp_path / step).write_bytes(b"")
    before = contents(tmp_path)
    with pytest.raises(UserError, match=r"no checkpoint in .* is whole \(2: it cannot be read.*; 1: it cannot"):
        Checkpoints(tmp_path).resume(trees(0))
    with pytest.raises(UserError, match=r"checkpoint .*/2 is damaged .*; checkpoint .*/1 is damaged"):
        load_model(tmp_path, trees(0)["model"])
    assert contents(tmp_path) == before


def test_a_disk_that_cannot_be_read_is_no_damage(two, monkeypatch):

    def denied(*args):
        raise ValueError("PERMISSION_DENIED: Error reading local file")

    monkeypatch.setattr("orbax.checkpoint.v1.load_checkpointables", denied)
    with pytest.raises(
        UserError, match=r"checkpoint .*/2 cannot be read: PERMISSION_DENIED: Error .*\. This is no sign of damage"
    ):
        Checkpoints(two).resume(trees(0))
    assert names(two) == ["1", "2"]


@functools.cache
def mesh(*shape: int) -> Mesh:
    return jax.make_mesh(shape, ("data", "model")[: len(shape)], devices=jax.devices()[: int(np.prod(shape))])


def placed(tree, mesh, *spec):
    """A tree on a mesh, its matrices as `spec` says, the rest on every device."""

    def place(x):
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec) if np.ndim(x) == 2 else PartitionSpec()))

    return jax.tree.map(place, tree)


PLACES = {
    "8, replicated": lambda tree: placed(tree, mesh(8)),
    "8, split": lambda tree: placed(tree, mesh(8), "data"),
    "2 x 4, split both ways": lambda tree: placed(tree, mesh(2, 4), "data", "model"),
    "2 x 4, second axis": lambda tree: placed(tree, mesh(2, 4), None, ("model", "data")),
    "one": lambda tree: placed(tree, mesh(1)),
}


@pytest.fixture
def state(rng):
    w = {dtype: rng.normal(size=(16, 24)).astype(jnp.dtype(dtype)) for dtype in ("float32", "bfloat16")}
    return {"model": {**w, "b": np.arange(3.0, dtype=np.float32), "step": np.array(7, np.int32)}}


@pytest.mark.parametrize("saved", ["8, replicated", "2 x 4, split both ways", "one"])
def test_a_checkpoint_of_any_devices_is_restored_on_any_others(tmp_path, state, saved):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, PLACES[saved](state), {})
    checkpoints.close()
    for place in PLACES.values():
        like = place(jax.tree.map(np.zeros_like, state))
        restored = Checkpoints(tmp_path).resume(like).trees
        chex.assert_trees_all_equal(restored, state)
        assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(lambda x: x.sharding, like)


def test_a_checksum_is_the_same_however_an_array_lies(state):
    sums = [describe(place(state)) for place in PLACES.values()] + [describe(state)]
    assert all(one == two for one, two in itertools.pairwise(sums))
    bits = state["model"]["float32"].view(np.uint32).astype(object).ravel()
    assert sums[0]["model/float32"] == (
        "float32",
        (16, 24),
        int(sum(bit * (2 * i + 1) for i, bit in enumerate(bits)) % 2**32),
    )


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "int32", "int8", "bool"])
def test_every_bit_and_every_place_counts_in_a_checksum(rng, dtype):
    array = (rng.integers(0, 2, 12) if dtype == "bool" else rng.normal(size=12) * 100).astype(jnp.dtype(dtype))
    whole = describe(array)
    for i in range(len(array)):
        for byte in range(array.itemsize):
            changed = array.copy()
            changed.view(np.uint8).reshape(12, -1)[i, byte] ^= 1
            assert describe(changed) != whole
    swapped = array.copy()
    swapped[[2, 5]] = ~array[[2, 5]] if dtype == "bool" else array[[5, 2]]
    assert describe(swapped) != whole


def test_a_full_disk_is_an_os_error_that_says_so(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise ValueError("RESOURCE_EXHAUSTED: Failed writing: No space left on device [os_error_code='28']")

    monkeypatch.setattr("orbax.checkpoint.v1.save_checkpointables_async", full)
    with pytest.raises(OSError, match="no space left; the last whole checkpoint is intact") as caught:
        Checkpoints(tmp_path).save(1, trees(1), {})
    assert caught.value.errno == errno.ENOSPC


def test_of_orbaxs_tracebacks_only_those_of_a_full_disk_are_left_out(caplog):
    log = logging.getLogger("absl")
    for message in ("No space left on device", "something else"):
        log.error("a thread failed", exc_info=ValueError(message))
    assert [str(record.exc_info[1]) for record in caplog.records] == ["something else"]


def test_notes_are_json_that_anybody_can_read(two):
    note = json.loads((two / "1" / "_CHECKPOINT_METADATA").read_text())["custom_metadata"]
    assert (note["run"], note["host"], note["top1"]) == ({"seed": 0, "epochs": 1}, {"note": 1 / 3}, 50.0)
    assert note["arrays"]["training"]["step"] == ["int32", [], 1]
