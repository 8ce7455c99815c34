"""Reads the tensors of untrusted checkpoint files without running code from them."""

import gzip
import io
import re
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from typing import IO, Any

import jax.numpy as jnp
import numpy as np
from etils import epath

from ldrld_jax.errors import UserError, first_line, needs
from ldrld_jax.files import replace_bytes
from ldrld_jax.interop.hub import download, is_on_hub

# An archive may unpack to so many bytes, or to so many times its own size: a few kilobytes can claim gigabytes.
_MOST_BYTES, _MOST_TIMES = 2**28, 20

_SAFETENSORS_DTYPES = {
    "F64": jnp.float64,
    "F32": jnp.float32,
    "F16": jnp.float16,
    "BF16": jnp.bfloat16,
    "I64": jnp.int64,
    "I32": jnp.int32,
    "I16": jnp.int16,
    "I8": jnp.int8,
    "U8": jnp.uint8,
    "BOOL": jnp.bool_,
}


def read_tensors(path: Any, model_name: str) -> dict[str, np.ndarray]:
    """Reads the tensors of a `.pth`, `.safetensors` or `.npz` file, or of one in a tar archive.

    Args:
      path: path of the file, or `file::key` for what a file holds under a key; `archive::member` or
        `archive::member::key` for an archive. Nothing is unpacked to disk. `hf://OWNER/NAME` is a file of the
        Hugging Face Hub, see `interop.hub.parse`.
      model_name: selects the member of an archive.

    Returns:
      The tensors by the file's keys. Those of nested dicts have all the keys on the way, joined by dots.

    Raises:
      UserError: if the file, the member or the key does not exist, or the file cannot be read safely.
    """
    name, *rest = str(path).split("::")
    file = epath.Path(download(name) if is_on_hub(name) else name)
    if not file.exists():
        raise UserError(f"there is no checkpoint {name}. Check the path.")
    if file.is_dir():
        raise UserError(f"{name} is a folder, not a PyTorch checkpoint. Give a .pth, .safetensors or .tar file.")
    with file.open("rb") as stream:
        if _is_tar(stream):
            member, *rest = rest or [""]
            name, data = _read_member(stream, name, member, model_name)
        else:
            data = stream.read()
    if len(rest) > 1:
        raise UserError(f"{path} has too many parts. Give FILE::KEY, or ARCHIVE::MEMBER::KEY for a tar archive.")
    tensors = _parse(name, data)
    if not rest:
        return tensors
    start = rest[0].rstrip(".") + "."
    if found := {key.removeprefix(start): value for key, value in tensors.items() if key.startswith(start)}:
        return found
    known = ", ".join(sorted({key.partition(".")[0] for key in tensors})[:20])
    raise UserError(f"{name} holds nothing under {rest[0]!r}. Its keys begin with: {known}.")


