"""Packs folders into size-limited pieces with checksums, and unpacks them.

python benchmarks/stages/pack.py pack FOLDER TO --name data --mib 56
python benchmarks/stages/pack.py unpack TO FOLDER --name data

A piece is a line of JSON followed by bytes of a tar archive. The line names the bundle, the part, and the checksums of
the part and of the whole, so that pieces from several folders can be mixed and a missing one is named.
"""

import argparse
import hashlib
import io
import json
import pathlib
import sys
import tarfile
from collections.abc import Iterable
from typing import Any

SUFFIX = ".piece"
MIB = 2**20


class PieceError(ValueError):
    """Error for a piece that is damaged, missing, or from another version of the bundle."""


def pack(root: pathlib.Path, names: Iterable[str], to: pathlib.Path, bundle: str, mib: float) -> list[pathlib.Path]:
    """Packs files and folders below `root` into pieces, replacing those of an earlier bundle of this name.

    Args:
      root: the folder that the names are relative to.
      names: names of files and folders.
      to: the folder for the pieces, created if missing.
      bundle: the bundle's name.
      mib: maximum size of a piece in MiB.

    Returns:
      The paths of the pieces, in order.
    """
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name in names:
            archive.add(root / name, name)
    content = stream.getbuffer()
    size = int(mib * MIB)
    count = max(1, -(-len(content) // size))
    whole = hashlib.sha256(content).hexdigest()
    to.mkdir(parents=True, exist_ok=True)
    begun = []
    for index in range(count):
        part = content[index * size : (index + 1) * size]
        head = {"bundle": bundle, "index": index, "count": count, "whole": whole}
        head["sha256"] = hashlib.sha256(part).hexdigest()
        path = to / f"{bundle}.{index + 1}of{count}{SUFFIX}.new"
        with path.open("wb") as file:
            file.write(json.dumps(head).encode() + b"\n")
            file.write(part)
        begun.append(path)
    pieces = [path.rename(path.with_suffix("")) for path in begun]  # atomically replaces an old piece
    for old in set(_of(bundle, [to])) - set(pieces):
        old.unlink()
    return pieces


def unpack(folders: Iterable[pathlib.Path], to: pathlib.Path, bundle: str) -> bool:
    """Unpacks a bundle whose pieces are in some folders; writes nothing unless the bundle is complete.

    Returns:
      True if the folders contain the bundle.

    Raises:
      PieceError: if a piece is damaged or missing.
    """
    parts: dict[int, bytes] = {}
    first: dict[str, Any] = {}
    for path in _of(bundle, folders):
        head, part = _read(path)
        first = first or head
        if (head["whole"], head["count"]) != (first["whole"], first["count"]):
            raise PieceError(f"{path} is a piece of another {bundle} than the others. Remove the older ones.")
        parts[head["index"]] = part
    if not first:
        return False
    missing = sorted(set(range(first["count"])) - parts.keys())
    if missing:
        numbers = ", ".join(str(index + 1) for index in missing)
        raise PieceError(f"{bundle} lacks the pieces {numbers} of {first['count']}. Transfer them too.")
    content = b"".join(parts[index] for index in range(first["count"]))
    if hashlib.sha256(content).hexdigest() != first["whole"]:
        raise PieceError(f"{bundle} is damaged, although each of its pieces is intact.")
    to.mkdir(parents=True, exist_ok=True)
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        archive.extractall(to, filter="data")
    return True


def _of(bundle: str, folders: Iterable[pathlib.Path]) -> list[pathlib.Path]:
    return [path for folder in folders for path in sorted(folder.glob(f"{bundle}.*of*{SUFFIX}"))]


def _read(path: pathlib.Path) -> tuple[dict[str, Any], bytes]:
    line, _, part = path.read_bytes().partition(b"\n")
    try:
        head = json.loads(line)
        whole = head["sha256"] == hashlib.sha256(part).hexdigest()
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise PieceError(f"{path} is damaged. Transfer it again.")
    return head, part


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("pack", "unpack"))
    parser.add_argument("source", type=pathlib.Path, help="the folder to pack, or the folder with the pieces")
    parser.add_argument("to", type=pathlib.Path)
    parser.add_argument("--name", required=True, help="name of the bundle")
    parser.add_argument("--mib", type=float, default=15.0, help="maximum size of a piece")
    flags = parser.parse_args()
    try:
        if flags.what == "pack":
            names = sorted(path.name for path in flags.source.iterdir())
            for path in pack(flags.source, names, flags.to, flags.name, flags.mib):
                print(path)
        elif not unpack([flags.source], flags.to, flags.name):
            sys.exit(f"there is no piece of {flags.name} in {flags.source}.")
    except PieceError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
