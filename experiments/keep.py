"""Copies the small JSON files that back a table from runs into the repository, without paths of the machine.

python experiments/keep.py runs/laptop experiments/laptop

For each run: summary.json, config.json, the evaluations of metrics.jsonl, analysis.json if the report wrote one, and
data.json of a run of objects given in Python.
"""

import json
import pathlib
import shutil
import sys

PLACES = ("data.data_dir", "teacher.data.data_dir", "teacher.workdir", "logits.dir", "compile_cache")


def keep(run: pathlib.Path, to: pathlib.Path) -> None:
    """Copies one finished run; the path of its teacher's file is reduced to the file name."""
    to.mkdir(parents=True, exist_ok=True)
    config = json.loads((run / "config.json").read_text())
    for place in PLACES:
        *path, last = place.split(".")
        block = config
        for part in path:
            block = block.get(part, {})
        if last in block:
            block[last] = None
    if (checkpoint := config.get("teacher", {}).get("checkpoint")) is not None:
        config["teacher"]["checkpoint"] = pathlib.Path(checkpoint).name
    (to / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    evaluations = [line for line in lines if line["split"] in ("eval", "teacher_eval")]
    (to / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in evaluations))
    shutil.copyfile(run / "summary.json", to / "summary.json")
    objects = ["data.json"] * ('"<' in json.dumps(config))  # it tells objects of one name apart
    for name in ("analysis.json", *objects):
        if (run / name).exists():
            shutil.copyfile(run / name, to / name)


def main(source: str, target: str) -> None:
    for summary in sorted(pathlib.Path(source).glob("*/summary.json")):
        name = summary.parent.name.replace(":", "_")  # Windows could not check out a colon
        keep(summary.parent, pathlib.Path(target) / name)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python experiments/keep.py RUNS FOLDER")
    main(*sys.argv[1:])
