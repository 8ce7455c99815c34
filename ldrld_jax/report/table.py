"""The table of the report: a line per experiment, mean and deviation over its seeds."""

import shutil
import statistics
import sys
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from ldrld_jax.record.console import duration, on_terminal
from ldrld_jax.report.collect import FoundRun
from ldrld_jax.report.groups import Comparison, Group, compare
from ldrld_jax.report.published import published


class Table(NamedTuple):
    """A table of text without empty columns."""

    header: list[str]
    rows: list[list[str]]


def table(runs: Iterable[FoundRun]) -> str:
    """Formats a Markdown table of finished runs, the best mean of last-epoch top-1 first, with sample deviations.

    Args:
      runs: `collect(folders).summaries`.

    Example:
      >>> config = {"method": "kd", "data.name": "digits", "student.model": "resnet8", "teacher.model": "resnet20"}
      >>> def run(seed):
      ...     tops = {"best_top1": 97.0 + seed, "last_top1": 96.0 + seed, "teacher_top1": 99.0}
      ...     return FoundRun("", config | {"epochs": 2, "seed": seed}, tops | {"examples_per_second": 1e3})
      >>> print(table([run(0), run(1)]))
      | teacher | student | method | seeds | best top-1 % | last top-1 % | teacher top-1 % | examples/s |
      | --- | --- | --- | --- | --- | --- | --- | --- |
      | resnet20 | resnet8 | kd | 2 | 97.50 ± 0.71 | 96.50 ± 0.71 | 99.00 | 1000 |
    """
    return markdown(results(compare(runs)))


def results(comparisons: Sequence[Comparison]) -> Table:
    """Returns the cells of the table."""
    rows = [_row(comparison, group) for comparison in comparisons for group in comparison.groups]
    header = list(rows[0]) if rows else []
    if rows and len({comparison.data for comparison in comparisons}) == 1:
        header.remove("data")
    shown = [name for name in header if name not in _OPTIONAL or any(row[name] for row in rows)]
    return Table(shown, [[row[name] for name in shown] for row in rows])


_OPTIONAL = ("setting", "against our kd", "published", "time", "ended")


def _row(comparison: Comparison, group: Group) -> dict[str, str]:
    kd = comparison.own_kd(group)
    return {
        "data": comparison.data,
        "teacher": group.first.teacher or "none",
        "student": comparison.student,
        "method": group.method,
        "setting": group.setting,
        "seeds": str(len(group.runs)),
        "best top-1 %": spread(group.values("best_top1")),
        "last top-1 %": spread(group.values("last_top1")),
        "against our kd": f"{group.mean('last_top1') - kd.mean('last_top1'):+.2f}" if kd else "",
        "published": published(group.first.config),
        "teacher top-1 %": spread(group.values("teacher_top1")),
        "examples/s": f"{group.mean('examples_per_second'):.0f}",
        "time": duration(group.mean("train_seconds")) if group.values("train_seconds") else "",
        "ended": group.ended,
    }


_FIRST = ("method", "last top-1 %", "best top-1 %", "against our kd", "published", "seeds")


def for_phones(cells: Table) -> Table:
    """Returns the table for the page: method and setting in one cell, main columns first, no student that all share."""
    rows = [dict(zip(cells.header, row, strict=True)) for row in cells.rows]
    one_student = len({row["student"] for row in rows}) == 1
    for row in rows:
        row["method"] = f"{row['method']} {row.pop('setting', '')}".strip()
        if one_student:
            del row["student"]
    header = sorted(rows[0] if rows else (), key=lambda name: (*_FIRST, name).index(name))
    return Table(header, [[row[name] for name in header] for row in rows])


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Formats mean and sample deviation; the mean alone if the values are equal; "" without values.

    Example:
      >>> spread([1.0, 2.0, 3.0]), spread([2.0]), spread([])
      ('2.00 ± 1.00', '2.00', '')
    """
    if not values:
        return ""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(set(values)) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{deviation}"


def fitting(cells: Table, columns: int | None = None) -> str:
    """Formats a table as Markdown; on a terminal that is too narrow for it, as a block of lines per row.

    Args:
      cells: the table.
      columns: of the terminal; None for those of standard output, which has no limit if it is no terminal.

    Example:
      >>> cells = Table(["method", "seeds", "last top-1 %"], [["kd", "2", "96.50 ± 0.71"], ["ce", "1", "95.00"]])
      >>> print(fitting(cells, 30))
      method        kd
      seeds         2
      last top-1 %  96.50 ± 0.71
      <BLANKLINE>
      method        ce
      seeds         1
      last top-1 %  95.00
    """
    text = markdown(cells)
    if columns is None:
        columns = shutil.get_terminal_size().columns if on_terminal() else sys.maxsize
    if all(len(line) <= columns for line in text.splitlines()):
        return text
    width = max(map(len, cells.header))
    pairs = [zip(cells.header, row, strict=True) for row in cells.rows]
    return "\n\n".join("\n".join(f"{name:{width}}  {cell}" for name, cell in row if cell) for row in pairs)


def markdown(cells: Table) -> str:
    """Formats a table as Markdown; "" for one without rows."""
    if not cells.rows:
        return ""
    lines = [cells.header, ["---"] * len(cells.header), *cells.rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
