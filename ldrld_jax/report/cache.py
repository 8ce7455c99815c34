"""Analyses kept beside their runs, so that the next report need not run the networks again."""

import hashlib
import json
from typing import Any

from etils import epath

from ldrld_jax.files import absolute, replace_text

VERSION = 2  # of what is kept: version 1, which has less, is shown, and computed again where the run is at hand
_KEYS = {"step", "features", "calibration", "embedding", "embedded", "teacher"}


def read(folder: str, out: epath.Path) -> dict[str, Any] | None:
    """Reads the analysis of the run in a folder; None if there is none, or it is torn or of another version."""
    for path in _places(folder, out):
        try:
            found = json.loads(path.read_text())
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(found, dict) and found.get("version") in (1, VERSION) and set(found) >= _KEYS:
            return found
    return None


def write(folder: str, out: epath.Path, analysis: dict[str, Any]) -> None:
    """Writes an analysis as `analysis.json` in the run's folder, or under `out` where that cannot be written to."""
    text = json.dumps({"version": VERSION, **analysis})
    first, second = _places(folder, out)
    try:
        replace_text(first, text)
    except OSError:
        second.parent.mkdir(parents=True, exist_ok=True)
        replace_text(second, text)


def _places(folder: str, out: epath.Path) -> tuple[epath.Path, epath.Path]:
    path = epath.Path(folder)
    unique = hashlib.sha256(str(absolute(path)).encode()).hexdigest()[:12]
    return path / "analysis.json", out / "analyses" / f"{path.name}-{unique}.json"
