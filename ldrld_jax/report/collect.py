"""Finds runs in folders, whatever else is there."""

import dataclasses
import itertools
import json
import os
import re
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeGuard

from etils import epath

from ldrld_jax.errors import UserError
from ldrld_jax.files import is_link, place_of
from ldrld_jax.identity import flat, identity, is_object
from ldrld_jax.record.console import counted
from ldrld_jax.record.reader import is_number, read_config, read_data, read_lines, read_summary

_DEPTH = 3  # how far below a folder runs are looked for
_MARKS = ("config.json", "summary.json", "metrics.jsonl", "checkpoints")  # one of them says that this is a run's folder


_SHORT = 8  # digits of a digest
_DIGESTS = ("data.images", "data.eval_images")  # keys that no config has
_NUMBERS = ("best_top1", "last_top1", "examples_per_second")


@dataclasses.dataclass(frozen=True)
class FoundRun:
    """A run as read from its files.

    Attributes:
      folder: its workdir.
      config: its config.json under dotted keys.
      summary: its summary.json; None for a run that has not ended.
      curve: `(epoch, top-1 in percent)` of each evaluation of the student.
      copy: 2 for the second run of the same identity and seed, which is a copy or has other objects, and so on.
    """

    folder: str
    config: dict[str, Any]
    summary: dict[str, Any] | None = None
    curve: tuple[tuple[float, float], ...] = ()
    copy: int = 1

    @property
    def identity(self) -> dict[str, Any]:
        """The keys that the run shares with those of other seeds, under dotted keys."""
        return {key: value for key, value in identity(self.config).items() if key != "seed"}

    @property
    def method(self) -> str:
        return self.config["method"]

    @property
    def best_step(self) -> int | None:
        """The step of the best checkpoint; None where the summary does not say."""
        found: list[Any] = [(self.summary or {}).get(name) for name in ("best_epoch", "steps", "epochs")]
        best, steps, epochs = found
        return round(best * steps / epochs) if all(map(is_number, found)) and epochs else None

    @property
    def seed(self) -> int:
        return self.config["seed"]

    @property
    def ended(self) -> str:
        """The end of the run, ISO 8601 in UTC; "" if its summary has none."""
        text = (self.summary or {}).get("ended")
        return text if isinstance(text, str) and re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d", text) else ""

    @property
    def student(self) -> str:
        return self.config["student.model"]

    @property
    def teacher(self) -> str | None:
        return self.config.get("teacher.model")


@dataclasses.dataclass
class Report:
    """The runs found in some folders.

    Attributes:
      summaries: the finished runs.
      running: those that have not ended, whether they still run or were stopped.
      notes: a line for each folder that is in no table, or only in part: why.
    """

    summaries: list[FoundRun] = dataclasses.field(default_factory=list)
    running: list[FoundRun] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)


def collect(folders: epath.PathLike | Iterable[epath.PathLike]) -> Report:
    """Finds the runs in and below a folder or several; a teacher that was trained for others is no run of the table.

    It never raises for the content of a folder: the notes name what cannot be read.
    """
    folders = [folders] if isinstance(folders, str | os.PathLike) else folders
    report = Report()
    workdirs: dict[str, epath.Path] = {}
    for folder in map(epath.Path, folders):
        below = list(_workdirs(folder, report.notes, _DEPTH))
        if not below:
            report.notes.append(f"{folder}: no run here")
        for workdir in below:
            workdirs.setdefault(place_of(workdir), workdir)
    for workdir in workdirs.values():
        try:
            _add(report, workdir)
        except (UserError, OSError) as error:
            report.notes.append(f"{workdir}: {error}")
    report.summaries, report.running = _told_apart(report.summaries, report.running)
    report.summaries = _numbered(report.summaries, report.notes)
    return report


def _told_apart(*found: list[FoundRun]) -> list[list[FoundRun]]:
    """Returns the runs without the digests of their data where their configs tell these apart, or they are the same.

    A folder's images are named by `data.data_dir`, which is no part of a run's identity: it may move.
    """
    digests = defaultdict[str, set[tuple[Any, ...]]](set)
    for run in itertools.chain(*found):
        if _DIGESTS[0] in run.config:  # not in a run without data.json
            digests[_data_keys(run)].add(tuple(run.config[key] for key in _DIGESTS))
    return [
        [
            run if is_object(run.config["data.name"]) or len(digests[_data_keys(run)]) > 1 else _anonymous(run)
            for run in runs
        ]
        for runs in found
    ]


