"""Every key has a type and a range, and a value outside of it is one line that names the key."""

import math
from typing import get_args

import numpy as np
import pytest

from ldrld_jax import config as config_lib
from ldrld_jax.config.keys import KINDS, Range, leaves
from ldrld_jax.config.load import set_value
from ldrld_jax.errors import UserError
from ldrld_jax.losses import METHODS

KEYS = [key for key, _ in leaves(config_lib.default())]
NAN = float("nan")
# Where -1 and None are among what a key may be although its kind does not say so by itself.
NEGATIVE = {"mesh.data"}


def resolved(key: str, value: object):
    """A digits run with one key set to a value, resolved; a method's key in a run of that method."""
    method = key.split(".")[1] if key.startswith(("loss.", "loss_weight.")) else "ldrld"
    config = config_lib.load("configs/digits.py", [f"method={method}", "logits.dir=somewhere"])
    set_value(config, key, value, "the test")
    return config_lib.resolve(config)


def refused(key: str, value: object) -> str | None:
    """The line with which a value is refused; None if it is taken."""
    try:
        resolved(key, value)
    except UserError as error:
        return str(error)
    return None


def test_every_key_declares_its_kind():
    own = {f"loss.{name}.{field}" for name, method in METHODS.items() for field in method.config.__dataclass_fields__}
    assert set(KEYS) == set(KINDS) | own


@pytest.mark.parametrize("key", KEYS)
def test_a_value_out_of_its_range_or_type_is_refused_in_one_line_that_names_the_key(key):
    name = key.rpartition(".")[2]
    for value in (NAN, -1, (), {"a": 1}, object(), b"3", [None], "", math.inf):
        kind = config_lib.default()
        for part in key.split("."):
            kind = kind.get_type(part) if not hasattr(kind[part], "items") else kind[part]
        allowed = (value == () and kind is tuple and name == "decay_epochs") or (value == "" and key == "compile_cache")
        line = refused(key, value)
        if allowed or (value == -1 and key in NEGATIVE):
            assert line is None
        else:
            assert line is not None, value
            assert name in line and "\n" not in line


@pytest.mark.parametrize("key", [key for key in KEYS if not key.startswith("loss.")])
def test_none_unsets_what_may_be_unset_and_is_refused_elsewhere(key):
    unset = type(None) in get_args(KINDS[key]) or key.startswith(("loss_weight.", "teacher.data.", "teacher.optim."))
    line = refused(key, None)
    if key == "teacher.model":
        assert "needs a teacher: teacher.model" in line
    elif key == "teacher.epochs":
        assert "needs a teacher" in line
    else:
        assert (line is None) == unset
        assert line is None or f"{key} must be of type" in line


@pytest.mark.parametrize(
    ("key", "value", "kept"),
    [
        ("seed", np.int64(3), 3),
        ("epochs", np.uint8(2), 2),
        ("optim.learning_rate", np.float32(0.5), 0.5),
        ("optim.decay_epochs", np.array([3, 4]), (3, 4)),
        ("data.flip", np.bool_(True), True),
        ("data.mean", [np.float64(0.25)], (0.25,)),
        ("loss.ldrld.depth", np.int32(5), 5),
    ],
)
def test_numbers_of_numpy_are_as_good_as_pythons(key, value, kept):
    config = resolved(key, value)
    for part in key.split("."):
        config = config[part]
    assert config == kept
    assert type(config) is type(kept)


