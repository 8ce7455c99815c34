"""Configs: files over defaults, overrides over files, and what a resolved config holds."""

import pathlib

import pytest
from ml_collections import ConfigDict

from ldrld_jax import config as config_lib
from ldrld_jax.errors import UserError
from ldrld_jax.losses import METHODS
from tests.conftest import ROOT

CONFIGS = [
    *("digits.py", "cifar100.py", "cifar100.py:resnet56-resnet20", "tiny_imagenet.py", "image_folder.py"),
    *("imagenet.py", "imagenet.py:imagenet_resnet50-imagenet_mobilenetv1"),
]


def test_every_config_file_is_tested():
    assert {name.partition(":")[0] for name in CONFIGS} == {path.name for path in (ROOT / "configs").glob("*.py")}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_loads_and_resolves(name):
    config = config_lib.resolve(config_lib.load(f"configs/{name}"))
    assert config.method == "ldrld"
    assert "resnet" in config.teacher.model


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


def test_resolve_keeps_what_the_run_reads_and_nothing_else():
    config = config_lib.resolve(config_lib.load("configs/digits.py", ["method=kd", "loss.kd.temperature=2"]))
    assert config.loss.to_dict() == {"kd": {"temperature": 2.0, "standardize": False}}
    assert config.loss_weight.to_dict() == {"kd": 1.0}
    assert (config.ce_weight, config.kd_weight, config.kd_warmup_epochs) == (0.1, 0.9, 0)
    assert config.teacher.optim == config.optim
    assert "teacher" in config
    plain = config_lib.resolve(config_lib.load("configs/digits.py", ["method=ce"]))
    assert (plain.ce_weight, plain.loss, plain.teacher) == (1.0, ConfigDict(), ConfigDict())


def test_the_teachers_recipe_is_the_plain_run_of_its_model():
    """So that a teacher trained by hand is found again by `teacher.workdir`."""
    resolved = config_lib.resolve(config_lib.load("configs/cifar100.py", ["teacher.optim.learning_rate=.01"]))
    recipe = config_lib.resolve(config_lib.teacher_recipe(resolved, "resnet32x4"))
    by_hand = config_lib.load(
        "configs/cifar100.py",
        ["method=ce", "student.model=resnet32x4", "optim.learning_rate=.01", "optim.warmup=none"],
    )
    assert config_lib.identity(recipe) == config_lib.identity(config_lib.resolve(by_hand))


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
    with pytest.raises(UserError, match=r"optim\.learning_rate must be a float, got 'fast'"):
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
    assert config_lib.identity(config) == config_lib.identity(moved)
    other = config_lib.resolve(config_lib.load("configs/digits.py", ["seed=1"]))
    assert config_lib.identity(config) != config_lib.identity(other)


def test_the_package_finds_its_configs_wherever_it_is_called_from(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert config_lib.load("configs/cifar100.py:resnet20-resnet8").student.model == "resnet8"
    assert pathlib.Path.cwd() == tmp_path
