"""The checkpoints of a run: retention, selection of the one to resume from, and checks for damage."""

import itertools
import logging
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from ldrld_jax.checkpoint import orbax_io
from ldrld_jax.checkpoint.checksum import Described, describe, leaves_by_path
from ldrld_jax.checkpoint.note import DamagedError, Note, read_note, rewrite_note, signed
from ldrld_jax.errors import UserError
from ldrld_jax.files import absolute, is_local

Json = dict[str, Any]
logger = logging.getLogger("ldrld_jax")

_DELETED = ".deleted"
_MOST_HELD = 3  # states in memory beside the one that trains


class Restored(NamedTuple):
    """A checkpoint as it was saved after `step` steps: its trees and its JSON."""

    step: int
    trees: dict[str, Any]
    host: Json


class Checkpoints:
    """The checkpoints of one run, `<directory>/<step>`: the last ones, the best by `top1`, and every n-th.

    Saving copies the arrays, then writes in the background. A checkpoint appears under its name only once it is whole;
    in a bucket, which cannot rename a folder, it counts once its last file is there. It contains checksums of its
    arrays, which are compared on restore. Nothing on disk changes before `resume` or `save`. Steps that are saved in
    quick succession are held in memory, so that runs with short epochs do not spend their time on files. `save` and
    `write_due` later write the held steps that the policy still keeps, and block until they are written.

    Args:
      directory: created by the first save.
      run: JSON that identifies the run, stored in each checkpoint.
      keep_last: number of last checkpoints to keep, at least 1.
      keep_every: checkpoints that are saved now, and whose step is a multiple of this, are kept forever.
      min_seconds: >= 0, from one write to the next; a step saved sooner is held until the first call of `save` or
        `write_due` after that time, or until `close`. One that is kept forever is written at once, and so is each step
        in a run of several processes.
    """

    def __init__(
        self,
        directory: epath.PathLike,
        *,
        run: Json | None = None,
        keep_last: int = 2,
        keep_every: int | None = None,
        min_seconds: float = 0.0,
    ):
        self._run = run or {}
        self._directory = absolute(epath.Path(directory))  # tensorstore accepts absolute paths only
        self._keep_last, self._keep_every = keep_last, keep_every
        self._notes = {step: read_note(self._path(step)) for step in self._steps_on_disk()}
        self._writing: tuple[int, Note, Callable[[], None]] | None = None
        # Nobody but this process holds all arrays, and the clocks of several do not agree on when to write.
        self._min_seconds = min_seconds if jax.process_count() == 1 else 0.0
        self._written = -math.inf  # when the last write began
        self._held: dict[int, tuple[Note, dict[str, Any]]] = {}

    def _path(self, step: int, suffix: str = "") -> epath.Path:
        return self._directory / f"{step}{suffix}"

    def _steps_on_disk(self) -> list[int]:
        found = self._directory.iterdir() if self._directory.exists() else ()
        named = [path for path in found if path.name.isdecimal() and path.name.isascii()]
        return sorted(int(path.name) for path in named if orbax_io.is_whole(path))

    @property
    def steps(self) -> list[int]:
        """The saved steps, ascending, including damaged checkpoints."""
        return sorted(self._notes)

    @property
    def readable_steps(self) -> list[int]:
        """The steps whose `host` can be read, ascending."""
        return sorted(self._readable())

    @property
    def latest_step(self) -> int | None:
        return max(self._notes, default=None)

    @property
    def best_step(self) -> int | None:
        """The step of the highest top-1, the latest one among ties; None before the first evaluation."""
        return _best(self._readable())

    def by_preference(self) -> list[int]:
        """Returns the steps in the order in which to try them: by top-1, the latest first among ties or without one.

        Unreadable ones come first, because one of them may have been the best: the caller reports it and goes on.
        """
        readable = self._readable()
        top1s = _top1s(readable)
        return sorted(self.steps, key=lambda step: (step not in readable, top1s.get(step, -1.0), step), reverse=True)

    def _readable(self) -> dict[int, Note]:
        return {step: note for step, note in self._notes.items() if not isinstance(note, DamagedError)}

    def _note(self, step: int) -> Note:
        note = self._notes[step]
        if isinstance(note, DamagedError):
            raise note
        return note

    def host(self, step: int) -> Json:
        """Returns the `host` saved at `step`; raises a DamagedError if it cannot be read."""
        return self._note(step)["host"]

    def run(self, step: int) -> Json:
        """Returns the `run` that saved `step`; raises a DamagedError if it cannot be read."""
        return self._note(step)["run"]

    def arrays(self, step: int, name: str) -> Described:
        """Returns the tree `name` as dtype, shape and checksum of each array; raises a DamagedError if unreadable."""
        arrays = self._note(step)["arrays"].get(name, {})
        return {path: (dtype, tuple(shape), total) for path, (dtype, shape, total) in arrays.items()}

    def save(self, step: int, trees: dict[str, Any], host: Json, top1: float | None = None) -> None:
        """Saves a checkpoint unless this step is saved or held; on return the arrays may be donated again.

        Args:
          step: the number of completed steps.
          trees: trees of arrays, each of which can be restored separately.
          host: other state of the run, JSON.
          top1: the top-1 of an evaluation at this step, if any; added to an existing checkpoint without one.
        """
        self._finish()
        if step in self._notes:
            if top1 is not None and self._note(step)["top1"] is None:
                self._rate(step, host, top1)
            return
        if step in self._held:
            note, copies = self._held[step]
            if top1 is not None and note["top1"] is None:
                self._held[step] = {**note, "host": host, "top1": top1}, copies
            return
        note = {
            "step": step,
            "run": self._run,
            "host": host,
            "top1": top1,
            "kept": bool(self._keep_every and step % self._keep_every == 0),
        }
        kept = self._kept({**self._readable(), **{held: note for held, (note, _) in self._held.items()}, step: note})
        self._held = {held: self._held[held] for held in self._held if held in kept}
        if self._is_early() and not note["kept"] and len(self._held) < _MOST_HELD:
            # NumPy's view of a CPU's array is not enough: the next step writes into the donated memory.
            self._held[step] = note, jax.tree.map(np.array, trees)
            return
        self._write(step, note, trees)
        if self._held:
            self.wait()

    def write_due(self) -> None:
        """Writes the held checkpoints if it is time; to be called now and then between two saves."""
        if self._held and not self._is_early():
            self.wait()

    def _is_early(self) -> bool:
        return time.monotonic() - self._written < self._min_seconds

    def _write(self, step: int, note: Note, trees: dict[str, Any]) -> None:
        """Begins to write a checkpoint."""
        note = {**note, "arrays": {name: describe(tree) for name, tree in trees.items()}}
        self._writing = step, note, orbax_io.write(self._path(step), trees, signed(note))
        self._written = time.monotonic()

    def _write_held(self) -> None:
        """Writes the held checkpoints, the newest first: where time runs out, it is the one to resume from."""
        while self._held:
            step = max(self._held)
            self._write(step, *self._held[step])
            self._finish()
            del self._held[step]

    def _rate(self, step: int, host: Json, top1: float) -> None:
        """Adds the result of an evaluation that a signal had interrupted when the step was saved."""
        note = self._notes[step] = {**self._note(step), "host": host, "top1": top1}
        if jax.process_index() == 0:
            rewrite_note(self._path(step), note)
        self._tidy()

    def wait(self) -> None:
        """Waits until every saved checkpoint that is kept is whole on disk and superseded ones are removed."""
        self._finish()
        self._write_held()

    close = wait

    def _finish(self) -> None:
        """Waits for the write in the background."""
        if self._writing is None:
            return
        (step, note, wait), self._writing = self._writing, None
        wait()
        self._notes[step] = note
        self._tidy()

    def resume(self, like: dict[str, Any]) -> Restored | None:
        """Restores the newest whole checkpoint; newer damaged ones are renamed to `<step>.corrupt`.

        Args:
          like: see `restore`.

        Returns:
          The checkpoint; None if nothing has been saved.

        Raises:
          UserError: if there are checkpoints but none is whole, or they hold other arrays; then nothing is renamed.
        """
        damaged: dict[int, DamagedError] = {}
        for step in reversed(self.steps):
            try:
                restored = Restored(step, self.restore(step, like), self.host(step))
            except DamagedError as error:
                damaged[step] = error
                continue
            for bad, reason in damaged.items():
                self._set_aside(bad, reason, step)
            self._tidy()
            return restored
        if damaged:
            why = "; ".join(f"{step}: {error}" for step, error in damaged.items())
            raise UserError(
                f"no checkpoint in {self._directory} is whole ({why}). Restore the folder, or choose another workdir."
            )
        self._tidy()
        return None

    def restore(self, step: int, like: dict[str, Any]) -> dict[str, Any]:
        """Restores the trees of `step` that are named in `like`.

        Args:
          step: one of `steps`.
          like: arrays or their shapes and dtypes. Arrays with a sharding are restored with it, on any number
            of devices, the others as NumPy arrays.

        Raises:
          UserError: if the checkpoint holds arrays of other names, shapes or dtypes.
          DamagedError: if it cannot be read, or an array's checksum differs from the saved one.
        """
        for name, tree in like.items():
            self._check_fit(step, name, tree)
        trees = orbax_io.read(self._path(step), like)
        for name, tree in trees.items():
            self._check_sums(step, name, tree)
        return trees

    def _check_fit(self, step: int, name: str, tree: Any) -> None:
        saved = {path: array[:2] for path, array in self.arrays(step, name).items()}
        wanted = {path: (str(leaf.dtype), tuple(leaf.shape)) for path, leaf in leaves_by_path(tree).items()}
        differing = sorted(path for path in saved | wanted if saved.get(path) != wanted.get(path))
        if differing:
            path = differing[0]
            raise UserError(
                f"the checkpoint {self._path(step)} does not fit: {path} is {_said(saved.get(path))} there and "
                f"{_said(wanted.get(path))} here, {len(differing)} of {len(saved | wanted)} arrays differ. "
                "Check the model's name, the number of classes and the images' channels."
            )

    def _check_sums(self, step: int, name: str, tree: Any) -> None:
        saved, here = self.arrays(step, name), describe(tree)
        changed = [path for path in saved if saved[path] != here[path]]
        if changed:
            raise DamagedError(f"{name}/{changed[0]} has changed since it was saved, {len(changed)} such arrays")

    def _kept(self, notes: dict[int, Note]) -> set[int]:
        """Returns those of the steps that the policy keeps."""
        best = _best(notes)
        for_good = (step for step, note in notes.items() if note["kept"])
        return {*sorted(notes)[-self._keep_last :], *([] if best is None else [best]), *for_good}

    def _tidy(self) -> None:
        """Removes checkpoints that the policy does not keep, and half-written or half-deleted ones of a killed run."""
        if jax.process_index() or not self._directory.exists():
            return
        for step in self._readable().keys() - self._kept(self._readable()):
            del self._notes[step]
            # Either is atomic, so half a checkpoint never passes for one; on a bucket a renamed folder is a copied one.
            if is_local(self._directory):
                self._path(step).rename(self._path(step, _DELETED))
            else:
                orbax_io.mark_unfinished(self._path(step))
        for path in self._directory.iterdir():
            if orbax_io.is_unfinished(path) or path.name.endswith(_DELETED):
                path.rmtree()

    def _set_aside(self, step: int, error: DamagedError, instead: int) -> None:
        names = (f"{step}.corrupt{n}" for n in itertools.chain([""], itertools.count(2)))
        name = next(name for name in names if not (self._directory / name).exists())
        if jax.process_index() == 0:
            self._path(step).rename(self._directory / name)
        del self._notes[step]
        logger.warning(
            "checkpoint %s is damaged (%s): set aside as %s, going on from step %d.",
            self._path(step), error, name, instead,
        )  # fmt: skip


