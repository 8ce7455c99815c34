"""Reads XLA's text of a compiled program and counts its traffic to memory and between devices."""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator

COLLECTIVES = (
    *("all-gather", "all-reduce", "all-to-all", "collective-broadcast", "collective-permute"),
    *("ragged-all-to-all", "reduce-scatter"),
)
# Instructions that only name, regroup or wait for arrays; they move no bytes themselves.
_FREE = {
    *("after-all", "async-start", "bitcast", "call", "conditional", "constant", "get-tuple-element", "iota"),
    *("opt-barrier", "parameter", "partition-id", "replica-id", "tuple", "while"),
}
_SLICES = ("dynamic-slice", "gather", "slice")  # these read only as many bytes as they return
_BITS = {"pred": 8, "token": 0, "bf16": 16, "c64": 64, "c128": 128}
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{[^}]*\})?")
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.-]+) = (.*)$")
_CALLED = re.compile(r"(?:calls|to_apply|branch_computations|true_computation)=(\{[^}]*\}|%?[\w.-]+)")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One kind of transfer between devices in a program.

    Attributes:
      kind: one of `COLLECTIVES`.
      count: executions on one device, counting each loop iteration.
      bytes: total size of one device's arrays over all executions.
    """

    kind: str
    count: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    shape: str
    kind: str
    operands: tuple[str, ...]
    rest: str  # the text after the operands
    root: bool  # True for the result of its computation

    @property
    def called(self) -> tuple[str, ...]:
        found = _CALLED.search(self.rest)
        return tuple(name.lstrip("%") for name in found.group(1).strip("{}").split(", ")) if found else ()


class CompiledText:
    """A compiled program, parsed from the text of `Compiled.as_text()`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> program = CompiledText(jax.jit(lambda x: jnp.sin(x) + 1).lower(jnp.ones(256)).compile().as_text())
      >>> program.bytes_moved, program.collectives
      (2048, [])
    """

    def __init__(self, text: str):
        self._computations: dict[str, dict[str, _Instruction]] = {}
        self._entry = ""
        current: dict[str, _Instruction] = {}
        for line in text.splitlines():
            if line.endswith("{") and "->" in line and not line.startswith(" "):
                name = line.removeprefix("ENTRY ").split()[0].split("(")[0].lstrip("%")
                current = self._computations[name] = {}
                self._entry = name if line.startswith("ENTRY ") else self._entry
            elif instruction := _instruction(line):
                current[instruction.name] = instruction

    @property
    def collectives(self) -> list[Collective]:
        """The transfers between devices, one entry per kind."""
        counts, sizes = collections.Counter[str](), collections.Counter[str]()
        for computation, instruction, times in self._executed(self._entry, 1):
            kind = instruction.kind.removesuffix("-start")
            if kind in COLLECTIVES:
                size = self._written(computation, instruction, any_memory=True)
                counts[kind] += times
                sizes[kind] += times * size
        return [Collective(kind, counts[kind], sizes[kind]) for kind in sorted(counts)]

    @property
    def bytes_moved(self) -> int:
        """The bytes that the program reads from and writes to memory, each fusion's inputs and outputs once.

        Arrays that the compiler keeps on the chip do not count. If only slices of an array are used, only the
        slices count.
        """
        return sum(
            times * self._moved(computation, instruction)
            for computation, instruction, times in self._executed(self._entry, 1)
        )

    @property
    def kernels(self) -> int:
        """The number of instructions executed, counting each loop iteration: roughly the kernel launches on a GPU."""
        executed = self._executed(self._entry, 1)
        return sum(times for _, i, times in executed if i.kind not in _FREE and not i.kind.endswith("-done"))

    def count(self, kind: str) -> int:
        """Returns the number of instructions of a kind in the text, including those inside fusions.

        Args:
          kind: an operation such as "sort", or the target of a custom call.
        """
        instructions = [i for computation in self._computations.values() for i in computation.values()]
        return sum(i.kind == kind or f'custom_call_target="{kind}"' in i.rest for i in instructions)

    def _executed(self, name: str, times: int) -> Iterator[tuple[str, _Instruction, int]]:
        """Yields the computation, the instruction and its number of executions, for every instruction that runs."""
        for instruction in self._computations[name].values():
            yield name, instruction, times
            if instruction.kind == "while":
                trips = re.search(r'"known_trip_count":\{"n":"(\d+)"', instruction.rest)
                body = re.search(r"body=%?([\w.-]+)", instruction.rest)
                assert body is not None
                yield from self._executed(body.group(1), times * (int(trips.group(1)) if trips else 1))
            elif instruction.kind in ("call", "async-start"):
                for called in instruction.called:
                    yield from self._executed(called, times)
            elif instruction.kind == "conditional":  # the branches cost about the same: count the first
                yield from self._executed(instruction.called[0], times)

    def _moved(self, computation: str, instruction: _Instruction) -> int:
        if instruction.kind in _FREE or instruction.kind.endswith(("-done", "-update")):
            return 0
        if instruction.kind == "copy-start":  # its shape holds source and destination
            return _bytes(instruction.shape)
        shapes = [self._computations[computation][name].shape for name in instruction.operands]
        written = self._written(computation, instruction)
        if instruction.kind in _SLICES:
            return 2 * written
        if instruction.kind == "dynamic-update-slice":
            return 2 * _bytes(shapes[1])
        if instruction.kind != "fusion":
            return written + sum(map(_bytes, shapes))
        inside = self._computations[instruction.called[0]]
        parameters = _parameters(inside)
        read = sum(_read(inside, parameters[i], shape) for i, shape in enumerate(shapes))
        return read + max(0, written - sum(_kept(inside, root) for root in _roots(inside)))

    def _written(self, computation: str, instruction: _Instruction, any_memory: bool = False) -> int:
        """Returns the bytes of an instruction's results, without the operands that the shape of a start has as well."""
        written, kind = _bytes(instruction.shape, any_memory), instruction.kind
        # From jax 0.12 on the starts of all collectives have them, in brackets of their own.
        if kind in ("all-gather-start", "collective-permute-start") or instruction.shape.startswith("(("):
            shapes = (self._computations[computation][name].shape for name in instruction.operands)
            written -= sum(_bytes(shape, any_memory) for shape in shapes)
        return written


