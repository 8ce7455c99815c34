"""Small files: atomic writes, reads with errors that name the file, and a lock."""

import contextlib
import errno
import fcntl
import glob
import importlib.util
import io
import json
import os
import pathlib
import secrets
import shutil
import time
from collections.abc import Collection, Iterator
from typing import IO, Any

from etils import epath

from ldrld_jax.errors import UserError, needs, reason, silent

_LOOK_SECONDS = 0.2  # longer than the duration of an `is_locked` check


def replace_text(path: epath.Path, text: str) -> None:
    """Writes a file atomically: after a crash it holds either the old or the new text."""
    replace_bytes(path, text.encode(errors="backslashreplace"))  # a file name may hold bytes that are no UTF-8


def replace_bytes(path: epath.Path, content: bytes) -> None:
    """Writes a file as `replace_text` does."""
    with replacing(path) as file:
        file.write(content)


@contextlib.contextmanager
def replacing(path: epath.Path) -> Iterator[IO[bytes]]:
    """Opens a file that takes the place of `path` at the end of the block; after an error `path` is as before.

    A file or link that already has this name is replaced; nothing is ever written through a link. A remote file is kept
    in memory until then, because a bucket writes it in one step, and has no renaming that does not copy.

    Raises:
      UserError: if there is no such bucket.
    """
    if not is_local(path):
        content = io.BytesIO()
        yield content
        try:
            path.write_bytes(content.getvalue())
        except FileNotFoundError:
            raise UserError(f"{path} cannot be written: there is no such bucket. Create it, or correct it.") from None
        return
    temporary = path.parent / f".{path.name}.{secrets.token_hex(8)}.tmp"
    with named(path):
        file = os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb")
        try:
            with file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise


def append_text(path: epath.Path, text: str) -> None:
    """Writes to the end of a local file, never through a link; a crash may leave half of it there."""
    with named(path), appending(path) as file:
        file.write(text)


def appending(path: epath.Path, mode: str = "a") -> IO[Any]:
    """Opens a local file to write to its end ("a", or "ab" for bytes), never through a link."""
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o666), mode)


@contextlib.contextmanager
def named(path: epath.Path) -> Iterator[None]:
    """Adds the file name to errors, because Python's own lack it when a write fails, as on a full disk."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


@contextlib.contextmanager
def full_disk_named(path: epath.PathLike, message: str) -> Iterator[None]:
    """Raises an OSError for a full disk, for which tensorstore raises a ValueError of many lines."""
    try:
        yield
    except Exception as error:
        if not is_full_disk(error):
            raise
        raise OSError(errno.ENOSPC, message, str(path)) from None


def is_full_disk(error: BaseException | None) -> bool:
    return "No space left on device" in str(error) or "Disk quota exceeded" in str(error)


# Error codes of tensorstore and XLA for failures of the machine, not of the files.
_OF_MACHINE = "RESOURCE_EXHAUSTED", "PERMISSION_DENIED", "UNAUTHENTICATED", "UNAVAILABLE", "DEADLINE_EXCEEDED"


def is_of_machine(error: BaseException) -> bool:
    """Returns whether an error of tensorstore or XLA says nothing of the files, which may be whole.

    Example:
      >>> is_of_machine(ValueError("PERMISSION_DENIED: Error opening file")), is_of_machine(ValueError("no chunk"))
      (True, False)
    """
    return any(code in str(error) for code in _OF_MACHINE)


def read_json(path: epath.Path, what: str, *, keys: Collection[str] = ()) -> dict[str, Any]:
    """Reads the JSON object in a file.

    Args:
      path: path of an existing file.
      what: description of the file, for the error.
      keys: required keys.

    Raises:
      UserError: if the file is truncated, is not a JSON object or lacks a key.
    """
    try:
        content = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:  # not JSON, not text, or endlessly nested brackets
        raise UserError(f"{path} is truncated or not JSON ({error}). {what}: restore it, or choose another.") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object. {what}: restore it, or choose another.")
    if missing := set(keys) - set(content):
        raise UserError(f"{path} lacks {', '.join(sorted(missing))}. {what}: restore it, or choose another.")
    return content


def split_argument(path: str) -> tuple[str, str]:
    """Splits `FILE[:ARG]`; a file whose name holds a colon is a file.

    Example:
      >>> split_argument("configs/cifar100.py:vgg13-vgg8"), split_argument("configs/digits.py")
      (('configs/cifar100.py', 'vgg13-vgg8'), ('configs/digits.py', ''))
    """
    path = expand_home(path)
    if pathlib.Path(path).is_file():
        return path, ""
    end = path.find(".py:")
    file, argument = (path[: end + 3], path[end + 4 :]) if end >= 0 else path.partition(":")[::2]
    return file, argument


def is_link(path: epath.Path) -> bool:
    return is_local(path) and os.path.islink(path)  # noqa: PTH114  # epath has no such method


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


def is_local(path: epath.PathLike) -> bool:
    """Returns whether a path is of this machine's file system, and not one such as `gs://...`."""
    return "://" not in str(path)


