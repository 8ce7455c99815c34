"""Records a profiler trace of some steps."""

from typing import Any

import jax
from etils import epath

from ldrld_jax.record.console import say

_STEPS = 10


class Profile:
    """Trace of ten steps of a run by `jax.profiler`.

    The first ten steps, in which programs are compiled, are skipped (half of the steps of a shorter run).

    Args:
      directory: created if missing; None records nothing.
      start: number of steps already done.
      steps: the run's last step.

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
        """True until the trace is complete; False if none is recorded."""
        return self._directory is not None

    def at(self, step: int, dispatched: Any) -> None:
        """Begins or ends the trace if that is due; called after each dispatch with a part of its output."""
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
        """Ends a trace that has begun and prints its location."""
        if self._directory is not None and self._since is not None:
            jax.profiler.stop_trace()
            say(
                f"the trace of steps {self._since + 1} to {self._step} lies in {self._directory}/plugins/profile: open "
                "its *.trace.json.gz in ui.perfetto.dev, or the directory in xprof"
            )
        self._directory = None
