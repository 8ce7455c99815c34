"""Supplies teacher logits for a run's batches: read from a store, or computed and then stored."""

import functools
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ldrld_jax.errors import UserError
from ldrld_jax.logit_store.store import Logits, LogitStore
from ldrld_jax.logit_store.top import TopLogits, top_logits_on
from ldrld_jax.record.console import say
from ldrld_jax.runtime.mesh import batch_sharding, to_devices

DeviceBatch = dict[str, Any]  # of arrays, and of the teacher's logits
Tell = Callable[[str], None]
Batches = Any  # a `data.stream.TrainBatches`, not imported: the store does not depend on data


def missing_epochs(store: LogitStore, batches: Batches, epochs: int, *, quiet: bool = False) -> list[int]:
    """Returns the augmentation epochs that a run needs and its store lacks; prints the size of the store.

    Args:
      store: the store, which need not exist yet.
      batches: the run's training batches.
      epochs: number of epochs of the run.
      quiet: True prints nothing.

    Raises:
      UserError: if the missing epochs do not fit on the disk, or several hosts would write them.
    """
    needed = sorted({batches.shown(epoch) for epoch in range(epochs)})
    missing = [epoch for epoch in needed if epoch not in store]
    if not missing:
        if not quiet:
            say(f"the logit store {store.directory} has all {store.describe(len(needed))}: the teacher is not run")
        return []
    if batches.hosts > 1:
        raise UserError(
            f"the logit store {store.directory} lacks {len(missing)} of {len(needed)} epochs, and only one host can "
            "write them. Run this config on one host first, or unset logits.dir."
        )
    if not quiet:
        there = f", of which it has {len(needed) - len(missing):,}" if len(missing) < len(needed) else ""
        say(f"the logit store {store.directory} will take {store.describe(len(needed))}{there}")
    store.check_space(len(missing))
    return missing


