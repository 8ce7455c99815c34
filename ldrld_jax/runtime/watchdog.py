"""Reports where a run hangs."""

import faulthandler
import sys
import threading
import time
from typing import IO


class Watchdog:
    """Context manager that prints a run's activity and all threads' stacks when it makes no progress.

    It prints once per hang, from a daemon thread. A call of `at` costs one assignment.

    Args:
      seconds: time without progress before it prints; 0 turns it off.
      file: a file with a file descriptor; None for standard error.

    Example:
      >>> with Watchdog(300.0) as watchdog:
      ...     watchdog.at("running step 1")
    """

    def __init__(self, seconds: float, file: IO[str] | None = None):
        self._seconds, self._file = seconds, file
        self._doing: tuple[float, str] = (time.monotonic(), "starting")
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def at(self, doing: str) -> None:
        """Records progress and the next activity, such as "evaluating after step 300"."""
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
        while not self._ended.wait(self._seconds / 10):
            since, doing = current = self._doing
            if time.monotonic() - since >= self._seconds and current is not told:
                told = current
                self._tell(time.monotonic() - since, doing)

    def _tell(self, seconds: float, doing: str) -> None:
        file = self._file or sys.stderr
        print(f"\nldrld_jax: no progress for {seconds:.0f} s while {doing}. The stacks of all threads:", file=file)
        file.flush()
        faulthandler.dump_traceback(file=file, all_threads=True)
