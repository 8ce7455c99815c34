"""Reads and writes the record of each piece of work, a JSON file with its results so far and their provenance."""

import json
import os
import pathlib
from typing import Any

Record = dict[str, Any]


def path_of(folder: pathlib.Path, name: str) -> pathlib.Path:
    """Returns the path of the record of the piece "stage.piece" below the work folder."""
    return folder / "results" / f"{name}.json"


def read(folder: pathlib.Path, name: str) -> Record:
    """Returns the record of a piece; {} if it is missing or corrupt, so that the piece is repeated."""
    try:
        record = json.loads(path_of(folder, name).read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def write(folder: pathlib.Path, name: str, record: Record) -> None:
    """Writes a record atomically."""
    replace(path_of(folder, name), json.dumps({"name": name, **record}, indent=1) + "\n")


def replace(path: pathlib.Path, text: str) -> None:
    """Writes a file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.{os.getpid()}")
    new.write_text(text)
    new.replace(path)


def is_complete(folder: pathlib.Path, name: str) -> bool:
    return read(folder, name).get("complete") is True


def fail(folder: pathlib.Path, name: str, error: str) -> None:
    """Adds an error to the record of an incomplete piece and keeps its earlier results."""
    write(folder, name, {**read(folder, name), "complete": False, "error": error})
