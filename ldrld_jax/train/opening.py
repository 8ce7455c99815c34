"""The description that a run prints when it starts, and its warnings, which the summary and the report repeat."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from ldrld_jax import config as config_lib
from ldrld_jax.data.folders import FolderRecords
from ldrld_jax.data.given import ArrayRecords, ItemRecords
from ldrld_jax.data.source import InMemory, Selected, whole_of
from ldrld_jax.data.stream import Readable
from ldrld_jax.data.tfds_records import TfdsRecords
from ldrld_jax.errors import listed
from ldrld_jax.interop import hub
from ldrld_jax.logit_store.store import checksum_of_images
from ldrld_jax.losses import SLDConfig
from ldrld_jax.record.console import counted
from ldrld_jax.record.reader import read_config, read_data
from ldrld_jax.train.networks import FED, is_workdir
from ldrld_jax.train.optim import unread
from ldrld_jax.train.plan import Run
from ldrld_jax.train.teacher import to_check

_MOST_NAMED = 5  # classes
_LEFT = 0.05  # share of the initial weights in an average
_FEW = 10_000  # images whose records are read for their labels


def opening(run: Run, role: str) -> str:
    """Returns five lines on a planned run: its data, models, devices and batch, and where its results go."""
    config, source, data = run.config, run.batches.source, run.config.data
    evaluated = f"{data.held_out:g} of {data.train_split}" if data.held_out else data.eval_split
    shape = " x ".join(map(str, source.image_shape))
    devices, kind = run.mesh.devices, _kind(source)
    origin = "given in Python" if run.given.train is not None else f"from {data.data_dir or 'the default folder'}"
    rate = "a learning rate of its own" if run.given.optimizer is not None else f"learning rate {_rate(config.optim)}"
    facts = {
        "data": f"{data.name} {origin}: {len(source):,} training {kind}s "
        f"({data.train_split}), {len(run.eval_source):,} to evaluate on ({evaluated}), {len(source.class_names)} "
        f"classes, {shape}",
        "models": "; ".join(
            f"{role if i == 0 else 'teacher'} {model}, {forward.parameters:,} parameters, {forward.flops / 1e6:,.1f} "
            f"MFLOPs per {kind}"
            for i, ((model, _), forward) in enumerate(zip(run.networks_used, run.forwards, strict=True))
        ),
        "device": f"{devices.size} x {devices.flat[0].device_kind} ({devices.flat[0].platform}), {config.precision}",
        "training": f"{config.method}, {counted(config.epochs, 'epoch')} of "
        f"{counted(run.batches.steps_per_epoch, 'step')}, batches of {config.batch_size}; {config.optim.name}, {rate}",
        "results": str(run.workdir),
    }
    return "\n".join(f"{name:<8}  {fact}" for name, fact in facts.items())


def _kind(source: Readable) -> str:
    return "example" if source.raw else "image"


def _rate(optim: ConfigDict) -> str:
    schedule = f"{optim.schedule} after {', '.join(map(str, optim.decay_epochs))}" if optim.schedule == "step" else ""
    warmup = "" if optim.warmup == "none" else f", {optim.warmup} warm-up of {counted(optim.warmup_epochs, 'epoch')}"
    return f"{optim.learning_rate:g}, {schedule or optim.schedule}{warmup}"


def warnings(run: Run) -> Iterator[str]:
    """Yields what is odd about a plan and does not stop it."""
    config = run.config
    optim, names = config.optim, run.batches.source.class_names
    if optim.warmup != "none" and optim.warmup_epochs >= config.epochs > 1:
        yield (
            f"the warm-up of {optim.warmup_epochs} epochs is as long as the run of {config.epochs}: lower "
            "optim.warmup_epochs, or set optim.warmup=none"
        )
    yield from _unread(run)
    if config.ema_decay is not None and (left := config.ema_decay**run.steps) > _LEFT:
        yield (
            f"ema_decay={config.ema_decay:g} averages over more steps than the run's {run.steps}: {100 * left:.0f} % "
            "of the evaluated average are the initial weights. Lower it"
        )
    yield from _student_fed_otherwise(config)
    late = [epoch for epoch in optim.decay_epochs if epoch >= config.epochs] if optim.schedule == "step" else []
    if late and run.given.optimizer is None and config.epochs > 1:
        yield (
            f"optim.decay_epochs has {', '.join(map(str, late))}, which a run of {config.epochs} epochs never "
            "reaches: lower them with the epochs"
        )
    if config.kd_warmup_epochs >= config.epochs > 1 and run.objective.methods:
        yield (
            f"kd_warmup_epochs={config.kd_warmup_epochs} is not less than the {config.epochs} epochs of the run: the "
            "methods never get their full weight. Lower it"
        )
    teachers = [name for name, _ in run.networks_used[1:]]
    if config.logits.get("dir") and (functions := [name for name in teachers if run.networks.is_function(name)]):
        yield (
            f"the logit store knows {', '.join(functions)} by its variables alone: if its function depends on anything "
            "else and that changes, set another logits.dir"
        )
    if run.batches.source.changes:
        yield (
            "the training images differ each time they are read: a resumed run therefore sees other images than an "
            "uninterrupted one would have"
        )
    yield from _late(run)
    if _evaluated_on_training_images(run):
        yield (
            f"the student is evaluated on images that it is trained on (data.eval_split={config.data.eval_split}): "
            "its top-1 is too high"
        )
    for purpose, source in (("to train on", run.batches.source), ("to evaluate on", run.eval_source)):
        if empty := _absent(source):
            yield no_images(purpose, empty, names)


def _late(run: Run) -> Iterator[str]:
    """Yields a line for each change of the loss that is set for an epoch after the run's last one."""
    epochs = run.config.epochs
    for name, schedule in run.objective.schedules.items():
        if (end := schedule.points[-1][0]) > epochs > 1:
            yield f"loss_schedule.{name} ends at epoch {end}, and the run has {epochs}: scale its epochs to the run"
    for term in run.objective.methods.values():
        if isinstance(term.cfg, SLDConfig) and term.cfg.student_swap and term.cfg.student_swap_epoch >= epochs > 1:
            yield (
                f"loss.sld.student_swap_epoch={term.cfg.student_swap_epoch} is not less than the {epochs} epochs of "
                "the run: the student's swapped target is never used. Lower it"
            )


