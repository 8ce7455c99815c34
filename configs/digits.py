"""ResNet20 -> ResNet8 on the 8x8 digits that ship with scikit-learn: a whole distillation on a laptop.

python -m ldrld_jax.main

published  none: this dataset needs no download, so everything can be tried with it
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.epochs = 20
    config.data = ConfigDict({"name": "digits", "pad": 1, "mean": (0.305,), "std": (0.376,)})
    config.student = ConfigDict({"model": "resnet8"})
    config.teacher = ConfigDict({"model": "resnet20", "epochs": 20, "min_top1": 90.0})
    config.optim = ConfigDict({"learning_rate": 0.05, "schedule": "cosine", "warmup": "linear", "warmup_epochs": 1})
    return config
