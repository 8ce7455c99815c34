"""Files of the Hugging Face Hub, by names such as `hf://OWNER/NAME@REVISION/FILE`."""

import json
import pathlib
import re
from typing import NamedTuple
from urllib.parse import quote, unquote

from ldrld_jax.errors import UserError, first_line, needs

WEIGHTS, CONFIG = "model.safetensors", "config.json"

_SCHEME = "hf://"
_NAME = re.compile(r"hf://(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^/@]+))?(?:/(?P<file>.+))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")


class HubFile(NamedTuple):
    """A file of a model repository.

    Attributes:
      repo: "OWNER/NAME".
      revision: a branch, a tag or a commit; None for the newest commit of the main branch.
      file: its path in the repository.
    """

    repo: str
    revision: str | None
    file: str

    def __str__(self) -> str:
        revision = "" if self.revision is None else f"@{quote(self.revision, safe='')}"
        return f"{_SCHEME}{self.repo}{revision}{'' if self.file == WEIGHTS else f'/{self.file}'}"


def is_on_hub(path: str) -> bool:
    """Returns whether a path is a name on the Hub."""
    return path.startswith(_SCHEME)


def parse(name: str) -> HubFile:
    """Parses a name on the Hub; without a file it is of the repository's `model.safetensors`.

    Raises:
      UserError: if it is no such name, or its file has another format than safetensors, which alone holds no code.

    Example:
      >>> parse("hf://timm/resnet18.a1_in1k@v1.0")
      HubFile(repo='timm/resnet18.a1_in1k', revision='v1.0', file='model.safetensors')
    """
    found = _NAME.fullmatch(name)
    if found is None:
        raise UserError(f"{name} must be hf://OWNER/NAME, hf://OWNER/NAME@REVISION or either with /FILE.safetensors.")
    file = found["file"] or WEIGHTS
    if not file.endswith(".safetensors"):
        raise UserError(
            f"{name}: only .safetensors files are taken from the Hub, because they hold no code. Name a .safetensors "
            "file, or download this one and give its path."
        )
    return HubFile(found["repo"], found["revision"] and unquote(found["revision"]), file)


def download(name: str, file: str | None = None) -> pathlib.Path:
    """Returns the local path of a file of the Hub, in the cache of `huggingface_hub`, after a download if need be.

    A file of a commit that is in the cache is returned without a connection.

    Args:
      name: see `parse`.
      file: another file of the same repository and revision; None for the one that is named.

    Raises:
      UserError: if huggingface_hub is not installed, or the file cannot be downloaded.
    """
    repo, revision, named = parse(name)
    with needs(f"reading {name}", "hub"):
        import huggingface_hub
    try:
        return pathlib.Path(huggingface_hub.HfApi().hf_hub_download(repo, file or named, revision=revision))
    except Exception as error:  # its own, and those of an HTTP library that changes with its version
        raise refused(f"{name} cannot be read", error) from None


def pinned(path: str) -> str:
    """Returns a path with the commit that its revision on the Hub has now, so that it stays the same file for ever.

    Args:
      path: of a checkpoint, `::key` included; one that is not on the Hub is returned as it is.

    Raises:
      UserError: see `download`.
    """
    name, *key = path.split("::")
    if not is_on_hub(name):
        return path
    found = parse(name)
    if found.revision is None or not _COMMIT.fullmatch(found.revision):
        parts = pathlib.PurePosixPath(found.file).parts
        found = found._replace(revision=download(name).parents[len(parts) - 1].name)  # .../snapshots/COMMIT/FILE
    return "::".join([str(found), *key])


def with_known_revisions(paths: str, before: str) -> str:
    """Returns paths, separated by commas, in which names on the Hub without a revision have the one in `before`.

    Example:
      >>> with_known_revisions("hf://me/net,a.pth", before="hf://me/net@v1")
      'hf://me/net@v1,a.pth'
    """
    names = [path.partition("::")[0] for path in before.split(",")]
    known = {str(parse(name)._replace(revision=None)): name for name in names if is_on_hub(name)}
    split = [path.split("::") for path in paths.split(",")]
    return ",".join("::".join([known.get(name, name), *key]) for name, *key in split)


def normalisation(name: str) -> dict[str, tuple[float, ...]] | None:
    """Returns the mean and std of pixels in 0..1 that the config.json beside a file names, ours or timm's, if it does.

    Args:
      name: see `parse`.
    """
    try:
        content = json.loads(download(name, CONFIG).read_bytes())
        said = content["pretrained_cfg"] if "pretrained_cfg" in content else content["preprocessing"]["inside"]
        return {key: tuple(map(float, said[key])) for key in ("mean", "std")}
    except (UserError, LookupError, TypeError, ValueError):  # there is none, or another kind
        return None


def refused(what: str, error: Exception) -> UserError:
    """Returns the error for what the Hub, or the way to it, refuses."""
    return UserError(
        f"{what} ({type(error).__name__}: {first_line(error)}). Check the name, the connection and, for a "
        "repository that is not public, the login: hf auth login."
    )
