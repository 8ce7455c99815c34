"""Teachers of PyTorch and ONNX Runtime, data of Hugging Face, writers to W&B and MLflow, where installed."""

import contextlib
import dataclasses
import io
import json
import struct

import numpy as np
import pytest
from etils import epath
from PIL import Image

import ldrld_jax
from ldrld_jax.data.given import as_source
from ldrld_jax.data.source import fingerprint
from ldrld_jax.errors import UserError
from ldrld_jax.record.mlflow_run import MLflowRun
from ldrld_jax.record.weights_and_biases import WeightsAndBiases
from ldrld_jax.runtime.signals import Interrupted
from tests.conftest import comparable_lines
from tests.pages import PAGES

MEAN, STD = 0.25, 0.5


@pytest.fixture(scope="module")
def weights():
    """Weights `[64, 10]` of a linear teacher."""
    return np.random.default_rng(1).normal(size=(64, 10)).astype(np.float32)


def expected_top1(weights, images, labels) -> float:
    inputs = (images.astype(np.float64) / 255 - MEAN) / STD
    return 100 * np.mean(np.argmax(inputs.reshape(len(images), -1) @ weights, axis=-1) == labels)


def the_block(library: str) -> str:
    """The code block of the page on the library that uses a package."""
    (block,) = (b for b in PAGES["docs/library.md"].read_text().split("```") if b.startswith("text\n") and library in b)
    return block.removeprefix("text\n")


def torch_teacher(weights, tmp_path):
    torch = pytest.importorskip("torch")
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10, bias=False))
    with torch.no_grad():
        net[1].weight.copy_(torch.from_numpy(weights.T))

    @torch.inference_mode()
    def logits(images):
        return net(torch.from_numpy(images.transpose(0, 3, 1, 2))).numpy()

    return ldrld_jax.HostTeacher(logits, mean=MEAN, std=STD)


def onnx_teacher(weights, tmp_path):
    """The one of the page, with a model of a single layer in place of the user's."""
    onnxruntime, onnx = pytest.importorskip("onnxruntime"), pytest.importorskip("onnx")
    batch = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", *shape])
        for name, shape in (("input", (1, 8, 8)), ("logits", (10,)))
    ]
    nodes = [
        onnx.helper.make_node("Flatten", ["input"], ["flat"]),
        onnx.helper.make_node("MatMul", ["flat", "w"], ["logits"]),
    ]
    graph = onnx.helper.make_graph(nodes, "teacher", batch[:1], batch[1:], [onnx.numpy_helper.from_array(weights, "w")])
    opset = [onnx.helper.make_opsetid("", 17)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=8), tmp_path / "teacher.onnx")
    code = the_block("onnxruntime").replace("teacher.onnx", str(tmp_path / "teacher.onnx"))
    scope = {"onnxruntime": onnxruntime, "HostTeacher": ldrld_jax.HostTeacher, "MEAN": MEAN, "STD": STD}
    exec(code, scope)
    return scope["teacher"]


@pytest.mark.parametrize("of", [torch_teacher, onnx_teacher])
def test_a_teacher_of_another_framework_teaches_what_its_weights_say(make, digits, weights, tmp_path, of):
    """Compares with the run that the same weights teach in JAX, to rounding."""
    keys = {"data.mean": (MEAN,), "data.std": (STD,)}
    result = make(teacher=of(weights, tmp_path), config=keys).fit()
    assert result.summary["teacher_top1"] == pytest.approx(expected_top1(weights, *digits["evaluation"]))
    linear = (lambda w, images, train: images.reshape(len(images), -1) @ w, weights)
    same = make(teacher=linear, config=keys, workdir=tmp_path / "same").fit()
    for ours, theirs in zip(result.metrics, same.metrics, strict=True):
        np.testing.assert_allclose([*ours["values"].values()][:3], [*theirs["values"].values()][:3], rtol=1e-4)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float64"])
