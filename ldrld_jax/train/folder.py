"""The workdir of a run: whether it belongs to this run, what it pins, its checkpoints, and whether it has ended."""

import copy
import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from ldrld_jax import config as config_lib
from ldrld_jax.checkpoint.folder import Checkpoints
from ldrld_jax.errors import UserError
from ldrld_jax.files import check_writable, is_local, replace_text
from ldrld_jax.identity import differences, identity, is_object
from ldrld_jax.interop import hub
from ldrld_jax.record.console import TABLE_NAMES, TABLE_NUMBERS
from ldrld_jax.record.reader import check_class_names, read_config, read_data, read_metrics, read_summary
from ldrld_jax.train.input import check_form
from ldrld_jax.train.optim import first_decay_epoch
from ldrld_jax.train.plan import Run


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """The files of a planned run.

    Attributes:
      run: the plan.
    """

    run: Run

    def check(self) -> None:
        """Raises a UserError unless the workdir can be made or holds an intact earlier part of this run."""
        workdir = self.run.workdir
        if self.finished() is None:  # a run that has ended may be read from anywhere
            check_writable(workdir, "workdir")
        saved = read_config(workdir)
        if saved is not None:
            self._check_identity(str(workdir), identity(saved))
        checkpoints = self.checkpoints()
        if not checkpoints.steps and self.finished() is None and (workdir / "summary.json").exists():
            raise UserError(
                f"{workdir} has the summary of a run and none of its checkpoints, and a run that begins anew would "
                "replace it. Restore the checkpoints, remove summary.json, or choose another workdir."
            )
        for step in checkpoints.readable_steps[-1:]:
            self._check_identity(str(workdir / "checkpoints" / str(step)), checkpoints.run(step))
        read_metrics(workdir)
        self._check_data()

    def _check_data(self) -> None:
        """Raises a UserError unless the data are those that the run began with."""
        workdir, here = self.run.workdir, self.run.data_note
        there = read_data(workdir)
        if there is None:
            return
        check_class_names(workdir, here["classes"], whose="the run")
        check_form(workdir, here["form"])
        before, now = there.get("weights", {}), self._weights
        if changed := sorted(key for key in before.keys() & now.keys() if before[key] != now[key]):
            raise UserError(
                f"{' and '.join(changed)} of the run in {workdir}: the weights, their shapes or the module's other "
                "attributes are not those that it began with. Restore them, or choose another workdir."
            )
        for split in ("train", "eval"):
            if there[split] != here[split]:
                before, now = there[split]["images"], here[split]["images"]
                what = f"{before} images there, {now} here" if before != now else "another list of images"
                raise UserError(
                    f"the {split} data of the run in {workdir} have changed: {what}. Restore them, or choose another "
                    "workdir."
                )

    @functools.cached_property  # reading a checkpoint for it may take a while
    def _weights(self) -> dict[str, str]:
        """The digests, by key, of the checkpoints that the config names, if they exist, and of given models."""
        config = self.run.config
        paths = {
            "teacher.checkpoint": config_lib.teacher_checkpoints(config),
            "student.checkpoint": [config.student.checkpoint] if config.student.checkpoint else [],
        }
        digests = {key: [_digest(path) for path in each] for key, each in paths.items() if each}
        found = {key: " ".join(filter(None, each)) for key, each in digests.items() if None not in each}
        return found | self.run.given_weights

    def remarks(self) -> Iterator[str]:
        """Yields lines on what cannot be compared with what the run in the workdir began with."""
        if self.checkpoints().latest_step is None:
            return
        if read_data(self.run.workdir) is None:
            yield f"{self.run.workdir} has no data.json: it cannot be checked whether the data have changed."
        if parts := self.run.given.incomparable:
            yield (
                f"{self.run.workdir} holds an earlier part of this run; {' and '.join(parts)} cannot be compared "
                "with that part's: give the same again, or choose another workdir."
            )

    def write(self) -> None:
        """Writes the run's config.json and data.json."""
        workdir = self.run.workdir
        replace_text(workdir / "config.json", self.run.config.to_json(indent=2) + "\n")
        note = {**self.run.data_note, "weights": self._weights}
        replace_text(workdir / "data.json", json.dumps(note, indent=2) + "\n")

    def _check_identity(self, place: str, theirs: dict[str, Any]) -> None:
        config, ours = self.run.config, identity(self.run.config)
        differing = differences(theirs, ours)
        if moved := {"teacher.checkpoint", "student.checkpoint"} & differing.keys():  # the same weights elsewhere?
            before, now = (read_data(self.run.workdir) or {}).get("weights", {}), self._weights
            same = {key for key in moved if before.get(key) is not None and before[key] == now.get(key)}
            differing = {key: text for key, text in differing.items() if key not in same}
        if list(differing) == ["epochs"] and ours["epochs"] > theirs["epochs"]:
            decay = first_decay_epoch(config.optim)
            done = (self.checkpoints().latest_step or 0) / self.run.batches.steps_per_epoch
            if done < decay:
                return
            own = is_object(config.optim.name)
            if own or config.optim.schedule == "cosine":
                depends = "an optimizer that is an object" if own else f"optim.schedule={config.optim.schedule}"
                raise UserError(
                    f"epochs cannot grow with {depends}, since the learning rate of each step may depend on them: the "
                    f"run in {self.run.workdir} has {theirs['epochs']}. Choose another workdir."
                )
            raise UserError(
                f"epochs may grow only before the first decay (epoch {decay}), and {self.run.workdir} is at epoch "
                f"{done:g}. Choose another workdir."
            )
        if differing:
            shown = ", ".join(differing.values())
            raise UserError(f"{place} holds a run of another config: {shown}. Choose another workdir.")

    def checkpoints(self) -> Checkpoints:
        """Returns the run's checkpoints, kept and written as its config says."""
        return Checkpoints(
            self.run.workdir / "checkpoints",
            run=identity(self.run.config),
            keep_last=self.run.config.checkpoint.keep_last,
            keep_every=self.run.keep_every,
            min_seconds=self.run.config.checkpoint.min_seconds,
        )

    def finished(self) -> dict[str, Any] | None:
        """Returns the summary of a run that has ended, else None."""
        summary = read_summary(self.run.workdir, numbers=TABLE_NUMBERS, keys=TABLE_NAMES)
        return summary if summary is not None and summary["steps"] == self.run.steps else None


