"""Packs and merges the files that are transferred between work folders of different machines."""

import json
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator

from stages import pack, plan
from stages.plan import Job
from stages.training import Runs, last_step

RESULTS, STATE, DATA = "results", "state", "data"  # the bundles
PIECE_MIB = 15.0
STATE_MIB = 58.0  # four pieces; a ResNet32x4 with its optimizer's state is 57 before it is compressed
_COMPILED_MIB = 12.0
_LOG_MIB = 3.0  # maximum size of a file that is only to be read
_LOGS = ("config.json", "data.json", "metrics.jsonl", "summary.json")


def pack_results(folder: pathlib.Path, to: pathlib.Path) -> list[pathlib.Path]:
    """Packs the readable results: records, logs, the trace, and each run's log without its weights."""
    names = [name for name in ("results", "logs", "profile") if (folder / name).exists()]
    paths = [path for name in names for path in (folder / name).rglob("*")]
    paths += [path for name in _LOGS for path in folder.glob(f"runs/*/*/{name}")]
    small = (path for path in paths if path.is_file() and path.stat().st_size < _LOG_MIB * pack.MIB)
    return pack.pack(folder, sorted(str(path.relative_to(folder)) for path in small), to, RESULTS, PIECE_MIB)


def pack_state(
    runs: Runs,
    to: pathlib.Path,
    *,
    wanted: Callable[[Job], bool] = lambda job: True,
    students: bool = True,
    say: Callable[[str], None] = print,
) -> list[pathlib.Path]:
    """Packs the state that training continues from: runs with last checkpoints, teachers' weights, compiled programs.

    Args:
      runs: the runs of one precision.
      to: the folder for the pieces.
      wanted: returns True for jobs whose run is included.
      students: True includes the weights of finished students, from which nothing is trained.
      say: called with a line for each part that is left out because the total would exceed STATE_MIB.
    """
    folder, names, size = runs.folder, [], 0
    records = sorted(str(path.relative_to(folder)) for path in folder.glob("results/*.json"))
    parts = [("records", records)]
    parts += [(job.name, list(_files(runs, job, students))) for job in _by_need(runs) if wanted(job)]
    parts.append(("compiled programs", list(_newest(folder, "compiled"))))
    for title, files in parts:
        more = sum((folder / name).stat().st_size + 1024 for name in files)
        if files and size + more > STATE_MIB * pack.MIB:
            say(f"left out, because the state is limited to {STATE_MIB:g} MiB: {title}, {more / pack.MIB:.1f} MiB")
            continue
        names += files
        size += more
    return pack.pack(folder, names, to, STATE, PIECE_MIB)


def _by_need(runs: Runs) -> Iterator[Job]:
    """Yields the jobs that have begun: first the next jobs with their teachers, then finished students."""
    progress = runs.progress()
    left = plan.order(progress, runs.pairs, runs.seeds)
    seen: set[str] = set()
    for job in [*(one for next_ in left for one in (next_.teacher, next_)), *runs.jobs()]:
        if job.name not in seen and runs.place(job).exists():
            seen.add(job.name)
            yield job


def _files(runs: Runs, job: Job, students: bool) -> Iterator[str]:
    """Yields a run's logs and one checkpoint: the last if it continues, or the best, without training state."""
    place = runs.place(job)
    ended = (place / "summary.json").exists()
    checkpoint = place / "checkpoints" / str(best_step(place) if ended else last_step(place))
    without = {"training"} if ended else set()
    paths = [place / name for name in _LOGS]
    if checkpoint.exists() and (students or not ended or job.method == plan.TEACHER):
        paths += [path for path in checkpoint.rglob("*") if not without & set(path.relative_to(checkpoint).parts)]
    yield from (str(path.relative_to(runs.folder)) for path in paths if path.is_file())


def best_step(place: pathlib.Path) -> int:
    """Returns the saved step with the highest top-1, the latest of ties; 0 if there is none."""
    top1s = dict[int, float]()
    for path in place.glob("checkpoints/*/_CHECKPOINT_METADATA"):
        if path.parent.name.isdigit():
            top1s[int(path.parent.name)] = json.loads(path.read_text())["custom_metadata"]["top1"] or 0.0
    return max(top1s, key=lambda step: (top1s[step], step), default=0)


def _newest(folder: pathlib.Path, name: str) -> Iterator[str]:
    """Yields the newest files below a folder, up to _COMPILED_MIB in total."""
    size = 0.0
    files = (path for path in (folder / name).rglob("*") if path.is_file())
    for path in sorted(files, key=lambda path: path.stat().st_mtime, reverse=True):
        size += path.stat().st_size
        if size > _COMPILED_MIB * pack.MIB:
            return
        yield str(path.relative_to(folder))


def bring(inbox: pathlib.Path, folder: pathlib.Path, say: Callable[[str], None]) -> None:
    """Unpacks the inbox and its folders into the work folder, except for runs that are further there.

    Incomplete bundles are reported and skipped, because the rest of the programme may not need them.
    """
    folders = [inbox, *(path for path in sorted(inbox.glob("*")) if path.is_dir())]
    try:
        take_state(folders, folder)
    except pack.PieceError as error:
        say(str(error))
    if not (folder / "data" / "cifar100").exists():
        try:
            if pack.unpack(folders, folder / "data.new", DATA):
                (folder / "data.new").rename(folder / "data")
        except pack.PieceError as error:
            say(str(error))


def take_state(folders: Iterable[pathlib.Path], folder: pathlib.Path) -> bool:
    """Merges a state packed in some folders into a work folder; returns True if there was one."""
    arrived = folder / "arrived"
    shutil.rmtree(arrived, ignore_errors=True)
    found = pack.unpack(folders, arrived, STATE)
    if found:
        merge(arrived, folder)
        shutil.rmtree(arrived)
    return found


def merge(arrived: pathlib.Path, folder: pathlib.Path) -> None:
    """Moves arrived files into a work folder: runs that are further than the local ones, and newer other files."""
    for place in [path for path in arrived.glob("runs/*/*") if path.is_dir()]:
        here = folder / place.relative_to(arrived)
        further = (place / "summary.json").exists(), last_step(place)
        if not here.exists() or further > ((here / "summary.json").exists(), last_step(here)):
            shutil.rmtree(here, ignore_errors=True)
            here.parent.mkdir(parents=True, exist_ok=True)
            place.rename(here)
    for path in [path for path in arrived.rglob("*") if path.is_file()]:
        here = folder / path.relative_to(arrived)
        if here.relative_to(folder).parts[0] == "runs":  # a run that is not further
            continue
        if not here.exists() or path.stat().st_mtime > here.stat().st_mtime:
            here.parent.mkdir(parents=True, exist_ok=True)
            path.replace(here)
