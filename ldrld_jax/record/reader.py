"""The reader of a run's files: config.json, data.json, metrics.jsonl and summary.json, each checked as it is read.

Resuming, sweeps, the export and the report all read runs through it.
"""

import json
import sys
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from etils import epath

from ldrld_jax.errors import UserError
from ldrld_jax.files import read_json
from ldrld_jax.identity import flat
from ldrld_jax.record.console import say

_TEXTS = ("method", "student.model", "data.name")


def read_config(workdir: epath.PathLike) -> dict[str, Any] | None:
    """Reads the resolved config of the run in a workdir; None if there is none.

    Raises:
      UserError: if the file is torn, or no config of a run.
    """
    path = epath.Path(workdir) / "config.json"
    if not path.exists():
        return None
    config = read_json(path, "A run's config")
    keys = flat(config)
    if missing := {"seed", "epochs", *_TEXTS} - set(keys):
        raise UserError(
            f"{path} was not written by ldrld_jax: it lacks {', '.join(sorted(missing))}. Choose another workdir."
        )
    texts = [keys[key] for key in _TEXTS] + [keys.get("teacher.model") or ""]
    if not all(isinstance(text, str) for text in texts) or not is_number(keys["seed"]):
        raise UserError(
            f"{path} was not written by ldrld_jax: seed must be a number, and {', '.join(_TEXTS)} and teacher.model "
            "text. Choose another workdir."
        )
    return config


def read_data(workdir: epath.PathLike) -> dict[str, Any] | None:
    """Reads the note that the run in a workdir has of its data; None for a run without one.

    Returns:
      `{"classes": names, "form": of an input, "train": {"images": n, "digest": text}, "eval": the same, "weights":
      digests of given models}`.

    Raises:
      UserError: if the file is torn, or no such note.
    """
    path = epath.Path(workdir) / "data.json"
    if not path.exists():
        return None
    data = read_json(path, "A run's note of its data", keys=("classes", "form", "train", "eval", "weights"))
    names, weights = data["classes"], data["weights"]
    whole = (
        isinstance(names, list) and all(isinstance(name, str) for name in names),
        all(isinstance(data[split], dict) and is_number(data[split].get("images")) for split in ("train", "eval")),
        isinstance(weights, dict) and all(isinstance(digest, str) for digest in weights.values()),
    )
    if not all(whole):
        raise UserError(f"{path} is not a valid data.json. Restore it, or choose another workdir.")
    return data


def check_class_names(workdir: epath.PathLike, class_names: Sequence[str], *, whose: str) -> None:
    """Raises a UserError unless the run in a workdir has the same class names in the same order.

    Args:
      workdir: the run's folder. If it has no data.json, the check prints a line and passes.
      class_names: the class names of the current data.
      whose: the run's role, for messages: "the run" or "the teacher".
    """
    noted = read_data(workdir)
    if noted is None:
        say(f"{whose} in {workdir} has no data.json: its classes cannot be compared with those of the data here.")
        return
    if noted["classes"] == list(class_names):
        return
    there, here = noted["classes"], list(class_names)
    if len(there) != len(here):
        what = f"{len(there)} classes there, {len(here)} here"
    else:
        label = next(i for i, names in enumerate(zip(there, here, strict=True)) if len(set(names)) == 2)
        what = f"class {label} is {there[label]!r} there and {here[label]!r} here"
    raise UserError(f"{whose} in {workdir} was trained on other classes: {what}. Restore the data's class names.")


def read_summary(
    workdir: epath.PathLike, *, numbers: Collection[str] = (), keys: Collection[str] = ()
) -> dict[str, Any] | None:
    """Reads the summary of the run in a workdir; None for a run that has not ended, or has more epochs since then.

    Args:
      workdir: of the run.
      numbers: the keys whose values must be finite numbers.
      keys: others that must be there.

    Raises:
      UserError: if the file is torn, or lacks one of `numbers` or `keys`.
    """
    path = epath.Path(workdir) / "summary.json"
    if not path.exists():
        return None
    summary = read_json(path, "A run's summary, written again once it is removed", keys=keys)
    config = read_config(workdir)
    if config is not None and summary.get("epochs", config["epochs"]) != config["epochs"]:
        return None
    for name in numbers:
        if not is_number(summary.get(name)):
            raise UserError(f"{path} has no number {name}. Remove it: the run writes it again.")
    teacher, warnings = summary.get("teacher_top1"), summary.get("warnings")
    known = [text for text in warnings if isinstance(text, str)] if isinstance(warnings, list) else []
    return {**summary, "teacher_top1": teacher if is_number(teacher) else None, "warnings": known}


class Lines(NamedTuple):
    """The lines of a metrics.jsonl.

    Attributes:
      whole: in order; an evaluation among them has a finite top-1.
      torn: the numbers, from 1, of those that are no such line.
      last: the number of the last line; 0 for an empty file.
    """

    whole: list[dict[str, Any]]
    torn: list[int]
    last: int


def read_lines(workdir: epath.PathLike) -> Lines:
    """Reads a run's `metrics.jsonl` and leaves out torn lines; a missing file has no lines."""
    path = epath.Path(workdir) / "metrics.jsonl"
    texts = path.read_bytes().decode(errors="replace").splitlines() if path.exists() else []
    lines = [_line(text) for text in texts]
    torn = [number for number, line in enumerate(lines, start=1) if line is None]
    return Lines([line for line in lines if line is not None], torn, len(lines))


def read_metrics(workdir: epath.PathLike) -> list[dict[str, Any]]:
    """Reads the lines of a run's `metrics.jsonl`, in order; a missing file has none.

    It leaves out a torn last line, such as a killed run leaves.

    Raises:
      UserError: if another line is torn.
    """
    lines = read_lines(workdir)
    if lines.torn and lines.torn[0] < lines.last:
        raise UserError(
            f"line {lines.torn[0]} of {epath.Path(workdir) / 'metrics.jsonl'} is torn, and later ones are not. Restore "
            "it, or choose another workdir."
        )
    return lines.whole


def last_evaluation(workdir: epath.PathLike) -> dict[str, Any]:
    """Reads the values of a run's last evaluation beside its step and epoch; empty if there is none yet.

    Raises:
      UserError: see `read_metrics`.
    """
    for line in reversed(read_metrics(workdir)):
        if line["split"] == "eval":
            return {"step": line["step"], "epoch": line["epoch"], **line["values"]}
    return {}


def is_number(value: Any) -> bool:
    """Returns whether a value is a finite number, and no bool."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and abs(value) <= sys.float_info.max  # an integer may be larger than any float


def _line(text: str) -> dict[str, Any] | None:
    """Parses a line of metrics.jsonl; None if it is no such line."""
    try:
        line = json.loads(text)
        numbers = [line["step"], line["epoch"], *([line["values"]["top1"]] if line["split"] == "eval" else [])]
        return line if all(map(is_number, numbers)) else None
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
