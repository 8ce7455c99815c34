"""A metrics file that survives being torn."""

import json

from etils import epath

from ldrld_jax.record.reader import read_metrics
from ldrld_jax.record.writer import Writer


def test_a_line_can_be_read_back(tmp_path):
    writer = Writer(epath.Path(tmp_path), tensorboard=False)
    writer.write(3, 1.5, "train", {"loss": 0.1 + 0.2})
    assert read_metrics(tmp_path) == [{"step": 3, "epoch": 1.5, "split": "train", "values": {"loss": 0.1 + 0.2}}]


def test_on_resume_later_lines_and_a_torn_one_are_cut_off(tmp_path):
    lines = [json.dumps({"step": step, "epoch": 0.0, "split": "train", "values": {}}) for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, lines[0][:20]]))
    Writer(epath.Path(tmp_path), lines=2, step=2, tensorboard=False)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]
    assert (tmp_path / "metrics.jsonl").read_text().endswith("\n")
