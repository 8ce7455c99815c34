"""A module outside of the package adds a model, a teacher, data, an optimizer, a writer and a loss to the commands."""

import json
import re
import sys

import pytest
from etils import epath
from PIL import Image

from ldrld_jax import main as main_lib
from ldrld_jax.config import load, load_run, resolve
from ldrld_jax.errors import UserError
from ldrld_jax.train.plan import Run

OWN = """
import json, pathlib
import jax.numpy as jnp, numpy as np, optax
from flax import nnx
import ldrld_jax

class Net(nnx.Module):
    def __init__(self, classes, rngs):
        self.head = nnx.Linear(64, classes, rngs=rngs)
    def __call__(self, x):
        return self.head(x.reshape(x.shape[0], -1))

def make_net(num_classes, rngs):
    return Net(num_classes, rngs)

def source(split):
    rng = np.random.default_rng({"train": 0, "test": 1}[split])
    labels = np.arange(60) % 3
    return np.uint8(rng.integers(0, 80, (60, 8, 8, 1)) + 80 * (labels == 1)[:, None, None, None]), labels

teacher = ldrld_jax.HostTeacher(lambda x: np.float32(x.reshape(len(x), -1)[:, :3]) / 255, name="pixels")

def optimizer(learning_rate, weight_decay):
    return optax.chain(optax.add_decayed_weights(weight_decay), optax.sign_sgd(learning_rate))

def loss(teacher_logits, student_logits, labels):
    return jnp.mean((teacher_logits - student_logits) ** 2, axis=-1)

class Writer:
    def __init__(self, workdir):
        self.path = pathlib.Path(workdir) / "mine.jsonl"
    def write(self, step, epoch, split, values):
        with self.path.open("a") as file:
            file.write(json.dumps([step, split]) + "\\n")
"""
FLAGS = {
    "student.model": "own:make_net",
    "teacher.model": "own:teacher",
    "data.name": "own:source",
    "optim.name": "own:optimizer",
    "log.writers": "own:Writer",
    "method": "kd+own:loss",
    "teacher.min_top1": 30,
    "epochs": 2,
    "batch_size": 25,
    "mesh.data": 1,
    "optim.learning_rate": 0.01,
    "log.every_steps": 1,
}


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("own", None)


def command(*flags: str, **changes) -> int:
    values = {**FLAGS, **changes}
    return main_lib.main(["--workdir", "run", *flags, *(f"--config.{key}={value}" for key, value in values.items())])


