"""What is noted beside a checkpoint's arrays, and that it is as it was written."""

import hashlib
import json
from typing import Any

from etils import epath

from ldrld_jax.files import replace_text

Note = dict[str, Any]

_FILE = "_CHECKPOINT_METADATA"  # orbax's; read without it, as it stops at what it cannot parse
_FIELD = "custom_metadata"


class DamagedError(Exception):
    """A checkpoint is not as it was written; the message says in what."""


def read_note(checkpoint: epath.Path) -> Note | DamagedError:
    """The note in a checkpoint's folder, without its signature."""
    try:
        note = dict(json.loads((checkpoint / _FILE).read_text())[_FIELD])
        digest = note.pop("digest")
    except (FileNotFoundError, NotADirectoryError):
        return DamagedError(f"it has no {_FILE}")
    except (ValueError, KeyError, TypeError):
        return DamagedError(f"its {_FILE} is torn")
    return note if digest == _digest(note) else DamagedError(f"its {_FILE} has changed since it was saved")


def rewrite_note(checkpoint: epath.Path, note: Note) -> None:
    """Another note for a checkpoint that is whole."""
    path = checkpoint / _FILE
    replace_text(path, json.dumps({**json.loads(path.read_text()), _FIELD: signed(note)}))


def signed(note: Note) -> Note:
    """The note as it is written: with a digest of what it says."""
    note = json.loads(json.dumps(note))  # tuples become lists, as they will be read
    return {**note, "digest": _digest(note)}


def _digest(note: Note) -> str:
    return hashlib.sha256(json.dumps(note, sort_keys=True).encode()).hexdigest()
