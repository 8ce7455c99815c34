"""A causal language model of characters, distilled from a larger one: texts in place of images, on a laptop.

python -m ldrld_jax.main --config configs/tokens.py --workdir runs/tokens

published  none: the texts ship with Python, so everything can be tried with them
"""

from ml_collections import ConfigDict

MODULE = "ldrld_jax.examples.tokens"


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.epochs = 4
    config.batch_size = 16
    config.method = "kd"
    config.loss = ConfigDict({"kd": {"temperature": 2.0}})
    config.data = ConfigDict({"name": f"{MODULE}:texts"})
    config.student = ConfigDict({"model": f"{MODULE}:small"})
    config.teacher = ConfigDict({"model": f"{MODULE}:large", "epochs": 4})
    config.optim = ConfigDict(
        {
            "name": "adamw",
            "learning_rate": 5e-3,
            "weight_decay": 0.01,
            "schedule": "cosine",
            "warmup": "linear",
            "warmup_epochs": 1,
        }
    )
    return config