def test_a_tensor_of_pytorch_is_taken_with_its_gradient_and_in_any_type(kind):
    torch = pytest.importorskip("torch")
    logits = torch.arange(6.0, requires_grad=True).reshape(2, 3).to(getattr(torch, kind))
    teacher = ldrld_jax.HostTeacher(lambda images: logits)
    np.testing.assert_array_equal(teacher(np.zeros((2, 4)), classes=3), [[0, 1, 2], [3, 4, 5]])


def test_what_numpy_cannot_convert_is_one_line():
    teacher = ldrld_jax.HostTeacher(lambda images: {"logits": 1}, name="dict")
    with pytest.raises(
        UserError, match=r"^the teacher dict returns dict, which NumPy cannot convert \(float\(\) .*\)\."
    ):
        teacher(np.zeros((2, 4)), classes=3)


def test_a_teacher_that_fails_is_one_line():
    teacher = ldrld_jax.HostTeacher(lambda images: images * {}["scale"], name="scaled")
    with pytest.raises(UserError, match=r"^the teacher scaled fails on images \(2, 4\) float64: KeyError: .*\. Mend"):
        teacher(np.ones((2, 4)), classes=3)


def test_a_sparse_tensor_is_one_line():
    torch = pytest.importorskip("torch")
    teacher = ldrld_jax.HostTeacher(lambda images: torch.eye(2, 3).to_sparse(), name="sparse")
    with pytest.raises(UserError, match=r"^the teacher sparse returns Tensor, which NumPy cannot convert"):
        teacher(np.zeros((2, 4)), classes=3)


@pytest.mark.parametrize("ready", [False, True])
def test_encoded_images_that_are_not_turned_are_no_contradiction(make, digits, ready):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(picture=datasets.Image(), digit=datasets.ClassLabel(names=[*"abcdefghij"]))
    pictures = [Image.fromarray(np.repeat(image, 3, axis=-1)) for image in digits["train"][0]]
    data: object = datasets.Dataset.from_dict(
        {"picture": pictures, "digit": digits["train"][1].tolist()}, features=features
    )
    data = as_source(data) if ready else data
    student = (lambda w, images, train: images.reshape(len(images), -1) @ w, np.zeros((192, 10), np.float32))
    keys = {"data.crop_size": 8, "data.resize_size": 8, "data.exif": False}
    common = dict(student=student, teacher=None, method="ce", epochs=1, config=keys)
    assert make(train=data, evaluation=data, **common).fit().summary["steps"] == 3


def test_a_data_set_of_hugging_face_gives_the_images_that_it_was_made_of(make, digits, tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(picture=datasets.Image(), digit=datasets.ClassLabel(names=[*"abcdefghij"]))

    def of(split):
        images, labels = digits[split]
        pictures = [Image.fromarray(np.repeat(image, 3, axis=-1)) for image in images]
        return datasets.Dataset.from_dict({"picture": pictures, "digit": labels.tolist()}, features=features)

    source = as_source(of("train"))
    assert source.class_names == tuple("abcdefghij")
    np.testing.assert_array_equal(source.records.labels(), digits["train"][1])
    record = source.records.__getitems__([7])[0]
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(record["image"])))[..., :1], digits["train"][0][7])
    assert fingerprint(source) == fingerprint(as_source(of("train")))
    assert fingerprint(source) != fingerprint(as_source(of("train").select(range(1, 90))))
    moved = of("train").map(lambda row: row)  # another fingerprint of its own, as of a file that is touched
    assert fingerprint(source) == fingerprint(as_source(moved.cast(features)))
    student = (lambda w, images, train: images.reshape(len(images), -1) @ w, np.zeros((192, 10), np.float32))
    keys = {"data.crop_size": 8, "data.resize_size": 8}
    common = dict(student=student, teacher=None, method="ce", config=keys)
    result = make(train=of("train"), evaluation=of("evaluation"), **common).fit()
    arrays = {split: (np.repeat(images, 3, axis=-1), labels) for split, (images, labels) in digits.items()}
    make(**arrays, **{**common, "config": {}}, workdir=tmp_path / "arrays").fit()
    assert comparable_lines(tmp_path / "run") == comparable_lines(tmp_path / "arrays")
    assert result.summary["best_top1"] > 30
    without = of("train").cast_column("digit", datasets.Value("int64"))
    with pytest.raises(UserError, match="an Image and a ClassLabel are needed"):
        as_source(without)
    coarse = of("train").add_column("coarse", [0] * 90).cast_column("coarse", datasets.ClassLabel(names=["a", "b"]))
    with pytest.raises(UserError, match=r"have several columns of ClassLabel: digit, coarse\. Keep the one to use"):
        as_source(coarse)
    rows = [{"picture": None, "digit": 1}, {"picture": Image.new("RGB", (8, 8)), "digit": None}]
    broken = as_source(datasets.Dataset.from_list(rows, features=features))
    assert [str(record["image"]) for record in broken.records.__getitems__([0, 1])] == [
        "it is missing",
        "its label is missing",
    ]
    assert broken.records.labels().tolist() == [1, -1]


