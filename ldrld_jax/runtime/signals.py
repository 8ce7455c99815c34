"""SIGINT and SIGTERM end a run after the step in flight, with its state saved; a second one ends it at once."""

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator

_NUMBERS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(Exception):
    """A signal ended the run after its state was saved; `exit_code` is 128 + its number.

    Args:
      signum: the signal's number.
      step: the last that is saved, 0 if there is none.
    """

    def __init__(self, signum: int, step: int):
        saved = f"the state after step {step} is saved; the same command resumes."
        super().__init__(f"{_name(signum)}: {saved if step else 'there was nothing to save yet.'}")
        self.exit_code = 128 + signum


class Signals:
    """What has been received.

    Attributes:
      received: the first signal's number, or None.
      in_time: set once the step in flight has ended; saving may then take as long as it takes.
    """

    received: int | None = None
    in_time: bool = False

    def stop_at(self, step: int) -> bool:
        """Whether the run should end after `step`."""
        del step
        return self.received is not None

    def check(self) -> None:
        """Raises Interrupted where there is nothing to save."""
        if self.received is not None:
            raise Interrupted(self.received, 0)

    def _handle(self, signum: int, frame: object) -> None:
        del frame
        if self.received is not None:  # asked twice: do not wait for the step
            raise KeyboardInterrupt
        self.received = signum


@contextlib.contextmanager
def catch_signals(leave_within: float | None = None) -> Iterator[Signals]:
    """Catches both signals inside the block; elsewhere than in the main thread it cannot, and does nothing.

    Python runs a handler between two of its own instructions, which a compilation or a device that
    hangs keeps from coming.

    Args:
      leave_within: seconds after which, or at a second signal at once, the process ends whatever it is
        doing; the checkpoints on disk are whole at any moment. None leaves that to the caller.
    """
    signals = Signals()
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    before = {number: signal.signal(number, signals._handle) for number in _NUMBERS}
    try:
        with contextlib.nullcontext() if leave_within is None else _deadline(signals, leave_within):
            yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _deadline(signals: Signals, seconds: float) -> Iterator[None]:
    reading, writing = socket.socketpair()
    writing.setblocking(False)
    before = signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)  # written to whatever Python is doing
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
                _leave(received[0], "the second signal, left at once")
            if received[0] in _NUMBERS:
                first, until = received[0], time.monotonic() + seconds


def _leave(signum: int, why: str) -> None:
    os.write(2, f"\nldrld_jax: {_name(signum)}: {why}; the same command goes on from the last checkpoint.\n".encode())
    os._exit(128 + signum)


def _name(signum: int) -> str:
    return signal.Signals(signum).name