def _data_keys(run: FoundRun) -> str:
    keys = {key: value for key, value in run.identity.items() if key.startswith("data.") and key not in _DIGESTS}
    return json.dumps(keys, sort_keys=True)


def _anonymous(run: FoundRun) -> FoundRun:
    return dataclasses.replace(run, config={key: v for key, v in run.config.items() if key not in _DIGESTS})


def _numbered(runs: Sequence[FoundRun], notes: list[str]) -> list[FoundRun]:
    """Returns the runs with `copy` set, in order of seed and folder, and adds a note for each second one of a seed."""
    folders = defaultdict[str, list[str]](list)
    numbered = []
    for run in sorted(runs, key=lambda run: (run.seed, run.folder)):
        same = folders[json.dumps([run.seed, run.identity], sort_keys=True)]
        same.append(run.folder)
        numbered.append(dataclasses.replace(run, copy=len(same)))
        if len(same) > 1:
            notes.append(f"{run.folder}: it has the config and the seed of {same[0]}, and is in no mean with it")
    return numbered


def _workdirs(folder: epath.Path, notes: list[str], depth: int) -> Iterator[epath.Path]:
    """Yields the folders of runs; a run below a run belongs to it and is left out."""
    if any((folder / mark).exists() for mark in _MARKS):
        yield folder
    elif depth and folder.is_dir():
        try:
            children = [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
            children.sort(key=lambda path: (is_link(path), path))  # a run goes by its own name
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
    config = read_config(workdir)
    if config is None:
        raise UserError("it has no config.json")
    lines = read_lines(workdir)
    if any(line["split"] == "teacher_train" for line in lines.whole):
        return
    if torn := len(lines.torn):
        report.notes.append(f"{workdir}: {counted(torn, 'torn line')} of metrics.jsonl left out")
    curve = [(line["epoch"], line["values"]["top1"]) for line in lines.whole if line["split"] == "eval"]
    keys, summary = flat(config), read_summary(workdir, numbers=_NUMBERS)
    run = FoundRun(str(workdir), keys | _objects(workdir, report.notes), summary, tuple(curve))
    if run.summary is not None and not all(plausible(run.summary[name]) for name in _NUMBERS):
        raise UserError("its summary.json has a number that no run reaches")
    if run.summary is not None:
        report.summaries.append(run)
        report.notes += [f"{workdir}: warning: {text}" for text in run.summary["warnings"]]
    else:
        report.running.append(run)
        report.notes.append(f"{workdir}: {_progress(run, lines.whole, workdir / 'metrics.jsonl')}")


def _objects(workdir: epath.Path, notes: list[str]) -> dict[str, str]:
    """Returns keys that tell data and objects given in Python apart, of which a config has only the names."""
    try:
        note = read_data(workdir) or {}
    except UserError as error:
        notes.append(str(error))
        return {}
    found = {}
    if note:
        for key, split in zip(_DIGESTS, ("train", "eval"), strict=True):
            found[key] = str(note[split].get("original", note[split].get("digest")))[:_SHORT]
        if (weights := note["weights"].get("teacher.model")) is not None:
            found["teacher.weights"] = " ".join(digest[:_SHORT] for digest in weights.split())
    return found


def plausible(value: Any) -> TypeGuard[float]:
    """Returns whether a value is a number that a run may have; sums and squares of such numbers are finite."""
    return is_number(value) and abs(value) < 1e12


def _progress(run: FoundRun, lines: list[dict[str, Any]], path: epath.Path) -> str:
    epoch = lines[-1]["epoch"] if lines else 0.0
    text = f"not finished, epoch {epoch:.1f} of {run.config['epochs']}"
    if run.curve:
        text += f", best top-1 so far {max(top1 for _, top1 in run.curve):.2f}"
    if lines:
        text += f", last written {(time.time() - path.stat().mtime) / 60:.0f} min ago"
    return text