def history_of(run: bytes) -> list[dict]:
    """Reads the history in a file of Weights & Biases: a log as LevelDB's, of protocol buffers."""
    from wandb.proto import wandb_internal_pb2

    lines, at, whole = [], 7, b""
    while at + 7 <= len(run):
        if (left := 2**15 - at % 2**15) < 7:  # no room for a record's header in this block
            at += left
            continue
        size, kind = struct.unpack_from("<HB", run, at + 4)
        whole += run[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # the whole record, or the last part
            record = wandb_internal_pb2.Record.FromString(whole)
            whole = b""
            if record.WhichOneof("record_type") == "history":
                lines.append({".".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item})
    return lines


def test_the_metrics_go_to_weights_and_biases_and_on_there_after_a_resume(make, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    keys = {"log.wandb.project": "digits", "optim.schedule": "constant"}
    result = make(config=keys, epochs=1).fit()
    (file,) = (tmp_path / "run/wandb").glob("offline-run-*/*.wandb")
    name = (tmp_path / "run/wandb_id").read_text()
    assert file.name == f"run-{name}.wandb"
    shown = history_of(file.read_bytes())
    for line in result.metrics:
        values = {f"{line['split']}/{key}": value for key, value in line["values"].items()}
        (there,) = (entry for entry in shown if entry["_step"] == line["step"])
        assert {key: there[key] for key in values} == values
    file.parent.rename(tmp_path / "first")
    make(config=keys, epochs=2).fit()
    (again,) = (tmp_path / "run/wandb").glob("offline-run-*/*.wandb")
    assert again.name == file.name
    assert {entry["_step"] for entry in history_of(again.read_bytes())} == {4, 5, 6}


@pytest.mark.filterwarnings("ignore:.*noload.*loader strategy is deprecated")  # MLflow's, of SQLAlchemy 2.1
def test_the_metrics_go_to_mlflow_and_on_there_after_a_resume(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    config = {"seed": 3, "data": {"mean": (0.5,), "threads": 4}}
    first = MLflowRun(epath.Path(tmp_path), "digits", config)
    first.write(1, 0.5, "train", {"loss": 2.0})
    first.close()
    again = MLflowRun(epath.Path(tmp_path), "digits", config)
    again.write(2, 1.0, "eval", {"top1": 50.0, "ce": float("nan")})
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("digits").experiment_id])
    assert (run.info.run_name, run.info.status) == (tmp_path.name, "RUNNING")
    again.close()
    run = client.get_run(run.info.run_id)
    assert (tmp_path / "mlflow_id").read_text() == run.info.run_id and run.info.status == "FINISHED"
    assert run.data.params == {"seed": "3", "data.mean": "[0.5]"}
    assert run.data.metrics["train/loss"] == 2.0 and run.data.metrics["eval/top1"] == 50.0
    assert [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, "epoch")] == [
        (1, 0.5),
        (2, 1.0),
    ]


