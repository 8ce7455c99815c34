"""A folder's lock: held by one, seen by others, and not in the way of whoever comes while somebody looks."""

import pytest
from etils import epath

from ldrld_jax import files
from ldrld_jax.errors import UserError


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
