"""Console output: the progress bar, a line per evaluation, the table at the end."""

import argparse
import contextlib
import errno
import io
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from tqdm import tqdm

from ldrld_jax.errors import UserError

_muted = False
_NARROW = 60  # columns
_TICK_SECONDS = 1.0


def mute() -> None:
    """Silences this process, so that one of several speaks."""
    global _muted
    _muted = True


def counted(number: int, noun: str) -> str:
    """Returns a number with its noun.

    Example:
      >>> counted(1, "epoch"), counted(20, "epoch")
      ('1 epoch', '20 epochs')
    """
    return f"{number} {noun}{'s' * (number != 1)}"


def duration(seconds: float) -> str:
    """Formats a time in its two largest units.

    Example:
      >>> duration(3.9), duration(247), duration(7500)
      ('3 s', '4 min 07 s', '2 h 05 min')
    """
    minutes, left = divmod(int(seconds), 60)
    hours, over = divmod(minutes, 60)
    return f"{hours} h {over:02} min" if hours else f"{minutes} min {left:02} s" if minutes else f"{left} s"


def say(text: str) -> None:
    """Prints a line on standard output, above the progress bar if there is one.

    It raises no OSError: a run goes on when nobody reads its output any more.
    """
    with contextlib.suppress(OSError):
        answer(text)


def answer(text: str, *, verbatim: bool = False) -> None:
    """Prints the result of a command, as `say` does, and raises an error if that fails.

    Args:
      text: without its last newline.
      verbatim: True for text that a shell reads, whose control characters are kept.

    Raises:
      OSError: if this text or an earlier one cannot be written. A pipe whose reader has left is no error.
      UserError: if a verbatim text has a character that the output's encoding lacks.
    """
    if _muted:
        return
    if sys.stdout is None:  # closed before Python began
        raise _unwritable(None)
    try:
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        tqdm.write(text if verbatim else printable(text, encoding), file=sys.stdout)
        sys.stdout.flush()
    except UnicodeEncodeError as error:  # a ValueError as well, and no reason to print nothing more
        raise UserError(
            f"standard output is {encoding}, which has no {error.object[error.start]!r}. Set "
            "PYTHONIOENCODING=utf-8:surrogateescape."
        ) from error
    except (OSError, ValueError) as error:  # a full disk, a reader or terminal that has gone, or the stream is closed
        sys.stdout = _Nowhere(error)
    if isinstance(sys.stdout, _Nowhere) and not isinstance(sys.stdout.why, ConnectionError):
        raise _unwritable(sys.stdout.why)


class _Nowhere(io.TextIOWrapper):
    """Standard output after a failure, so that neither another line nor the end of Python fails again.

    Attributes:
      why: the failure.
    """

    def __init__(self, why: Exception):
        super().__init__(open(os.devnull, "wb"))  # noqa: PTH123, SIM115
        self.why = why


def _unwritable(why: Exception | None) -> OSError:
    number = getattr(why, "errno", None) or errno.EBADF
    return OSError(number, os.strerror(number), "standard output")


def on_terminal() -> bool:
    """Returns True if standard output is a terminal."""
    return sys.stdout is not None and sys.stdout.isatty()


class Parser(argparse.ArgumentParser):
    """Parser that prints its help by `answer`."""

    def print_help(self, file: Any = None) -> None:
        if file is not None:
            return super().print_help(file)
        return answer(self.format_help().rstrip("\n"))


def printable(text: str, encoding: str = "utf-8") -> str:
    r"""Escapes what a terminal would obey, such as control sequences in names, and what `encoding` cannot show.

    Example:
      >>> print(printable("cat\x1b[2J, caf\u00e9", "ascii"))
      cat\x1b[2J, caf\xe9
    """
    escaped = "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
    return escaped.encode(encoding, "backslashreplace").decode(encoding)


