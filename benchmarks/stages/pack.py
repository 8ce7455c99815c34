"""Folders packed into pieces that fit through a narrow door, each with checksums, and back.

python benchmarks/stages/pack.py pack FOLDER TO --name data --mib 56
python benchmarks/stages/pack.py unpack TO FOLDER --name data

A piece is a line of JSON and then bytes of a tar archive: it says of which bundle it is which part, and the checksums
of itself and of the whole, so that pieces of several folders can be thrown together and a lost one is named.
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
    """A piece is damaged, missing, or of another bundle than its fellows."""


def pack(root: pathlib.Path, names: Iterable[str], to: pathlib.Path, bundle: str, mib: float) -> list[pathlib.Path]:
    """Packs files and folders below `root` into pieces; those of an earlier bundle of this name are replaced.

    Args:
      root: what the names are relative to.
      names: of files and folders.
      to: the folder for the pieces, made if it is missing.
      bundle: the bundle's name.
      mib: the most that a piece holds, in MiB.

    Returns:
      The pieces, in order.
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
    pieces = [path.rename(path.with_suffix("")) for path in begun]  # over the old one of this name, at once
    for old in set(_of(bundle, [to])) - set(pieces):
        old.unlink()
    return pieces


def unpack(folders: Iterable[pathlib.Path], to: pathlib.Path, bundle: str) -> bool:
    """Unpacks a bundle whose pieces lie in some folders; nothing is written unless all of it is whole.

    Returns:
      Whether there was such a bundle.

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
        raise PieceError(f"{bundle} lacks the pieces {numbers} of {first['count']}. Bring them as well.")
    content = b"".join(parts[index] for index in range(first["count"]))
    if hashlib.sha256(content).hexdigest() != first["whole"]:
        raise PieceError(f"{bundle} is not as it was packed, though each of its pieces is.")
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
        raise PieceError(f"{path} is damaged. Bring it again.")
    return head, part


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("pack", "unpack"))
    parser.add_argument("source", type=pathlib.Path, help="the folder to pack, or the one that holds the pieces")
    parser.add_argument("to", type=pathlib.Path)
    parser.add_argument("--name", required=True, help="the bundle's")
    parser.add_argument("--mib", type=float, default=15.0, help="the most that a piece holds")
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
