"""Compiled programs on disk: where they lie, and that a closed folder stops nothing."""

import sys

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from ldrld_jax import config as config_lib
from ldrld_jax.runtime.compile_cache import keep_compiled
from ldrld_jax.train import check, trainer


@pytest.fixture
def nowhere():
    """A process that keeps nothing yet, and will keep programs however soon they compile."""
    names = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"
    before = {name: getattr(jax.config, name) for name in names}
    for name, value in zip(names, (None, 0), strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def test_a_program_lands_in_the_folder(nowhere, tmp_path):
    with keep_compiled(str(tmp_path / "of" / "mine")):
        jax.jit(lambda x: x * 7 + 3)(1.5)
    assert (tmp_path / "of" / "mine").stat().st_mode & 0o777 == 0o700
    assert any(path.name.startswith("jit__lambda") for path in (tmp_path / "of" / "mine").iterdir())


def test_what_the_user_chose_for_jax_stays(tmp_path):
    before = jax.config.jax_compilation_cache_dir
    with keep_compiled(str(tmp_path / "other")):
        assert jax.config.jax_compilation_cache_dir == before
    assert jax.config.jax_compilation_cache_dir == before
    assert not (tmp_path / "other").exists()


def test_a_folder_that_cannot_be_written_is_one_warning(nowhere, tmp_path, caplog):
    (tmp_path / "file").touch()
    with keep_compiled(str(tmp_path / "file" / "folder")):
        assert jax.config.jax_compilation_cache_dir is None
    (message,) = caplog.messages
    assert message.startswith("compiled programs are not kept, ")
    assert "Set compile_cache" in message


def test_nothing_is_kept_if_the_folder_is_empty(nowhere):
    with keep_compiled(""):
        assert jax.config.jax_compilation_cache_dir is None


def test_each_run_of_a_process_has_its_own_folder_or_none(nowhere, tmp_path):
    for number, name in enumerate(("a", "b", "", "c")):
        with keep_compiled(name and str(tmp_path / name)):
            jax.jit(lambda x, number=number: x * number + 5)(1.5)
        jax.jit(lambda x, number=number: x * number + 6)(1.5)
        assert jax.config.jax_compilation_cache_dir is None
    assert {path.name: sum("lambda" in file.name for file in path.glob("*-cache")) for path in tmp_path.iterdir()} == {
        "a": 1,
        "b": 1,
        "c": 1,
    }


def test_a_run_within_another_has_its_own_and_gives_the_other_one_back(nowhere, tmp_path):
    with keep_compiled(str(tmp_path / "outer")):
        for folder in (str(tmp_path / "inner"), ""):
            with keep_compiled(folder):
                assert jax.config.jax_compilation_cache_dir == (folder or None)
            assert jax.config.jax_compilation_cache_dir == str(tmp_path / "outer")
        with pytest.raises(ValueError, match="failed"), keep_compiled(str(tmp_path / "inner")):
            raise ValueError("failed")
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "outer")
    assert jax.config.jax_compilation_cache_dir is None


def test_a_folder_that_a_run_had_may_be_the_users_afterwards(nowhere, tmp_path):
    with keep_compiled(str(tmp_path / "a")):
        pass
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "a"))
    for folder in (str(tmp_path / "b"), ""):
        with keep_compiled(folder):
            assert jax.config.jax_compilation_cache_dir == str(tmp_path / "a")


def test_what_the_user_chooses_during_a_run_stays(nowhere, tmp_path):
    with keep_compiled(str(tmp_path / "a")):
        jax.config.update("jax_compilation_cache_dir", str(tmp_path / "own"))
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "own")


class Seen(BaseException):
    """Folder that a run had for its programs."""


def seen(*args, **options):
    raise Seen(jax.config.jax_compilation_cache_dir)


@pytest.mark.parametrize(
    ("command", "owner", "name"),
    [
        (trainer.train, trainer, "_train"),
        (trainer.evaluate, trainer, "open_best"),
        (check.check, check, "pinned"),
    ],
    ids=["train", "evaluate", "check"],
)
def test_a_run_has_the_folder_of_its_config_and_leaves_none(nowhere, tmp_path, monkeypatch, command, owner, name):
    monkeypatch.setattr(owner, name, seen)
    for folder in (f"{tmp_path}/a", f"{tmp_path}/b", ""):
        config = config_lib.load("configs/digits.py", [f"compile_cache={folder}"])
        with pytest.raises(Seen) as found:
            command(config, tmp_path / "run")
        assert found.value.args == (folder or None,)
        assert jax.config.jax_compilation_cache_dir is None


def test_programs_are_kept_in_a_bucket_which_takes_no_permissions(nowhere, bucket):
    with keep_compiled("gs://bucket/programs"):
        assert jax.config.jax_compilation_cache_dir == "gs://bucket/programs"


def test_a_bucket_that_cannot_be_opened_is_one_warning(nowhere, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with keep_compiled("gs://bucket/programs"):
        assert jax.config.jax_compilation_cache_dir is None
    (message,) = caplog.messages
    assert message.startswith("compiled programs are not kept, gs://bucket/programs is on Google Cloud Storage, and")
