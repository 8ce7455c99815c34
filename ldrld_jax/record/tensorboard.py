"""TensorBoard's event file."""

import time
from collections.abc import Mapping
from typing import Any

from etils import epath

from ldrld_jax.files import named

_FLUSH_SECONDS = 10.0


class Events:
    """Writer of scalars to `<workdir>/events.out.tfevents.*`.

    It writes in the calling thread, where a full disk raises an error; tensorboardX's own SummaryWriter
    writes in a thread that dies silently.

    Args:
      workdir: local, or `gs://` and the like.
      purge_step: TensorBoard discards the values of earlier files from this step on.
      hparams: numbers and text by name, a column each of the HPARAMS tab, where every run is a row; others and None are
        left out. TensorBoard takes the union over the runs that it shows.
    """

    def __init__(self, workdir: epath.Path, purge_step: int, hparams: Mapping[str, Any]):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.summary import hparams as of_hparams
        from tensorboardX.summary import scalar

        self._event, self._scalar, self._path = Event, scalar, workdir / "events.out.tfevents"
        with named(self._path):
            self._writer = EventsWriter(str(workdir / "events"))
            self._add(purge_step, session_log=SessionLog(status=SessionLog.START))
            _, session, _ = of_hparams(dict(hparams), {})  # an experiment's summary would fix the columns to this run's
            self._add(0, summary=session)
        self._flushed = time.monotonic()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the scalars of one step, by name."""
        with named(self._path):
            for name, value in values.items():
                self._add(step, summary=self._scalar(name, value))
            if time.monotonic() - self._flushed > _FLUSH_SECONDS:
                self._flushed = time.monotonic()
                self._writer.flush()

    def _add(self, step: int, **what) -> None:
        self._writer.write_event(self._event(step=step, wall_time=time.time(), **what))

    def close(self) -> None:
        with named(self._path):
            self._writer.close()
