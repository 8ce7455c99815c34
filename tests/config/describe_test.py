"""The description of each key is read off the code that checks it."""

import pytest

from ldrld_jax import config as config_lib
from ldrld_jax.config import describe
from ldrld_jax.errors import UserError


def test_every_key_has_a_type_a_default_a_range_and_a_meaning():
    found = describe.described()
    assert list(found) == [key for key, _ in config_lib.keys.leaves(config_lib.default())]
    assert not [key.name for key in found.values() if not all(key[:5])]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("epochs", ("int", "1", "at least 1", True)),
        ("data.threads", ("int", "unset", "at least 1", False)),
        ("data.crop_area", ("tuple of float", "(0.08, 1.0)", "above 0 each", True)),
        ("optim.decay_epochs", ("tuple of int", "(150, 180, 210)", "at least 0 each", True)),
        ("data.remainder", ("str", "'keep'", "keep | drop", True)),
        ("data.flip", ("bool", "False", "True | False", True)),
        ("teacher.checkpoint", ("str", "unset", "paths separated by commas", True)),
        ("teacher.workdir", ("str", "unset", "a path", False)),
        ("loss.ldrld.depth", ("int", "7", "at least 2", True)),
        ("loss.topk_tail.beta", ("float", "1.0", "between 0 and 1", True)),
        ("loss.mlkd.views", ("int", "1", "1 | 2", True)),
        ("loss.ldrld.temperature", ("float", "4.0", "above 0", True)),
        ("loss.ldrld.rank_by", ("str", "'student'", "student | teacher", True)),
        ("loss.kd.entropy_bound", ("float", "unset", "above 0", True)),
        ("loss.kd.standardize", ("bool", "False", "True | False", True)),
        ("loss_weight.kd", ("float", "unset", "at least 0", True)),
    ],
)
def test_a_key_is_described_as_it_is_checked(name, expected):
    key = describe.described()[name]
    assert (key.type, key.default, key.range, key.identity) == expected


def test_a_key_of_the_teachers_points_to_the_students():
    found = describe.described()
    assert found["teacher.data.mean"].meaning == "the teacher's data.mean; unset: the student's"
    assert found["teacher.data.augment_seed"].meaning == "the teacher's data.augment_seed; unset: teacher.seed"


def test_a_block_is_explained_by_its_keys_and_an_unknown_key_by_the_nearest():
    lines = describe.explain("student").splitlines()
    assert lines[0] == "student.checkpoint       weights to start from"
    assert len(lines) == 3
    with pytest.raises(UserError, match=r"there is no config key 'optim\.lr'\. Did you mean 'optim\.learning_rate'\?"):
        describe.explain("optim.lr")
