"""Runs all accelerator benchmarks in short sessions: it stops in time and continues in the next session.

python benchmarks/accelerator.py --minutes 9                       # all stages, the most valuable first
python benchmarks/accelerator.py --minutes 9 --stages training     # all the time goes into training
python benchmarks/accelerator.py --minutes 20 --shrink --work build/rehearsal --out build/out   # on a CPU

Every piece of work is a separate process with a record in WORK/results, and is not repeated once the record is
complete. A piece that fails leaves its error there, and the others continue. Results are packed into OUT after each
piece. docs/accelerator_runs.md describes how to prepare an inbox, and the results of each stage.
"""

import argparse
import hashlib
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

from stages import carry, record
from stages.plan import Progress
from stages.processes import GRACE_SECONDS, Launcher, Minutes, Task
from stages.training import Launch, Runs, train

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKING_SECONDS = 8.0
STAGES = ("smoke", "loss", "step", "input", "training")
# (name, maximum seconds, minimum seconds). Pieces in one list run at the same time, because they are not timed.
PIECES: dict[str, list[list[tuple[str, float, float]]]] = {
    "smoke": [
        [(name, 110, 45) for name in ("losses", "resume", "resume_deterministic", "several", "bfloat16", "store")]
    ],
    "loss": [[("table", 70, 25)], [("pallas", 50, 25)], [("compiled", 60, 40)]],
    "step": [
        [("cifar64", 150, 60)],
        [("imagenet", 130, 60)],
        [("where", 150, 70)],
        [("cifar1024", 120, 60)],
        [("cifar64_bfloat16", 120, 60)],
    ],
    "input": [[("photos", 40, 20)], [("cifar", 40, 20)]],
}
NEED_DATA = {"step.where", "input.cifar"}
FLAGS = {"smoke.resume_deterministic": {"XLA_FLAGS": "--xla_gpu_deterministic_ops=true"}}


def batches(stages: Sequence[str], folder: pathlib.Path, shrink: bool) -> list[list[Task]]:
    """Returns the tasks of all stages except training, in order; the tasks of one batch run in parallel."""
    return [
        [_task(stage, name, folder, shrink, seconds, least) for name, seconds, least in together]
        for stage in stages
        for together in PIECES.get(stage, ())
    ]


def _task(stage: str, piece: str, folder: pathlib.Path, shrink: bool, seconds: float, least: float) -> Task:
    name = f"{stage}.{piece}"
    module = [sys.executable, "-m", f"stages.{stage}", piece, "--folder", str(folder), f"--seconds={seconds}"]
    if not shrink:
        return Task(name, module, seconds, least, FLAGS.get(name, {}))
    return Task(name, [*module, "--shrink"], 6 * seconds, 1.0, FLAGS.get(name, {}))


def perform(
    work: Sequence[Sequence[Task]],
    folder: pathlib.Path,
    minutes: Minutes,
    launch: Launch,
    *,
    publish: Callable[[], None],
    say: Callable[[str], None],
    explain: Callable[[str], str] = lambda name: "",
) -> None:
    """Runs the tasks that are not complete, one batch after another, as time allows.

    Args:
      work: the batches of tasks.
      folder: the work folder, which holds the records.
      minutes: the time available.
      launch: `launch(tasks, seconds)` returns exit statuses, see `Launcher`.
      publish: called after each batch.
      say: called with a line for each batch that begins or is skipped for lack of time.
      explain: returns the end of a task's output, by the task's name.
    """
    for batch in work:
        waiting = [task for task in batch if not record.is_complete(folder, task.name)]
        begun = [task for task in waiting if task.least <= minutes.left()]
        if late := [task.name for task in waiting if task not in begun]:
            say(f"too late for {', '.join(late)}: {minutes.left():.0f} s are left")
        if not begun:
            continue
        seconds = min(minutes.left(), max(task.seconds for task in begun))
        say(f"{', '.join(task.name for task in begun)}: {seconds:.0f} s at most, {minutes.left():.0f} s are left")
        codes = launch(begun, seconds)
        for task in begun:
            if not record.is_complete(folder, task.name):
                why = "stopped when its time was over" if codes[task.name] is None else f"exit {codes[task.name]}"
                record.fail(folder, task.name, f"{why}. {explain(task.name)}".strip())
                say(f"{task.name}: {why}")
        publish()