def _top1s(notes: dict[int, Note]) -> dict[int, float]:
    return {step: note["top1"] for step, note in notes.items() if note["top1"] is not None}


def _best(notes: dict[int, Note]) -> int | None:
    """Returns the step of the highest top-1, the latest one among ties; None if no step was evaluated."""
    top1s = _top1s(notes)
    return max(top1s, key=lambda step: (top1s[step], step), default=None)


def load_model(directory: epath.PathLike, like: dict[str, Any], *, run: Json | None = None) -> dict[str, Any]:
    """Restores the weights of a run's best checkpoint; falls back to the next if it is damaged, and warns.

    Args:
      directory: the run's `checkpoints` folder.
      like: `{"params": ..., "batch_stats": ...}`, arrays, or their shapes and dtypes.
      run: the `run` that the checkpoint must have been saved with, except for its epochs, which may have grown, and
        for the paths of other checkpoints, which may have moved.

    Raises:
      UserError: if there is no checkpoint, none is whole, or it does not fit or belongs to another run.
    """
    checkpoints = Checkpoints(directory)
    reasons = []
    for step in checkpoints.by_preference():
        try:
            if run is not None and _compared(checkpoints.run(step)) != _compared(run):
                raise UserError(
                    f"the checkpoint {directory}/{step} belongs to another run than the config beside it. Restore that "
                    "config.json, or give another workdir."
                )
            model = checkpoints.restore(step, {"model": _as_stored(checkpoints.arrays(step, "model"), like)})["model"]
        except DamagedError as error:
            reasons.append(f"checkpoint {epath.Path(directory) / str(step)} is damaged ({error})")
            continue
        for reason in reasons:
            logger.warning("%s: using step %d instead.", reason, step)
        return jax.tree.map(lambda array, leaf: jnp.asarray(array, leaf.dtype), model, like)
    if not reasons:
        raise UserError(f"there is no checkpoint in {directory}. Give the workdir of a run that has saved one.")
    raise UserError(f"{'; '.join(reasons)}. Restore the folder, or give another run's workdir.")


def _compared(run: Json) -> Json:
    return {key: value for key, value in run.items() if key != "epochs" and not key.endswith(".checkpoint")}


def _as_stored(saved: Described, like: Any) -> Any:
    """Returns the shapes of `like` with the dtypes of the saved arrays."""
    shapes = [
        jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(saved[name][0]) if name in saved else leaf.dtype)
        for name, leaf in leaves_by_path(like).items()
    ]
    return jax.tree.unflatten(jax.tree.structure(like), shapes)


def _said(array: tuple[str, tuple[int, ...]] | None) -> str:
    return "absent" if array is None else f"{array[0]}{list(array[1])}"
