"""Students for the Hugging Face Hub, out and in: by a folder, and by a local server in the Hub's place."""

import json
import pathlib
import sys
import types

import jax
import numpy as np
import pytest
import safetensors.numpy
import yaml
from PIL import Image

import ldrld_jax
from ldrld_jax import config as config_lib
from ldrld_jax import main as main_lib
from ldrld_jax.data.pipeline import make_eval_source
from ldrld_jax.deploy import export, hub
from ldrld_jax.errors import UserError
from ldrld_jax.interop import hub as hub_files
from ldrld_jax.models import MODELS
from ldrld_jax.train import folder, trainer
from ldrld_jax.train.networks import Networks
from ldrld_jax.train.opening import teacher_warnings
from tests.hub_server import serving
from tests.models import torch_zoo
from tests.pages import blocks
from tests.tiny_net import TinyNet


@pytest.fixture(autouse=True)
def tiny_net(monkeypatch):
    monkeypatch.setitem(MODELS, "tiny_net", TinyNet)


@pytest.fixture
def server(monkeypatch, tmp_path):
    pytest.importorskip("huggingface_hub", reason="needs the hub extra")
    with serving(monkeypatch, tmp_path / "cache") as running:
        yield running


@pytest.fixture(scope="module")
def written(teacher_dir, tmp_path_factory):
    """A folder for the Hub, and the run's images with the logits of its best student."""
    place = tmp_path_factory.mktemp("hub")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, "tiny_net", TinyNet)
        config = config_lib.load_run(teacher_dir)
        assert hub.export(config, teacher_dir, str(place)) == str(place)
        images, _ = make_eval_source(config.data).read(np.arange(5))
        student, *_ = export.student_of(config, teacher_dir)
        return place, images, np.asarray(student.program.call(images))


def upload(server, repo, place):
    return server.commit(repo, {path.name: path.read_bytes() for path in place.iterdir()})


def test_a_folder_for_the_hub_holds_the_student_and_no_program(written, teacher_dir):
    place, images, logits = written
    assert {path.name for path in place.iterdir()} == {"README.md", "config.json", "model.safetensors"}
    content = json.loads((place / "config.json").read_text())
    assert (content["architecture"], content["num_classes"], content["id2label"]["7"]) == ("tiny_net", 10, "7")
    student = hub.read_student(str(place))
    assert student.labels == tuple("0123456789")
    np.testing.assert_array_equal(student.program.call(images), logits)
    header = yaml.safe_load((place / "README.md").read_text().split("---\n")[1])
    summary = json.loads((pathlib.Path(teacher_dir) / "summary.json").read_text())
    (result,) = header["model-index"][0]["results"]
    assert result["metrics"][0]["value"] == summary["best_top1"]
    assert (header["library_name"], header["datasets"]) == ("ldrld_jax", ["digits"])


def test_files_of_something_else_are_not_replaced(teacher_dir, tmp_path):
    """A run's own folder has a config.json too, and a project's a README.md."""
    (tmp_path / "README.md").write_text("mine")
    before = (pathlib.Path(teacher_dir) / "config.json").read_bytes()
    for place, name in ((teacher_dir, "config.json"), (str(tmp_path), "README.md")):
        with pytest.raises(UserError, match=f"has {name} of something else. Name another folder"):
            hub.export(config_lib.load_run(teacher_dir), teacher_dir, place)
    assert (pathlib.Path(teacher_dir) / "config.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"] and (
        tmp_path / "README.md"
    ).read_text() == "mine"


def test_the_precision_of_an_export_is_noted_and_predicted_in(teacher_dir, tmp_path):
    config = config_lib.load_run(teacher_dir, ["precision=bfloat16"])
    hub.export(config, teacher_dir, str(tmp_path))
    assert json.loads((tmp_path / "config.json").read_text())["precision"] == "bfloat16"
    assert "10 classes, bfloat16" in (tmp_path / "README.md").read_text()
    images, _ = make_eval_source(config.data).read(np.arange(5))
    student, *_ = export.student_of(config, teacher_dir)
    predicted = hub.read_student(str(tmp_path)).program.call(images)
    np.testing.assert_array_equal(predicted, student.program.call(images))


def test_a_second_export_replaces_the_first(written, teacher_dir):
    place, images, logits = written
    hub.export(config_lib.load_run(teacher_dir), teacher_dir, str(place))
    np.testing.assert_array_equal(hub.read_student(str(place)).program.call(images), logits)


