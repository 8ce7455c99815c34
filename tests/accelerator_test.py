"""The programme for borrowed minutes: it keeps its time, does nothing twice, and what travels arrives whole."""

import importlib
import json
import pathlib
import random
import re
import sys
import time
import types

import pytest

from ldrld_jax import config as config_lib
from ldrld_jax import main as main_lib
from ldrld_jax.identity import identity
from ldrld_jax.train import trainer
from ldrld_jax.train.networks import Networks
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def programme():
    """The modules of `benchmarks/accelerator.py`, by name."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    names = ("carry", "pack", "plan", "processes", "record", "training")
    modules = {name: importlib.import_module(f"stages.{name}") for name in names}
    yield types.SimpleNamespace(accelerator=importlib.import_module("accelerator"), **modules)
    sys.path.remove(str(ROOT / "benchmarks"))


class Clock:
    """A clock that only a task moves."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class FakeLaunch:
    """Runs tasks as if they took so many seconds each; writes the record of those that end in time.

    Attributes:
      begun: the names, a tuple each time.
    """

    def __init__(self, programme, folder, clock, takes, fails=()):
        self.record, self.folder, self.clock, self.takes, self.fails = programme.record, folder, clock, takes, fails
        self.begun: list[tuple[str, ...]] = []

    def __call__(self, tasks, seconds):
        self.begun.append(tuple(task.name for task in tasks))
        self.clock.now += min(seconds, max(self.takes[task.name] for task in tasks))
        codes = {}
        for task in tasks:
            codes[task.name] = None if self.takes[task.name] > seconds else int(task.name in self.fails)
            if codes[task.name] == 0:
                self.record.write(self.folder, task.name, {"complete": True})
        return codes


def perform(programme, folder, clock, launch, batches, minutes, closing=20.0):
    tasks = [[programme.processes.Task(name, (), seconds, least) for name, seconds, least in one] for one in batches]
    published, said = [], []
    programme.accelerator.perform(
        tasks,
        folder,
        programme.processes.Minutes(minutes, closing, clock),
        launch,
        publish=lambda: published.append(clock.now),
        say=said.append,
    )
    return published, said


BATCHES = [[("a", 100, 10), ("b", 90, 10)], [("c", 60, 30)], [("d", 60, 55)], [("e", 60, 5)]]


def test_the_deadline_is_kept_and_what_does_not_fit_is_left_out(programme, tmp_path):
    clock = Clock()
    launch = FakeLaunch(programme, tmp_path, clock, {"a": 40, "b": 95, "c": 1e9, "d": 10, "e": 1e9})
    published, said = perform(programme, tmp_path, clock, launch, BATCHES, minutes=4)
    assert launch.begun == [("a", "b"), ("c",), ("d",), ("e",)]  # 240 s, of which 20 are for the end
    assert clock.now == 220  # a and b took 95, c its 60, d 10, e what was left: 55
    assert published == [95, 155, 165, 220]
    assert [programme.record.is_complete(tmp_path, name) for name in "abcde"] == [True, True, False, True, False]
    assert programme.record.read(tmp_path, "c")["error"] == "stopped when its time was over."
    clock.now = 0
    launch = FakeLaunch(programme, tmp_path, clock, {"c": 25, "e": 1})
    _, said = perform(programme, tmp_path, clock, launch, BATCHES, minutes=0.75, closing=5.0)
    assert launch.begun == [("c",), ("e",)]  # what is complete is not done again
    launch = FakeLaunch(programme, tmp_path / "new", clock, dict.fromkeys("abce", 10))
    clock.now = 0
    _, said = perform(programme, tmp_path / "new", clock, launch, BATCHES, minutes=1, closing=0.0)
    assert launch.begun == [("a", "b"), ("c",), ("e",)]
    assert "too late for d: 40 s are left" in said


def test_a_piece_that_fails_leaves_its_error_beside_what_it_measured_and_the_others_go_on(programme, tmp_path):
    clock = Clock()
    programme.record.write(tmp_path, "a", {"complete": False, "values": {"first": 1.0}})
    launch = FakeLaunch(programme, tmp_path, clock, dict.fromkeys("abcde", 1), fails="a")
    perform(programme, tmp_path, clock, launch, BATCHES, minutes=9)
    expected = {"name": "a", "complete": False, "values": {"first": 1.0}, "error": "exit 1."}
    assert programme.record.read(tmp_path, "a") == expected
    assert all(programme.record.is_complete(tmp_path, name) for name in "bcde")
    launch = FakeLaunch(programme, tmp_path, clock, {"a": 1})
    perform(programme, tmp_path, clock, launch, BATCHES, minutes=9)
    assert launch.begun == [("a",)]