def _unread(run: Run) -> Iterator[str]:
    """Yields a line for each key of `optim` that is set and that the optimizer does not take."""
    optim, usual = run.config.optim, config_lib.default().optim
    for key in unread(optim) if run.given.optimizer is None else []:
        if optim[key] != usual[key]:
            yield f"optim.{key}={optim[key]} has no effect: {optim.name} does not take it. Unset it"


def _student_fed_otherwise(config: ConfigDict) -> Iterator[str]:
    """Yields a line for each key by which the images of a student's checkpoint, a run's workdir, were fed otherwise."""
    path = config.student.checkpoint
    theirs = (read_config(path) or {}).get("data", {}) if path is not None and is_workdir(path) else {}
    for key in FED:
        ours = list(value) if isinstance(value := config.data[key], tuple) else value
        if key in theirs and theirs[key] != ours:
            yield (
                f"student.checkpoint={path} was trained with data.{key}={theirs[key]}, and goes on with {ours}: set "
                f"data.{key} as there"
            )


def no_images(purpose: str, empty: Sequence[int], names: Sequence[str]) -> str:
    """Returns a line on classes without images, by their labels.

    Example:
      >>> no_images("to train on", [1], ["cat", "dog"])
      '1 of 2 classes have no image to train on: dog'
    """
    shown = listed([names[label] for label in empty], _MOST_NAMED)
    return f"{len(empty)} of {len(names)} classes have no image {purpose}: {shown}"


def _absent(source: Readable) -> list[int]:
    """Returns the classes without an image in a split, if that is known without reading many of them.

    With several labels per example, such as tokens of a vocabulary, many classes may be rare, so none is reported.
    """
    records = source.uncached.records
    selected = isinstance(records, Selected) and records.given_labels is not None
    known = selected or isinstance(records, FolderRecords | ArrayRecords)
    # TFDS and dataset objects give a label with its image; an object may decode that.
    few = isinstance(source, InMemory) and len(source) <= _FEW and type(records) is not ItemRecords
    if source.label_shape or not (known or few):
        return []
    return np.setdiff1d(np.arange(len(source.class_names)), records.labels()).tolist()


