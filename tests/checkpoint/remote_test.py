"""Checkpoints in a bucket, which cannot rename a folder: the last file of a whole one tells it from a half one."""

import chex
import pytest
from etils import epath

from ldrld_jax.checkpoint.folder import Checkpoints, load_model
from tests.checkpoint.saved import flip, largest, trees
from tests.object_store import ObjectStore

PLACE = "gs://bucket/run/checkpoints"


@pytest.fixture
def place(bucket, tmp_path, monkeypatch):
    """Returns the local folder that stands for PLACE."""
    monkeypatch.chdir(tmp_path)
    return bucket / "run" / "checkpoints"


def save(*checkpoints):
    saver = Checkpoints(PLACE)
    for step, top1 in checkpoints:
        saver.save(step, trees(step), {}, top1)
    saver.close()


def kept(place):
    """Returns the names of the folders that have files; a bucket has no others."""
    return sorted(path.name for path in place.iterdir() if any(file.is_file() for file in path.rglob("*")))


def test_the_stand_in_has_the_habits_of_a_bucket(place):
    folder = epath.Path(PLACE)
    (folder / "5/file").write_text("x")
    assert [path.name for path in folder.iterdir()] == ["5"]
    assert [(str(top), folders, files) for top, folders, files in folder.walk()] == [
        ("bucket/run/checkpoints", ["5"], []),
        ("bucket/run/checkpoints/5", [], ["file"]),
    ]
    # Raised by epath's own backend for buckets, which the stand-in hands a mode on to.
    with pytest.raises(NotImplementedError, match="custom `mode=` not supported"):
        folder.mkdir(mode=0o700, exist_ok=True)


def test_checkpoints_go_to_the_bucket_and_not_to_a_local_folder_of_its_name(place, tmp_path):
    save((1, 50.0), (2, 70.0), (3, 60.0), (4, None))
    assert kept(place) == ["2", "3", "4"]
    assert not (tmp_path / "gs:").exists()
    restored = Checkpoints(PLACE).resume(trees(0))
    assert restored.step == 4
    chex.assert_trees_all_equal(restored.trees, trees(4))
    chex.assert_trees_all_equal(load_model(PLACE, trees(0)["model"]), trees(2)["model"])


@pytest.mark.parametrize("whole", [[], [1]], ids=["the first", "a later one"])
def test_a_checkpoint_that_a_killed_run_was_writing_is_none_and_is_removed(place, caplog, whole):
    save(*((step, None) for step in [*whole, 2]))
    (place / "2" / "commit_success.txt").unlink()  # the last file that orbax writes
    assert Checkpoints(PLACE).steps == whole
    restored = Checkpoints(PLACE).resume(trees(0))
    assert restored is None if not whole else restored.step == 1
    assert kept(place) == [str(step) for step in whole]
    assert caplog.messages == []


def test_a_checkpoint_that_a_killed_run_was_removing_is_none(place, monkeypatch):
    save((1, None), (2, None))
    saver = Checkpoints(PLACE)
    saver.save(3, trees(3), {})
    with monkeypatch.context() as patch:
        patch.setattr(ObjectStore, "rmtree", lambda self, path: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            saver.close()
    assert kept(place) == ["1", "2", "3"]
    assert Checkpoints(PLACE).steps == [2, 3]
    assert Checkpoints(PLACE).resume(trees(0)).step == 3
    assert kept(place) == ["2", "3"]


def test_a_damaged_checkpoint_is_set_aside(place, caplog):
    save((1, None), (2, None))
    flip(largest(place / "2"), 0)
    assert Checkpoints(PLACE).resume(trees(0)).step == 1
    assert kept(place) == ["1", "2.corrupt"]
    assert "set aside as 2.corrupt, going on from step 1" in caplog.text
