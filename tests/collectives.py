"""Transfers between devices in a compiled program."""

import re

_KINDS = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter|collective-broadcast"


def transfers(compiled) -> list[tuple[str, list[tuple[int, ...]]]]:
    """Returns the transfers of a compiled program in order: the kind, and the shapes of its results, () for a scalar.

    `aot.hlo.CompiledText.collectives` adds the bytes of a kind up; tests also bound what a single transfer holds.
    """
    found = []
    for results, kind in re.findall(rf"= (.*?) ({_KINDS})(?:-start)?\(", compiled.as_text()):
        dimensions = re.findall(r"\w\[([\d,]*)\]", re.sub(r"\{[^}]*\}|/\*.*?\*/", "", results))
        found.append((kind, [tuple(map(int, filter(None, shape.split(",")))) for shape in dimensions]))
    return found
