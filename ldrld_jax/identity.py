"""Identity of a run: the keys of a resolved config that determine what is computed."""

from typing import Any

# These keys determine where and how fast a run executes, not what it computes.
NOT_IDENTITY = (
    "data.data_dir",
    "data.loader",
    "data.threads",
    "data.workers",
    "data.cache_mb",
    "data.max_skipped",
    "logits.dir",
    "remat",
    "teacher.workdir",
    "teacher.data.data_dir",
    "teacher.data.loader",
    "teacher.data.threads",
    "teacher.data.workers",
    "teacher.data.cache_mb",
    "teacher.data.max_skipped",
    "steps_per_dispatch",
    "compile",  # the cache folder, and the assumptions of --mode compile
    "check.",
    "mesh.",
    "log.",
    "checkpoint.",
)


def identity(config: Any) -> dict[str, Any]:
    """Returns the flat keys that identify a run, from a resolved config: a ConfigDict, or a dict as in config.json.

    Example:
      >>> identity({"seed": 1, "data": {"mean": (0.5,), "threads": 4}})
      {'seed': 1, 'data.mean': [0.5]}
    """
    keys = flat(config if isinstance(config, dict) else config.to_dict())
    return {key: value for key, value in keys.items() if not key.startswith(NOT_IDENTITY)}


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens a nested config to dotted keys, with tuples as lists, as in JSON."""
    keys: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            keys |= flat(value, f"{prefix}{key}.")
        else:
            keys[prefix + key] = list(value) if isinstance(value, tuple) else value
    return keys