def test_a_users_own_parts_work_with_every_command(own, capsys):
    assert command() == 0
    saved = json.loads((own / "run" / "config.json").read_text())
    assert (saved["student"]["model"], saved["method"]) == ("own:make_net", "kd+own:loss")
    lines = [json.loads(line) for line in (own / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [json.loads(line) for line in (own / "run" / "mine.jsonl").read_text().splitlines()] == [
        [line["step"], line["split"]] for line in lines
    ]
    assert {"kd", "own_loss", "ce_term"} <= set(lines[1]["values"])
    assert command() == 0  # the same command again
    assert "is complete" in capsys.readouterr().out

    Image.new("L", (8, 8), 99).save(own / "scan.png")
    again = ["--config.student.model=own:make_net", "--config.data.name=own:source"]
    for mode, rest in (("eval", []), ("export", []), ("predict", ["scan.png"])):
        assert main_lib.main(["--workdir", "run", "--mode", mode, *again, *rest]) == 0, mode
        sys.modules.pop("own")
        assert main_lib.main(["--workdir", "run", "--mode", mode, *rest]) == 2
        error = capsys.readouterr().err
        assert "Repeat it if you trust it: --config.student.model=own:make_net" in error
        assert "own" not in sys.modules  # nothing of it was executed
    assert main_lib.main(["--mode", "predict", "--workdir", "run/export", "scan.png"]) == 0
    assert "0 " in capsys.readouterr().out


def test_own_code_may_import_more_of_the_folder_when_it_is_called(own, monkeypatch):
    """Runs without the working directory on the path, as an installed command does, and with a worker process."""
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    (own / "of_own.py").write_text("scale = 3.0\n")
    (own / "own.py").write_text(OWN.replace("    rng = np", "    import of_own\n    rng = np"))
    assert command("--config.data.workers=1", method="ce", epochs=1) == 0
    sys.modules.pop("of_own")


def test_a_student_that_asks_for_the_size_of_a_batch_is_not_exported_and_told_why(own, capsys):
    (own / "own.py").write_text(OWN.replace("x.shape[0]", "len(x)"))
    again = ["--config.student.model=own:make_net", "--config.data.name=own:source"]
    assert command(method="ce") == 0
    assert main_lib.main(["--workdir", "run", "--mode", "export", *again]) == 2
    assert re.search(
        r"own:make_net cannot be traced .* write x\.shape\[0\] in place of len\(x\)", capsys.readouterr().err
    )


MADE = """
made = []
def make_net(num_classes, rngs):
    net = Net(num_classes, rngs)
    made.append(float(net.head.kernel[0, 0]))  # of the seed
    return net
def make_function(num_classes, rngs):
    variables = nnx.to_pure_dict(nnx.state(make_net(num_classes, rngs)))
    return (lambda v, x: x.reshape(x.shape[0], -1) @ v["head"]["kernel"]), variables
"""


@pytest.mark.parametrize("model", ["make_net", "make_function"])
def test_a_users_function_is_called_once_for_the_shapes_and_once_for_the_weights(own, model):
    """Counts the calls, because one that downloads weights takes seconds."""
    (own / "own.py").write_text(OWN + MADE)
    flags = {"student.model": f"own:{model}", "seed": 5, "optim.schedule": "constant", "optim.warmup": "none"}
    assert command(**flags) == 0
    made = sys.modules["own"].made
    assert len(made) == 2 and made[0] != made[1]  # of seeds 0 and 5
    assert command(**flags, epochs=3) == 0  # goes on
    assert made[2:] == made[:2]


@pytest.mark.parametrize("changes", [{"method": "kd"}, {"teacher.model": "own:Net", "teacher.epochs": 1}])
def test_what_only_training_uses_is_left_out_of_a_run_that_is_loaded_again(own, changes, monkeypatch):
    """Leaves out a loss and its schedules; Weights & Biases need not be installed there."""
    config = load("configs/digits.py", [f"{key}={value}" for key, value in {**FLAGS, **changes}.items()])
    config.loss_schedule.temperature, config.log.wandb.project = "linear:4@1:2@2", "digits"
    (own / "run").mkdir()
    (own / "run" / "config.json").write_text(config.to_json())
    again = [f"{key}={FLAGS[key]}" for key in ("student.model", "data.name")]
    monkeypatch.setitem(sys.modules, "wandb", None)
    loaded = load_run("run", again)
    assert (loaded.method, loaded.loss_schedule.temperature, loaded.log.wandb.project) == ("ce", None, None)
    assert Run.plan(resolve(loaded), epath.Path("run")).objective.schedules == {}


OTHERS = """

def make_scaled(num_classes, rngs):
    net = Net(num_classes, nnx.Rngs(SEED))
    net.scale = SCALE
    return net
"""
SCALED = OWN.replace("return self.head", "return getattr(self, 'scale', 1.0) * self.head") + OTHERS


def test_a_module_that_code_makes_is_known_by_its_weights_and_structure(own, capsys):
    """Changes the code of a teacher to texts of other lengths, by which Python knows what it has compiled."""

    def run(scale, seed, workdir="run", **more):
        sys.modules.pop("own", None)
        (own / "own.py").write_text(SCALED.replace("SEED", str(seed)).replace("SCALE", str(scale)))
        given = {"teacher.model": "own:make_scaled", "teacher.min_top1": 0, "method": "kd", "log.writers": None, **more}
        code = command(f"--workdir={workdir}", **{"teacher.epochs": None, "epochs": 1, **given})
        return code, capsys.readouterr().err

    assert run(1.0, 0) == (0, "")
    assert run(1.0, 0) == (0, "")  # the same again is complete
    for changed, part in (((30.0, 0), r"teacher\.structure"), ((1.0, 111), r"teacher\.model")):
        code, error = run(*changed)
        assert code == 2
        assert re.search(rf"{part} of the run in run: the weights, .* are not those that it began with", error)
    stored = {"logits.dir": "logits"}
    assert run(1.0, 0, "wrote", **stored) == run(1.0, 0, "read", **stored) == (0, "")
    assert re.search(r"holds other logits: teacher\.structure", run(30.0, 0, "other", **stored)[1])


def test_a_report_shows_a_run_of_own_parts_and_executes_none(own, capsys):
    from ldrld_jax.report.__main__ import main as report

    assert command() == 0
    sys.modules.pop("own")
    assert report(["run", "--out", "page"]) in (0, None)
    assert "own:make_net" in (own / "page" / "report.html").read_text()
    assert "own" not in sys.modules


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student.model": "own:make_ten"}, "Did you mean 'make_net'"),
        ({"student.model": "elsewhere:make"}, "there is no module 'elsewhere'"),
        ({"data.name": "own:make_net"}, "own:make_net failed: TypeError"),
        ({"optim.name": "own:loss"}, "cannot be called with a learning rate alone"),
        ({"method": "own:los"}, "Did you mean 'loss'"),
        ({"teacher.model": "own:loss"}, "own:loss failed: TypeError"),
    ],
)
def test_what_is_wrong_with_own_parts_is_one_line(own, capsys, changes, message):
    assert command(**changes) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (own / "run" / "checkpoints").exists()


