"""Several processes on one machine, over loopback, are one run; and end as one."""

import os
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from ldrld_jax import config as config_lib
from ldrld_jax import main as main_lib
from ldrld_jax.runtime import hosts
from ldrld_jax.runtime.signals import Interrupted
from ldrld_jax.train import trainer
from tests.conftest import ROOT, comparable_lines, tiny_overrides
from tests.train.trainer_test import values

CONFIG = "tests/tiny_config.py"

# The command line in a process that is three seconds late with an error that all processes raise.
LATE = """
import sys, time
from ldrld_jax import main
from ldrld_jax.runtime import hosts

class Late(hosts._ErrorOfAll):
    def __init__(self, message):
        time.sleep(3)
        super().__init__(message)

hosts._ErrorOfAll = Late
hosts.exit_with(main.main(sys.argv[1:]))
"""


def overrides_of(data_dir: str, *more: str) -> list[str]:
    """A run that is alike in any number of processes; epochs of three steps."""
    kept = [o for o in tiny_overrides(data_dir) if not o.startswith(("mesh.", "teacher."))]
    return [*kept, "checkpoint.every_steps=2", *more]


def free_address() -> str:
    """Returns a `host:port` on which nothing listens."""
    with socket.create_server(("localhost", 0)) as server:
        return f"localhost:{server.getsockname()[1]}"


def start(
    processes: int, devices: int, workdir, overrides, of_last=(), devices_of_last=None, mode="train"
) -> list[subprocess.Popen]:
    flags = [f"--mode={mode}", f"--config={CONFIG}", f"--workdir={workdir}", f"--coordinator={free_address()}"]
    flags += [f"--processes={processes}", *(f"--config.{override}" for override in overrides)]
    pipes = dict(cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    started = []
    for process in range(processes):
        last = process == processes - 1
        program = ["-c", LATE] if last and (of_last or devices_of_last) else ["-m", "ldrld_jax.main"]
        own = devices_of_last if last and devices_of_last else devices
        xla = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={own}"  # the last of two counts
        more = [f"--config.{override}" for override in of_last] if last else []
        environment = {**os.environ, "XLA_FLAGS": xla}
        command = [sys.executable, *program, *flags, f"--process={process}", *more]
        started.append(subprocess.Popen(command, env=environment, **pipes))
    return started


def lines_of(workdir) -> int:
    path = workdir / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def when_it_trains(processes, workdir, lines: int) -> None:
    """Waits until the run has written so many lines of metrics, or ended."""
    while all(process.poll() is None for process in processes) and lines_of(workdir) < lines:
        time.sleep(0.01)


def finish(processes, timeout: float = 240) -> list[tuple[int, str]]:
    """Exit status and standard error of each."""
    return [(p.returncode, err) for p, (_, err) in ((p, p.communicate(timeout=timeout)) for p in processes)]


def expected_losses(workdir, overrides: list[str]) -> list[float]:
    trainer.train(config_lib.load(CONFIG, [*overrides, "mesh.data=8"]), workdir)
    return values(workdir, "train", "loss")


def test_two_processes_are_one_run_through_a_signal_a_kill_and_two_resumes(data_dir, tmp_path):
    overrides = overrides_of(data_dir, "precision=float64", "epochs=20")
    expected = expected_losses(tmp_path / "one", overrides)
    workdir = tmp_path / "two"

    processes = start(2, 4, workdir, overrides)
    when_it_trains(processes, workdir, 2)
    processes[1].send_signal(signal.SIGTERM)
    for status, error in finish(processes, 30):
        assert status == 143
        assert "the state after step" in error.splitlines()[-1]
    saved = int(re.search(r"after step (\d+)", error)[1])
    assert len(values(workdir, "train", "loss")) == saved < 60

    processes = start(2, 4, workdir, overrides)
    when_it_trains(processes, workdir, lines_of(workdir) + 2)
    processes[1].kill()
    (status, error), _ = finish(processes, 60)
    assert status == 1
    assert error.splitlines()[-1].startswith("ldrld_jax: process 1 of 2 has died or failed")

    for status, error in finish(start(2, 4, workdir, overrides)):
        assert status == 0, error
    np.testing.assert_allclose(values(workdir, "train", "loss"), expected, rtol=1e-9)
    assert [line["step"] for line in comparable_lines(workdir) if line["split"] == "eval"] == list(range(3, 61, 3))


def test_four_processes_give_the_losses_of_one_whose_logit_store_they_read(data_dir, tmp_path):
    teacher = ["teacher.model=tiny_net", "teacher.epochs=1", f"teacher.workdir={tmp_path / 'teacher'}"]
    overrides = overrides_of(data_dir, "epochs=1", "method=kd", *teacher, f"logits.dir={tmp_path / 'logits'}")
    expected = expected_losses(tmp_path / "one", overrides)
    finished = finish(start(4, 2, tmp_path / "four", overrides))
    assert [status for status, _ in finished] == [0, 0, 0, 0], finished
    np.testing.assert_allclose(values(tmp_path / "four", "train", "loss"), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("last", "expected"),
    [
        (
            dict(of_last=["seed=5", "epochs=3", "data.threads=1"]),
            "processes 0 and 1 have different configs: epochs (2 and 3), seed (0 and 5). Give all the same.",
        ),
        (
            dict(devices_of_last=2),
            "every process needs the same number of devices; processes 0, 1, ... have 1, 2.",
        ),
    ],
)
def test_processes_that_differ_train_nothing(last, expected, data_dir, tmp_path):
    finished = finish(start(2, 1, tmp_path / "run", overrides_of(data_dir, "epochs=2"), **last))
    assert [(status, error.splitlines()[-1]) for status, error in finished] == [(2, f"ldrld_jax: {expected}")] * 2
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("mode", ["eval", "bench"])
def test_other_commands_in_processes_that_differ_are_refused_before_they_compute_anything(mode, data_dir, teacher_dir):
    overrides, of_last = overrides_of(data_dir), ["eval_batch_size=8"]
    finished = finish(start(2, 1, teacher_dir, overrides, of_last, mode=mode))
    for status, error in finished:
        assert (status, error.splitlines()[-1]) == (
            2,
            "ldrld_jax: processes 0 and 1 have different configs: eval_batch_size (24 and 8). Give all the same.",
        )


@pytest.mark.parametrize(
    ("ending", "end", "status", "others"),
    [
        (0, "raise UserError('mine alone.')", 2, "hosts.together('a collective that one of them misses')"),
        (0, "raise UserError('mine alone.')", 2, "pass"),  # they are done, and wait for process 0 alone
        (0, "raise RuntimeError('mine alone.')", 1, "time.sleep(60)"),
        (1, "raise UserError('mine alone.')", 2, "time.sleep(60)"),
        (1, "os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL, "time.sleep(60)"),
    ],
)
def test_the_end_of_one_process_is_one_line_of_each_other(ending, end, status, others):
    code = f"""
import os, signal, sys, time
from ldrld_jax.errors import UserError
from ldrld_jax.runtime import hosts
address, me = sys.argv[1], int(sys.argv[2])
try:
    with hosts.joined(address, 3, me):
        if me == {ending}:
            time.sleep(0.5)
            {end}
        {others}
except UserError as error:
    print(f"ldrld_jax: {{error}}", file=sys.stderr)
    hosts.exit_with(2)
"""
    address = free_address()
    command = [sys.executable, "-c", code, address]
    started = [
        subprocess.Popen([*command, str(process)], cwd=ROOT, text=True, stderr=subprocess.PIPE) for process in range(3)
    ]
    finished = finish(started, 60)
    assert finished[ending][0] == status
    assert "mine alone." in finished[ending][1] or status < 0
    for process in {0, 1, 2} - {ending}:
        code, error = finished[process]
        assert code == 1, error
        assert "died or failed" in error.splitlines()[-1], error
        assert f"process {ending} of 3" in error and f"process {process} stops" in error
        assert "absl::" not in error  # no stack dump of JAX's


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--processes=2"], "give --coordinator, --processes and --process, or --distributed alone."),
        (["--distributed", "--process=0"], "give --coordinator, --processes and --process, or --distributed alone."),
        (["--coordinator=localhost:1", "--processes=2", "--process=2"], "--process must be at least 0 and below"),
    ],
)
def test_flags_that_do_not_say_who_this_is_are_refused(flags, expected, capsys):
    assert main_lib.main(flags) == 2
    assert expected in capsys.readouterr().err


