"""SIGINT and SIGTERM end a run after the step in flight, with its state saved."""

import contextlib
import signal
import threading
from collections.abc import Iterator


class Interrupted(Exception):
    """A signal ended the run after its state was saved; `exit_code` is 128 + its number."""

    def __init__(self, signum: int, step: int):
        name = signal.Signals(signum).name
        super().__init__(f"{name}: the state after step {step} is saved; the same command resumes.")
        self.exit_code = 128 + signum


class Signals:
    """What has been received: `received` is the signal's number, or None."""

    received: int | None = None

    def _handle(self, signum: int, frame: object) -> None:
        del frame
        if self.received is not None:  # asked twice: do not wait for the step
            raise KeyboardInterrupt
        self.received = signum


@contextlib.contextmanager
def catch_signals() -> Iterator[Signals]:
    """Catches both signals inside the block; elsewhere than in the main thread it cannot, and does nothing."""
    signals = Signals()
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    before = {number: signal.signal(number, signals._handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
