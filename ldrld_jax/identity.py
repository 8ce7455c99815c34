"""Identity of a run: the keys of a resolved config that determine what is computed."""

from collections.abc import Iterator
from typing import Any

# Keys of a data block that determine where images lie and how they are read, not what is read.
READING = ("data_dir", "loader", "threads", "workers", "cache_mb", "max_skipped")
# Keys that may differ between the processes of one run.
OF_A_PROCESS = (
    *(f"{block}.{key}" for block in ("data", "teacher.data") for key in READING),
    "logits.dir",
    "teacher.workdir",
    "compile",  # the cache folder, and the assumptions of --mode compile
    "check.",
    "log.",
)
# These keys determine where and how fast a run executes, not what it computes.
NOT_IDENTITY = (*OF_A_PROCESS, "remat", "steps_per_dispatch", "mesh.", "checkpoint.")


def of_all(config: Any) -> dict[str, Any]:
    """Returns the flat keys of a resolved config in which all processes of a run agree."""
    return {key: value for key, value in flat(config).items() if not key.startswith(OF_A_PROCESS)}


def identity(config: Any) -> dict[str, Any]:
    """Returns the flat keys that identify a run, from a resolved config: a ConfigDict, or a dict as in config.json.

    Example:
      >>> identity({"seed": 1, "data": {"mean": (0.5,), "threads": 4}})
      {'seed': 1, 'data.mean': [0.5]}
    """
    return {key: value for key, value in flat(config).items() if not key.startswith(NOT_IDENTITY)}


def is_object(name: str) -> bool:
    """Returns whether a config's value stands for an object that was given in Python.

    Example:
      >>> is_object("<MyNet>"), is_object("resnet8"), is_object("my_module:make_net")
      (True, False, False)
    """
    return name.startswith("<")


def differences(theirs: dict[str, Any], ours: dict[str, Any]) -> dict[str, str]:
    """Returns the keys in which two flat dicts differ, each as text with both values.

    Example:
      >>> differences({"seed": 1, "epochs": 2}, {"seed": 3, "epochs": 2})
      {'seed': 'seed (1 there, 3 here)'}
    """
    return {
        key: f"{key} ({theirs.get(key)!r} there, {ours.get(key)!r} here)"
        for key in sorted(ours | theirs)
        if ours.get(key) != theirs.get(key)
    }


def leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields each dotted key of a nested config, a ConfigDict or a dict, with its value."""
    for key, value in config.items():
        if hasattr(value, "items"):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def flat(config: Any) -> dict[str, Any]:
    """Flattens a nested config to dotted keys, with tuples as lists, as in JSON."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in leaves(config)}