@pytest.mark.filterwarnings("ignore:.*noload.*loader strategy is deprecated")  # MLflow's, of SQLAlchemy 2.1
@pytest.mark.parametrize(
    ("error", "status"), [(None, "FINISHED"), (ValueError("full"), "FAILED"), (Interrupted(15, 3), "KILLED")]
)
def test_mlflow_has_how_a_run_ended(make, tmp_path, monkeypatch, error, status):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")

    def end(step, variables):
        if error is not None:
            raise error

    with contextlib.nullcontext() if error is None else pytest.raises(type(error)):
        make(config={"log.mlflow": "digits"}, callbacks=[ldrld_jax.Callback(after_save=end)]).fit()
    run = mlflow.MlflowClient().get_run((tmp_path / "run/mlflow_id").read_text())
    assert run.info.status == status


@pytest.mark.filterwarnings("ignore:.*noload.*loader strategy is deprecated")  # MLflow's, of SQLAlchemy 2.1
def test_a_writer_that_cannot_be_made_leaves_no_run_open(make, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    with pytest.raises(UserError, match=r"^math:sqrt failed: "):
        make(config={"log.mlflow": "digits", "log.writers": "math:sqrt"}).fit()
    run = mlflow.MlflowClient().get_run((tmp_path / "run/mlflow_id").read_text())
    assert run.info.status == "FAILED"


def test_a_run_of_the_users_in_weights_and_biases_is_left_alone(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    theirs, codes = wandb.init(project="mine", dir=str(tmp_path)), []
    ours = WeightsAndBiases(epath.Path(tmp_path), "digits", {})
    assert ours._run is not theirs and wandb.run is theirs
    finish = ours._run.finish
    monkeypatch.setattr(ours._run, "finish", lambda exit_code: (codes.append(exit_code), finish(exit_code)))
    ours.fail(ValueError("diverged"))
    ours.close()
    theirs.log({"loss": 1.0})
    theirs.finish()
    assert codes == [1]


@pytest.mark.filterwarnings("ignore:.*noload.*loader strategy is deprecated")  # MLflow's, of SQLAlchemy 2.1
def test_what_mlflow_refuses_of_a_line_is_said_once_and_ends_no_run(tmp_path, monkeypatch, caplog):
    exceptions = pytest.importorskip("mlflow.exceptions")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    run = MLflowRun(epath.Path(tmp_path), "digits", {"seed": 3})
    run.write(1, 0.5, "eval", {"F1 (macro)": 0.25})
    assert run._client.get_run(run._run).data.metrics["eval/F1 _macro_"] == 0.25

    def away(*args, **options):
        raise exceptions.MlflowException("no route to host")

    monkeypatch.setattr(run._client, "log_batch", away)
    run.write(2, 1.0, "eval", {"top1": 50.0})
    run.write(3, 1.5, "eval", {"top1": 50.0})
    assert [record.message for record in caplog.records if record.name == "ldrld_jax"] == [
        "MLflow did not take a line of metrics: no route to host. The run goes on."
    ]
    run.close()


def test_a_data_set_object_is_told_from_another_by_its_labels(digits):
    @dataclasses.dataclass
    class Items:
        labels: list

        num_classes = 10

        def __len__(self):
            return len(self.labels)

        def __getitem__(self, i):
            return np.random.default_rng().integers(0, 256, (8, 8, 1), np.uint8), self.labels[i]  # augmented

    labels = digits["train"][1].tolist()
    assert fingerprint(as_source(Items(labels))) == fingerprint(as_source(Items(labels)))
    assert fingerprint(as_source(Items(labels))) != fingerprint(as_source(Items(labels[::-1])))
