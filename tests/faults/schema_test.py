"""Files of a run with anything in the place of anything are answered in one line."""

import copy
import json

import pytest

from ldrld_jax import config as config_lib
from ldrld_jax.deploy.preprocessing import view_of
from ldrld_jax.errors import UserError
from ldrld_jax.record.reader import check_class_names, read_data, read_summary

DEEP = "[" * 900 + "]" * 900
STRANGE = [None, [], {}, "x\0y", 10**400, "text", -1, True, [[1]], {"a": {"b": 1}}, "DEEP"]
KEYS = (
    *("method", "seed", "epochs", "ce_weight", "precision", "data", "data.name", "data.data_dir", "data.mean", "optim"),
    *("optim.decay_epochs", "optim.learning_rate", "student.model", "teacher.model", "teacher.data.crop_area", "loss"),
    *("loss.ldrld.depth", "loss_weight", "mesh.fsdp"),
)


def changed(content, key, value):
    """A copy with another value at a dotted key."""
    content = copy.deepcopy(content)
    *path, last = key.split(".")
    block = content
    for part in path:
        block = block[part]
    block[last] = value
    return content


def refused(read, path, content) -> bool:
    """Checks that a UserError is raised, and no other error, for such a file."""
    path.write_text(json.dumps(content).replace('"DEEP"', DEEP))
    try:
        read()
    except UserError as error:
        assert "\n" not in str(error)
        return True
    return False


@pytest.mark.parametrize("key", KEYS)
def test_a_config_with_anything_in_a_keys_place_is_read_or_refused_in_one_line(tmp_path, key):
    good = json.loads(config_lib.resolve(config_lib.load("configs/digits.py")).to_json())
    read = lambda: config_lib.resolve(config_lib.load_run(str(tmp_path)))  # noqa: E731
    assert not refused(read, tmp_path / "config.json", good)
    times = [refused(read, tmp_path / "config.json", changed(good, key, value)) for value in STRANGE]
    assert sum(times) >= 4


def test_a_summary_and_a_note_of_data_likewise(tmp_path):
    summary = {"steps": 3, "teacher_top1": 2.0, "warnings": []}
    split = {"images": 3, "digest": "x"}
    data = {"classes": ["a", "b"], "form": {}, "weights": {}, "train": split, "eval": split}
    for key in summary:
        for value in STRANGE:
            path = tmp_path / "summary.json"
            assert refused(lambda: read_summary(tmp_path, numbers=("steps",)), path, changed(summary, key, value)) == (
                key == "steps" and value != -1
            )
    check = lambda: check_class_names(tmp_path, ["a", "b"], whose="the run")  # noqa: E731
    assert all(refused(check, tmp_path / "data.json", changed(data, "classes", value)) for value in STRANGE)
    for key in ("train", "eval", "train.images"):
        for value in STRANGE:
            path = tmp_path / "data.json"
            expected = not (key == "train.images" and value == -1)
            assert refused(lambda: read_data(tmp_path), path, changed(data, key, value)) == expected


@pytest.mark.parametrize(
    "key", ["input", "input.shape", "before", "before.resize_shorter_side", "before.turn_as_exif_says"]
)
def test_a_preprocessing_likewise(key):
    good = {"input": {"shape": ["batch", 8, 8, 3]}, "before": {"turn_as_exif_says": True, "resize_shorter_side": 9}}
    view_of(good)
    for value in STRANGE:
        allowed = (value is None and key.endswith("side")) or (value is True and key.endswith("says"))
        if not allowed:
            with pytest.raises(UserError, match=r"preprocessing\.json is not of an export"):
                view_of(changed(good, key, value))