def ended(process: str) -> bool:
    """Returns whether a process is gone, or waits only to be collected."""
    try:
        return pathlib.Path(f"/proc/{process}/stat").read_text().split()[2] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_a_task_that_ignores_the_signal_is_killed_with_what_it_started(programme, tmp_path, monkeypatch):
    monkeypatch.setattr(programme.processes, "GRACE_SECONDS", 0.5)
    launcher = programme.processes.Launcher(tmp_path, tmp_path, {"PATH": "/bin:/usr/bin"})
    stubborn = f"trap '' TERM; sleep 600 & echo $! > {tmp_path}/child; wait; sleep 600"
    tasks = [
        programme.processes.Task("stubborn", ("sh", "-c", stubborn), 9, 0),
        programme.processes.Task("quick", ("sh", "-c", "echo hello $NAME; exit 3"), 9, 0, {"NAME": "there"}),
    ]
    there = tmp_path / "child"
    codes = launcher(tasks, 60, enough=lambda: there.exists() and bool(there.read_text()))
    assert codes == {"stubborn": None, "quick": 3} or codes == {"stubborn": None, "quick": None}
    until = time.monotonic() + 10
    while not ended(there.read_text().strip()):  # the kernel may take a moment
        assert time.monotonic() < until
        time.sleep(0.01)
    codes = launcher([tasks[1]], 60)
    assert codes == {"quick": 3}
    assert launcher.tail("quick").endswith("hello there")


def test_pieces_come_back_as_what_was_packed(programme, tmp_path):
    content = random.Random(0).randbytes(5000)
    (tmp_path / "from/deep").mkdir(parents=True)
    (tmp_path / "from/deep/file").write_bytes(content)
    (tmp_path / "from/other").write_text("left behind")
    pieces = programme.pack.pack(tmp_path / "from", ["deep"], tmp_path / "to", "state", mib=2**-9)
    assert [piece.name for piece in pieces] == [f"state.{n}of5.piece" for n in range(1, 6)]  # tar pads to 10 KiB
    assert all(piece.stat().st_size <= 2**11 + 300 for piece in pieces)
    for index, piece in enumerate(pieces):  # however they are spread
        (tmp_path / f"{index % 3}").mkdir(exist_ok=True)
        piece.rename(tmp_path / f"{index % 3}" / piece.name)
    assert programme.pack.unpack([tmp_path / name for name in "210"], tmp_path / "back", "state")
    assert (tmp_path / "back/deep/file").read_bytes() == content
    assert not (tmp_path / "back/other").exists()
    assert not programme.pack.unpack([tmp_path / "0"], tmp_path / "nothing", "results")


def test_a_later_bundle_of_fewer_pieces_replaces_the_earlier_one(programme, tmp_path):
    (tmp_path / "from").mkdir()
    for size, count in ((30_000, 20), (3, 5)):
        (tmp_path / "from/file").write_bytes(b"x" * size)
        programme.pack.pack(tmp_path / "from", ["file"], tmp_path / "to", "state", mib=2**-9)
        assert len(list((tmp_path / "to").iterdir())) == count
    assert programme.pack.unpack([tmp_path / "to"], tmp_path / "back", "state")
    assert (tmp_path / "back/file").read_bytes() == b"xxx"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"?"), "2of5.piece is damaged"),
        (lambda path: path.write_bytes(path.read_bytes()[:100]), "2of5.piece is damaged"),
        (lambda path: path.write_bytes(b""), "2of5.piece is damaged"),
        (lambda path: path.unlink(), "state lacks the pieces 2 of 5"),
    ],
    ids=["flipped", "torn", "empty", "lost"],
)
def test_a_damaged_bundle_is_refused_and_nothing_is_written(programme, tmp_path, damage, message):
    (tmp_path / "from").mkdir()
    (tmp_path / "from/file").write_bytes(b"content")
    pieces = programme.pack.pack(tmp_path / "from", ["file"], tmp_path / "to", "state", mib=2**-9)
    damage(pieces[1])
    with pytest.raises(programme.pack.PieceError, match=message):
        programme.pack.unpack([tmp_path / "to"], tmp_path / "back", "state")
    assert not (tmp_path / "back").exists()


