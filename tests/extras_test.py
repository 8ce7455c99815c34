"""Packages that are extras: the losses need none of them, and whatever needs one names it in one line."""

import contextlib
import re
import runpy
import subprocess
import sys
import tomllib

import numpy as np
import pytest
from ml_collections import ConfigDict

import ldrld_jax
from ldrld_jax import Trainer
from ldrld_jax import config as config_lib
from ldrld_jax import main as main_lib
from ldrld_jax.deploy.export import read_student
from ldrld_jax.errors import UserError
from ldrld_jax.files import check_remote
from ldrld_jax.interop.host_teacher import LogitsFile
from ldrld_jax.interop.torch_files import read_tensors, write_safetensors
from ldrld_jax.record.mlflow_run import MLflowRun
from ldrld_jax.record.weights_and_biases import WeightsAndBiases
from ldrld_jax.report.__main__ import main as report_main
from ldrld_jax.sweep.__main__ import main as sweep_main
from ldrld_jax.train.given import NOTHING
from tests.conftest import ROOT

ALONE = """
import runpy, sys
KNOWN = {"jax", "jaxlib", "numpy", "ml_dtypes", "opt_einsum", "scipy", "ldrld_jax", *sys.stdlib_module_names}
class Known:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        known = name.partition(".")[0] in KNOWN or name.startswith("_sysconfigdata")
        return self.finder.find_spec(name, path, target) if known else None
sys.meta_path[:] = map(Known, sys.meta_path)
sys.path.insert(0, "")
runpy.run_path("tests/losses/alone.py")
"""


def test_the_losses_run_with_jax_and_numpy_alone():
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, cwd=ROOT)
    assert done.stderr == ""
    assert done.stdout == f"{len(ldrld_jax.METHODS)} losses\n"


LOG = {"wandb": {"project": None}, "mlflow": None, "writers": None}


@pytest.mark.parametrize(
    "package", ["safetensors", "flatbuffers", "torch", "huggingface_hub", "wandb", "mlflow", "optuna", "gcsfs"]
)
def test_a_package_that_is_missing_is_named_with_its_extra_in_one_line(tmp_path, monkeypatch, package):
    path = tmp_path / f"net.{'pth' if package == 'torch' else 'safetensors'}"
    path.write_bytes(b"\x80\x02" if package == "torch" else (2).to_bytes(8, "little") + b"{}")
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, f"{package}.numpy", None)
    uses = {
        "safetensors": [
            lambda: read_tensors(path, "resnet8"),
            lambda: write_safetensors(path, {"w": np.ones(1)}),
            lambda: LogitsFile.open(str(path), images=1, classes=1),
        ],
        "flatbuffers": [lambda: read_student(tmp_path)],
        "gcsfs": [
            lambda: check_remote("gs://bucket/run"),
            lambda: Trainer.from_config(ConfigDict(), "gs://bucket/run"),
            lambda: config_lib.load("configs/digits.py", ["data.data_dir=gs://bucket/data"]),
        ],
        "huggingface_hub": [lambda: read_tensors("hf://me/net", "resnet8")],
        "torch": [lambda: read_tensors(path, "resnet8")],
        "optuna": [lambda: runpy.run_path(str(ROOT / "experiments/optuna_digits.py"))["search"](1, tmp_path)],
        "wandb": [
            lambda: NOTHING.check_writers(ConfigDict({"log": LOG | {"wandb": {"project": "p"}}})),
            lambda: WeightsAndBiases(tmp_path, "p", {}),
        ],
        "mlflow": [
            lambda: NOTHING.check_writers(ConfigDict({"log": LOG | {"mlflow": "e"}})),
            lambda: MLflowRun(tmp_path, "e", {}),
        ],
    }[package]
    extras = {"safetensors": "export", "flatbuffers": "export", "huggingface_hub": "hub", "gcsfs": "gcs"}
    extra = extras.get(package, package)
    for use in uses:
        with pytest.raises(
            UserError, match=rf"needs {package}(\.numpy)?: pip install 'ldrld_jax\[{extra}\]'\.$"
        ) as error:
            use()
        assert "\n" not in str(error.value)


def test_an_export_without_its_extra_is_refused_before_it_begins(tmp_path, monkeypatch, capsys):
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    assert main_lib.main(["--mode", "export", "--workdir", str(tmp_path), "--config", "configs/digits.py"]) == 2
    assert capsys.readouterr().err == (
        "ldrld_jax: exporting a student needs flatbuffers: pip install 'ldrld_jax[export]'.\n"
    )
    assert not (tmp_path / "export").exists()


@pytest.mark.parametrize("command", ["main", "report", "sweep"])
def test_a_bucket_without_its_extra_is_one_line_of_every_command(monkeypatch, capsys, command):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    main, flags = {
        "main": (main_lib.main, ["--workdir", "gs://bucket/run"]),
        "report": (report_main, ["gs://bucket/run"]),
        "sweep": (sweep_main, ["--config", "configs/digits.py", "--grid", "seed=0,1", "--workdir", "gs://bucket/run"]),
    }[command]
    with contextlib.suppress(SystemExit):  # of argparse
        main(flags)
    assert (
        capsys.readouterr()
        .err.splitlines()[-1]
        .endswith(
            ": gs://bucket/run is on Google Cloud Storage, and opening it needs gcsfs: pip install 'ldrld_jax[gcs]'."
        )
    )


def test_every_extra_of_a_user_stands_in_the_installation_page():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    installing = (ROOT / "docs" / "start.md").read_text().partition("## A complete distillation")[0]
    cells = [line.split("|")[1] for line in installing.splitlines() if line.startswith("| `")]
    assert sorted([*re.findall("`(.+?)`", " ".join(cells)), "docs", "test"]) == sorted(extras)