class LogitFeed:
    """Source of the `teacher_logits` for the batches of a run: `[n, ..., C]` in the store's dtype, or `TopLogits`.

    The teacher runs in its own program, so that runs that write a store and runs that read it train with the same
    step: their losses are bitwise equal.

    Args:
      store: a `LogitStore`; epochs that it has are read, the next one in the background; the others are computed and
        written. Anything that has all epochs and reads like one will do.
      batches: the run's training batches.
      mesh: the run's devices.
      epochs: number of epochs of the run.
      teach: maps a batch, its `image` `[n, ...]` and the `mask` of examples that count, if it has one, to logits as
        stored; None if the store has every epoch that the run needs.
      threads, workers: threads and processes that prepare the batches that no step of this process trained on; None to
        choose.
    """

    def __init__(
        self,
        store: Any,
        batches: Batches,
        mesh: Mesh,
        epochs: int,
        teach: Callable[[DeviceBatch], Any] | None = None,
        *,
        threads: int | None = None,
        workers: int | None = None,
    ):
        self._store, self._batches, self._mesh = store, batches, mesh
        self._epochs, self._teach = epochs, teach
        self._made_by = dict(threads=threads, workers=workers)
        self._ahead = _ReadAhead(store)
        self._epoch = -1
        self._stored: Logits | None = None  # the current epoch's logits
        self._sheet: _Sheet | None = None  # collects the current epoch's logits if they are not stored
        self._has_taught = False

    def __call__(self, step: int, batch: DeviceBatch, tell: Tell) -> DeviceBatch:
        """Returns `teacher_logits` for the batch after `step` steps. Steps must be requested in order.

        An epoch is written to the store before the logits of its last batch are returned.

        Args:
          step: number of steps done.
          batch: the batch, used if the teacher must be run.
          tell: called with a description of any work that takes longer than a step.

        Raises:
          UserError: if a logit does not fit the dtype, or an epoch of the store is damaged.
          OSError: if the disk is full.
        """
        position = self._enter(step)
        if self._stored is None:
            return {"teacher_logits": self._make(position, batch, tell)}
        rows = self._rows(self._stored, position)
        return {"teacher_logits": self._global(batch_sharding(self._mesh), rows)}

    def several(self, step: int, count: int, batch: Callable[[int], DeviceBatch], tell: Tell) -> DeviceBatch:
        """Returns `teacher_logits` `[count, n, ...]` for the `count` batches after `step` steps, all of one epoch.

        `batch(s)` returns the batch after `s` steps. See `__call__` for the rest.
        """
        position = self._enter(step)
        sharding = NamedSharding(self._mesh, PartitionSpec(None, *batch_sharding(self._mesh).spec))
        if self._stored is None:
            made = [self._make(position + i, batch(step + i), tell) for i in range(count)]
            return {"teacher_logits": jax.device_put(jax.tree.map(lambda *each: jnp.stack(each), *made), sharding)}
        rows = [self._rows(self._stored, position + i) for i in range(count)]
        return {"teacher_logits": self._global(sharding, jax.tree.map(lambda *each: np.stack(each), *rows))}

    def _enter(self, step: int) -> int:
        """Returns a step's position in its epoch, after loading the epoch's logits or preparing a sheet for them."""
        epoch, position = divmod(step, self._batches.steps_per_epoch)
        if epoch == self._epoch:
            return position
        shown, following = (self._batches.shown(min(e, self._epochs - 1)) for e in (epoch, epoch + 1))
        self._epoch, self._stored, self._sheet = epoch, None, None
        if shown in self._store:
            self._stored = self._ahead(shown, following)
        else:
            self._sheet = _Sheet(self._store, functools.partial(self._batches.share, epoch))
        return position

    def _rows(self, stored: Logits, position: int) -> Logits:
        """Returns this host's rows of a batch, with zeros for padding."""
        share = self._batches.share(self._epoch, position)

        def own(stored: np.ndarray) -> np.ndarray:
            rows = np.zeros((share.rows, *stored.shape[1:]), stored.dtype)
            rows[: len(share.indices)] = stored[share.indices]
            return rows

        return jax.tree.map(own, stored)

    @staticmethod
    def _global(sharding: NamedSharding, rows: Logits) -> Any:
        """Returns the rows of all hosts as arrays on the devices."""
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), rows)

    def _make(self, position: int, batch: DeviceBatch, tell: Tell) -> Any:
        assert self._sheet is not None and self._teach is not None
        tell("running the teacher" if self._has_taught else "compiling the teacher")
        self._has_taught = True
        logits = self._teach(batch)
        self._sheet.add(position, logits)
        if position == self._batches.steps_per_epoch - 1:
            self._complete(self._epoch, self._sheet, self._teach, tell)
            tell(f"storing the teacher's logits of epoch {self._epoch}")
            self._store.write(self._batches.shown(self._epoch), self._sheet.finished())
        return logits

    def _complete(self, epoch: int, sheet: "_Sheet", teach: Callable[[DeviceBatch], Any], tell: Tell) -> None:
        """Computes the batches that no step of this process saw: those before a resume, and the dropped remainder."""
        places = -(-len(self._batches.source) // self._batches.batch_size)
        missing = [position for position in range(places) if position not in sheet.positions]
        parts = self._batches.parts(epoch, missing, **self._made_by)
        for position, batch in zip(missing, to_devices(parts, self._mesh), strict=True):
            tell(f"running the teacher on batch {position} of epoch {epoch}, which this process has not trained on")
            sheet.add(position, teach(batch))


def teacher_program(network: Callable[..., Any], dtype: Any, mesh: Mesh, top_k: int | None = None) -> Any:
    """Returns a network as a jitted program `program(variables, images [n, ...])` with logits as stored."""

    def logits(variables: Any, images: jax.Array) -> jax.Array | TopLogits:
        rows = network(variables, images, train=False)[0]
        return rows.astype(jnp.dtype(dtype)) if top_k is None else top_logits_on(mesh, rows, top_k, jnp.dtype(dtype))

    return jax.jit(logits, out_shardings=batch_sharding(mesh))


class _ReadAhead:
    """Reader of a store's epochs that prefetches the next epoch in the background."""

    def __init__(self, store: LogitStore):
        self._store, self._background = store, ThreadPoolExecutor(max_workers=1)
        self._read: dict[int, Future[Logits]] = {}

    def __call__(self, epoch: int, following: int) -> Logits:
        """Returns the logits of `epoch`, starts reading `following` if it is stored, and drops all others."""
        wanted = [epoch, following] if following in self._store else [epoch]
        self._read = {e: self._read.get(e) or self._background.submit(self._store.read, e) for e in wanted}
        return self._read[epoch].result()


class _Sheet:
    """Logits of one epoch, collected batch by batch; the newest batch stays on the devices."""

    def __init__(self, store: LogitStore, share: Callable[[int], Any]):
        self.positions: set[int] = set()
        self._logits, self._share, self._dtype = store.empty(), share, store.key["dtype"]
        self._newest: tuple[int, Any] | None = None

    def add(self, position: int, logits: Any) -> None:
        jax.tree.map(lambda x: x.copy_to_host_async(), logits)
        self._settle()
        self._newest = position, logits
        self.positions.add(position)

    def finished(self) -> Logits:
        self._settle()
        return self._logits

    def _settle(self) -> None:
        """Fetches the previous batch from the devices, which have moved on a step, so that nothing waits."""
        if self._newest is None:
            return
        (position, logits), self._newest = self._newest, None
        indices = self._share(position).indices
        for whole, part in zip(jax.tree.leaves(self._logits), jax.tree.leaves(logits), strict=True):
            rows = np.asarray(part)[: len(indices)]
            if not np.isfinite(rows).all():
                raise UserError(
                    f"a logit of the teacher is not finite as {self._dtype}. Set logits.dtype=bfloat16, or check its "
                    "checkpoint and its data."
                )
            whole[indices] = rows
