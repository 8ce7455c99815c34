"""Checkpoints: the only file that touches orbax."""

import contextlib
import errno
from collections.abc import Iterator
from typing import Any

import jax
from etils import epath
from orbax.checkpoint import v1 as ocp

from ldrld_jax.errors import UserError

Json = dict[str, Any]


class Checkpoints:
    """The checkpoints of one run, `<directory>/<step>`: the best by `top1` and the last are kept.

    Saving copies the arrays, then writes in the background; a checkpoint appears under its name
    only when it is whole.

    Args:
      directory: created if it is missing.
      clean: remove what a killed run left half written; not for somebody who only reads.
    """

    def __init__(self, directory: epath.PathLike, *, clean: bool = True):
        policies = ocp.training.preservation_policies
        self._checkpointer = ocp.training.Checkpointer(
            epath.Path(directory).resolve(),  # tensorstore takes absolute paths only
            preservation_policy=policies.AnyPreservationPolicy(
                [
                    policies.LatestN(1),
                    policies.BestN(
                        get_metric_fn=lambda metrics: metrics["top1"], n=1, keep_checkpoints_without_metrics=False
                    ),
                ]
            ),
            cleanup_tmp_directories=clean,
        )
        if clean:  # a run killed between a save and its clean-up leaves one too many
            for step in {c.step for c in self._checkpointer.checkpoints} - {self.latest_step, self.best_step}:
                self._checkpointer.delete(step)

    @property
    def latest_step(self) -> int | None:
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    @property
    def best_step(self) -> int | None:
        """The step of the highest top-1, of ties the latest; None before the first evaluation."""
        rated = [(c.metrics["top1"], c.step) for c in self._checkpointer.checkpoints if c.metrics]
        return max(rated)[1] if rated else None

    def save(self, step: int, trees: dict[str, Any], host: Json, top1: float | None = None) -> None:
        """Saves unless this step is saved already; returns when the arrays may be donated again.

        Args:
          step: the number of steps done.
          trees: trees of arrays, each of which can be restored alone.
          host: what else belongs to the run, JSON.
          top1: the evaluation's, if there was one at this step.
        """
        if self.latest_step == step:
            return
        metrics = None if top1 is None else {"top1": top1}
        with self._disk_errors():
            self._checkpointer.save_checkpointables_async(
                step, trees, force=True, metrics=metrics, custom_metadata=host
            )

    def restore(self, step: int, like: dict[str, Any]) -> dict[str, Any]:
        """The trees of `step` that `like` names, in its shapes, dtypes and shardings (if none, on one device)."""
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or here), like)
        return self._checkpointer.load_checkpointables(step, abstract)

    def shapes(self, step: int, name: str) -> dict[str, tuple[int, ...]]:
        """The shapes of the tree saved as `name` at `step`, by path."""
        return _shapes(self._checkpointer.checkpointables_metadata(step).metadata[name])

    def host(self, step: int) -> Json:
        """What was saved as `host` at `step`."""
        return self._checkpointer.checkpointables_metadata(step).custom_metadata

    def close(self) -> None:
        """Waits for what is still being written."""
        with self._disk_errors():
            self._checkpointer.close()

    @contextlib.contextmanager
    def _disk_errors(self) -> Iterator[None]:
        """A full disk as the OSError that it is: tensorstore's is a ValueError of many lines."""
        try:
            yield
        except Exception as error:
            if "No space left on device" not in str(error):
                raise
            directory = str(self._checkpointer.directory)
            raise OSError(errno.ENOSPC, "no space left; the last whole checkpoint is intact", directory) from error


def load_model(directory: epath.PathLike, like: dict[str, Any], *, best: bool = True) -> dict[str, Any]:
    """The weights in a run's best (or last) checkpoint.

    Args:
      directory: the run's `checkpoints` folder.
      like: `{"params": ..., "batch_stats": ...}`, arrays, or their shapes and dtypes.
      best: the best evaluated one, if any; else the last.

    Raises:
      UserError: if there is no checkpoint, or it does not fit.
    """
    directory = epath.Path(directory)
    none = UserError(f"there is no checkpoint in {directory}. Give the workdir of a run that has saved one.")
    if not directory.is_dir():
        raise none
    with contextlib.closing(Checkpoints(directory, clean=False)) as checkpoints:
        step = (checkpoints.best_step if best else None) or checkpoints.latest_step
        if step is None:
            raise none
        saved, wanted = checkpoints.shapes(step, "model"), _shapes(like)
        differing = sorted(path for path in saved | wanted if saved.get(path) != wanted.get(path))
        if differing:
            path = differing[0]
            raise UserError(
                f"the checkpoint in {directory} does not fit the model: {path} has shape {saved.get(path)} there and "
                f"{wanted.get(path)} here, {len(differing)} of {len(saved | wanted)} arrays differ. "
                "Check the model's name, the number of classes and the images' channels."
            )
        return checkpoints.restore(step, {"model": like})["model"]


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape) for path, leaf in leaves}
