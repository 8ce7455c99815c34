"""Reads and writes the JSON note next to a checkpoint's arrays, with a digest that detects changes."""

import hashlib
import json
from typing import Any

from etils import epath

from ldrld_jax.files import replace_text

Note = dict[str, Any]

_FILE = "_CHECKPOINT_METADATA"  # orbax's file, read without orbax because that stops at metadata it cannot parse
_FIELD = "custom_metadata"


class DamagedError(Exception):
    """A checkpoint that differs from what was written; the message names the damage."""


def read_note(checkpoint: epath.Path) -> Note | DamagedError:
    """Reads the note in a checkpoint's folder and removes its digest; returns a DamagedError if it is damaged."""
    try:
        note = dict(json.loads((checkpoint / _FILE).read_text())[_FIELD])
        digest = note.pop("digest")
    except (FileNotFoundError, NotADirectoryError):
        return DamagedError(f"it has no {_FILE}")
    except (ValueError, KeyError, TypeError):
        return DamagedError(f"its {_FILE} is torn")
    if digest != _digest(note):
        return DamagedError(f"its {_FILE} has changed since it was saved")
    if str(note["step"]) != checkpoint.name:
        return DamagedError(f"it was saved at step {note['step']}: its folder has another name")
    return note


def rewrite_note(checkpoint: epath.Path, note: Note) -> None:
    """Replaces the note of a whole checkpoint."""
    path = checkpoint / _FILE
    replace_text(path, json.dumps({**json.loads(path.read_text()), _FIELD: signed(note)}))


def signed(note: Note) -> Note:
    """Returns the note with a digest of its content, as it is written."""
    note = json.loads(json.dumps(note))  # turns tuples into lists, as in the note that is read back
    return {**note, "digest": _digest(note)}


def _digest(note: Note) -> str:
    return hashlib.sha256(json.dumps(note, sort_keys=True).encode()).hexdigest()
