"""CIFAR-100: `configs/cifar100.py:TEACHER-STUDENT`, by default the paper's headline pair.

python -m ldrld_jax.main --config configs/cifar100.py:resnet32x4-resnet8x4 --workdir runs/r32x4-r8x4

published  77.20 (LDRLD, ICCV 2025; best or last epoch not stated), teacher 79.42
ours       not yet run
time       not yet measured
The 240-epoch recipe of RepDistiller, mdistiller and the LDRLD code, warm-up "official" as there.
alpha and beta are the official README's for resnet32x4-resnet8x4; nobody has published another pair's.
"""

from ml_collections import ConfigDict


def get_config(pair: str = "resnet32x4-resnet8x4") -> ConfigDict:
    teacher, _, student = pair.partition("-")
    config = ConfigDict()
    config.epochs = 240
    config.batch_size = 64
    config.loss = ConfigDict({"ldrld": {"depth": 7, "temperature": 4.0, "alpha": 10.5, "beta": 7.0}})
    config.data = ConfigDict(
        {
            "name": "cifar100",
            "pad": 4,
            "flip": True,
            "mean": (0.5071, 0.4867, 0.4408),
            "std": (0.2675, 0.2565, 0.2761),
        }
    )
    config.optim = ConfigDict({"learning_rate": 0.05, "weight_decay": 5e-4, "warmup": "official", "warmup_epochs": 20})
    config.student = ConfigDict({"model": student})
    # The teacher's recipe as published has no warm-up.
    config.teacher = ConfigDict({"model": teacher, "epochs": 240, "optim": {"warmup": "none"}})
    return config
