"""Writes the model card of an exported student: its data, training and accuracy."""

import json
import re
from typing import Any

import flax
import jax

import ldrld_jax
from ldrld_jax.config import teacher_checkpoints, teaches_itself
from ldrld_jax.interop.hub import CONFIG, WEIGHTS
from ldrld_jax.models import MODELS

# Licences as the publishers of the data state them; not legal advice.
_LICENCES = {
    "digits": "UCI's page of the dataset names CC BY 4.0",
    "cifar10": "its authors name none; they ask to cite Krizhevsky, 2009",
    "cifar100": "its authors name none; they ask to cite Krizhevsky, 2009",
    "imagenet2012": "ImageNet's terms of access: non-commercial research and education only",
    "tiny_imagenet": "a part of ImageNet, whose terms of access are: non-commercial research and education only",
}
_UNKNOWN = "not known to this software"


def model_card(
    config: dict[str, Any],
    summary: dict[str, Any] | None,
    *,
    described: dict[str, Any],
    parameters: int,
    place: str | None = None,
) -> str:
    """Returns the model card in Markdown, with the YAML header that model hubs read.

    Args:
      config: the run's resolved config, as in its config.json.
      summary: the content of its summary.json; None for a run that has not ended.
      described: the content of preprocessing.json.
      parameters: number of trained parameters of the student.
      place: `hf://OWNER/NAME`, where this package reads the weights; None for an exported program.
    """
    (*labels, classes), raw = described["output"]["shape"][1:], described["inside"] is None
    model = _shown(config["student"]["model"])
    title = f"{model} on {_shown(config['data']['name'])}"
    title += f", distilled from {_name(config)}" if config["teacher"] else ", trained from its labels"
    facts = {
        "dataset": _data(config["data"]),
        "licence of the data": _LICENCES.get(re.split("[:/]", config["data"]["name"])[0], _UNKNOWN),
        "student": f"{model}, {parameters:,} parameters, {classes} classes, {config['precision']}",
        "teacher": _teacher(config, summary),
        "method": _method(config),
        "seeds": _seeds(config),
        "training": f"{config['epochs']} epochs, batches of {config['batch_size']}",
        "accuracy, best epoch": _accuracy(summary, "best"),
        "accuracy, last epoch": _accuracy(summary, "last"),
        "made by": ", ".join(f"{package.__name__} {package.__version__}" for package in (ldrld_jax, jax, flax)),
    }
    table = "\n".join(f"| {name} | {fact} |" for name, fact in facts.items())
    task, each = ("other", "label") if raw or labels else ("image-classification", "image, whatever it shows")
    if place is None:
        use = _use_of_program(described, task, published=config["student"]["model"] in MODELS)
    else:
        use = _use_of_weights(config, described, task, place)
    library = ("jax", "stablehlo") if place is None else ("ldrld_jax", "safetensors")
    return f"""---
{_header(config, summary, title, task, library)}
---

# {title}

| | |
| --- | --- |
{table}

The files hold the epoch with the best top-1 of all evaluated epochs. That epoch was selected on the same images that
its accuracy is measured on; the last epoch's accuracy has no such selection. The student names one of the {classes}
classes for every {each}.

## Use

{use}
"""


def _use_of_program(described: dict[str, Any], task: str, *, published: bool) -> str:
    shape, dtype = described["input"]["shape"][1:], described["input"]["dtype"]
    takes = "inputs as they are" if described["inside"] is None else "images and normalises the pixels itself"
    predict = "\n`python -m ldrld_jax.main --mode predict --workdir FOLDER IMAGE...` does all these steps."
    if published:
        names = "as a PyTorch state_dict under the published names; `ldrld_jax.load_torch_checkpoint` reads it too."
    else:
        names = "under the model's own names, with PyTorch's names and axes for kernels, scales and statistics."
    return f"""```python
from pathlib import Path
import numpy as np
from jax import export

student = export.deserialize(bytearray(Path("student.stablehlo").read_bytes()))
labels = Path("labels.txt").read_text().splitlines()
images = np.zeros((1, {", ".join(map(str, shape))}), np.{dtype})  # yours, made as preprocessing.json says
print([labels[i] for i in np.asarray(student.call(images)).argmax(axis=-1).ravel()])
```

The program needs jax, numpy and flatbuffers. It takes any number of {takes}, and runs on a CPU, a CUDA GPU or a
TPU.{"" if described["before"] is None or task == "other" else predict}

`student.stablehlo` is a program: run it only if you trust its source. JAX promises to run it with versions up to six
months newer and three weeks older than the one above. `student.safetensors` stores the same weights permanently,
{names}"""


