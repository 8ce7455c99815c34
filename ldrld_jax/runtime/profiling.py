"""A trace of some steps: what the device and the host do when."""

from typing import Any

import jax
from etils import epath

from ldrld_jax.record.console import say

_STEPS = 10


class Profile:
    """Traces ten steps of a run with `jax.profiler`; with `directory` None nothing.

    The first ten steps are left out, or half of those of a shorter run: in them programs are compiled.

    Args:
      directory: created if it is missing.
      start: steps done.
      steps: the run's last.

    Raises:
      OSError: if the directory cannot be written.
    """

    def __init__(self, directory: str | None, *, start: int, steps: int):
        self._directory, self._step = directory, start
        self._from = start + min(_STEPS, (steps - start) // 2)
        self._since: int | None = None
        if directory is not None:
            epath.Path(directory).mkdir(parents=True, exist_ok=True)

    @property
    def wanted(self) -> bool:
        """Whether there is a trace to be made or ended."""
        return self._directory is not None

    def at(self, step: int, dispatched: Any) -> None:
        """After each dispatch, with something of its output: begins and ends the trace where that is due."""
        self._step = step
        if self._directory is None:
            return
        if self._since is None and step >= self._from:
            jax.block_until_ready(dispatched)
            jax.profiler.start_trace(self._directory)
            self._since = step
        elif self._since is not None and step >= self._since + _STEPS:
            jax.block_until_ready(dispatched)
            self.close()

    def close(self) -> None:
        """Ends a trace that has begun, and says where it lies."""
        if self._directory is not None and self._since is not None:
            jax.profiler.stop_trace()
            say(
                f"the trace of steps {self._since + 1} to {self._step} lies in {self._directory}/plugins/profile: open "
                "its *.trace.json.gz in ui.perfetto.dev, or the directory in xprof"
            )
        self._directory = None
