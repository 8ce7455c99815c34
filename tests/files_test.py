"""Files that are whole or not there; a folder's lock, held by one, seen by others, in nobody's way."""

import os

import fsspec.config
import pytest
from etils import epath

from ldrld_jax import files
from ldrld_jax.errors import UserError
from tests.object_store import ObjectStore


def test_a_file_is_replaced_once_it_is_whole_and_never_through_a_link(tmp_path):
    (tmp_path / "other").write_text("other")
    path = epath.Path(tmp_path / "file")
    (tmp_path / "file").symlink_to(tmp_path / "other")
    with files.replacing(path) as file:
        file.write(b"new")
        assert path.read_text() == "other"
    assert (path.read_text(), (tmp_path / "other").read_text(), files.is_link(path)) == ("new", "other", False)
    with pytest.raises(ZeroDivisionError), files.replacing(path) as file:
        file.write(b"half")
        1 / 0  # noqa: B018
    assert path.read_text() == "new"
    assert {place.name for place in tmp_path.iterdir()} == {"file", "other"}


def test_where_no_folder_can_be_made_is_one_line(tmp_path, monkeypatch):
    for place in ("", "new", "new/deeper", "..", "gs://bucket/x"):
        files.check_writable(tmp_path / place if ":" not in place else place, "workdir")
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    monkeypatch.chdir(tmp_path)
    for place, line in {
        "file": "file is a file. Choose another workdir.",
        "file/a/b": "file is a file. Choose another workdir.",
        "link/a": "link is a broken link. Choose another workdir.",
        "a\\b": f"the path '{tmp_path}/a\\\\b' has a backslash, or bytes that are no UTF-8. Choose another workdir.",
        "\udcff": f"the path '{tmp_path}/\\udcff' has a backslash, or bytes that are no UTF-8. Choose another workdir.",
    }.items():
        with pytest.raises(UserError) as error:
            files.check_writable(place, "workdir")
        assert str(error.value) == line
    asked = []
    monkeypatch.setattr(os, "access", lambda path, mode: asked.append((path, mode)))  # to root all may be written
    with pytest.raises(UserError) as error:
        files.check_writable(tmp_path / "new/run", "logits.dir")
    assert str(error.value) == f"{tmp_path} is not writable. Choose another logits.dir, or change its permissions."
    assert asked == [(tmp_path, os.W_OK | os.X_OK)]


def test_a_folder_is_not_replaced_by_a_file(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        files.replace_text(epath.Path(tmp_path / "folder"), "text")
    assert [place.name for place in tmp_path.iterdir()] == ["folder"]


def test_a_lock_is_seen_and_given_back(tmp_path):
    folder = epath.Path(tmp_path)
    assert not files.is_locked(folder)
    with files.locked(folder):
        assert files.is_locked(folder)
        with pytest.raises(UserError, match="another process is running in"), files.locked(folder):
            pass
    assert not files.is_locked(folder)
    assert not files.is_locked(folder / "nothing")


def test_who_only_looks_does_not_keep_others_out(tmp_path, monkeypatch):
    looking = (tmp_path / ".lock").open("a")
    assert files._lock(looking)
    monkeypatch.setattr(files.time, "sleep", lambda seconds: looking.close())
    with files.locked(epath.Path(tmp_path)):
        assert looking.closed


def test_a_path_in_a_bucket_stays_one(bucket, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert str(files.absolute(epath.Path("gs://bucket/run"))) == "gs://bucket/run"
    assert str(files.absolute(epath.Path("run"))) == f"{tmp_path}/run"
    files.replace_text(epath.Path("gs://bucket/run/file"), "text")
    with pytest.raises(ZeroDivisionError), files.replacing(epath.Path("gs://bucket/run/file")) as file:
        file.write(b"half")
        1 / 0  # noqa: B018
    assert [(path.name, path.read_text()) for path in (bucket / "run").iterdir()] == [("file", "text")]
    assert files.is_folder("gs://bucket/run") and files.is_folder(str(tmp_path))
    assert not files.is_folder("gs://bucket/run/file") and not files.is_folder("hf://owner/name")


def test_a_bucket_is_asked_each_time_since_other_programs_write_to_it(bucket, monkeypatch):
    monkeypatch.setattr(fsspec.config, "conf", {})
    files.check_remote("gs://bucket/run")
    assert fsspec.config.conf == {"gcs": {"use_listings_cache": False}}
    monkeypatch.setattr(fsspec.config, "conf", {"gcs": {"use_listings_cache": True, "project": "mine"}})
    files.check_remote("gs://bucket/run")  # what a user has set stays
    assert fsspec.config.conf == {"gcs": {"use_listings_cache": True, "project": "mine"}}


def test_a_bucket_that_does_not_exist_or_is_closed_is_one_line(bucket, monkeypatch):
    def refuse(error):
        def call(self, path, *args):
            raise error

        return call

    monkeypatch.setattr(ObjectStore, "open", refuse(FileNotFoundError("b/bucket/o")))  # as gcsfs has it
    with pytest.raises(UserError, match=r"^gs://bucket/file cannot be written: there is no such bucket\. Create it"):
        files.replace_text(epath.Path("gs://bucket/file"), "text")
    monkeypatch.setattr(ObjectStore, "exists", refuse(RuntimeError("Anonymous caller has no access.\n401")))
    with pytest.raises(UserError) as error:
        files.check_remote("gs://bucket/run")
    assert str(error.value) == (
        "gs://bucket/run cannot be opened: Anonymous caller has no access. 401. Log in by `gcloud auth "
        "application-default login`, and check the bucket and your permissions."
    )
    with pytest.raises(UserError, match=r"^gs://bucket/a\[1\] has one of \*, \? and \[, which are patterns"):
        files.check_writable("gs://bucket/a[1]", "workdir")
