"""Copies the small JSON files that back a table from runs into the repository, without paths of the machine.

python experiments/keep.py runs/laptop experiments/laptop

For each run: summary.json, config.json, the evaluations of metrics.jsonl, analysis.json if the report wrote one, and
data.json of a run of objects given in Python.
"""

import json
import pathlib
import shutil
import sys

from ldrld_jax.config import teacher_checkpoints

PLACES = ("data.data_dir", "teacher.data.data_dir", "teacher.workdir", "logits.dir", "compile_cache")


def keep(run: pathlib.Path, to: pathlib.Path) -> None:
    """Copies one finished run; the paths of checkpoints and of arrays are reduced to the files' names.

    Raises:
      ValueError: if a file is torn; nothing is copied.
    """
    config = json.loads((run / "config.json").read_text())
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    json.loads((run / "summary.json").read_text())
    for place in PLACES:
        *path, last = place.split(".")
        block = config
        for part in path:
            block = block.get(part, {})
        if last in block:
            block[last] = None
    student = config.get("student", {})
    if (path := student.get("checkpoint")) is not None:
        student["checkpoint"] = pathlib.Path(path).name
    if config.get("teacher") and (paths := teacher_checkpoints(config)):
        config["teacher"]["checkpoint"] = ",".join(pathlib.Path(path).name for path in paths)
    for data in (config.get("data", {}), config.get("teacher", {}).get("data", {})):
        kind, colon, path = (data.get("name") or "").partition(":")
        if kind == "arrays":
            data["name"] = f"{kind}{colon}{pathlib.Path(path).name}"
    to.mkdir(parents=True, exist_ok=True)
    (to / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    evaluations = [line for line in lines if line["split"] in ("eval", "teacher_eval")]
    (to / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in evaluations))
    shutil.copyfile(run / "summary.json", to / "summary.json")
    objects = ["data.json"] * ('"<' in json.dumps(config))  # it tells objects of one name apart
    for name in ("analysis.json", *objects):
        if (run / name).exists():
            shutil.copyfile(run / name, to / name)


def main(source: str, target: str) -> None:
    torn = []
    for summary in sorted(pathlib.Path(source).glob("*/summary.json")):
        name = summary.parent.name.replace(":", "_")  # Windows could not check out a colon
        try:
            keep(summary.parent, pathlib.Path(target) / name)
        except (ValueError, OSError) as error:  # no JSON, or no such file
            torn.append(f"{summary.parent} is left out: {error}")
    if torn:
        sys.exit("\n".join(torn))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python experiments/keep.py RUNS FOLDER")
    main(*sys.argv[1:])