def write_safetensors(path: Any, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes one file with PyTorch's format marker, which readers of that library expect.

    Raises:
      UserError: if safetensors is not installed.
    """
    with needs(f"writing {path}", "export"):
        import safetensors.numpy
    replace_bytes(epath.Path(path), safetensors.numpy.save(dict(tensors), metadata={"format": "pt"}))


def _is_tar(stream: IO[bytes]) -> bool:
    """Detects a tar archive by content, because some scripts name a plain torch file `.pth.tar`."""
    head = stream.read(512)
    stream.seek(0)
    return head[257:262] == b"ustar" or head[:2] == b"\x1f\x8b"


def _read_member(stream: IO[bytes], archive: str, member: str, model_name: str) -> tuple[str, bytes]:
    """Returns name and bytes of the requested member, or of the only one whose path names the model."""
    try:
        _check_gzip(stream, archive)
        with tarfile.open(fileobj=stream, mode="r:*") as tar:
            files = {info.name: info for info in tar.getmembers() if info.isreg()}
            chosen = [member] if member else [name for name in files if _names(name, model_name)]
            if len(chosen) == 1 and chosen[0] in files:
                _check_size(archive, files[chosen[0]].size, _size(stream))  # a sparse member may claim any
                content = tar.extractfile(files[chosen[0]])
                assert content is not None  # only regular files are listed
                return f"{archive}::{chosen[0]}", content.read()
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise UserError(f"{archive} is a damaged archive ({error}). Download it again.") from None
    wanted = f"no member {member!r}" if member else f"{len(chosen) or 'no'} members for {model_name}"
    listed = ", ".join(chosen if len(chosen) > 1 else list(files)[:20]) or "nothing"
    raise UserError(f"{archive} has {wanted}. Choose one as {archive}::MEMBER from: {listed}.")


def _check_gzip(stream: IO[bytes], name: str) -> None:
    """Reads a compressed archive to its end, where its checksum is, without keeping what it unpacks to."""
    if stream.read(2) == b"\x1f\x8b":
        stream.seek(0)
        packed, unpacked = _size(stream), 0
        with gzip.open(stream) as content:
            while chunk := content.read(2**20):
                unpacked += len(chunk)
                _check_size(name, unpacked, packed)
    stream.seek(0)


def _size(stream: IO[bytes]) -> int:
    here = stream.tell()
    size = stream.seek(0, io.SEEK_END)
    stream.seek(here)
    return size


def _check_size(name: str, unpacked: int, packed: int) -> None:
    if unpacked > max(_MOST_BYTES, _MOST_TIMES * packed):
        raise UserError(
            f"{name} of {packed:,} bytes unpacks to {unpacked:,} or more, which no checkpoint does. If you trust it, "
            "unpack it yourself and give the file in it."
        )


def _check_zip(name: str, data: bytes) -> list[str]:
    """Compares the members of a zip archive with its checksums, and returns their names; none for a torn archive.

    Raises:
      UserError: if one differs, or the archive unpacks to implausibly much.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            _check_size(name, sum(info.file_size for info in archive.infolist()), len(data))
            damaged = archive.testzip()
            names = archive.namelist()
    except zipfile.BadZipFile:
        return []
    except (zlib.error, EOFError, OSError, RuntimeError) as error:  # the last by a password or an unknown compression
        damaged = f"a file ({error})"
    if damaged is not None:
        raise UserError(f"{name} is damaged: {damaged} in it differs from its checksum. Download it again.")
    return names


def _names(member: str, model_name: str) -> bool:
    """Returns whether a folder or file in the path is named after the model, such as `resnet56_vanilla`."""
    if not member.endswith((".pth", ".pt", ".safetensors", ".npz")):
        return False
    return re.search(rf"(^|/){re.escape(model_name)}([_./-]|$)", member) is not None


def _parse(name: str, data: bytes) -> dict[str, np.ndarray]:
    if not data:
        raise UserError(f"{name} is empty. Download it again.")
    start = data[:64]
    if len(start) > 16 and start.isascii() and all(char.isprintable() or char.isspace() for char in start.decode()):
        raise UserError(
            f"{name} is text that begins {start.decode()[:24]!r}, not a checkpoint: perhaps the page around "
            "the download, or a pointer to the file. Download the file itself."
        )
    if name.endswith(".stablehlo"):
        raise UserError(f"{name} is a program, not a checkpoint. Give the student.safetensors that lies beside it.")
    if data[8:9] == b"{" or name.endswith(".safetensors"):
        return _parse_safetensors(name, data)
    members = _check_zip(name, data) if start[:4] == b"PK\x03\x04" else []
    if members and all(member.endswith(".npy") for member in members):
        return _parse_npz(name, data)
    return _parse_torch(name, data)


def _parse_safetensors(name: str, data: bytes) -> dict[str, np.ndarray]:
    with needs(f"reading {name}", "export"):
        import safetensors
    try:
        return {
            key: np.frombuffer(tensor["data"], _SAFETENSORS_DTYPES[tensor["dtype"]]).reshape(tensor["shape"])
            for key, tensor in safetensors.deserialize(data)
        }
    except KeyError as error:
        raise UserError(f"{name} holds tensors of type {error}. Convert them to float32.") from None
    except safetensors.SafetensorError as error:
        raise UserError(f"{name} is truncated or damaged ({error}). Download it again.") from None


def _parse_npz(name: str, data: bytes) -> dict[str, np.ndarray]:
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            return dict(arrays)
    except ValueError as error:
        raise UserError(f"{name} holds an array of Python objects ({error}). Save the file without it.") from None


def _parse_torch(name: str, data: bytes) -> dict[str, np.ndarray]:
    with needs(f"{name} is a PyTorch file, and reading it", "torch"):
        import torch
    try:
        # These are counters and options that training scripts save with the weights; building them runs no code.
        with torch.serialization.safe_globals(_harmless_globals()):
            content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        entries = dict(_flat(content)) if isinstance(content, dict) else {}
        # An expanded tensor reads its numbers several times: a few bytes may claim any size.
        claimed = sum(value.nbytes for value in entries.values())
        if claimed > max(_MOST_BYTES, _MOST_TIMES * len(data)):
            raise UserError(
                f"{name} of {len(data):,} bytes claims tensors of {claimed:,}, which no checkpoint does. If you trust "
                "it, save its tensors as tensor.contiguous()."
            )
        arrays = {key: _as_numpy(value) for key, value in entries.items()}
    except UserError:
        raise
    except Exception as error:  # torch raises a dozen kinds, and each means that the file is unusable
        raise _unreadable(name, error) from None
    if not arrays:
        held = f"the keys {', '.join(map(str, list(content)[:8]))}" if isinstance(content, dict) else type(content)
        raise UserError(f"{name} holds no state_dict but {held}. Save model.state_dict(), bare or under any key.")
    return arrays


def _flat(content: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the tensors and arrays of nested dicts and lists, under their keys joined by dots."""
    items = content.items() if isinstance(content, dict) else enumerate(content)
    for key, value in items:
        if isinstance(value, dict | list | tuple):
            yield from _flat(value, f"{prefix}{key}.")
        elif hasattr(value, "detach") or isinstance(value, np.ndarray):
            yield f"{prefix}{key}", value


def _as_numpy(tensor: Any) -> np.ndarray:
    """Converts floats below 32 bits, some of which NumPy lacks, to float32, which represents them exactly."""
    if isinstance(tensor, np.ndarray):
        return tensor
    narrow = tensor.dtype.is_floating_point and tensor.dtype.itemsize < 4
    return (tensor.float() if narrow else tensor).detach().numpy()


def _harmless_globals() -> list[Any]:
    import argparse

    scalar, rebuild = np.float64(0).__reduce__()[0], np.zeros(0).__reduce__()[0]
    dtypes = {type(np.dtype(kind)) for kind in "?bhilqBHILQefdSU"}
    old = [(scalar, "numpy.core.multiarray.scalar"), (rebuild, "numpy.core.multiarray._reconstruct")]  # of numpy 1
    return [argparse.Namespace, np.ndarray, np.dtype, *dtypes, scalar, rebuild, *old]


def _unreadable(name: str, error: Exception) -> UserError:
    if "Unsupported operand" in str(error) or "pickle protocol" in str(error):
        return UserError(
            f"{name} uses a pickle protocol other than PyTorch's, which is refused. If you trust it, read it "
            "with PyTorch and write it again by torch.save(state_dict, path)."
        )
    wanted = re.search(r"GLOBAL (\S+)", str(error))
    if wanted is None:
        reason = first_line(error)[:120]
        return UserError(f"{name} is truncated or no PyTorch checkpoint ({reason}). Download it again.")
    return UserError(
        f"{name} asks to run {wanted[1]!r} on loading, which is refused: only tensors are read. "
        "If you trust it, save model.state_dict() from it with PyTorch and give that."
    )