def test_pieces_of_two_bundles_are_not_mixed(programme, tmp_path):
    (tmp_path / "from").mkdir()
    for name in ("one", "two"):
        (tmp_path / "from/file").write_text(name)
        programme.pack.pack(tmp_path / "from", ["file"], tmp_path / name, "state", mib=2**-9)
    with pytest.raises(programme.pack.PieceError, match="of another state than the others"):
        programme.pack.unpack([tmp_path / "one", tmp_path / "two"], tmp_path / "back", "state")


def progress_of(programme, done=(), finished=(), seconds=()):
    return programme.plan.Progress(240 * 782, dict(done), frozenset(finished), dict(seconds))


def names(jobs):
    return [job.name for job in jobs]


def test_the_comparison_that_is_soonest_complete_comes_first_and_seeds_last(programme):
    plan = programme.plan
    order = plan.order(progress_of(programme))
    assert len(order) == 3 + 3 * 3 * 4
    assert names(order)[:5] == [
        "teacher=resnet56",
        *(f"pair=resnet56-resnet20,method={method},seed=0" for method in ("ldrld", "kd", "dkd", "ce")),
    ]
    assert [job.seed for job in order] == [0] * 15 + [1] * 12 + [2] * 12
    # Where the deep thin nets turn out slow, for each of their kernels waits for the host, the wide ones go first.
    slow = {"resnet56": 9e-3, "resnet56-resnet20": 6e-3, "resnet20": 3e-3}
    assert names(plan.order(progress_of(programme, seconds=slow)))[0] == "teacher=wrn_40_2"
    # A comparison that is nearly complete goes on.
    done = [job.name for job in order[:4]]
    left = plan.order(progress_of(programme, finished=done, seconds=slow))
    assert left[0].name == "pair=resnet56-resnet20,method=ce,seed=0"
    everything = [job.name for job in order]
    assert plan.order(progress_of(programme, finished=everything)) == []


def test_a_student_waits_for_its_teacher(programme):
    plan = programme.plan
    fresh = progress_of(programme)
    first = plan.runnable(plan.order(fresh), fresh, 3)
    assert names(first)[:2] == ["teacher=resnet56", "pair=resnet56-resnet20,method=ce,seed=0"]
    assert first[2].method == "teacher"
    taught = progress_of(programme, finished=["teacher=resnet56"])
    assert [job.method for job in plan.runnable(plan.order(taught), taught, 4)] == ["ldrld", "kd", "dkd", "ce"]


def test_what_remains_is_reckoned_from_the_measured_step(programme):
    plan = programme.plan
    job = plan.Job("resnet56-resnet20", "kd")
    measured = progress_of(programme, done={job.name: 187_680 - 1000}, seconds={"resnet56-resnet20": 2e-3})
    assert measured.remaining(job) == pytest.approx(2.0)
    assert progress_of(programme).remaining(job) == pytest.approx(187_680 * plan.prior(job))
    assert progress_of(programme, finished=[job.name]).remaining(job) == 0


def test_settings_are_tried_in_turn_and_the_fastest_is_kept(programme):
    plan = programme.plan
    plain, graphs = plan.Setting("", 1), plan.Setting(plan.GRAPHS, 1)
    two, four = plan.Setting(plan.GRAPHS, 2), plan.Setting(plan.GRAPHS, 4)
    assert plan.next_setting({}) == (plain, True)
    assert plan.next_setting({plain: 1.0}) == (graphs, True)
    assert plan.next_setting({plain: 1.0, graphs: 0.0}) == (plan.Setting("", 2), True)  # XLA did not take the flags
    assert plan.next_setting({plain: 1.0, graphs: 2.0}) == (two, True)
    assert plan.next_setting({plain: 1.0, graphs: 2.0, two: 1.9}) == (graphs, False)  # four are not tried
    assert plan.next_setting({plain: 1.0, graphs: 2.0, two: 3.0}) == (four, True)
    assert plan.next_setting({plain: 1.0, graphs: 2.0, two: 3.0, four: 2.5}) == (two, False)


