"""A watchdog that reports where a run hangs."""

import faulthandler
import sys
import threading
import time
from collections.abc import Callable
from typing import IO


class Watchdog:
    """Reporter of what a run is doing, with the stacks of all threads, once it has made no progress for a while.

    A daemon thread looks at the clock and reports each hang once; `at` costs the step an assignment. Where
    that thread cannot run either, because something holds the interpreter's lock, `faulthandler` prints the
    stacks from a thread of its own after twice the time.

    Args:
      seconds: the time without progress; 0 turns the watchdog off.
      file: with a file descriptor; None for standard error.
      others: returns lines on what other processes of the run are doing.

    Example:
      >>> with Watchdog(300.0) as watchdog:
      ...     watchdog.at("running step 1")
    """

    def __init__(self, seconds: float, file: IO[str] | None = None, others: Callable[[], list[str]] = list):
        self._seconds, self._file, self._others = seconds, file, others
        self._doing: tuple[float, str] = (time.monotonic(), "starting")
        # What a notebook or a script puts in the place of sys.stderr may have no descriptor: standard error's own.
        self._stacks = 2 if file is None else file.fileno()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def at(self, doing: str) -> None:
        """Notes progress: the run now does `doing`, such as "evaluating after step 300"."""
        self._doing = (time.monotonic(), doing)

    def __enter__(self) -> "Watchdog":
        if self._seconds:
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        if self._seconds:
            self._thread.join()

    def _watch(self) -> None:
        told = None
        while self._wait():
            since, doing = current = self._doing
            if time.monotonic() - since >= self._seconds and current is not told:
                told = current
                self._tell(time.monotonic() - since, doing)

    def _wait(self) -> bool:
        """Waits a tenth of the time; returns False once the run has ended."""
        faulthandler.dump_traceback_later(2 * self._seconds, file=self._stacks)
        ended = self._ended.wait(self._seconds / 10)
        faulthandler.cancel_dump_traceback_later()
        return not ended

    def _tell(self, seconds: float, doing: str) -> None:
        file = self._file or sys.stderr
        lines = [*self._others(), f"no progress for {seconds:.0f} s while {doing}. The stacks of all threads:"]
        print("", *(f"ldrld_jax: {line}" for line in lines), sep="\n", file=file)
        file.flush()
        faulthandler.dump_traceback(file=self._stacks, all_threads=True)