def test_an_upload_predicts_by_its_name_as_the_run_does(written, teacher_dir, server, tmp_path, capsys, monkeypatch):
    _, images, logits = written
    assert main_lib.main(["--mode=export", "--workdir", teacher_dir, "--hub", "hf://me/net"]) == 0
    (commit,) = server.commits["me/net"]
    assert capsys.readouterr().out == f"hf://me/net@{commit}\n"
    assert server.made == [{"name": "net", "organization": "me", "visibility": "private"}]
    Image.fromarray(images[0, ..., 0]).save(tmp_path / "scan.png")
    assert main_lib.main(["--mode=predict", "--top_k=1", "--workdir=hf://me/net", f"{tmp_path}/scan.png"]) == 0
    chance, best = float(jax.nn.softmax(logits[0]).max()), int(logits[0].argmax())
    assert capsys.readouterr().out == f"{tmp_path}/scan.png  {best} {100 * chance:.2f} %\n"

    (tmp_path / "README.md").write_bytes(server.commits["me/net"][commit]["README.md"])
    (block,) = blocks(tmp_path / "README.md", "python")
    exec(block.code, scope := {})
    inputs = (images / np.float32(255) - np.float32(0.305)) / np.float32(0.376)
    np.testing.assert_allclose(scope["model"](inputs, train=False), logits, rtol=0, atol=1e-5)


def test_a_teachers_commit_is_pinned_when_its_run_begins(written, server, tiny, tmp_path, monkeypatch):
    first = upload(server, "me/net", written[0])
    config = tiny("method=kd", "teacher.checkpoint=hf://me/net")
    planned = []
    monkeypatch.setattr(trainer.Run, "plan", lambda config, *_, **__: planned.append(config) or sys.exit())
    with pytest.raises(SystemExit):
        trainer.train(config, tmp_path / "run")
    assert planned[0].teacher.checkpoint == f"hf://me/net@{first}"

    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text(planned[0].to_json())
    weights = folder._digest(f"hf://me/net@{first}")
    second = server.commit("me/net", {"model.safetensors": b"other weights"})
    config = config_lib.resolve(config)
    assert folder.pinned(config, tmp_path / "run").teacher.checkpoint == f"hf://me/net@{first}"
    assert folder.pinned(config, tmp_path / "new").teacher.checkpoint == f"hf://me/net@{second}"
    asked = len(server.asked)
    assert folder._digest(f"hf://me/net@{first}") == weights
    assert len(server.asked) == asked  # a commit in the cache needs no connection


def test_a_teacher_of_the_hub_has_the_weights_and_says_how_it_is_fed(written, server, tiny, teacher_dir):
    upload(server, "me/net", written[0])
    config = config_lib.resolve(tiny("method=kd", "teacher.checkpoint=hf://me/net", "data.mean=.5"))
    networks = Networks(10, 1, "float32")
    _, theirs = networks.restore("hf://me/net", "tiny_net", config.data)
    _, ours = networks.restore(teacher_dir, "tiny_net", config.data)
    jax.tree.map(np.testing.assert_array_equal, theirs, ours)

    source = types.SimpleNamespace(class_names=range(10))
    run = types.SimpleNamespace(config=config, batches=types.SimpleNamespace(source=source))
    assert [*teacher_warnings(run, ["hf://me/net"], 90.0)] == [
        "the teacher in hf://me/net was trained with a different normalisation: set teacher.data.mean=0.305 "
        "teacher.data.std=0.376"
    ]
    config.teacher.data.mean = (0.305,)
    assert [*teacher_warnings(run, ["hf://me/net"], 90.0)] == []


def test_a_teacher_by_timms_name_brings_its_weights(server, tiny):
    state = {key: value.astype(np.float32) for key, value in torch_zoo.state_dict("imagenet_resnet18").items()}
    weights = safetensors.numpy.save(state, metadata={"format": "pt"})
    described = {"architecture": "resnet18", "pretrained_cfg": {"mean": [0.485, 0.456, 0.406], "std": [0.5] * 3}}
    files = {"model.safetensors": weights, "config.json": json.dumps(described).encode(), "pytorch_model.bin": b"no"}
    commit = server.commit("timm/resnet18.a1_in1k", files)
    teacher = config_lib.resolve(tiny("method=kd", "teacher.model=timm/resnet18.a1_in1k")).teacher
    assert (teacher.model, teacher.checkpoint) == ("imagenet_resnet18", "hf://timm/resnet18.a1_in1k")
    _, variables = Networks(1000, 3, "float32").restore(teacher.checkpoint, teacher.model, teacher.data)
    kernel = np.asarray(variables.params["layer4"]["1"]["conv2"]["kernel"])
    np.testing.assert_array_equal(kernel, state["layer4.1.conv2.weight"].transpose(2, 3, 1, 0))
    assert hub_files.normalisation(f"hf://timm/resnet18.a1_in1k@{commit}")["mean"] == (0.485, 0.456, 0.406)