def _read(inside: dict[str, _Instruction], parameter: str, shape: str) -> int:
    """Returns the bytes that a fusion reads from a parameter: the whole parameter, or only the slices it uses."""
    users = [i for i in inside.values() if parameter in i.operands and i.kind != "parameter"]
    sliced = [i for i in users if i.operands[0] == parameter and i.kind in (*_SLICES, "dynamic-update-slice")]
    if not users or len(sliced) < len(users) or not _bytes(shape):
        return _bytes(shape)
    # The target of a dynamic-update-slice is not read.
    return sum(_bytes(i.shape, any_memory=True) for i in sliced if i.kind in _SLICES)


@functools.cache
def _bytes(shape: str, any_memory: bool = False) -> int:
    """Returns the bytes of an array or tuple in the device's main memory.

    Example:
      >>> _bytes("(f32[8,3]{1,0}, s4[10], pred[])"), _bytes("f32[8]{0:T(128)S(1)}")
      (102, 0)
    """
    total = 0
    for found in _ARRAY.finditer(shape):
        kind, dims = found.groups()
        if "S(" in found.group(0) and not any_memory:  # another memory space: on-chip or host
            continue
        digits = re.search(r"\d+", kind)
        bits = _BITS.get(kind, int(digits.group(0)) if digits else 8)
        total += math.ceil(bits * math.prod(int(d) for d in dims.split(",") if d) / 8)
    return total


def _instruction(line: str) -> _Instruction | None:
    found = _INSTRUCTION.match(line)
    if not found:
        return None
    root, name, text = found.groups()
    text = re.sub(r"/\*.*?\*/", "", text)
    end = _closing(text) if text.startswith("(") else text.index(" ")
    shape, text = text[:end], text[end:].strip()
    kind, _, text = text.partition("(")
    end = _closing(f"({text}") - 2
    operands = tuple(re.findall(r"%([\w.-]+)", text[:end])) if kind != "parameter" else (text[:end],)
    return _Instruction(name, shape, kind, operands, text[end + 1 :], bool(root))


def _closing(text: str) -> int:
    """Returns the position after the bracket that closes the opening bracket at the start of `text`."""
    depth = 0
    for position, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return position + 1
    return len(text)


def _parameters(computation: dict[str, _Instruction]) -> dict[int, str]:
    return {int(i.operands[0]): i.name for i in computation.values() if i.kind == "parameter"}


def _roots(computation: dict[str, _Instruction]) -> list[_Instruction]:
    """Returns the results of a fused computation: its root, or the elements of the root tuple."""
    root = next(instruction for instruction in computation.values() if instruction.root)
    return [computation[name] for name in root.operands] if root.kind == "tuple" else [root]


def _kept(computation: dict[str, _Instruction], root: _Instruction) -> int:
    """Returns the bytes of a result that are not written: everything but the update, for an in-place update."""
    if root.kind != "dynamic-update-slice":
        return 0
    return _bytes(root.shape) - _bytes(computation[root.operands[1]].shape, any_memory=True)
