"""Runs the jobs of a sweep in a limited number of parallel processes."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

from etils import epath

from ldrld_jax.files import is_locked, place_of
from ldrld_jax.sweep.plan import Job

_POLL_SECONDS = 1.0


class Sweep:
    """Scheduler that runs jobs in processes, one per slot, until no job is left to run.

    Args:
      jobs: from `plan`.
      slots: extra environment variables for each parallel process; several slots share the machine's cores equally.
      logs: folder for the output of the processes.
      show: called with the jobs on every poll.
    """

    def __init__(
        self, jobs: list[Job], slots: list[dict[str, str]], logs: epath.Path, show: Callable[[list[Job]], None]
    ):
        self.jobs, self.slots, self.logs, self.show = jobs, slots, logs, show
        self.running: dict[int, tuple[Job, subprocess.Popen]] = {}

    def run(self) -> None:
        """Runs until every job is done or failed; passes SIGTERM, SIGHUP and Ctrl-C on to the processes, and waits."""
        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
        for number, handler in handlers.items():
            if handler is not signal.SIG_IGN:  # as nohup sets SIGHUP
                signal.signal(number, lambda number, _: sys.exit(128 + number))
        try:
            while self._turn():
                self.show(self.jobs)
                time.sleep(_POLL_SECONDS)
            self.show(self.jobs)
        except (KeyboardInterrupt, SystemExit) as stop:
            self._stop(signal.SIGINT if isinstance(stop, KeyboardInterrupt) else signal.SIGTERM)
            raise
        except BaseException:  # such as a full disk: no run goes on without its sweep
            self._stop(signal.SIGTERM)
            raise
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _turn(self) -> bool:
        """Collects ended processes and starts waiting jobs; returns False once nothing is left to wait for."""
        for slot, (job, process) in list(self.running.items()):
            if process.poll() is not None:
                del self.running[slot]
                job.look()
                job.state = "failed" if job.state == "waiting" else job.state
        for job in self.jobs:
            if job.state in ("waiting", "elsewhere"):
                job.look()
            free = set(range(len(self.slots))) - set(self.running)
            if job.state == "waiting" and free and self._teachers_free(job):
                slot = min(free)
                self.running[slot] = (job, self._start(job, slot))
                job.state = "running"
        return any(job.state in ("waiting", "running", "elsewhere") for job in self.jobs)

    def _teachers_free(self, job: Job) -> bool:
        """Returns True if no process is currently training one of the job's teachers."""
        missing = {place_of(place) for place in job.teachers if not (place / "summary.json").exists()}
        in_hand = {place_of(place) for other, _ in self.running.values() for place in other.teachers}
        return not missing & in_hand and not any(is_locked(epath.Path(place)) for place in missing)

    def _start(self, job: Job, slot: int) -> subprocess.Popen:
        with (self.logs / f"{job.name}.txt").open("a") as log:
            process = subprocess.Popen(
                job.command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | self.slots[slot],
                start_new_session=True,  # Ctrl-C then reaches it only through _stop
            )
        if len(self.slots) > 1 and hasattr(os, "sched_setaffinity"):
            cores = sorted(os.sched_getaffinity(0))
            os.sched_setaffinity(process.pid, cores[slot :: len(self.slots)] or cores)
        return process

    def _stop(self, number: signal.Signals) -> None:
        for _, process in self.running.values():
            process.send_signal(number)
        try:
            for _, process in self.running.values():
                process.wait()
        except (KeyboardInterrupt, SystemExit):
            self._stop(number)
