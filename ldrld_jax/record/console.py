"""Console output: the progress bar, a line per evaluation, the table at the end."""

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from tqdm import tqdm

_muted = False


def mute() -> None:
    """Silences this process, so that one of several speaks."""
    global _muted
    _muted = True


def say(text: str) -> None:
    """Prints a line on standard output, above the progress bar if there is one.

    It never raises: a run goes on when nobody reads its output any more.
    """
    if _muted or sys.stdout is None:
        return
    try:
        tqdm.write(printable(text, sys.stdout.encoding or "utf-8"), file=sys.stdout)
        sys.stdout.flush()
    except OSError:  # the reader of a pipe has gone, or the terminal
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115  # nor does Python complain at its end


def printable(text: str, encoding: str = "utf-8") -> str:
    r"""Escapes what a terminal would obey, such as control sequences in names, and what `encoding` cannot show.

    Example:
      >>> print(printable("cat\x1b[2J, caf\u00e9", "ascii"))
      cat\x1b[2J, caf\xe9
    """
    escaped = "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
    return escaped.encode(encoding, "backslashreplace").decode(encoding)


class ProgressBar:
    """Progress bar with loss, top-1, examples/s and the time left on standard error, if that is a terminal."""

    def __init__(self, start: int, total: int, name: str, unit: str = "step"):
        hidden = True if _muted or sys.stderr is None else None  # None: unless it is a terminal
        self._bar = tqdm(total=total, initial=start, desc=name, unit=unit, disable=hidden, dynamic_ncols=True)

    def update(self, step: int, values: Mapping[str, float]) -> None:
        with self._hidden_once_it_fails():
            self._bar.set_postfix({name: f"{value:.4g}" for name, value in values.items()}, refresh=False)
            self._bar.update(step - self._bar.n)

    def close(self) -> None:
        with self._hidden_once_it_fails():
            self._bar.close()

    @contextlib.contextmanager
    def _hidden_once_it_fails(self) -> Iterator[None]:
        try:
            yield
        except OSError:  # the terminal has gone
            self._bar.disable = True


def evaluation_line(name: str, epoch: float, epochs: int, values: Mapping[str, float], best: float) -> str:
    """Formats an evaluation as one line.

    Example:
      >>> evaluation_line("student", 2.0, 30, {"top1": 91.5, "top5": 99.0, "ce": 0.3}, best=92.0)
      'student epoch 2/30  top-1 91.50  top-5 99.00  cross-entropy 0.3000  (best top-1 92.00)'
    """
    return (
        f"{name} epoch {epoch:g}/{epochs}  top-1 {values['top1']:.2f}  top-5 {values['top5']:.2f}  "
        f"cross-entropy {values['ce']:.4f}  (best top-1 {best:.2f})"
    )


def summary_table(summary: Mapping[str, Any], workdir: str) -> str:
    """Formats the table at the end of a run: the scores, and the workdir."""
    rows = [("", "top-1 %", "top-5 %")]
    if summary["teacher_top1"] is not None:
        rows.append((f"teacher {summary['teacher']}", f"{summary['teacher_top1']:.2f}", ""))
    for when in ("best", "last"):
        name = f"student {summary['student']}, {when} (epoch {summary[f'{when}_epoch']:g})"
        rows.append((name, f"{summary[f'{when}_top1']:.2f}", f"{summary[f'{when}_top5']:.2f}"))
    width = max(len(row[0]) for row in rows)
    lines = [f"{name:<{width}}  {top1:>7}  {top5:>7}".rstrip() for name, top1, top5 in rows]
    return "\n".join([*lines, "", f"{summary['method']}, seed {summary['seed']}, {summary['steps']} steps: {workdir}"])
