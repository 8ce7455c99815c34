"""What makes two runs the same run: the keys of a resolved config that say what is computed."""

from typing import Any

# Where and how fast a run runs, not what it computes.
NOT_IDENTITY = (
    "data.data_dir",
    "data.loader",
    "data.threads",
    "data.cache_mb",
    "logits.dir",
    "remat",
    "teacher.workdir",
    "teacher.data.data_dir",
    "teacher.data.loader",
    "teacher.data.threads",
    "teacher.data.cache_mb",
    "steps_per_dispatch",
    "compile",  # the cache's place, and what --mode compile assumes
    "mesh.",
    "log.",
    "checkpoint.",
)


def identity(config: Any) -> dict[str, Any]:
    """Of a resolved config (a ConfigDict, or a dict as config.json has it): the keys that two runs must share to be
    the same run, dotted and flat.

    Example:
      >>> identity({"seed": 1, "data": {"mean": (0.5,), "threads": 4}})
      {'seed': 1, 'data.mean': [0.5]}
    """
    keys = flat(config if isinstance(config, dict) else config.to_dict())
    return {key: value for key, value in keys.items() if not key.startswith(NOT_IDENTITY)}


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested config under dotted keys, its tuples as the lists that JSON makes of them."""
    keys: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            keys |= flat(value, f"{prefix}{key}.")
        else:
            keys[prefix + key] = list(value) if isinstance(value, tuple) else value
    return keys