def test_a_function_that_returns_no_writer_is_named_before_the_first_step(own, capsys):
    (own / "own.py").write_text(OWN + "\ndef nothing(workdir):\n    pass\n\ndef a_class(workdir):\n    return Writer\n")
    for name, wrong in (
        ("nothing", "must have write(step, epoch, split, values), and NoneType"),
        ("a_class", "an object"),
    ):
        assert command(**{"log.writers": f"own:{name}"}) == 2
        error = capsys.readouterr().err
        assert f"the writer that own:{name} of log.writers returns" in error and wrong in error
        assert error.count("\n") == 1
        assert not (own / "run" / "metrics.jsonl").exists()


def test_a_writer_that_cannot_be_made_is_named_before_the_teacher_is_trained(own, capsys):
    """Fails before the teacher trains, whose run has the same writers."""
    (own / "own.py").write_text(OWN + "\ndef fails(workdir):\n    raise ConnectionError('no server at 8080')\n")
    flags = {"teacher.model": "own:make_net", "teacher.epochs": 2, "teacher.min_top1": 0, "method": "kd"}
    assert command(**flags, **{"log.writers": "own:fails"}) == 2
    assert "own:fails failed: ConnectionError: no server at 8080" in capsys.readouterr().err
    assert not list(own.glob("run/**/metrics.jsonl"))


def test_names_of_objects_are_refused_where_there_are_none(own):
    for flags, what in (
        ({"student.model": "<Net>"}, "the model <Net> was given as a Python object"),
        ({"method": "<loss>"}, "method <loss> was given as a Python object"),
        ({"optim.name": "<optimizer>"}, "the optimizer <optimizer> was given as a Python object"),
    ):
        with pytest.raises(UserError, match=what):
            from ldrld_jax import config as config_lib
            from ldrld_jax.train import trainer

            overrides = [f"{key}={value}" for key, value in {**FLAGS, **flags}.items()]
            trainer.train(config_lib.load("configs/digits.py", overrides), own / "no")


def test_a_run_of_objects_is_evaluated_by_the_trainer_alone(tmp_path):
    config = {"seed": 0, "epochs": 1, "method": "kd", "data": {"name": "<arrays>"}, "student": {"model": "<Net>"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        UserError, match=r"student\.model=<Net>\. It was given in Python: .* or Trainer\.export\.$"
    ) as error:
        load_run(str(tmp_path))
    assert "\n" not in str(error.value)
