"""Prepares the inbox of `benchmarks/accelerator.py` and merges its results; run it where there is a network.

python benchmarks/pack_inbox.py --data_dir DIR                     # DIR holds cifar100 as prepared by TFDS
python benchmarks/pack_inbox.py --data_dir DIR --returned OUT      # merges the results of a run first

Creates INBOX/0, INBOX/1 and so on, each to be transferred by its own command, with wheels of the packages that are
missing there and CIFAR-100 in pieces, and INBOX/state, from which training continues. The records of OUT go to
WORK/results and its runs to WORK/runs.
"""

import argparse
import pathlib
import shutil
import subprocess
import sys
import tomllib
import zipfile

from stages import carry, pack
from stages.training import Runs

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Packages that machines with an accelerator and JAX already have, or that are too large to transfer.
THERE = {
    *("jax", "jaxlib", "jax_cuda13_plugin", "jax_cuda13_pjrt", "torch"),
    *("numpy", "scipy", "scikit_learn", "pillow", "pyarrow", "uvloop", "psutil"),
}


def wheels(to: pathlib.Path, python: str, jax: str) -> None:
    """Collects the wheels that `pip install` needs on the target machine; builds packages that have no wheel.

    Args:
      to: the folder to create.
      python: an interpreter of the target machine's version.
      jax: the target machine's version of JAX.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    to.mkdir(parents=True)
    (to / "constraints.txt").write_text(f"jax=={jax}\njaxlib=={jax}\n")
    needed = [*project["dependencies"], *project["optional-dependencies"]["export"]]  # a stage exports a student
    wanted = [*needed, "chex", "pip"]
    command = [python, "-m", "pip", "wheel", "--quiet", "--wheel-dir", str(to), "-c", str(to / "constraints.txt")]
    subprocess.run([*command, *wanted], check=True)
    for path in to.glob("*.whl"):
        if path.name.partition("-")[0].lower() in THERE:
            path.unlink()
        elif path.stat().st_size > 2**19 and not path.name.startswith("pip-"):  # pip's wheel is executed directly
            _squeeze(path)
    (to / "requirements.txt").write_text("\n".join(needed) + "\n")


def _squeeze(wheel: pathlib.Path) -> None:
    """Recompresses a wheel with LZMA, which Python can unpack; saves a fifth of the bytes."""
    small = wheel.with_suffix(".new")
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(small, "w", zipfile.ZIP_LZMA) as new:
        for member in old.infolist():
            new.writestr(member, old.read(member), zipfile.ZIP_LZMA)
    small.replace(wheel)


def data(data_dir: pathlib.Path, inbox: pathlib.Path, mib: float) -> None:
    """Packs CIFAR-100 into pieces, one per folder; the smallest shares the first folder with the wheels."""
    staged = inbox / "pieces"
    pieces = pack.pack(data_dir, ["cifar100"], staged, carry.DATA, mib)
    for index, piece in enumerate(reversed(pieces)):  # the last piece is the smallest
        (inbox / str(index)).mkdir(exist_ok=True)
        piece.rename(inbox / str(index) / piece.name)
    staged.rmdir()


def take_in(returned: pathlib.Path, work: pathlib.Path) -> None:
    """Merges returned results into the local work folder; raises a PieceError if they are incomplete."""
    for path in sorted(returned.rglob("*")):
        print(f"returned: {path.name}, {path.stat().st_size / pack.MIB:.1f} MiB")
    folders = [returned, *(path for path in returned.rglob("*") if path.is_dir())]
    arrived = work / "arrived"
    shutil.rmtree(arrived, ignore_errors=True)
    if pack.unpack(folders, arrived, carry.RESULTS):
        shutil.rmtree(arrived / "runs", ignore_errors=True)  # logs come with checkpoints
        carry.merge(arrived, work)
    carry.take_state(folders, work)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=pathlib.Path, required=True, help="the folder that holds cifar100")
    parser.add_argument("--inbox", type=pathlib.Path, default=pathlib.Path("inbox"))
    parser.add_argument("--work", type=pathlib.Path, default=pathlib.Path("outbox/work"), help="the local work folder")
    parser.add_argument("--returned", type=pathlib.Path, help="the OUT of a run, merged first")
    parser.add_argument("--python", default="python3.12", help="an interpreter of the target's version")
    parser.add_argument("--jax", default="0.11.2", help="the target's version of JAX")
    parser.add_argument("--mib", type=float, default=57.0, help="maximum size of a piece of the data")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32", help="of the training")
    flags = parser.parse_args()
    work = flags.work.resolve()
    if flags.returned is not None:
        try:
            take_in(flags.returned, work)
        except pack.PieceError as error:
            sys.exit(str(error))
    flags.inbox.mkdir(parents=True, exist_ok=True)
    head = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    if not (flags.inbox / "0" / "wheels").exists():  # once
        wheels(flags.inbox / "0" / "wheels", flags.python, flags.jax)
        data(flags.data_dir, flags.inbox, flags.mib)
    (flags.inbox / "0" / "commit.txt").write_text(head.stdout)
    shutil.rmtree(flags.inbox / "state", ignore_errors=True)
    runs = Runs(work, flags.precision)
    if work.exists():
        carry.pack_state(runs, flags.inbox / "state", students=False)
    for folder in sorted(path for path in flags.inbox.iterdir() if path.is_dir()):
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / pack.MIB
        print(f"{folder}: {size:.1f} MiB")


if __name__ == "__main__":
    main()