class ProgressBar:
    """Progress bar with loss, top-1, examples/s and the time left on standard error, if that is a terminal.

    A task that takes longer than a second is shown by name with its seconds, which a thread counts, until the next
    `update`. There is no colour. On a terminal of fewer than 60 columns the name of what is done takes the place of the
    bar.

    Args:
      start, total: steps done, and those of the run; None shows nothing but what is done.
      name: of the run.
      unit: the name of a step.
    """

    def __init__(self, start: int, total: int | None, name: str, unit: str = "step"):
        hidden = True if _muted or sys.stderr is None else None  # None: unless it is a terminal
        self._name, self._doing = name, (time.monotonic(), "starting")
        self._bar = tqdm(
            total=total,
            initial=start,
            desc=name,
            unit=unit,
            disable=hidden,
            dynamic_ncols=True,
            leave=total is not None,
            bar_format="{desc}" if total is None else None,
        )
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="progress", daemon=True)
        if not self._bar.disable:
            self._thread.start()

    def at(self, doing: str) -> None:
        """Notes what the run does from now on, such as "compiling the train step"; the same again goes on counting."""
        if doing != self._doing[1]:
            self._doing = (time.monotonic(), doing)

    def update(self, step: int, values: Mapping[str, float]) -> None:
        with self._hidden_once_it_fails():
            self._bar.set_postfix({name: f"{value:.4g}" for name, value in values.items()}, refresh=False)
            self._describe()
            self._bar.update(step - self._bar.n)

    def close(self) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
        with self._hidden_once_it_fails():
            self._describe()
            self._bar.close()

    def _watch(self) -> None:
        while not self._ended.wait(_TICK_SECONDS):
            self._tick()

    def _tick(self) -> None:
        since, doing = self._doing
        seconds = int(time.monotonic() - since)
        if seconds:
            with self._hidden_once_it_fails():
                self._describe(doing, f", {seconds} s")
                self._bar.refresh()

    def _describe(self, doing: str = "", seconds: str = "") -> None:
        """Sets the bar's text: what is done and for how long, or "" for the progress."""
        bar = self._bar
        if bar.disable:
            return
        columns = bar.format_dict["ncols"] or _NARROW
        if bar.total is not None and columns >= _NARROW:
            bar.bar_format, bar.desc = None, f"{self._name}, {doing}{seconds}" if doing else self._name
        elif doing or bar.total is None:
            done = "" if bar.total is None else f"{bar.n}/{bar.total} "
            room = columns - len(done) - len(seconds)
            bar.bar_format, bar.desc = "{desc}", f"{done}{doing[:room]}{seconds}"
        else:
            bar.bar_format, bar.desc = "{desc} {n_fmt}/{total_fmt}, {remaining} left{postfix}", self._name

    @contextlib.contextmanager
    def _hidden_once_it_fails(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError):  # the terminal has gone, or the stream is closed
            self._bar.disable = True


@contextlib.contextmanager
def waiting(doing: str) -> Iterator[Callable[[str], None]]:
    """Shows what is done and the seconds it takes, if standard error is a terminal and it takes more than one.

    Yields a function that changes the text.

    Example:
      >>> with waiting("compiling the evaluation") as at:
      ...     at("evaluating")
    """
    bar = ProgressBar(0, None, "")
    bar.at(doing)
    try:
        yield bar.at
    finally:
        bar.close()


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


_RATED = tuple(f"{when}_{name}" for when in ("best", "last") for name in ("epoch", "top1", "top5"))
# What `summary_table` shows of a run's summary.
TABLE_NUMBERS = ("seed", "steps", *_RATED)
TABLE_NAMES = ("student", "teacher", "method")


def summary_table(summary: Mapping[str, Any], workdir: str) -> str:
    """Formats the table at the end of a run, in 40 columns, and a line with what the run was.

    Example:
      >>> scores = {"best_epoch": 3.0, "best_top1": 98.0, "best_top5": 99.5}
      >>> scores |= {"last_epoch": 4.0, "last_top1": 97.25, "last_top5": 99.75, "teacher_top1": 98.5}
      >>> run = {"student": "resnet8", "teacher": "resnet20", "method": "kd", "seed": 0, "steps": 92}
      >>> print(summary_table(scores | run, "runs/digits"))
      epoch      top-1 %  top-5 %  vs teacher
      teacher      98.50
      3, best      98.00    99.50       -0.50
      4, last      97.25    99.75       -1.25
      <BLANKLINE>
      resnet8 from resnet20 by kd, seed 0, 92 steps: runs/digits
    """
    teacher = summary["teacher_top1"]
    rows = [("epoch", "top-1 %", "top-5 %", "vs teacher" if teacher is not None else "")]
    if teacher is not None:
        rows.append(("teacher", f"{teacher:.2f}", "", ""))
    for when in ("best", "last"):
        top1, top5 = (summary[f"{when}_{name}"] for name in ("top1", "top5"))
        delta = "" if teacher is None else f"{top1 - teacher:+.2f}"
        rows.append((f"{summary[f'{when}_epoch']:g}, {when}", f"{top1:.2f}", f"{top5:.2f}", delta))
    lines = [f"{name:<9} {top1:>8} {top5:>8} {delta:>11}".rstrip() for name, top1, top5, delta in rows]
    from_teacher = f" from {summary['teacher']}" if summary["teacher"] else ""
    what = f"{summary['student']}{from_teacher} by {summary['method']}, seed {summary['seed']}"
    return "\n".join([*lines, "", f"{what}, {summary['steps']} steps: {workdir}"])