def pinned(config: ConfigDict, workdir: epath.Path) -> ConfigDict:
    """Returns a resolved config whose checkpoints on the Hugging Face Hub name a commit, so that they stay the same.

    It is the commit that the run in `workdir` began with, or else the one that the name has now.

    Raises:
      UserError: if a checkpoint cannot be downloaded.
    """
    pinned, saved = copy.deepcopy(config), read_config(workdir) or {}
    for block in ("student", "teacher"):
        if given := config[block].get("checkpoint"):
            paths = hub.with_known_revisions(given, (saved.get(block) or {}).get("checkpoint") or "")
            each = paths.split(",") if block == "teacher" and "," in (config.teacher.model or "") else [paths]
            pinned[block].checkpoint = ",".join(map(hub.pinned, each))
    return pinned


def _files_below(folder: epath.Path) -> Iterable[Any]:
    if is_local(folder):
        return (file for file in pathlib.Path(folder).rglob("*") if file.is_file())
    return (file for each in folder.iterdir() for file in (_files_below(each) if each.is_dir() else [each]))


def _digest(path: str) -> str | None:
    """Returns a digest of the weights of a run's best checkpoint, a file or a zarr array; None if there is nothing."""
    name, _, member = path.partition("::")
    place = epath.Path(hub.download(name) if hub.is_on_hub(name) else name)
    if not place.exists():
        return None
    if not place.is_dir():
        return hashlib.sha256(place.read_bytes() + member.encode()).hexdigest()[:32]
    if place.suffix == ".zarr":
        files = sorted(_files_below(place))
        parts = {str(file.relative_to(place)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
    checkpoints = Checkpoints(place / "checkpoints")
    step = next(iter(checkpoints.by_preference()), None)
    if step is None or step not in checkpoints.readable_steps:
        return None
    return hashlib.sha256(json.dumps(checkpoints.arrays(step, "model"), sort_keys=True).encode()).hexdigest()[:32]