def commit(inbox: pathlib.Path) -> str:
    """Returns the measured commit, from git or the inbox, and a digest of the sources."""
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
        head += " with changes" if changed.strip() else ""
    except (OSError, subprocess.CalledProcessError):
        found = sorted(inbox.rglob("commit.txt"))
        head = found[-1].read_text().strip() if found else "unknown"
    digest = hashlib.sha256()
    for path in sorted(path for name in ("ldrld_jax", "configs", "benchmarks") for path in (ROOT / name).rglob("*.py")):
        digest.update(path.read_bytes())
    return f"{head}, sources {digest.hexdigest()[:12]}"


def environment(folder: pathlib.Path, inbox: pathlib.Path, shrink: bool) -> dict[str, str]:
    """Returns the environment of all processes: module paths, the compile cache, and provenance for records."""
    paths = [str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
    more = {
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "PYTHONUNBUFFERED": "1",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # several processes and PyTorch share the memory
        "BENCHMARK_COMMIT": commit(inbox),
        "BENCHMARK_COMMAND": shlex.join(["python", *sys.argv]),
    }
    return {**os.environ, **more, **({"JAX_PLATFORMS": "cpu"} if shrink else {})}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, required=True, help="wall-clock time, never exceeded")
    parser.add_argument("--stages", default=",".join(STAGES), help="a comma-separated selection of %(default)s")
    parser.add_argument("--inbox", type=pathlib.Path, default=pathlib.Path("inbox"), help="the prepared inbox")
    parser.add_argument("--work", type=pathlib.Path, default=pathlib.Path("outbox/work"), help="the work folder")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("outbox/out"), help="where results are packed")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32", help="of the training")
    parser.add_argument("--shrink", action="store_true", help="rehearse on a CPU: tiny sizes, the same code")
    flags = parser.parse_args()
    stages = flags.stages.split(",")
    if unknown := set(stages) - set(STAGES):
        parser.error(f"there is no stage {', '.join(sorted(unknown))}. Known: {', '.join(STAGES)}.")
    minutes = Minutes(flags.minutes, GRACE_SECONDS + PACKING_SECONDS)
    folder = flags.work.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    runs = Runs(folder, flags.precision, flags.shrink)
    launcher = Launcher(folder / "logs", ROOT, environment(folder, flags.inbox, flags.shrink))
    seconds = 60 * flags.minutes

    def say(line: str) -> None:
        print(f"[{seconds - GRACE_SECONDS - PACKING_SECONDS - minutes.left():5.0f} s] {line}", flush=True)

    def publish() -> None:
        carry.pack_results(folder, flags.out)

    def deliver() -> None:
        publish()
        now = runs.progress()
        carry.pack_state(runs, flags.out, wanted=lambda job: _is_further(now, begun, job.name), say=say)

    def last_resort(*_: Any) -> None:
        launcher.kill()
        deliver()
        print("stopped before the end; finished work is packed", flush=True)
        os._exit(1)

    carry.bring(flags.inbox, folder, say)
    begun = runs.progress()
    watch = threading.Timer(minutes.left() + GRACE_SECONDS + 2, last_resort)
    watch.daemon = True
    watch.start()
    signal.signal(signal.SIGTERM, last_resort)
    machine = _task("smoke", "machine", folder, flags.shrink, 60, 1)
    codes = launcher([machine], min(60.0, minutes.left()))  # every session: the machine may differ
    about = {key: value for key, value in record.read(folder, machine.name).items() if key not in ("name", "values")}
    if codes[machine.name] != 0:
        sys.exit(f"this machine cannot run the benchmarks:\n{launcher.tail(machine.name, 3000)}")
    if about["platform"] == "cpu" and not flags.shrink:
        sys.exit("JAX finds no accelerator, only a CPU. Use --shrink to rehearse on it.")
    say(f"{about['device']}, {about['versions']}, commit {about['commit']}")
    work = batches(stages, folder, flags.shrink)
    has_data = (folder / "data" / "cifar100").exists()
    if not has_data:
        say(f"CIFAR-100 is missing: skipping training, {', '.join(sorted(NEED_DATA))}")
        work = [batch for batch in work if batch[0].name not in NEED_DATA]
    perform(work, folder, minutes, launcher, publish=publish, say=say, explain=launcher.tail)
    if "training" in stages and has_data:
        train(runs, minutes, launcher, about, publish=deliver, say=say)
    deliver()
    watch.cancel()
    say("ended")


def _is_further(now: Progress, begun: Progress, name: str) -> bool:
    """Returns True if a run has made progress in this session; otherwise the copy in the inbox is current."""
    return (name in now.finished, now.done[name]) > (name in begun.finished, begun.done[name])


if __name__ == "__main__":
    main()
