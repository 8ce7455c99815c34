"""The comparison of runs, from the files they left: `python -m ldrld_jax.report DIR...`.

A DIR is a run's workdir, or a folder of them. Prints a Markdown table, a line per teacher, student
and method, with mean and deviation over seeds; runs that are unfinished or unreadable are named.
"""

import json
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from etils import epath


class Report(NamedTuple):
    """What was found.

    Attributes:
      summaries: of the finished runs.
      notes: a line for every run that is not in the table.
    """

    summaries: list[dict[str, Any]]
    notes: list[str]


_FIELDS = ("method", "seed", "student", "teacher", "teacher_top1", "best_top1", "last_top1", "examples_per_second")


def collect(folders: Iterable[epath.PathLike]) -> Report:
    """The runs in and below some folders; a student's own teacher is no run of the table."""
    report = Report([], [])
    for folder in map(epath.Path, folders):
        workdirs = [folder] if (folder / "config.json").exists() else _below(folder)
        if not workdirs:
            report.notes.append(f"{folder}: no run here")
        for workdir in workdirs:
            path = workdir / "summary.json"
            if not path.exists():
                report.notes.append(f"{workdir}: not finished")
                continue
            try:
                summary = json.loads(path.read_text())
                report.summaries.append({field: summary[field] for field in _FIELDS})
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                report.notes.append(f"{workdir}: summary.json is not readable ({type(error).__name__}: {error})")
    return report


def _below(folder: epath.Path) -> list[epath.Path]:
    return sorted(path.parent for path in folder.glob("*/config.json")) if folder.is_dir() else []


def table(summaries: Iterable[dict[str, Any]]) -> str:
    """A Markdown table, the best mean of last-epoch accuracy first; deviations are of the sample.

    Example:
      >>> run = dict(method="kd", student="resnet8", teacher="resnet20", teacher_top1=99.0, examples_per_second=1e3)
      >>> print(table([run | dict(seed=s, best_top1=97.0 + s, last_top1=96.0 + s) for s in (0, 1)]))
      | teacher | student | method | seeds | best top-1 % | last top-1 % | teacher top-1 % | examples/s |
      | --- | --- | --- | --- | --- | --- | --- | --- |
      | resnet20 | resnet8 | kd | 2 | 97.50 ± 0.71 | 96.50 ± 0.71 | 99.00 | 1000 |
    """
    groups = defaultdict(list)
    for summary in summaries:
        groups[summary["teacher"], summary["student"], summary["method"]].append(summary)
    lines = [
        "| teacher | student | method | seeds | best top-1 % | last top-1 % | teacher top-1 % | examples/s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (teacher, student, method), runs in sorted(groups.items(), key=lambda item: -_mean(item[1], "last_top1")):
        cells = [teacher or "none", student, method, len({run["seed"] for run in runs})]
        cells += [_spread(runs, "best_top1"), _spread(runs, "last_top1")]
        cells += [_spread(runs, "teacher_top1"), f"{_mean(runs, 'examples_per_second'):.0f}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def _mean(runs: Sequence[dict[str, Any]], field: str) -> float:
    values = [run[field] for run in runs if run[field] is not None]
    return statistics.fmean(values) if values else math.nan


def _spread(runs: Sequence[dict[str, Any]], field: str) -> str:
    values = [run[field] for run in runs if run[field] is not None]
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.2f}" if len(set(values)) > 1 else ""
    return f"{statistics.fmean(values):.2f}{spread}"


def main(folders: Sequence[str]) -> int:
    """Prints the table of `folders`; 2 if there is no finished run in them."""
    if not folders:
        print("usage: python -m ldrld_jax.report DIR...", file=sys.stderr)
        return 2
    report = collect(folders)
    if report.summaries:
        print(table(report.summaries))
    for note in report.notes:
        print(note, file=sys.stderr)
    return 0 if report.summaries else 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