def _use_of_weights(config: dict[str, Any], described: dict[str, Any], task: str, place: str) -> str:
    model, classes = config["student"]["model"], described["output"]["shape"][-1]
    predict = f"""
The same from the command line, and as the teacher of another student:

```
ldrld-jax predict --workdir {place} IMAGE...
ldrld-jax train --config.teacher.model={model} --config.teacher.checkpoint={place} ...
```
"""
    return f"""```python
import ldrld_jax

model = ldrld_jax.load_torch_checkpoint("{place}", "{model}", {classes}, in_channels={described["input"]["shape"][-1]})
```

This is the network alone. It takes inputs that are made as `preprocessing` in `{CONFIG}` says, by the steps of `before`
and then of `inside`; `model(inputs, train=False)` returns logits.
{"" if described["before"] is None or task == "other" else predict}
`{WEIGHTS}` is a PyTorch state_dict under the published names, which `safetensors.torch.load_file` reads as well."""


def _header(
    config: dict[str, Any], summary: dict[str, Any] | None, title: str, task: str, library: tuple[str, str]
) -> str:
    """Returns the YAML header; its values are written as JSON, which is valid YAML."""
    header: dict[str, Any] = {
        "library_name": library[0],
        "pipeline_tag": task,
        "license": "unknown",
        "datasets": [_shown(config["data"]["name"])],
        "metrics": ["accuracy"],
        "tags": ["jax", library[1], "knowledge-distillation", *_methods(config)],
    }
    if summary is not None:
        metrics = [
            {"type": "accuracy", "name": f"{when} {name}", "value": summary[f"{when}_{name}"]}
            for when in ("best", "last")
            for name in ("top1", "top5")
        ]
        name = _shown(config["data"]["name"])
        data = {"type": name, "name": name, "split": _evaluated_on(config["data"])}
        result = {"task": {"type": task}, "dataset": data, "metrics": metrics}
        header["model-index"] = [{"name": title, "results": [result]}]
    return "\n".join(f"{key}: {json.dumps(value)}" for key, value in header.items())


def _methods(config: dict[str, Any]) -> list[str]:
    return [] if config["method"] == "ce" else _shown(config["method"]).split("+")


def _shown(name: str) -> str:
    """Returns a name without the angle brackets of an object's, which Markdown takes for HTML."""
    return name.replace("<", "").replace(">", "")


def _evaluated_on(data: dict[str, Any]) -> str:
    return f"{data['held_out']:g} of {data['train_split']}" if data["held_out"] else data["eval_split"]


def _data(data: dict[str, Any]) -> str:
    return f"{_shown(data['name'])}, trained on `{data['train_split']}`, evaluated on `{_evaluated_on(data)}`"


def _name(config: dict[str, Any]) -> str:
    return "its own moving average" if teaches_itself(config) else _shown(config["teacher"]["model"])


def _teacher(config: dict[str, Any], summary: dict[str, Any] | None) -> str:
    teacher = config["teacher"]
    if not teacher:
        return "none"
    if paths := teacher_checkpoints(config):
        origin = f", from {', '.join(path.rstrip('/').rpartition('/')[2] for path in paths)}"
    else:
        origin = f", trained for {teacher['epochs']} epochs" if teacher["epochs"] is not None else ""
    top1 = None if summary is None else summary["teacher_top1"]
    return _name(config) + origin + ("" if top1 is None else f", top-1 {top1:.2f} %")


def _method(config: dict[str, Any]) -> str:
    ce = f"ce_weight {config['ce_weight']:g}"
    if not _methods(config):
        return f"cross-entropy with the labels, {ce}"
    facts = []
    for name in _methods(config):
        fields = ", ".join(f"{key} {value}" for key, value in config["loss"].get(name, {}).items())
        weight = config["loss_weight"].get(name)  # a method of the user's own has neither fields nor weight
        facts.append(f"{name} ({fields or 'own code'})" + ("" if weight is None else f" times {weight:g}"))
    if config["standardize"]:
        facts.append("of standardised logits")
    facts.append(f"{ce}, kd_weight {config['kd_weight']:g}, kd_warmup_epochs {config['kd_warmup_epochs']}")
    schedule = config["loss_schedule"]
    facts += [f"{field} by epoch {schedule[field]} instead" for field in schedule if schedule[field] is not None]
    return "; ".join(facts)


def _seeds(config: dict[str, Any]) -> str:
    teacher = config["teacher"]
    return f"{config['seed']}" + (f", the teacher's {teacher['seed']}" if teacher and teacher["epochs"] else "")


def _accuracy(summary: dict[str, Any] | None, when: str) -> str:
    if summary is None:
        return "the run had not ended"
    epoch, top1, top5 = (summary[f"{when}_{name}"] for name in ("epoch", "top1", "top5"))
    return f"top-1 {top1:.2f} %, top-5 {top5:.2f} % (epoch {epoch:g})"