@pytest.mark.parametrize(
    ("overrides", "teacher"),
    [
        (["teacher.model=timm/resnet50.tv_in1k@v1"], ("imagenet_resnet50", "hf://timm/resnet50.tv_in1k@v1")),
        (["teacher.model=timm/resnet34", "teacher.checkpoint=a.pth"], ("imagenet_resnet34", "a.pth")),
        (
            ["teacher.model=timm/resnet18.a1_in1k,timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k"],
            (
                "imagenet_resnet18,vit_tiny_patch16_224",
                "hf://timm/resnet18.a1_in1k,hf://timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k",
            ),
        ),
        (["teacher.model=timm/convnext_tiny.fb_in1k"], "there is no model of timm here 'convnext_tiny'"),
        (["teacher.model=timm/resnet18.a1_in1k,resnet8"], "Set teacher.checkpoint for each"),
    ],
)
def test_timms_names_are_models_of_ours(overrides, teacher, tiny):
    config = tiny("method=kd", *overrides)
    if isinstance(teacher, str):
        with pytest.raises(UserError, match=teacher):
            config_lib.resolve(config)
    else:
        found = config_lib.resolve(config).teacher
        assert (found.model, found.checkpoint) == teacher


# what is changed in a stranger's config.json; the line
STRANGE = {
    "code as the network": ({"architecture": "ldrld_trap:net"}, "'ldrld_trap:net', which is not of this package"),
    "no name of a network": ({"architecture": ["a"]}, "['a'], which is not of this package"),
    "no digests": ({"sha256": {}}, "is not of a student"),
    "digests that are none": ({"sha256": None}, "is not of a student"),
    "no preprocessing": ({"preprocessing": None}, "is not of a student"),
    "labels that are none": ({"id2label": ["a"]}, "is not of a student"),
    "too few labels": ({"id2label": {"0": "a"}}, "does not fit tiny_net with 1 classes"),
    "another precision": ({"precision": "int4"}, "is not of a student"),
    "other products": ({"matmul_precision": "; rm"}, "is not of a student"),
}


@pytest.mark.parametrize("case", STRANGE)
def test_a_strangers_folder_is_refused_in_one_line(case, written, tmp_path):
    changed, line = STRANGE[case]
    for path in written[0].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(content | changed))
    with pytest.raises(UserError) as error:
        hub.read_student(str(tmp_path))
    assert line in str(error.value) and "\n" not in str(error.value)


def test_weights_of_another_export_are_refused(written, tmp_path):
    for path in written[0].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    safetensors.numpy.save_file(
        {name: np.asarray(-array) for name, array in weights.items()}, tmp_path / "model.safetensors"
    )
    with pytest.raises(UserError, match=r"model\.safetensors is not what .*config\.json describes: its SHA-256"):
        hub.read_student(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("hf://net", "must be hf://OWNER/NAME"),
        ("hf://me/../net", "only .safetensors files are taken"),
        ("hf://me/net/pytorch_model.bin", "only .safetensors files are taken"),
        ("hf://me/nothing", "RepositoryNotFoundError"),
        ("hf://me/net@v1", "RevisionNotFoundError"),
    ],
)
def test_what_the_hub_does_not_have_is_said_in_one_line(name, line, server):
    server.commit("me/net", {"pytorch_model.bin": b"\x80\x02"})
    with pytest.raises(UserError) as error:
        ldrld_jax.load_torch_checkpoint(name, "tiny_net", 10)
    assert line in str(error.value) and "\n" not in str(error.value)
    assert not [path for path in server.asked if path.endswith(".bin")]


def test_names_on_the_hub_are_written_as_they_are_read():
    for name in (
        "hf://me/net",
        "hf://me/net@v1.0",
        "hf://me/net@main/weights/a.safetensors",
        "hf://me/net@refs%2Fpr%2F1",
    ):
        assert str(hub_files.parse(name)) == name
    assert hub_files.parse("hf://me/net@refs%2Fpr%2F1").revision == "refs/pr/1"
