"""Configs: files over defaults, overrides over files, and what a resolved config holds."""

import functools
import pathlib
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict

from ldrld_jax import config as config_lib
from ldrld_jax.config.load import set_value
from ldrld_jax.errors import UserError
from ldrld_jax.identity import identity
from ldrld_jax.losses import METHODS
from ldrld_jax.models import create_model
from tests.conftest import ROOT

PAIRS = re.findall(r"^\| (\w+-\w+) +\|", (ROOT / "configs/cifar100.py").read_text(), re.MULTILINE)
CONFIGS = [
    *("digits.py", "cifar100.py", "cifar100_laptop.py", "image_folder.py"),
    *("imagenet.py", "imagenet.py:imagenet_resnet50-imagenet_mobilenetv1"),
    *("tiny_imagenet.py", "tiny_imagenet.py:ResNet18-ShuffleV2"),
    *(f"cifar100.py:{pair}" for pair in PAIRS),
]


def test_every_config_file_is_tested():
    of_texts = {"tokens.py"}  # tests/examples/tokens_test.py
    files = {path.name for path in (ROOT / "configs").glob("*.py")}
    assert {name.partition(":")[0] for name in CONFIGS} | of_texts == files


IMAGES = {"digits": (8, 8, 1), "cifar100": (32, 32, 3), "tiny_imagenet": (64, 64, 3), "imagenet2012": (224, 224, 3)}


@functools.cache
def parameters(model: str, shape: tuple[int, int, int], classes: int) -> int:
    """Counts the parameters of a model that takes images of a shape, without computing anything."""
    common = dict(dtype=jnp.float32, param_dtype=jnp.float32)

    def built():
        module = create_model(model, classes, shape[-1], rngs=nnx.Rngs(0), **common)
        return module(jnp.zeros((2, *shape)), train=False), nnx.state(module, nnx.Param)

    logits, params = nnx.eval_shape(built)
    chex.assert_shape(logits, (2, classes))
    return sum(leaf.size for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("student", ["resnet8", "MobileNetV2", "ShuffleV1", "ShuffleV2"])
def test_a_students_learning_rate_is_the_same_on_a_fifth_of_the_images(student):
    rates = [
        config_lib.load(f"configs/{name}.py:resnet20-{student}").optim.learning_rate
        for name in ("cifar100", "cifar100_laptop")
    ]
    assert rates == [0.05 if student == "resnet8" else 0.01] * 2


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_loads_locks_and_builds(name):
    config = config_lib.resolve(config_lib.load(f"configs/{name}")).lock()
    assert config.method == "ldrld"
    with pytest.raises(AttributeError):
        config.sede = 1
    shape = IMAGES.get(config.data.name, (224, 224, 3))
    student, teacher = (parameters(model, shape, 100) for model in (config.student.model, config.teacher.model))
    assert 60_000 < student < teacher


def test_configs_do_not_import_the_package():
    for path in (ROOT / "configs").glob("*.py"):
        assert "import ldrld_jax" not in path.read_text()
        assert "from ldrld_jax" not in path.read_text()


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("seed=3", 3),
        ("optim.learning_rate=1", 1.0),
        ("data.flip=true", True),
        ("optim.decay_epochs=(3, 4)", (3, 4)),
        ("optim.decay_epochs=[3]", (3,)),
        ("optim.decay_epochs=()", ()),
        ("data.mean=.5", (0.5,)),
        ("loss.ldrld.alpha=3", 3.0),
        ("loss.ldrld.use_irw=False", False),
        ("loss.ldrld.rank_by=teacher", "teacher"),
        ("teacher.checkpoint=a=b", "a=b"),
        ("teacher.epochs=None", None),
        ("data.data_dir=None", None),
        ("teacher.model=None", None),  # which the file sets
        ("data.eval_split=None", "None"),  # a split's name, which cannot be unset
    ],
)
def test_an_override_is_parsed_by_the_type_of_its_key(override, expected):
    config = config_lib.load("configs/digits.py", [override])
    for part in override.partition("=")[0].split("."):
        config = config[part]
    assert config == expected
    assert type(config) is type(expected)


def test_a_file_is_found_in_the_working_directory_first(tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/digits.py").write_text(
        "from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict({'seed': 17})\n"
    )
    monkeypatch.chdir(tmp_path)
    assert config_lib.load("configs/digits.py").seed == 17
    (tmp_path / "configs/digits.py").unlink()
    assert config_lib.load("configs/digits.py").seed == 0


def test_a_file_may_define_dataclasses_whose_annotations_are_text(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from __future__ import annotations\nimport dataclasses\nfrom ml_collections import ConfigDict\n"
        "@dataclasses.dataclass\nclass Recipe:\n    seed: int = 17\n"
        "def get_config():\n    return ConfigDict(dataclasses.asdict(Recipe()))\n"
    )
    assert config_lib.load(str(tmp_path / "mine.py")).seed == 17


