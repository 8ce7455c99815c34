"""A config file for runs in processes of their own: the digits, with the net that compiles in a second."""

import pathlib
import sys

from ml_collections import ConfigDict

from ldrld_jax.models import MODELS

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
from tests.tiny_net import TinyNet

MODELS["tiny_net"] = TinyNet


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.student = ConfigDict({"model": "tiny_net"})
    config.data = ConfigDict({"name": "digits", "pad": 1, "mean": (0.305,), "std": (0.376,)})
    config.optim = ConfigDict({"learning_rate": 0.05, "schedule": "cosine", "warmup": "linear", "warmup_epochs": 1})
    return config