def test_a_home_directory_is_expanded_in_every_path(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    paths = [key for key in KEYS if key in KINDS and key.endswith(("dir", "checkpoint", "workdir"))]
    assert len(paths) == 6
    for key in paths:
        config = config_lib.load("configs/digits.py", [f"{key}=~/x"])
        for part in key.split("."):
            config = config[part]
        assert config == "/home/me/x"
    two = config_lib.load("configs/digits.py", ["teacher.checkpoint=~/a,/b,~/c"])
    assert two.teacher.checkpoint == "/home/me/a,/b,/home/me/c"
    with pytest.raises(UserError, match="~nobody-of-that-name/x is in the home directory of a user who does not"):
        config_lib.load("configs/digits.py", ["data.data_dir=~nobody-of-that-name/x"])


@pytest.mark.parametrize(
    ("allowed", "inside", "outside", "text"),
    [
        (Range(1), (1, 2, 10**9), (0, -1, NAN, math.inf), "at least 1"),
        (Range(0, above_low=True), (1e-300, 5), (0, -1e-300, NAN), "above 0"),
        (Range(0, 1, below_high=True), (0, 0.999), (1, -1e-9, 1.5), "at least 0 and below 1"),
        (Range(0, 30), (0, 30), (31, -1), "at least 0 and at most 30"),
        (Range(), (-5, 5), (math.inf, -math.inf, NAN), "finite"),
    ],
    ids=str,
)
def test_a_range_holds_what_it_says(allowed, inside, outside, text):
    assert str(allowed) == text
    assert all(value in allowed for value in inside)
    assert not any(value in allowed for value in outside)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["data.fraction=0."], "data.fraction must be above 0 and at most 1, got 0.0"),
        (["data.held_out=1."], "data.held_out must be at least 0 and below 1, got 1.0"),
        (["data.imbalance=.5"], "data.imbalance must be at least 1, got 0.5"),
        (["data.label_noise=symetric"], "there is no data.label_noise 'symetric'. Did you mean 'symmetric'"),
        (["data.augment=random_crop"], "there is no data.augment 'random_crop'"),
        (["data.augment=random_resized_crop"], "Set data.crop_size"),
        (["data.crop_size=9", "data.resize_size=8"], "must be between 1 and data.resize_size, got 9 and 8"),
        (["teacher.data.crop_size=9", "teacher.data.resize_size=8"], "between 1 and teacher.data.resize_size"),
        (["data.crop_area=(.5,)"], "data.crop_area must be two numbers"),
        (["data.crop_area=(.5,.4)"], "data.crop_area must be two numbers"),
        (["data.rand_magnitude=31"], "data.rand_magnitude must be at least 0 and at most 30, got 31"),
        (["data.on_error=ignore"], "there is no data.on_error 'ignore'"),
        (["data.std=(.5,0.)"], "data.std must be above 0 and at most 1, got 0.0"),
        (["data.mean=('a',)"], "data.mean must be numbers, got ('a',)"),
        (["optim.decay_epochs=(1.5,)"], "optim.decay_epochs must be whole numbers, got (1.5,)"),
        (["compile.image_shape=(3,3)"], "compile.image_shape must be height, width and channels, got (3, 3)"),
        (["data.mean=(128.,)"], "data.mean must be at least 0 and at most 1, got 128.0"),
        (["teacher.data.std=(58.,)"], "teacher.data.std must be above 0 and at most 1, got 58.0"),
    ],
)
def test_keys_that_do_not_go_together_are_one_line(overrides, expected):
    with pytest.raises(UserError) as caught:
        config_lib.load("configs/digits.py", overrides)
    assert expected in str(caught.value)


WEIGHTS = {
    "kd": (0.1, 0.9, 0, {"kd": 1.0}),
    "dkd": (1.0, 1.0, 20, {"dkd": 1.0}),
    "dkd+kd": (1.0, 1.0, 20, {"dkd": 1.0, "kd": 0.9}),
    "kd+skd": (0.1, 1.0, 0, {"kd": 0.9, "skd": 0.9}),
    "ldrld+dist": (1.0, 1.0, 0, {"ldrld": 1.0, "dist": 2.0}),
    "bild": (0.0, 1.0, 0, {"bild": 1.0}),
    "ce": (1.0, 1.0, 0, {}),
}


@pytest.mark.parametrize("method", WEIGHTS)
def test_a_term_has_its_authors_weight_alone_and_in_a_sum(method):
    config = config_lib.resolve(config_lib.load("configs/digits.py", [f"method={method}"]))
    found = (config.ce_weight, config.kd_weight, config.kd_warmup_epochs, config.loss_weight.to_dict())
    assert found == WEIGHTS[method]


def test_a_weight_that_is_given_goes_before_the_authors():
    given = ["method=dkd+kd", "loss_weight.kd=.5", "kd_warmup_epochs=0", "ce_weight=2.", "kd_weight=3."]
    config = config_lib.resolve(config_lib.load("configs/digits.py", given))
    assert (config.ce_weight, config.kd_weight, config.kd_warmup_epochs) == (2.0, 3.0, 0)
    assert config.loss_weight.to_dict() == {"dkd": 1.0, "kd": 0.5}