def test_an_array_without_an_axis_is_a_number():
    config = config_lib.default()
    set_value(config, "seed", np.array(3), source="a file")
    assert (config.seed, type(config.seed)) == (3, int)


def test_a_file_that_returns_no_config_is_one_line(tmp_path):
    (tmp_path / "mine.py").write_text("def get_config():\n    {'seed': 17}\n")
    with pytest.raises(UserError, match=r"get_config of .*mine\.py must return a ConfigDict, got NoneType"):
        config_lib.load(str(tmp_path / "mine.py"))


def test_a_schedule_of_the_methods_weight_has_its_own_warm_up():
    def warmup(*flags):
        flags = ["method=dkd+kd", *flags]
        return config_lib.resolve(config_lib.load("configs/digits.py", flags)).kd_warmup_epochs

    assert warmup() == 20
    assert warmup("loss_schedule.kd_weight=linear:0@1:1@20") == 0
    assert warmup("loss_schedule.kd_weight=linear:0@1:1@20", "kd_warmup_epochs=3") == 3


def test_resolve_keeps_what_the_run_reads_and_nothing_else():
    config = config_lib.resolve(config_lib.load("configs/digits.py", ["method=kd", "loss.kd.temperature=2"]))
    weighting = {"entropy_weighting": False, "entropy_temperature": 3.0, "entropy_bound": None}
    assert config.loss.to_dict() == {"kd": {"temperature": 2.0, "standardize": False, **weighting}}
    assert config.loss_weight.to_dict() == {"kd": 1.0}
    assert (config.ce_weight, config.kd_weight, config.kd_warmup_epochs) == (0.1, 0.9, 0)
    assert config.teacher.optim == config.optim
    assert "teacher" in config
    plain = config_lib.resolve(config_lib.load("configs/digits.py", ["method=ce"]))
    assert (plain.ce_weight, plain.loss, plain.teacher) == (1.0, ConfigDict(), ConfigDict())


def test_the_teachers_recipe_is_the_plain_run_of_its_model():
    """Lets `teacher.workdir` find a teacher that was trained by hand."""
    resolved = config_lib.resolve(config_lib.load("configs/cifar100.py", ["teacher.optim.learning_rate=.01"]))
    recipe = config_lib.resolve(config_lib.teacher_recipe(resolved, "resnet32x4"))
    by_hand = config_lib.load(
        "configs/cifar100.py",
        ["method=ce", "student.model=resnet32x4", "optim.learning_rate=.01", "optim.warmup=none"],
    )
    assert identity(recipe) == identity(config_lib.resolve(by_hand))


def test_a_checkpoint_goes_before_a_recipe():
    config = config_lib.load("configs/digits.py", ["teacher.checkpoint=somewhere"])
    assert config.teacher.epochs is not None
    assert config_lib.resolve(config).teacher.epochs is None


def test_every_method_has_a_block_with_all_its_fields():
    config = config_lib.default()
    for name, method in METHODS.items():
        assert set(config.loss[name]) == set(method.config.__dataclass_fields__)
        assert config_lib.method_config(config, name) == method.config()


def test_a_wrong_override_names_the_key():
    with pytest.raises(UserError, match=r"optim\.learning_rate must be of type float, got 'fast'"):
        config_lib.load("configs/digits.py", ["optim.learning_rate=fast"])


def test_identity_leaves_out_where_and_how_fast():
    config = config_lib.resolve(config_lib.load("configs/digits.py"))
    moved = config_lib.resolve(
        config_lib.load(
            "configs/digits.py",
            [
                *("data.data_dir=/x", "teacher.workdir=/y", "data.threads=9", "mesh.data=1"),
                *("log.every_steps=3", "checkpoint.every_steps=5"),
            ],
        )
    )
    assert identity(config) == identity(moved)
    other = config_lib.resolve(config_lib.load("configs/digits.py", ["seed=1"]))
    assert identity(config) != identity(other)


def test_the_package_finds_its_configs_wherever_it_is_called_from(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert config_lib.load("configs/cifar100.py:resnet20-resnet8").student.model == "resnet8"
    assert pathlib.Path.cwd() == tmp_path


def test_a_teacher_is_not_trained_by_an_optimizer_that_is_an_object():
    config = config_lib.load("configs/digits.py", ["teacher.epochs=1"])
    config.optim.name = "<optimizer>"
    with pytest.raises(UserError, match=r"Set teacher\.optim\.name, to sgd for example\.$"):
        config_lib.resolve(config)
    config.teacher.optim.name = "sgd"
    assert config_lib.resolve(config).teacher.optim.name == "sgd"