class FakeTraining:
    """Trains as many steps as the seconds allow, one at a time at 1 ms, and writes what a run leaves."""

    def __init__(self, runs, clock, speedup):
        self.runs, self.clock, self.speedup, self.slices = runs, clock, speedup, []

    def __call__(self, tasks, seconds, enough):
        self.slices.append([task.name for task in tasks])
        end = self.clock.now + seconds
        rate = self.speedup[len(tasks)] / len(tasks) / 1e-3
        jobs = [job for job in self.runs.jobs() if job.name in self.slices[-1]]
        places = [self.runs.place(job) for job in jobs]
        while self.clock.now < end and not enough() and not all((place / "summary.json").exists() for place in places):
            self.clock.now += 4
            for job, place in zip(jobs, places, strict=True):
                if not (place / "summary.json").exists():
                    self._train(job, int(4 * rate), rate)
        return dict.fromkeys(self.slices[-1])

    def _train(self, job, steps, rate):
        place = self.runs.place(job)
        done = min(self.runs.steps, steps + sum(int(path.name) for path in place.glob("checkpoints/*")))
        for path in place.glob("checkpoints/*"):
            path.rmdir()
        (place / f"checkpoints/{done}").mkdir(parents=True)
        with (place / "metrics.jsonl").open("a") as log:
            log.write(json.dumps({"split": "train", "values": {"examples_per_second": 64 * rate}}) + "\n")
        if done == self.runs.steps:
            (place / "summary.json").write_text('{"last_top1": 70.0}')


def test_training_goes_on_in_slices_within_its_time(programme, tmp_path):
    runs = programme.training.Runs(tmp_path)
    clock, about, published = Clock(), {"device": "fake"}, []
    launch = FakeTraining(runs, clock, {1: 1.0, 2: 1.5, 3: 1.8, 4: 2.0})

    def train(minutes):
        minutes = programme.processes.Minutes(minutes, 20, clock)
        publish = lambda: published.append(clock.now)  # noqa: E731
        programme.training.train(runs, minutes, launch, about, publish=publish, say=lambda line: None)

    train(3)
    assert 120 <= clock.now <= 160  # a slice of less than 40 s is not begun
    assert launch.slices[:2] == [["teacher=resnet56"], ["teacher=resnet56"]]  # each set of flags
    assert launch.slices[2] == ["teacher=resnet56", "pair=resnet56-resnet20,method=ce,seed=0"]
    assert len(launch.slices[3]) == 4
    assert len(published) == len(launch.slices)
    record = programme.record.read(tmp_path, "training.float32")
    assert [one["together"] for one in record["values"]["slices"]][:4] == [1, 1, 2, 4]
    assert not record["complete"]
    before, begun = len(launch.slices), clock.now
    train(30)
    assert clock.now - begun <= 30 * 60 - 20
    assert len(launch.slices[before]) == 4  # nothing is tried again
    after = programme.record.read(tmp_path, "training.float32")
    assert after["values"]["seconds_left"] < record["values"]["seconds_left"]
    assert after["values"]["ended"]["teacher=resnet56"] == {"last_top1": 70.0}
    train(60 * 24)
    assert programme.record.read(tmp_path, "training.float32")["complete"]
    assert len(after["values"]["ended"]) < len(programme.record.read(tmp_path, "training.float32")["values"]["ended"])


def test_a_run_that_fails_ends_the_training_and_one_that_only_flags_break_does_not(programme, tmp_path):
    runs, about = programme.training.Runs(tmp_path), {"device": "fake"}
    clock, said = Clock(), []

    def launch(tasks, seconds, enough):
        clock.now += 10
        if tasks[0].env.get("XLA_FLAGS") == programme.plan.GRAPHS:
            return {tasks[0].name: -6}
        return dict.fromkeys((task.name for task in tasks), 2) if clock.now > 30 else trained(tasks, seconds, enough)

    trained = FakeTraining(runs, clock, {1: 1.0, 2: 1.5, 3: 1.8, 4: 2.0})
    programme.training.train(
        runs, programme.processes.Minutes(30, 20, clock), launch, about, publish=lambda: None, say=said.append
    )
    slices = programme.record.read(tmp_path, "training.float32")["values"]["slices"]
    assert [one["rate"] for one in slices[:2]] == [pytest.approx(1000 * programme.plan.prior(runs.jobs()[0])), 0.0]
    assert slices[-1]["error"] == said[-1]
    assert "failed: [2" in said[-1]


@pytest.mark.parametrize("pair", ["resnet56-resnet20", "wrn_40_2-wrn_16_2"])
def test_the_teacher_that_is_trained_apart_is_the_one_that_its_students_would_train(programme, tmp_path, pair):
    runs = programme.training.Runs(tmp_path)

    def config_of(job):
        args, overrides = main_lib.parse(runs.command(job)[3:])
        return config_lib.resolve(config_lib.load(args.config, overrides))

    teacher, student = (config_of(programme.plan.Job(pair, method)) for method in ("teacher", "ldrld"))
    recipe = config_lib.resolve(config_lib.teacher_recipe(student, pair.partition("-")[0]))
    assert identity(teacher) == identity(recipe)
    assert teacher.epochs * 782 == runs.steps