def test_a_signal_before_the_first_step_of_a_resumed_run_stops_it():
    code = """
import contextlib, os, signal, socket, time, jax
from ldrld_jax.runtime.hosts import catch_signals_of_all
with socket.create_server(("localhost", 0)) as server:
    port = server.getsockname()[1]
jax.distributed.initialize(f"localhost:{port}", 1, 0)
with catch_signals_of_all() as signals:
    assert not any(signals.stop_at(step) for step in range(1, 4))  # of a teacher
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(3)  # JAX agrees on the number at which all stop
with contextlib.suppress(KeyboardInterrupt), catch_signals_of_all() as signals:
    end, step = time.monotonic() + 20, 500
    while not signals.stop_at(step := step + 1) and time.monotonic() < end:
        time.sleep(0.1)
    assert signals.received == signal.SIGTERM, step
"""
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, stderr=subprocess.PIPE, timeout=120)
    assert ended.returncode == 0, ended.stderr


def test_a_signal_for_all_after_the_last_step_ends_the_caller_too(monkeypatch):
    monkeypatch.setattr(hosts.multihost_utils, "reached_preemption_sync_point", lambda number: True)
    with (
        pytest.raises(Interrupted, match=r"^SIGTERM: the work in hand was completed\.$"),
        hosts.catch_signals_of_all() as signals,
    ):
        assert signals.stop_at(6)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x2)"}, []),
        ({"SLURM_STEP_TASKS_PER_NODE": "1"}, []),
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x2)"}, None),
        ({"SLURM_STEP_TASKS_PER_NODE": "1,8"}, None),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, []),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, None),
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x2)", "JAX_LOCAL_DEVICE_IDS": "0,1"}, None),
    ],
)
def test_the_only_task_of_a_machine_takes_all_its_gpus(environment, expected, monkeypatch):
    for name in ("SLURM_STEP_TASKS_PER_NODE", "OMPI_COMM_WORLD_LOCAL_SIZE", "JAX_LOCAL_DEVICE_IDS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert hosts._local_devices() == expected


def test_without_a_lifeline_every_process_hears_so(monkeypatch):
    said = []
    monkeypatch.setattr(hosts.multihost_utils, "broadcast_one_to_all", lambda where: said.append(where) or where)
    lifeline = hosts._Lifeline("192.0.2.1")  # no address of this machine
    assert len(said) == 1 and not said[0][:4].any()  # port 0
    lifeline.leave()
