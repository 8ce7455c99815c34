"""The small JSON file that each piece of work leaves: what it measured so far, and on what."""

import json
import os
import pathlib
from typing import Any

Record = dict[str, Any]


def path_of(folder: pathlib.Path, name: str) -> pathlib.Path:
    """Returns where the record of the piece "stage.piece" lies below the work folder."""
    return folder / "results" / f"{name}.json"


def read(folder: pathlib.Path, name: str) -> Record:
    """The record of a piece; {} if there is none, or a torn one, whose piece is then done again."""
    try:
        record = json.loads(path_of(folder, name).read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def write(folder: pathlib.Path, name: str, record: Record) -> None:
    """Writes a record as a whole or not at all."""
    replace(path_of(folder, name), json.dumps({"name": name, **record}, indent=1) + "\n")


def replace(path: pathlib.Path, text: str) -> None:
    """Writes a file as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.{os.getpid()}")
    new.write_text(text)
    new.replace(path)


def is_complete(folder: pathlib.Path, name: str) -> bool:
    return read(folder, name).get("complete") is True


def fail(folder: pathlib.Path, name: str, error: str) -> None:
    """Notes why a piece is not complete, beside what it measured before."""
    write(folder, name, {**read(folder, name), "complete": False, "error": error})