@pytest.fixture(scope="module")
def trained(programme, data_dir, tmp_path_factory):
    """A work folder with an ended teacher and a student under way, as the programme lays them."""
    from ldrld_jax.models import MODELS
    from tests.conftest import tiny_overrides
    from tests.tiny_net import TinyNet

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, "tiny_net", TinyNet)
        runs = programme.training.Runs(tmp_path_factory.mktemp("work"))
        teacher, student = programme.plan.Job("resnet56-resnet20", "teacher"), runs.jobs()[1]
        overrides = [*tiny_overrides(data_dir), "student.model=tiny_net", "checkpoint.keep_last=1"]
        for job in (teacher, student):
            trainer.train(config_lib.load("configs/digits.py", overrides), runs.place(job))
        (runs.place(student) / "summary.json").unlink()
        yield runs, teacher, student


def test_what_travels_is_enough_to_go_on_from_and_teachers_leave_their_optimizer_behind(programme, trained, tmp_path):
    from ldrld_jax.models import MODELS
    from tests.tiny_net import TinyNet

    runs, teacher, student = trained
    assert programme.carry.pack_state(runs, tmp_path / "inbox/state")
    assert programme.carry.take_state([tmp_path / "inbox/state"], tmp_path / "work")
    there = programme.training.Runs(tmp_path / "work")
    assert there.progress().finished == runs.progress().finished == {teacher.name}
    assert there.progress().done[student.name] == runs.progress().done[student.name] == 6
    last = str(programme.training.last_step(there.place(student)))
    kept = {path.name for path in (there.place(student) / "checkpoints" / last).iterdir()}
    assert kept >= {"model", "training"}
    best = there.place(teacher) / "checkpoints" / str(programme.carry.best_step(runs.place(teacher)))
    assert "training" not in {path.name for path in best.iterdir()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, "tiny_net", TinyNet)
        data = config_lib.default().data
        Networks(10, 1, "float32").restore(str(there.place(teacher)), "tiny_net", data)


def test_a_run_that_has_come_further_is_not_replaced(programme, tmp_path):
    here, arrived = tmp_path / "here", tmp_path / "arrived"
    for folder, steps in ((here, (20, 5)), (arrived, (10, 10))):
        for name, step in zip(("ahead", "behind"), steps, strict=True):
            (folder / f"runs/float32/{name}/checkpoints/{step}").mkdir(parents=True)
        (folder / "results").mkdir()
    (arrived / "results/new.json").write_text("{}")
    programme.carry.merge(arrived, here)
    assert [path.name for path in sorted(here.glob("runs/*/*/checkpoints/*"))] == ["20", "10"]
    assert (here / "results/new.json").exists()


def test_what_does_not_fit_stays_behind_and_is_named(programme, trained, tmp_path, monkeypatch):
    runs, teacher, _ = trained
    monkeypatch.setattr(programme.carry, "STATE_MIB", 0.001)
    said = []
    programme.carry.pack_state(runs, tmp_path, say=said.append)
    assert [line.split(": ")[1].partition(",")[0] for line in said][:1] == [teacher.name]
    assert len(said) == 2


def test_every_stage_has_its_pieces(programme):
    pieces = {
        task.name
        for batch in programme.accelerator.batches(programme.accelerator.STAGES, ROOT, False)
        for task in batch
    }
    assert {"smoke.losses", "loss.table", "step.cifar64", "step.imagenet", "input.photos"} <= pieces
    for stage in ("smoke", "loss", "step", "input"):
        text = (ROOT / f"benchmarks/stages/{stage}.py").read_text()
        assert all(name.partition(".")[2] in text for name in pieces if name.startswith(stage))


def test_the_wheels_are_those_that_every_stage_needs(programme, tmp_path, monkeypatch):
    pack_inbox = importlib.import_module("pack_inbox")
    asked = []
    monkeypatch.setattr(pack_inbox.subprocess, "run", lambda command, check: asked.append(command))
    pack_inbox.wheels(tmp_path / "wheels", "python", "0.11.2")
    required = (tmp_path / "wheels" / "requirements.txt").read_text()
    for name in ("jax", "flax", "pillow", "flatbuffers", "safetensors"):  # the last two for the exported student
        assert re.search(rf"^{name}\b", required, re.MULTILINE)
    assert set(required.split("\n")) <= {*asked[0], ""}