def _evaluated_on_training_images(run: Run) -> bool:
    """Returns whether the evaluation split has images of the training split."""
    data = run.config.data
    if data.held_out:
        return False
    train, evaluation = (source.uncached.records for source in (run.batches.source, run.eval_source))
    if isinstance(whole_of(train), TfdsRecords):
        return _overlaps(run, data.train_split)
    if run.given.train is not None:
        # The list of a dataset object has its labels alone.
        alike = run.data_note["train"]["digest"] == run.data_note["eval"]["digest"]
        return alike and checksum_of_images(whole_of(train)) == checksum_of_images(evaluation)
    return data.eval_split == data.train_split or _overlaps(run, data.train_split)


def _overlaps(run: Run, split: str) -> bool:
    """Returns whether a split of the run's dataset has images that the student is evaluated on.

    Of what is not TFDS's only a slice of that split, such as train[90%:], is known to.
    """
    evaluation = whole_of(run.eval_source.uncached.records)
    if isinstance(evaluation, TfdsRecords):
        return evaluation.overlaps(split)
    part, _, cut = run.config.data.eval_split.partition("[")
    return bool(cut) and part == split


def teacher_warnings(run: Run, paths: list[str], top1: float | None) -> Iterator[str]:
    """Yields what is odd about a run's teacher.

    Args:
      run: the plan.
      paths: of the teacher's checkpoints.
      top1: in percent; None if it was not measured.
    """
    config, chance = run.config, 100 / len(run.batches.source.class_names)
    if top1 is not None and top1 < chance + 0.05 * (100 - chance):
        yield (
            f"the teacher's top-1 is {top1:.2f} %, and guessing gives {chance:.2f} %: check its classes and their "
            f"order, and {to_check(run)}"
        )
    teacher = config.teacher
    alike = teacher.checkpoint is None and teacher.optim.learning_rate == config.optim.learning_rate
    if alike and teacher.batch_size != config.batch_size:
        yield (
            f"the teacher's batches of {teacher.batch_size} use the learning rate of the student's batches of "
            f"{config.batch_size}: set teacher.optim.learning_rate"
        )
    yield from filter(None, (_leak(run, path) for path in paths))
    yield from filter(None, (_fed_otherwise(run, path) for path in paths))


def _fed_otherwise(run: Run, path: str) -> str | None:
    """Returns a line if a teacher of the Hugging Face Hub was trained with a different normalisation."""
    name, ours = path.partition("::")[0], run.config.teacher.data
    theirs = hub.normalisation(name) if hub.is_on_hub(name) else None
    if theirs is None or all(_alike(ours[key], theirs[key]) for key in theirs):
        return None
    needed = " ".join(f"teacher.data.{key}={','.join(map(str, value))}" for key, value in theirs.items())
    return f"the teacher in {path} was trained with a different normalisation: set {needed}"


def _alike(ours: Sequence[float], theirs: Sequence[float]) -> bool:
    """Returns whether two means or standard deviations, of each channel or of all, are the same to three decimals."""
    return (len(ours) == len(theirs) or 1 in (len(ours), len(theirs))) and np.allclose(ours, theirs, atol=1e-3)


def _first(note: Mapping[str, Any]) -> str | None:
    """Returns the digest of the images that a run read, or of those that they are copies of."""
    return note.get("original", note.get("digest"))


def _leak(run: Run, path: str) -> str | None:
    """Returns a line if a teacher saw, or may have seen, the images that the student is evaluated on."""
    ours, place = run.config.data, epath.Path(path)
    if not is_workdir(path):
        unknown = f"{path} may have been trained on the images that data.held_out={ours.held_out:g} holds out"
        return unknown if ours.held_out else None
    config, note = read_config(place), read_data(place)
    if config is None or note is None:
        return None
    theirs = config["data"]
    if _first(note["train"]) == _first(run.data_note["eval"]):
        seen = not ours.held_out or any(theirs.get(key) != ours[key] for key in ("held_out", "seed"))
    else:  # another part of the same dataset
        seen = not ours.held_out and theirs["name"] == ours.name and _overlaps(run, theirs["train_split"])
    if not seen:
        return None
    return (
        f"the teacher in {path} was trained on images that the student is evaluated on (teacher: "
        f"data.train_split={theirs['train_split']}, held_out={theirs.get('held_out', 0):g}): its top-1 and the "
        "student's are too high"
    )
