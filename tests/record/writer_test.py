"""A metrics file that survives being torn."""

import json
import struct

import pytest
from etils import epath
from tensorboardX.proto import event_pb2, plugin_hparams_pb2

from ldrld_jax.record.reader import read_metrics
from ldrld_jax.record.writer import Writer, closing_all


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


@pytest.mark.parametrize("fails", ["ldrld_jax.record.tensorboard.Events.write", "ldrld_jax.record.writer.append_text"])
def test_a_line_that_could_not_be_written_is_written_once_by_the_next_attempt(fails, tmp_path, monkeypatch):
    writer = Writer(epath.Path(tmp_path))

    def full(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(fails, full)
        with pytest.raises(OSError, match="No space left"):
            writer.write(3, 1.0, "eval", {"top1": 50.0})
    assert (writer.lines, read_metrics(tmp_path)) == (0, [])
    writer.write(3, 1.0, "eval", {"top1": 50.0})
    assert writer.lines == len(read_metrics(tmp_path)) == 1
    writer.close()


def events_of(content):
    """The records of an event file: a length, its checksum, the record, its checksum."""
    while content:
        (size,) = struct.unpack("<Q", content[:8])
        yield content[12 : 12 + size]
        content = content[16 + size :]


def test_tensorboard_has_the_runs_hyperparameters_and_no_others(tmp_path):
    hparams = {"method": "ldrld", "seed": 3, "remat": False, "loss.ldrld.alpha": 10.5, "data.image_size": None}
    Writer(epath.Path(tmp_path), hparams=hparams).close()
    (path,) = tmp_path.glob("events.out.tfevents.*")
    found, data = {}, plugin_hparams_pb2.HParamsPluginData()
    for event in map(event_pb2.Event.FromString, events_of(path.read_bytes())):
        for value in event.summary.value:
            data.ParseFromString(value.metadata.plugin_data.content)
            assert (value.tag, value.metadata.plugin_data.plugin_name) == ("_hparams_/session_start_info", "hparams")
            found |= {key: getattr(v, v.WhichOneof("kind")) for key, v in data.session_start_info.hparams.items()}
    assert found == {"method": "ldrld", "seed": 3.0, "remat": False, "loss.ldrld.alpha": 10.5}


class Closed:
    """A writer that notes how it is closed, and raises then if it is told to."""

    def __init__(self, said, error=None):
        self.said, self.error = said, error

    def write(self, step, epoch, split, values):
        pass

    def close(self):
        self.said.append("close")
        if self.error:
            raise self.error


class Told(Closed):
    def fail(self, error):
        self.said.append(error)
        if self.error:
            raise self.error


def test_a_writer_that_cannot_be_closed_is_named_and_the_others_are_closed(caplog):
    said = []
    with closing_all([Closed(said, OSError("the service is away.\nTry later.")), Closed(said), object()]):
        pass
    assert said == ["close", "close"]
    assert [record.message for record in caplog.records if record.name == "ldrld_jax"] == [
        "Closed could not be closed: the service is away. Its last lines may be lost."
    ]


@pytest.mark.parametrize("error", [ValueError("diverged"), KeyboardInterrupt()])
def test_writers_are_told_of_the_error_that_ended_the_run_and_do_not_hide_it(error, caplog):
    said = []
    with pytest.raises(type(error)) as raised, closing_all([Told(said, OSError("away")), Told(said), Closed(said)]):
        raise error
    assert raised.value is error
    assert said == [error, "close", error, "close", "close"]
    assert len(caplog.records) == 2


def test_events_that_cannot_be_closed_end_no_run(tmp_path, monkeypatch, caplog):
    writer = Writer(epath.Path(tmp_path))

    def full(events):
        events._writer.close()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ldrld_jax.record.tensorboard.Events.close", full)
    writer.close()
    assert "Events could not be closed: [Errno 28] No space left on device" in caplog.text
