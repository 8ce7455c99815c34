"""Logit distillation in JAX: LDRLD (ICCV 2025), a sharded Flax train step, and the runs around them.

Importing the package loads nothing else: the losses, which need jax, and what needs flax are loaded when first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from ldrld_jax.errors import NonFiniteError, UserError

if TYPE_CHECKING:
    from ldrld_jax.interop.host_teacher import HostTeacher
    from ldrld_jax.interop.torch_import import load_torch_checkpoint
    from ldrld_jax.losses import METHODS, LDRLDConfig, LDRLDTerms, ldrld_loss, ldrld_terms, rank_weights
    from ldrld_jax.models import MODELS, create_model
    from ldrld_jax.runtime.signals import Interrupted
    from ldrld_jax.train.given import Callback
    from ldrld_jax.train.trainer import Result, Trainer

__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "MODELS",
    "Callback",
    "HostTeacher",
    "Interrupted",
    "LDRLDConfig",
    "LDRLDTerms",
    "NonFiniteError",
    "Result",
    "Trainer",
    "UserError",
    "create_model",
    "ldrld_loss",
    "ldrld_terms",
    "load_torch_checkpoint",
    "rank_weights",
]

_LAZY = {
    **dict.fromkeys(
        ("METHODS", "LDRLDConfig", "LDRLDTerms", "ldrld_loss", "ldrld_terms", "rank_weights"), "ldrld_jax.losses"
    ),
    "Callback": "ldrld_jax.train.given",
    "HostTeacher": "ldrld_jax.interop.host_teacher",
    "Interrupted": "ldrld_jax.runtime.signals",
    "MODELS": "ldrld_jax.models",
    "Result": "ldrld_jax.train.trainer",
    "Trainer": "ldrld_jax.train.trainer",
    "create_model": "ldrld_jax.models",
    "load_torch_checkpoint": "ldrld_jax.interop.torch_import",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
