"""Students as folders of the Hugging Face Hub, out and in: `export --hub`, and predictions by `hf://OWNER/NAME`.

The folder holds model.safetensors, config.json with the labels and the preprocessing, and README.md, the model card.
None of them is code, so that a stranger's folder can be used.
"""

import json
import math
from typing import Any, get_args

from etils import epath
from ml_collections import ConfigDict

import ldrld_jax
from ldrld_jax.config.keys import KINDS
from ldrld_jax.deploy.export import Student, card_of, make_program, sha256_of, student_of
from ldrld_jax.deploy.preprocessing import view_of
from ldrld_jax.errors import UserError, needs
from ldrld_jax.files import is_link, named, read_json, replace_text
from ldrld_jax.interop import hub
from ldrld_jax.interop.torch_import import save_torch_checkpoint
from ldrld_jax.models import MODELS
from ldrld_jax.runtime.hosts import first
from ldrld_jax.runtime.precision import dtypes, precision_scope
from ldrld_jax.train.networks import Networks

_CARD, _LIBRARY = "README.md", "ldrld_jax"
_FILES = (hub.WEIGHTS, hub.CONFIG, _CARD)


def export(config: ConfigDict, workdir: epath.PathLike, target: str) -> str:
    """Writes a run's best student as the Hub wants it, and returns where it is.

    Args:
      config: the run's config, see `ldrld_jax.config.load_run`.
      workdir: the run's folder.
      target: a folder; or `hf://OWNER/NAME`, optionally with `@BRANCH`, to which `workdir/hub` is uploaded. A
        repository that does not exist is made, and is private.

    Raises:
      UserError: if there is no such run, an extra is not installed, the folder has files of something else, or the Hub
        refuses the upload.
    """
    remote = hub.parse(target) if hub.is_on_hub(target) else None
    if remote is not None and remote.file != hub.WEIGHTS:
        raise UserError(f"--hub takes a folder, hf://OWNER/NAME or hf://OWNER/NAME@BRANCH, got {target}.")
    with needs("--hub", "export"):
        import safetensors  # noqa: F401
    if remote is not None:
        with needs(f"--hub {target}", "hub"):
            import huggingface_hub  # noqa: F401
    folder = epath.Path(target) if remote is None else epath.Path(workdir) / "hub"
    _check_writable(folder)
    student, variables, saved = student_of(config, workdir)
    if not first():
        return target
    with named(folder):
        folder.mkdir(parents=True, exist_ok=True)
        save_torch_checkpoint(folder / hub.WEIGHTS, *variables)
    content = {
        "library_name": _LIBRARY,
        "library_version": ldrld_jax.__version__,
        "architecture": saved["student"]["model"],
        "num_classes": len(student.labels),
        "id2label": dict(enumerate(student.labels)),
        "precision": config.precision,
        "matmul_precision": config.matmul_precision,
        "preprocessing": student.preprocessing,
        "sha256": {hub.WEIGHTS: sha256_of(folder / hub.WEIGHTS)},
    }
    replace_text(folder / hub.CONFIG, json.dumps(content, indent=2) + "\n")
    place = "hf://OWNER/NAME" if remote is None else str(remote)
    replace_text(folder / _CARD, card_of(workdir, student, variables, saved, place))
    return str(folder) if remote is None else _upload(folder, remote)


def _check_writable(folder: epath.Path) -> None:
    """Raises a UserError if writing to `folder` would replace files that no earlier export wrote, as a run's config."""
    if is_link(folder):
        raise UserError(f"{folder} is a link, and nothing is written through one. Remove it.")
    there = [name for name in _FILES if (folder / name).exists()]
    if hub.CONFIG in there and read_json(folder / hub.CONFIG, "A folder for the Hub").get("library_name") == _LIBRARY:
        return
    if there:
        raise UserError(f"{folder} has {' and '.join(there)} of something else. Name another folder for --hub.")


def _upload(folder: epath.Path, remote: hub.HubFile) -> str:
    import huggingface_hub

    api = huggingface_hub.HfApi()
    try:
        api.create_repo(remote.repo, private=True, exist_ok=True)
        done = api.upload_folder(
            repo_id=remote.repo,
            folder_path=str(folder),
            revision=remote.revision,
            allow_patterns=list(_FILES),
            commit_message="Upload a student of ldrld_jax",
        )
    except Exception as error:  # see hub.download
        raise hub.refused(f"{folder} was written but not uploaded to {remote}", error) from None
    return str(remote._replace(revision=done.oid))


def is_hub(place: str) -> bool:
    """Returns whether a place is `hf://OWNER/NAME` or a folder that `export` wrote."""
    return hub.is_on_hub(place) or (epath.Path(place) / hub.WEIGHTS).exists()


def read_student(place: str) -> Student:
    """Reads a student from the Hub, or from a folder that `export` wrote. No code in it is executed.

    Args:
      place: `hf://OWNER/NAME`, optionally with `@REVISION`, or the folder.

    Raises:
      UserError: if it cannot be downloaded, a file is damaged or of another kind, or its network is not one of
        `MODELS`.
    """
    if hub.is_on_hub(place):
        place = hub.pinned(place)  # both files are of one commit
        config, weights = epath.Path(hub.download(place, hub.CONFIG)), place
    else:
        config, weights = epath.Path(place) / hub.CONFIG, str(epath.Path(place) / hub.WEIGHTS)
    what = "Beside a student for the Hub"
    content = read_json(config, what, keys={"architecture", "preprocessing", "sha256"})
    model = content["architecture"]
    if not isinstance(model, str) or model not in MODELS:
        raise UserError(
            f"{place} holds a network {model!r}, which is not of this package and is not imported. Give a student of "
            "one of these: python -m ldrld_jax.models.table."
        )
    try:
        described, inside = content["preprocessing"], content["preprocessing"]["inside"]
        shape, channels = view_of(described).shape, described["input"]["shape"][-1]
        data = ConfigDict({"mean": _numbers(inside["mean"]), "std": _numbers(inside["std"])})
        data.image_size = None if inside["resize"] is None else int(inside["resize"])
        labels = tuple(str(content["id2label"][str(i)]) for i in range(len(content["id2label"])))
        precision, products = content["precision"], content["matmul_precision"]
        expected = content["sha256"][hub.WEIGHTS]
        dtypes(precision)  # a name that it does not know is a LookupError
        if not all(data.std) or not labels or products not in get_args(KINDS["matmul_precision"]):
            raise ValueError(f"std {data.std}, {len(labels)} labels, matmul_precision {products!r}")
    except (LookupError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{config} is not of a student ({type(error).__name__}: {error}). Export it again.") from None
    file = epath.Path(hub.download(weights) if hub.is_on_hub(weights) else weights)
    if file.exists() and sha256_of(file) != expected:
        raise UserError(f"{weights} is not what {config} describes: its SHA-256 is not {expected}. Export it again.")
    with precision_scope(precision, products):
        network, variables = Networks(len(labels), channels, precision).restore(weights, model, data)
        return Student(make_program(network, variables, shape, "uint8"), described, labels)


def _numbers(values: Any) -> tuple[float, ...]:
    numbers = tuple(map(float, values))
    if not all(map(math.isfinite, numbers)):
        raise ValueError(f"{values} are not finite")
    return numbers
