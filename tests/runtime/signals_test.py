"""Signals: the first is noted, the second ends the run at once, and a deadline ends what does not come to an end."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from ldrld_jax.runtime.signals import Interrupted, catch_signals
from tests.conftest import ROOT


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_noted_and_the_second_interrupts(signum):
    before = signal.getsignal(signum)
    with pytest.raises(Interrupted, match="the work in hand was completed"), catch_signals() as signals:
        assert not signals.stop_at(1)
        os.kill(os.getpid(), signum)
        assert (signals.received, signals.stop_at(1)) == (signum, True)
        with pytest.raises(Interrupted, match=f"{signal.Signals(signum).name}: there was nothing to save yet"):
            signals.check()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signum)
    assert signal.getsignal(signum) == before


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_that_nobody_asked_for_is_raised_at_the_end(signum, code):
    before = signal.signal(signum, signal.SIG_DFL)  # the suite itself may run under nohup
    try:
        with (
            pytest.raises(Interrupted, match=f"^{signum.name}: the work in hand was completed") as raised,
            catch_signals(),
        ):
            os.kill(os.getpid(), signum)
        assert raised.value.exit_code == code
        with pytest.raises(ValueError, match="first"), catch_signals():
            os.kill(os.getpid(), signum)
            raise ValueError("an error comes first")
    finally:
        signal.signal(signum, before)


def test_an_interruption_says_what_is_saved_and_how_to_exit():
    error = Interrupted(signal.SIGTERM, 7)
    assert str(error) == "SIGTERM: the state after step 7 is saved; the same command resumes."
    assert error.exit_code == 143


def test_elsewhere_than_in_the_main_thread_nothing_is_caught():
    before = signal.getsignal(signal.SIGTERM)
    caught = []

    def run():
        with catch_signals(leave_within=1.0) as signals:
            caught.append((signals.received, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert caught == [(None, before)]


# Inside one long call of C, as a compilation is: no handler of Python's can run.
STUCK = """
import contextlib, hashlib, os, signal, sys, threading
sys.path.insert(0, "ldrld_jax/runtime")  # the file alone: importing the package takes seconds
from signals import catch_signals
with contextlib.suppress(KeyboardInterrupt), catch_signals(leave_within=float(sys.argv[1])) as signals:
    signals.in_time = sys.argv[2] == "saving"
    for n in range(int(sys.argv[3])):
        threading.Timer(0.1 + n / 5, os.kill, [os.getpid(), signal.SIGTERM]).start()
    hashlib.pbkdf2_hmac("sha256", b"", b"", int(sys.argv[4]))
print("ended")
"""


@pytest.mark.parametrize(
    ("seconds", "doing", "signals", "code", "said"),
    [
        ("0.2", "running", "1", 143, "SIGTERM: the step did not end within 0.2 s. Nothing was saved; the same command"),
        ("60", "running", "2", 143, "SIGTERM: second signal, exited at once; the same command goes on from the last"),
        ("0.2", "saving", "1", 0, ""),
    ],
    ids=["deadline", "second", "saving"],
)
def test_a_process_that_does_not_listen_is_ended(seconds, doing, signals, code, said):
    rounds = "1000000" if code == 0 else "1000000000"  # a second or so, or much longer than the test may take
    command = [sys.executable, "-c", STUCK, seconds, doing, signals, rounds]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert (done.returncode, said in done.stderr) == (code, True)
    assert ("ended" in done.stdout) == (code == 0)
