"""The processes of the programme: each piece of work is one, so that none takes another down or keeps the time."""

import contextlib
import dataclasses
import os
import pathlib
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence

GRACE_SECONDS = 12.0  # from SIGTERM to SIGKILL: a run saves its state in one or two, whatever it is doing
_POLL_SECONDS = 0.2


@dataclasses.dataclass(frozen=True)
class Task:
    """A piece of work in a process of its own.

    Attributes:
      name: "stage.piece", of its record and of its log.
      command: what is run.
      seconds: it is stopped after so many.
      least: it is not begun with less time than this.
      env: added to the environment.
    """

    name: str
    command: Sequence[str]
    seconds: float
    least: float
    env: Mapping[str, str] = dataclasses.field(default_factory=dict)


class Minutes:
    """The time of one command of the programme.

    Args:
      minutes: from now on.
      closing: seconds at the end that are kept for stopping what runs and packing the results.
      clock: of seconds.
    """

    def __init__(self, minutes: float, closing: float, clock: Callable[[], float] = time.monotonic):
        self._clock, self._end, self._closing = clock, clock() + 60 * minutes, closing

    def left(self) -> float:
        """Seconds for work, 0 at least."""
        return max(0.0, self._end - self._closing - self._clock())


class Launcher:
    """Runs tasks side by side.

    Args:
      logs: the folder for what they print.
      cwd: their working directory.
      env: their environment, to which a task adds its own.
    """

    def __init__(self, logs: pathlib.Path, cwd: pathlib.Path, env: Mapping[str, str]):
        self._logs, self._cwd, self._env = logs, cwd, env
        self._running: dict[str, subprocess.Popen] = {}

    def __call__(
        self, tasks: Sequence[Task], seconds: float, enough: Callable[[], bool] = lambda: False
    ) -> dict[str, int | None]:
        """Runs tasks until all have ended, `seconds` are over or `enough` says so.

        Returns:
          The exit status of each; None for one that had to be stopped, whatever it made of that.
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
                    start_new_session=True,  # a group of its own, which ends with it
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
        """The end of what a task printed."""
        with contextlib.suppress(OSError):
            return (self._logs / f"{name}.txt").read_text(errors="replace")[-characters:].strip()
        return ""

    def kill(self) -> None:
        """Ends whatever runs, and what it started, at once."""
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
