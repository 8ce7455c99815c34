"""Configs: every key with its default, the files and flags that override them, and what a run makes of them.

A file in `configs/` defines `get_config(arg="")` and returns an `ml_collections.ConfigDict` that holds
only what differs from `default()`. `--config` executes that file: it is Python, trust it as such.
"""

from ldrld_jax.config.keys import check, default
from ldrld_jax.config.load import load, load_run, overridden
from ldrld_jax.config.remarks import remarks
from ldrld_jax.config.resolve import (
    method_config,
    method_names,
    method_of,
    resolve,
    teacher_checkpoints,
    teacher_models,
    teacher_recipe,
    teacher_runs,
    teaches_from_file,
    teaches_itself,
    views,
)

__all__ = [
    "check",
    "default",
    "load",
    "load_run",
    "method_config",
    "method_names",
    "method_of",
    "overridden",
    "remarks",
    "resolve",
    "teacher_checkpoints",
    "teacher_models",
    "teacher_recipe",
    "teacher_runs",
    "teaches_from_file",
    "teaches_itself",
    "views",
]
