"""Small files on disk: written whole or not at all, read with an error that names them, and a lock."""

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import time
from collections.abc import Collection, Iterator
from typing import IO, Any

from etils import epath

from ldrld_jax.errors import UserError

_LOOK_SECONDS = 0.2  # longer than it takes `is_locked` to look


def replace_text(path: epath.Path, text: str) -> None:
    """Writes a file so that a crash leaves the old one or the new one, never half of either."""
    temporary = path.parent / f"{path.name}.tmp"
    with named(path), temporary.open("w") as file:
        file.write(text)
        if is_local(path):
            file.flush()
            os.fsync(file.fileno())
    temporary.replace(path)


def append_text(path: epath.Path, text: str) -> None:
    """Writes to the end of a file; a crash may leave half of it there."""
    with named(path), path.open("a") as file:
        file.write(text)


@contextlib.contextmanager
def named(path: epath.Path) -> Iterator[None]:
    """An error that names the file: Python's own does not where a write is refused, as on a full disk."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


@contextlib.contextmanager
def full_disk_named(path: epath.PathLike, message: str) -> Iterator[None]:
    """A full disk as the OSError that it is: tensorstore's is a ValueError of many lines."""
    try:
        yield
    except Exception as error:
        if not is_full_disk(error):
            raise
        raise OSError(errno.ENOSPC, message, str(path)) from None


def is_full_disk(error: BaseException | None) -> bool:
    return "No space left on device" in str(error) or "Disk quota exceeded" in str(error)


def read_json(path: epath.Path, what: str, *, keys: Collection[str] = ()) -> dict[str, Any]:
    """The JSON object in a file.

    Args:
      path: of a file that exists.
      what: it is, for the error.
      keys: that it must have.

    Raises:
      UserError: if it is torn, or something else.
    """
    try:
        content = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:  # no JSON, no text, or brackets without end
        raise UserError(f"{path} is torn or no JSON ({error}). {what}: restore it, or choose another.") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object. {what}: restore it, or choose another.")
    if missing := set(keys) - set(content):
        raise UserError(f"{path} lacks {', '.join(sorted(missing))}. {what}: restore it, or choose another.")
    return content


def expand_home(path: str) -> str:
    """Returns a path with a leading ~ or ~user replaced by that home directory.

    Raises:
      UserError: if there is no such user.
    """
    if not path.startswith("~"):
        return path
    try:
        return str(pathlib.Path(path).expanduser())
    except RuntimeError:
        raise UserError(f"{path} is in the home directory of a user who does not exist. Write it out.") from None


def is_local(path: epath.Path) -> bool:
    return "://" not in str(path)


@contextlib.contextmanager
def locked(folder: epath.Path) -> Iterator[None]:
    """Keeps other processes out of a folder: a lock on `<folder>/.lock`, which ends with the process, however it ends.

    Does nothing on `gs://` and the like, nor where the file system knows no locks.

    Raises:
      UserError: if another process holds it.
    """
    if not is_local(folder):
        yield
        return
    with (folder / ".lock").open("a") as file:
        if not _lock(file):
            time.sleep(_LOOK_SECONDS)  # perhaps somebody looked whether it is locked
            if not _lock(file):
                raise UserError(
                    f"another process is running in {folder}. Wait for it to end, or choose another workdir."
                )
        yield


def is_locked(folder: epath.Path) -> bool:
    """Whether another process, or this one, holds the lock on a folder; False where there is no folder."""
    if not folder.is_dir() or not is_local(folder):
        return False
    with (folder / ".lock").open("a") as file:
        return not _lock(file)


def _lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # no locks here, as on some network file systems
        pass
    return True
