"""The writer of a run's metrics: lines of JSON, with TensorBoard's events and a user's writers beside them."""

import contextlib
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol

from etils import epath

from ldrld_jax.errors import first_line
from ldrld_jax.files import append_text, is_local, replace_text
from ldrld_jax.record.console import say
from ldrld_jax.record.reader import read_metrics
from ldrld_jax.record.tensorboard import Events

logger = logging.getLogger("ldrld_jax")


class LineWriter(Protocol):
    """A user's writer of metrics.

    `close()`, if it has one, is called at the end; `fail(error)`, if it has one, before it, if an error or a signal (a
    KeyboardInterrupt) ended the run.
    """

    def write(self, step: int, epoch: float, split: str, values: Mapping[str, float]) -> None: ...


class Writer:
    """Writer of `metrics.jsonl`, and of TensorBoard events beside it.

    A line is `{"step": int, "epoch": float, "split": str, "values": {name: float}}`.

    Args:
      workdir: the folder of both; on `gs://` and the like the file is rewritten with each line.
      lines: the number of lines at the checkpoint that the run resumes from; later lines are cut off.
      step: of that checkpoint.
      tensorboard: False leaves out the events.
      hparams: of the run, for TensorBoard.
      others: they get each new line as well; whoever made them closes them.
    """

    def __init__(
        self,
        workdir: epath.Path,
        *,
        lines: int = 0,
        step: int = 0,
        tensorboard: bool = True,
        hparams: Mapping[str, Any] = MappingProxyType({}),
        others: Sequence[LineWriter] = (),
    ):
        self._others = others
        self._path = workdir / "metrics.jsonl"
        self._lines = read_metrics(workdir)[:lines]
        if missing := lines - len(self._lines):
            after = f"after step {self._lines[-1]['step']}" if self._lines else "from the start on"
            say(f"{self._path} lacks {missing} of the {lines} lines that had been written, {after}.")
        text = "".join(_dump(line) for line in self._lines)
        if not self._path.exists() or self._path.read_bytes() != text.encode():
            replace_text(self._path, text)
        self._events = Events(workdir, purge_step=step + 1, hparams=hparams) if tensorboard else None

    @property
    def lines(self) -> int:
        """The number of lines written."""
        return len(self._lines)

    def write(self, step: int, epoch: float, split: str, values: Mapping[str, float]) -> None:
        for other in self._others:  # first: a line of one that raises is written again by the run that resumes
            other.write(step, epoch, split, dict(values))
        if self._events is not None:
            self._events.write(step, {f"{split}/{name}": value for name, value in values.items()})
        line = {"step": step, "epoch": epoch, "split": split, "values": dict(values)}
        if is_local(self._path):
            append_text(self._path, _dump(line))
        else:
            self._path.write_text("".join(map(_dump, [*self._lines, line])))
        self._lines.append(line)

    def flush(self) -> None:
        """Brings what was written to the disk, so that a machine that goes down does not lose it."""
        if is_local(self._path):
            with self._path.open("rb") as file:
                os.fsync(file.fileno())

    def close(self) -> None:
        if self._events is not None:
            close_all([self._events])


@contextlib.contextmanager
def closing_all(writers: Sequence[LineWriter]) -> Iterator[Sequence[LineWriter]]:
    """Closes the writers after the block, and tells them of the error that ended it."""
    try:
        yield writers
    except BaseException as error:
        close_all(writers, error)
        raise
    close_all(writers)


def close_all(writers: Iterable[object], error: BaseException | None = None) -> None:
    """Closes the writers that can be closed, after a call of `fail(error)` if there is an error.

    What they raise is logged: it must not keep a complete run from its summary, nor hide the error.
    """
    for writer in writers:
        if error is not None and hasattr(writer, "fail"):
            with _logged(writer):
                writer.fail(error)
        if hasattr(writer, "close"):
            with _logged(writer):
                writer.close()


@contextlib.contextmanager
def _logged(writer: object) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        logger.warning(
            "%s could not be closed: %s. Its last lines may be lost.", type(writer).__name__, first_line(error)
        )


def _dump(line: dict[str, Any]) -> str:
    return json.dumps(line) + "\n"
