"""Handles SIGINT, SIGTERM and SIGHUP: the first ends a run after the step in flight and a save, the second at once."""

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator

_NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(KeyboardInterrupt):
    """Error for a run that a signal ended after saving its state; `exit_code` is 128 + the signal's number.

    A loop over runs that catches every `Exception` does not go on with the next run.

    Args:
      signum: the signal's number.
      step: the last saved step; 0 if there is none, None if nothing is left to resume.
    """

    def __init__(self, signum: int, step: int | None):
        saved = f"the state after step {step} is saved; the same command resumes."
        done = "the work in hand was completed." if step is None else "there was nothing to save yet."
        super().__init__(f"{_name(signum)}: {saved if step else done}")
        self.exit_code = 128 + signum


class Signals:
    """The signals received so far.

    Attributes:
      received: the number of the first signal, or None.
      in_time: True once the step in flight has ended; saving, and what follows the last step, has no time limit.
    """

    received: int | None = None
    in_time: bool = False

    def stop_at(self, step: int) -> bool:
        """Returns True if the run should end after `step`."""
        del step
        return self.received is not None

    def check(self) -> None:
        """Raises Interrupted if a signal was received; for points where there is nothing to save."""
        if self.received is not None:
            raise Interrupted(self.received, 0)

    def end(self) -> None:
        """Raises Interrupted if a signal was received during work that is complete now."""
        if self.received is not None:
            raise Interrupted(self.received, None)
        self.in_time = False

    def _handle(self, signum: int, frame: object) -> None:
        del frame
        if self.received is not None:  # the second signal: do not wait for the step
            raise KeyboardInterrupt
        self.received = signum


@contextlib.contextmanager
def catch_signals(leave_within: float | None = None) -> Iterator[Signals]:
    """Catches the signals inside the block, except a SIGHUP that is ignored already, as under `nohup`.

    If the block ends without acting on a signal, Interrupted is raised then, so that its caller stops too.

    Outside the main thread this is impossible, and it does nothing.

    Python runs signal handlers between two of its instructions, so a compilation or a hanging device delays them.

    Args:
      leave_within: seconds that the step in flight may still take after the first signal; then the process ends
        without saving. None sets no limit. A second signal ends it at once. Checkpoints on disk are always intact.
    """
    signals = Signals()
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    caught = [n for n in _NUMBERS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, signals._handle) for number in caught}
    try:
        with contextlib.nullcontext() if leave_within is None else _deadline(signals, leave_within):
            yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    signals.end()


@contextlib.contextmanager
def _deadline(signals: Signals, seconds: float) -> Iterator[None]:
    reading, writing = socket.socketpair()
    writing.setblocking(False)
    before = signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)  # written even if Python is blocked
    threading.Thread(target=_watch, args=(reading, signals, seconds), name="signals", daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        writing.close()  # which ends the thread


def _watch(reading: socket.socket, signals: Signals, seconds: float) -> None:
    first, until = 0, 0.0
    with reading:
        while True:
            reading.settimeout(max(until - time.monotonic(), 0.01) if first and not signals.in_time else None)
            try:
                received = reading.recv(1)
            except TimeoutError:
                if not signals.in_time:
                    _leave(first, f"the step did not end within {seconds:g} s. Nothing was saved")
                continue
            if not received:
                return
            if received[0] in _NUMBERS and first:
                _leave(received[0], "second signal, exited at once")
            if received[0] in _NUMBERS:
                first, until = received[0], time.monotonic() + seconds


def _leave(signum: int, why: str) -> None:
    os.write(2, f"\nldrld_jax: {_name(signum)}: {why}; the same command goes on from the last checkpoint.\n".encode())
    os._exit(128 + signum)


def _name(signum: int) -> str:
    return signal.Signals(signum).name