def check_remote(path: epath.PathLike) -> None:
    """Raises a UserError if a path is on Google Cloud Storage, and a package or the permission to look is missing.

    It also makes gcsfs ask for what is there each time. By default it remembers the lists of folders, and does not see
    what tensorstore or another process has written since.
    """
    if not str(path).startswith("gs://"):
        return
    if importlib.util.find_spec("tensorflow") is None:  # which epath would prefer
        with needs(f"{path} is on Google Cloud Storage, and opening it", "gcs"):
            import gcsfs  # noqa: F401
        import fsspec.config

        fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
    try:
        with silent("gcsfs"):
            epath.Path(path).exists()
    except Exception as error:  # of gcsfs, google-auth or the network, which have errors of their own
        raise UserError(
            f"{path} cannot be opened: {reason(error)}. Log in by `gcloud auth application-default login`, and check "
            "the bucket and your permissions."
        ) from error


def given_path(path: epath.PathLike) -> str:
    """Returns a path that a user gives, with ~ expanded by `expand_home`, after `check_remote`."""
    check_remote(path := expand_home(str(path)))
    return path


def absolute(path: epath.Path) -> epath.Path:
    """Returns a local path as an absolute one, and a remote one, of which epath would make a local one, as it is."""
    return path.resolve() if is_local(path) else path


def is_folder(path: str) -> bool:
    """Returns whether a path, local or remote, is a folder; a name on the Hugging Face Hub is none."""
    return not path.startswith("hf://") and epath.Path(path).is_dir()


def place_of(path: epath.Path) -> str:
    """Returns one name for a folder, whatever links and relative parts a path to it has."""
    return os.path.realpath(path) if is_local(path) else str(path)


def free_bytes(path: epath.PathLike) -> int:
    """Returns the bytes that are free on the disk of a local path, which need not exist."""
    place = pathlib.Path(path).resolve()
    return shutil.disk_usage(next(p for p in [place, *place.parents] if p.exists())).free


def check_writable(path: epath.PathLike, what: str) -> None:
    r"""Raises a UserError if a local folder can neither be written to nor created; of a remote one the name is checked.

    It also raises for a path that tensorstore, which writes there, would misread: tensorstore takes only UTF-8 and
    reads a \ as a /.

    Args:
      path: path of the folder, which need not exist.
      what: the name that the error message uses for the folder, such as "workdir".
    """
    if not is_local(path):
        if glob.escape(str(path)) != str(path):
            raise UserError(f"{path} has one of *, ? and [, which are patterns in a bucket. Choose another {what}.")
        return
    place = pathlib.Path(path)
    if "\\" in (whole := str(place.resolve())) or any("\ud800" <= char <= "\udfff" for char in whole):
        raise UserError(f"the path {whole!r} has a backslash, or bytes that are no UTF-8. Choose another {what}.")
    # These functions of os take what lies in a folder that may not be entered as absent, and raise nothing.
    nearest = next(p for p in [place, *place.parents] if os.path.lexists(p))
    if not os.path.isdir(nearest):  # noqa: PTH112
        there = os.path.exists(nearest)  # noqa: PTH110
        raise UserError(f"{nearest} is {'a file' if there else 'a broken link'}. Choose another {what}.")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"{nearest} is not writable. Choose another {what}, or change its permissions.")


def human_bytes(size: float) -> str:
    """Formats a number of bytes.

    Example:
      >>> human_bytes(2.4e9), human_bytes(1000)
      ('2.4 GB', '1.0 kB')
    """
    power = min(len(str(int(size))) - 1, 14) // 3
    return f"{size / 1000**power:.1f} {('bytes', 'kB', 'MB', 'GB', 'TB')[power]}"


class LockedError(UserError):
    """Another process holds the lock on a folder."""


@contextlib.contextmanager
def locked(folder: epath.Path, *, other: str = "workdir") -> Iterator[None]:
    """Locks other processes out of a folder with `<folder>/.lock`; the lock ends with the process in any case.

    It has no effect on remote paths such as `gs://` and on file systems without locks.

    Args:
      folder: the folder of work that only one process may do at a time.
      other: the name that the error message uses for the folder, such as "workdir".

    Raises:
      LockedError: if another process holds the lock.
    """
    if not is_local(folder):
        yield
        return
    with appending(folder / ".lock") as file:
        if not _lock(file):
            time.sleep(_LOOK_SECONDS)  # another process may only be checking the lock
            if not _lock(file):
                raise LockedError(
                    f"another process is running in {folder}. Wait for it to end, or choose another {other}."
                )
        yield


def is_locked(folder: epath.Path) -> bool:
    """Returns whether any process, including this one, holds the lock on a folder; False if there is no folder."""
    if not folder.is_dir() or not is_local(folder):
        return False
    with appending(folder / ".lock") as file:
        return not _lock(file)


def _lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # the file system has no locks, as some network file systems
        pass
    return True
