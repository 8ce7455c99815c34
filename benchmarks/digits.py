"""Times the main job, `python -m ldrld_jax.main`, against the same job in plain PyTorch, as whole processes in turns.

python benchmarks/digits.py --turns 3

"empty" starts with an empty cache of compiled programs, "warm" with those of the "empty" before it, "torch" and "torch
compiled" run `benchmarks/torch_digits.py`; "torch compiled" starts with inductor's cache empty. Seconds are medians;
"CPU s" is the CPU time of the process and its children. Each row shows the accuracies of its last turn.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

CONTESTANTS = ("empty", "warm", "torch", "torch compiled")
HERE = pathlib.Path(__file__).parent


def ours(scratch: pathlib.Path, cache: str, run: str) -> str:
    """Runs the main job; returns the teacher's and the student's accuracy."""
    command = [sys.executable, "-m", "ldrld_jax.main", "--workdir", str(scratch / run)]
    _call(command, JAX_COMPILATION_CACHE_DIR=str(scratch / cache))
    summary = json.loads((scratch / run / "summary.json").read_text())
    return f"{summary['teacher_top1']:.2f} {summary['best_top1']:.2f} {summary['last_top1']:.2f}"


def torch(scratch: pathlib.Path, cache: str, *flags: str) -> str:
    """Runs the job in PyTorch; returns the teacher's accuracy, and the student's best and last."""
    command = [sys.executable, str(HERE / "torch_digits.py"), *flags]
    teacher, student = _call(command, TORCHINDUCTOR_CACHE_DIR=str(scratch / cache)).splitlines()
    return " ".join((teacher.split("top-1 ")[1].split(",")[0], *student.split("top-1 ")[1].split(", last ")))


def _call(command: list[str], **environment: str) -> str:
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    args = parser.parse_args()
    if "warm" in args.contestants and "empty" not in args.contestants:
        parser.error('"warm" takes the programs that "empty" compiles')
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in args.contestants}
    reached: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        scratch = pathlib.Path(folder)
        for turn in range(args.turns):
            runs = {
                "empty": lambda turn=turn: ours(scratch, f"cache{turn}", f"empty{turn}"),
                "warm": lambda turn=turn: ours(scratch, f"cache{turn}", f"warm{turn}"),
                "torch": lambda turn=turn: torch(scratch, f"torch{turn}"),
                "torch compiled": lambda turn=turn: torch(scratch, f"torch{turn}", "--compile"),
            }
            for name in args.contestants:
                begun, before = time.perf_counter(), os.times()
                reached[name] = runs[name]()
                after = os.times()
                cpu = after.children_user + after.children_system - before.children_user - before.children_system
                wall = time.perf_counter() - begun
                taken[name].append((wall, cpu))
                print(f"{name}: {wall:.1f} s, {cpu:.1f} CPU s, {reached[name]}", file=sys.stderr, flush=True)
    print("| | s | CPU s | teacher | student, best and last |\n| --- | ---: | ---: | ---: | ---: |")
    for name, both in taken.items():
        seconds, cpu = map(statistics.median, zip(*both, strict=True))
        teacher, best, last = reached[name].split()
        print(f"| {name} | {seconds:.1f} | {cpu:.1f} | {teacher} | {best}, {last} |")


if __name__ == "__main__":
    main()
