"""Reads and writes a checkpoint's arrays; the only file that uses orbax. It also filters what orbax's threads log."""

import contextlib
import functools
import gc
import glob
import logging
import sys
import warnings
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath
from orbax.checkpoint import v1 as ocp

from ldrld_jax.checkpoint.note import DamagedError, Note
from ldrld_jax.errors import UserError, silent
from ldrld_jax.files import full_disk_named, is_full_disk, is_local, is_of_machine

_FULL = "no space left; the last whole checkpoint is intact"
_UNFINISHED = ".orbax-checkpoint-tmp"  # suffix of a checkpoint that is still being written
_WHOLE = "commit_success.txt"  # the last file of a checkpoint; on gs:// nothing else tells a whole one


def write(path: epath.Path, trees: dict[str, Any], note: Note) -> Callable[[], None]:
    """Copies the trees and writes them with a note; the checkpoint appears under its path once it is whole.

    Returns a function that waits until then, and raises an OSError if the disk is full.
    """
    _quiet_threads()
    with full_disk_named(path.parent, _FULL), _layout(path):
        writing = ocp.save_checkpointables_async(path, trees, custom_metadata=note)

    def wait() -> None:
        with full_disk_named(path.parent, _FULL):
            writing.result()

    return wait


def is_whole(path: epath.Path) -> bool:
    """Returns whether a folder with a checkpoint's name is whole: a local one gets that name only then."""
    return is_local(path) or (path / _WHOLE).exists()


def is_unfinished(path: epath.Path) -> bool:
    """Returns whether a folder is a checkpoint that a killed run was writing, or `mark_unfinished` has marked."""
    return path.name.endswith(_UNFINISHED) or (path.name.isdecimal() and not is_whole(path))


def mark_unfinished(path: epath.Path) -> None:
    """Turns a whole remote checkpoint into an unfinished one, in one step."""
    (path / _WHOLE).unlink()


def _layout(path: epath.Path) -> contextlib.AbstractContextManager[object]:
    """Returns orbax's options for a path.

    To join an OCDBT database, orbax looks for its parts by a pattern that begins with the path itself, and in a folder
    "a[1]" it finds none: there each array has a folder of its own.
    """
    if glob.escape(str(path)) == str(path):
        return contextlib.nullcontext()
    saving = ocp.options.ArrayOptions.Saving(use_ocdbt=False)
    return ocp.Context(array_options=ocp.options.ArrayOptions(saving=saving))


def read(path: epath.Path, like: dict[str, Any]) -> dict[str, Any]:
    """Reads the trees named in `like`: leaves with a sharding are placed by it, others become NumPy arrays.

    Raises:
      UserError: if the machine or the permissions keep them from being read.
      DamagedError: if they cannot be read; its message shortens orbax's to one line.
    """
    _quiet_threads()
    abstract = jax.tree.map(_abstract, like)
    with silent("absl"), silent("asyncio"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            # One at a time: with several at once, orbax never awaits those after a damaged one, and Python warns.
            return {name: ocp.load_checkpointables(path, {name: tree})[name] for name, tree in abstract.items()}
        except Exception as error:  # orbax raises dozens of kinds
            why = _first_cause(error)
            if is_of_machine(error):
                raise UserError(
                    f"the checkpoint {path} cannot be read: {why}. This is no sign of damage: check its permissions "
                    "and the machine."
                ) from None
        gc.collect()  # coroutines that orbax never awaited warn when they are collected: do it while silenced
    raise DamagedError(f"it cannot be read: {why}")


def _first_cause(error: BaseException) -> str:
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    text = " ".join(str(error).partition("[tensorstore_spec")[0].split()).strip(" '\"")
    return f"{text[:100]} ... {text[-100:]}" if len(text) > 210 else text or type(error).__name__


def _abstract(leaf: Any) -> Any:
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        return np.empty(leaf.shape, leaf.dtype)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


@functools.cache
def _quiet_threads() -> None:
    """Silences what orbax and tensorstore print, from threads of their own, of a failure that is raised as well."""
    logging.getLogger("absl").addFilter(_reported_elsewhere)
    sys.unraisablehook = _but_late_writes(sys.unraisablehook)


def _reported_elsewhere(record: logging.LogRecord) -> bool:
    """Drops tracebacks of a full disk that orbax's threads log; `full_disk_named` reports it in one line."""
    return not (record.exc_info and is_full_disk(record.exc_info[1]))


def _but_late_writes(hook: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Wraps an unraisable hook to ignore writes left over from a failed checkpoint, which nobody awaits."""

    def report(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    return report
