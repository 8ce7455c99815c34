"""Finds runs in folders and reads the files they left, whatever else lies there."""

import dataclasses
import json
import math
import time
from collections.abc import Iterable, Iterator
from typing import Any

from etils import epath

from ldrld_jax.identity import flat, identity

_DEPTH = 3  # how far below a folder runs are looked for
_MARKS = ("config.json", "summary.json", "metrics.jsonl", "checkpoints")  # one of them says that this is a run's folder
_CONFIG = {"seed", "epochs", "method", "student.model", "data.name"}
_NUMBERS = ("best_top1", "last_top1", "examples_per_second")


@dataclasses.dataclass(frozen=True)
class FoundRun:
    """A run, as its files tell it.

    Attributes:
      folder: its workdir.
      config: its config.json under dotted keys.
      summary: its summary.json; None for a run that has not ended.
      curve: `(epoch, top-1 in percent)` of each evaluation of the student.
    """

    folder: str
    config: dict[str, Any]
    summary: dict[str, Any] | None = None
    curve: tuple[tuple[float, float], ...] = ()

    @property
    def identity(self) -> dict[str, Any]:
        """All that the run shares with those of other seeds, under dotted keys."""
        return {key: value for key, value in identity(self.config).items() if key != "seed"}

    @property
    def method(self) -> str:
        return self.config["method"]

    @property
    def seed(self) -> int:
        return self.config["seed"]

    @property
    def student(self) -> str:
        return self.config["student.model"]

    @property
    def teacher(self) -> str | None:
        return self.config.get("teacher.model")


@dataclasses.dataclass
class Report:
    """What was found.

    Attributes:
      summaries: the finished runs.
      running: those that have not ended, whether they still run or were stopped.
      notes: a line for each folder that is in no table, or only in part: why.
    """

    summaries: list[FoundRun] = dataclasses.field(default_factory=list)
    running: list[FoundRun] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)


class _NoRunError(Exception):
    """Why a folder is no run."""


def collect(folders: Iterable[epath.PathLike]) -> Report:
    """The runs in and below some folders; a teacher that was trained for others is no run of the table.

    Never raises for what lies there: what cannot be read is named in the notes.
    """
    report = Report()
    workdirs: dict[str, epath.Path] = {}
    for folder in map(epath.Path, folders):
        below = list(_workdirs(folder, report.notes, _DEPTH))
        if not below:
            report.notes.append(f"{folder}: no run here")
        workdirs |= {str(workdir): workdir for workdir in below}
    for workdir in workdirs.values():
        try:
            _add(report, workdir)
        except (_NoRunError, OSError) as error:
            report.notes.append(f"{workdir}: {error}")
    return report


def _workdirs(folder: epath.Path, notes: list[str], depth: int) -> Iterator[epath.Path]:
    """The folders of runs, of which none lies in another: what is below a run is its own."""
    if any((folder / mark).exists() for mark in _MARKS):
        yield folder
    elif depth and folder.is_dir():
        try:
            children = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
        except OSError as error:
            notes.append(f"{folder}: it cannot be read ({error.strerror or error})")
            return
        within: list[list[str]] = [[] for _ in children]
        found = [list(_workdirs(child, own, depth - 1)) for child, own in zip(children, within, strict=True)]
        for child, runs, own in zip(children, found, within, strict=True):
            yield from runs
            if any(found):  # else the folder itself is named
                notes.extend(own if runs else [f"{child}: no run here"])


def _add(report: Report, workdir: epath.Path) -> None:
    config = flat(_json_object(workdir / "config.json"))
    if missing := _CONFIG - set(config):
        raise _NoRunError(f"config.json is not of ldrld_jax (it lacks {', '.join(sorted(missing))})")
    names = [config[key] for key in ("method", "student.model", "data.name")] + [config.get("teacher.model") or ""]
    if not all(isinstance(name, str) for name in names) or not _is_number(config["seed"]):
        raise _NoRunError("config.json is not of ldrld_jax (a name that is no text, or a seed that is no number)")
    lines, torn = _metrics(workdir / "metrics.jsonl")
    if any(line["split"] == "teacher_train" for line in lines):
        return
    if torn:
        report.notes.append(f"{workdir}: {torn} torn line{'s' * (torn > 1)} of metrics.jsonl left out")
    curve = [(line["epoch"], line["values"]["top1"]) for line in lines if line["split"] == "eval"]
    run = FoundRun(str(workdir), config, curve=tuple(curve))
    if (workdir / "summary.json").exists():
        report.summaries.append(dataclasses.replace(run, summary=_summary(workdir / "summary.json")))
    else:
        report.running.append(run)
        report.notes.append(f"{workdir}: {_progress(run, lines, workdir / 'metrics.jsonl')}")


def _json_object(path: epath.Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise _NoRunError(f"it has no {path.name}") from None
    except (ValueError, RecursionError) as error:  # no JSON, no text, or brackets without end
        raise _NoRunError(f"{path.name} is torn or no JSON ({error})") from None
    if not isinstance(content, dict):
        raise _NoRunError(f"{path.name} holds no JSON object")
    return content


def _summary(path: epath.Path) -> dict[str, Any]:
    summary = _json_object(path)
    for field in _NUMBERS:
        if not _is_number(summary.get(field)):
            raise _NoRunError(f"{path.name} has no number {field}")
    teacher = summary.get("teacher_top1")
    return {**summary, "teacher_top1": teacher if _is_number(teacher) else None}


def _metrics(path: epath.Path) -> tuple[list[dict[str, Any]], int]:
    """The lines that are whole, and how many are not."""
    try:
        texts = path.read_bytes().decode(errors="replace").splitlines()
    except FileNotFoundError:
        return [], 0
    lines = [line for line in map(_line, texts) if line is not None]
    return lines, len(texts) - len(lines)


def _line(text: str) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
        whole = _is_number(line["epoch"]) and (line["split"] != "eval" or _is_number(line["values"]["top1"]))
        return line if whole else None
    except (ValueError, LookupError, TypeError, RecursionError):
        return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _progress(run: FoundRun, lines: list[dict[str, Any]], path: epath.Path) -> str:
    epoch = lines[-1]["epoch"] if lines else 0.0
    text = f"not finished, epoch {epoch:.1f} of {run.config['epochs']}"
    if run.curve:
        text += f", best top-1 so far {max(top1 for _, top1 in run.curve):.2f}"
    if lines:
        text += f", last written {(time.time() - path.stat().mtime) / 60:.0f} min ago"
    return text
