"""Compiled programs on disk: where they lie, and that a closed folder stops nothing."""

import sys

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from ldrld_jax.runtime.compile_cache import keep_compiled


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
    keep_compiled(str(tmp_path / "of" / "mine"))
    jax.jit(lambda x: x * 7 + 3)(1.5)
    assert (tmp_path / "of" / "mine").stat().st_mode & 0o777 == 0o700
    assert any(path.name.startswith("jit__lambda") for path in (tmp_path / "of" / "mine").iterdir())


def test_what_the_user_chose_for_jax_stays(tmp_path):
    before = jax.config.jax_compilation_cache_dir
    keep_compiled(str(tmp_path / "other"))
    assert jax.config.jax_compilation_cache_dir == before
    assert not (tmp_path / "other").exists()


def test_a_folder_that_cannot_be_written_is_one_warning(nowhere, tmp_path, caplog):
    (tmp_path / "file").touch()
    keep_compiled(str(tmp_path / "file" / "folder"))
    (message,) = caplog.messages
    assert message.startswith("compiled programs are not kept, ")
    assert "Set compile_cache" in message
    assert jax.config.jax_compilation_cache_dir is None


def test_nothing_is_kept_if_the_folder_is_empty(nowhere):
    keep_compiled("")
    assert jax.config.jax_compilation_cache_dir is None


def test_programs_are_kept_in_a_bucket_which_takes_no_permissions(nowhere, bucket):
    keep_compiled("gs://bucket/programs")
    assert jax.config.jax_compilation_cache_dir == "gs://bucket/programs"


def test_a_bucket_that_cannot_be_opened_is_one_warning(nowhere, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    keep_compiled("gs://bucket/programs")
    (message,) = caplog.messages
    assert message.startswith("compiled programs are not kept, gs://bucket/programs is on Google Cloud Storage, and")
    assert jax.config.jax_compilation_cache_dir is None
