"""Runs each piece of work in its own process, so that a failing or slow one does not affect the others."""

import contextlib
import dataclasses
import os
import pathlib
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence

GRACE_SECONDS = 12.0  # from SIGTERM to SIGKILL; a run saves its state in one or two seconds
_POLL_SECONDS = 0.2


@dataclasses.dataclass(frozen=True)
class Task:
    """A piece of work to run in its own process.

    Attributes:
      name: "stage.piece", the name of its record and log.
      command: the command line.
      seconds: time after which it is stopped.
      least: it is not started with fewer seconds left than this.
      env: additional environment variables.
    """

    name: str
    command: Sequence[str]
    seconds: float
    least: float
    env: Mapping[str, str] = dataclasses.field(default_factory=dict)


class Minutes:
    """Time budget of one session.

    Args:
      minutes: length of the session, from now.
      closing: seconds reserved at the end for stopping processes and packing results.
      clock: returns the time in seconds.
    """

    def __init__(self, minutes: float, closing: float, clock: Callable[[], float] = time.monotonic):
        self._clock, self._end, self._closing = clock, clock() + 60 * minutes, closing

    def left(self) -> float:
        """Returns the seconds left for work, at least 0."""
        return max(0.0, self._end - self._closing - self._clock())


class Launcher:
    """Launcher of parallel tasks.

    Args:
      logs: folder for their output.
      cwd: their working directory.
      env: their environment, extended by each task's own.
    """

    def __init__(self, logs: pathlib.Path, cwd: pathlib.Path, env: Mapping[str, str]):
        self._logs, self._cwd, self._env = logs, cwd, env
        self._running: dict[str, subprocess.Popen] = {}

    def __call__(
        self, tasks: Sequence[Task], seconds: float, enough: Callable[[], bool] = lambda: False
    ) -> dict[str, int | None]:
        """Runs tasks until all have ended, `seconds` have passed or `enough()` returns True.

        Returns:
          The exit status of each task; None for a task that had to be stopped.
        """
        end = time.monotonic() + seconds
        self._logs.mkdir(parents=True, exist_ok=True)
        for task in tasks:
            with (self._logs / f"{task.name}.txt").open("ab") as log:
                self._running[task.name] = subprocess.Popen(
                    task.command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    cwd=self._cwd,
                    env={**self._env, **task.env},
                    start_new_session=True,  # its own process group, which can be signalled as a whole
                )
        try:
            while self._any_runs() and time.monotonic() < end and not enough():
                time.sleep(_POLL_SECONDS)
            codes = {name: process.poll() for name, process in self._running.items()}
            self._signal(signal.SIGTERM)
            end = time.monotonic() + GRACE_SECONDS
            while self._any_runs() and time.monotonic() < end:
                time.sleep(_POLL_SECONDS)
            return codes
        finally:
            self.kill()

    def tail(self, name: str, characters: int = 600) -> str:
        """Returns the end of a task's output."""
        with contextlib.suppress(OSError):
            return (self._logs / f"{name}.txt").read_text(errors="replace")[-characters:].strip()
        return ""

    def kill(self) -> None:
        """Kills all running tasks and their child processes."""
        self._signal(signal.SIGKILL)
        for process in self._running.values():
            process.wait()
        self._running.clear()

    def _any_runs(self) -> bool:
        return any(process.poll() is None for process in self._running.values())

    def _signal(self, number: signal.Signals) -> None:
        for process in self._running.values():
            if number == signal.SIGKILL or process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, number)
