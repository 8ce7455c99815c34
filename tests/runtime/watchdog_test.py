"""The watchdog: one line and the stacks for each hang, silence otherwise."""

import ctypes
import io
import sys
import threading
import time

from ldrld_jax.runtime.watchdog import Watchdog


def wait_for(path, text, times=1):
    until = time.monotonic() + 30
    while path.read_text().count(text) < times:
        assert time.monotonic() < until, path.read_text()
        time.sleep(0.005)


def test_each_hang_is_told_once_with_what_the_run_does_and_all_stacks(tmp_path):
    path = tmp_path / "told"
    stuck = threading.Event()

    def a_thread_that_waits():
        stuck.wait()

    thread = threading.Thread(target=a_thread_that_waits)
    thread.start()
    with path.open("w") as file, Watchdog(0.05, file) as watchdog:
        watchdog.at("running step 7")
        wait_for(path, "a_thread_that_waits")
        time.sleep(0.2)  # four more periods of the same hang
        watchdog.at("evaluating after step 7")
        wait_for(path, "a_thread_that_waits", times=2)
    stuck.set()
    thread.join()
    told = [line for line in path.read_text().splitlines() if "no progress" in line]
    assert [line.partition(" while ")[2] for line in told] == [
        "running step 7. The stacks of all threads:",
        "evaluating after step 7. The stacks of all threads:",
    ]
    assert "test_each_hang" in path.read_text()


def test_stacks_go_to_standard_error_where_its_replacement_has_no_descriptor(monkeypatch, capfd):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with Watchdog(0.05) as watchdog:
        watchdog.at("running step 7")
        until = time.monotonic() + 30
        while "test_stacks_go_to" not in (stacks := capfd.readouterr().err):
            assert time.monotonic() < until, stacks
            time.sleep(0.05)
        watchdog.at("running step 8")  # the thread goes on
        while sys.stderr.getvalue().count("no progress") < 2:
            assert time.monotonic() < until
            time.sleep(0.005)


def test_a_call_that_holds_the_interpreters_lock_is_shown_too(tmp_path):
    path = tmp_path / "told"
    with path.open("w") as file, Watchdog(0.1, file) as watchdog:
        watchdog.at("running step 7")
        ctypes.PyDLL(None).usleep(600_000)  # no other thread of Python runs meanwhile
        shown = path.read_text()
    assert "Timeout (0:00:00.2" in shown
    assert "test_a_call_that_holds" in shown


def test_progress_keeps_it_quiet_and_zero_turns_it_off(tmp_path):
    path = tmp_path / "told"
    before = threading.active_count()
    with path.open("w") as file:
        with Watchdog(60.0, file) as watchdog:
            assert threading.active_count() == before + 1
            watchdog.at("running step 1")
        with Watchdog(0, file) as watchdog:
            assert threading.active_count() == before
            watchdog.at("running step 1")
    assert path.read_text() == ""
