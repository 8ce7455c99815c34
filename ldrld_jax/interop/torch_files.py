"""Reads the tensors of untrusted checkpoint files without running code from them."""

import io
import re
import tarfile
from collections.abc import Mapping
from typing import IO, Any

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from etils import epath

from ldrld_jax.errors import UserError
from ldrld_jax.files import replace_bytes

# Keys under which training scripts save the state_dict.
_WRAPPERS = ("model", "state_dict", "model_state_dict", "net")

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
    """Reads the tensors of a `.pth` or `.safetensors` file, or of one in a tar archive, under the file's keys.

    Args:
      path: path of the file, or `archive::member`. Nothing is unpacked to disk.
      model_name: selects the member of an archive.

    Raises:
      UserError: if the file or member does not exist, or is not a checkpoint that can be read safely.
    """
    name, _, member = str(path).partition("::")
    file = epath.Path(name)
    if not file.exists():
        raise UserError(f"there is no checkpoint {name}. Check the path.")
    if file.is_dir():
        raise UserError(f"{name} is a folder, not a PyTorch checkpoint. Give a .pth, .safetensors or .tar file.")
    with file.open("rb") as stream:
        if _is_tar(stream):
            name, data = _read_member(stream, name, member, model_name)
        elif member:
            raise UserError(f"{name} is no tar archive, so it has no member {member!r}. Give the path alone.")
        else:
            data = stream.read()
    return _parse(name, data)


def write_safetensors(path: Any, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes one file with PyTorch's format marker, which readers of that library expect."""
    replace_bytes(epath.Path(path), safetensors.numpy.save(dict(tensors), metadata={"format": "pt"}))


def _is_tar(stream: IO[bytes]) -> bool:
    """Detects a tar archive by content, because some scripts name a plain torch file `.pth.tar`."""
    head = stream.read(512)
    stream.seek(0)
    return head[257:262] == b"ustar" or head[:2] == b"\x1f\x8b"


def _read_member(stream: IO[bytes], archive: str, member: str, model_name: str) -> tuple[str, bytes]:
    """Returns name and bytes of the requested member, or of the only one whose path names the model."""
    try:
        with tarfile.open(fileobj=stream, mode="r:*") as tar:
            files = {info.name: info for info in tar.getmembers() if info.isreg()}
            chosen = [member] if member else [name for name in files if _names(name, model_name)]
            if len(chosen) == 1 and chosen[0] in files:
                content = tar.extractfile(files[chosen[0]])
                assert content is not None  # only regular files are listed
                return f"{archive}::{chosen[0]}", content.read()
    except (tarfile.TarError, EOFError, OSError) as error:
        raise UserError(f"{archive} is a damaged archive ({error}). Download it again.") from None
    wanted = f"no member {member!r}" if member else f"{len(chosen) or 'no'} members for {model_name}"
    listed = ", ".join(chosen if len(chosen) > 1 else list(files)[:20]) or "nothing"
    raise UserError(f"{archive} has {wanted}. Choose one as {archive}::MEMBER from: {listed}.")


def _names(member: str, model_name: str) -> bool:
    """Returns whether a folder or file in the path is named after the model, such as `resnet56_vanilla`."""
    if not member.endswith((".pth", ".pt", ".safetensors")):
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
    if data[8:9] == b"{" or name.endswith(".safetensors"):
        return _parse_safetensors(name, data)
    return _parse_torch(name, data)


def _parse_safetensors(name: str, data: bytes) -> dict[str, np.ndarray]:
    try:
        return {
            key: np.frombuffer(tensor["data"], _SAFETENSORS_DTYPES[tensor["dtype"]]).reshape(tensor["shape"])
            for key, tensor in safetensors.deserialize(data)
        }
    except KeyError as error:
        raise UserError(f"{name} holds tensors of type {error}. Convert them to float32.") from None
    except safetensors.SafetensorError as error:
        raise UserError(f"{name} is truncated or damaged ({error}). Download it again.") from None


def _parse_torch(name: str, data: bytes) -> dict[str, np.ndarray]:
    try:
        import torch
    except ImportError:
        raise UserError(
            f"{name} is a PyTorch file, and reading it needs torch: pip install 'ldrld_jax[torch]'. "
            "A .safetensors file needs no extra."
        ) from None
    try:
        # These are counters and options that training scripts save with the weights; building them runs no code.
        with torch.serialization.safe_globals(_harmless_globals()):
            content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        for wrapper in _WRAPPERS:
            if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
                content = content[wrapper]
        entries = content.items() if isinstance(content, dict) else ()
        arrays = {str(key): _as_numpy(value) for key, value in entries if isinstance(value, torch.Tensor)}
    except Exception as error:  # torch raises a dozen kinds, and each means that the file is unusable
        raise _unreadable(name, error) from None
    if not arrays:
        held = f"the keys {', '.join(map(str, list(content)[:8]))}" if isinstance(content, dict) else type(content)
        raise UserError(
            f"{name} holds no state_dict but {held}. It may be bare or under one of: {', '.join(_WRAPPERS)}."
        )
    return arrays


def _as_numpy(tensor: Any) -> np.ndarray:
    """Converts floats below 32 bits, some of which NumPy lacks, to float32, which represents them exactly."""
    narrow = tensor.dtype.is_floating_point and tensor.dtype.itemsize < 4
    return (tensor.float() if narrow else tensor).detach().numpy()


def _harmless_globals() -> list[Any]:
    import argparse

    scalar = np.float64(0).__reduce__()[0]
    dtypes = [type(np.dtype(name)) for name in ("float64", "float32", "int64", "int32")]
    old = (scalar, "numpy.core.multiarray.scalar")  # its name in numpy 1
    return [argparse.Namespace, np.dtype, *dtypes, scalar, old]


def _unreadable(name: str, error: Exception) -> UserError:
    wanted = re.search(r"GLOBAL (\S+)", str(error))
    if wanted is None:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return UserError(f"{name} is truncated or no PyTorch checkpoint ({reason[:120]}). Download it again.")
    return UserError(
        f"{name} asks to run {wanted[1]!r} on loading, which is refused: only tensors are read. "
        "If you trust it, save model.state_dict() from it with PyTorch and give that."
    )
