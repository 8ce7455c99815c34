"""CIFAR-100, any pair of the papers: `configs/cifar100.py:TEACHER-STUDENT`; default: the paper's headline pair.

python -m ldrld_jax.main --config configs/cifar100.py:resnet32x4-resnet8x4 --workdir runs/r32x4-r8x4
python -m ldrld_jax.sweep experiments/methods.py --config configs/cifar100.py:resnet56-resnet20 --workdir runs/r56-r20

Published top-1 (LDRLD: ICCV 2025, best or last epoch not stated; KD and DKD: from the tables of the DKD family, best
epoch, mean of five runs):

| pair                    | teacher | student | KD    | DKD   | LDRLD | ours        |
| ----------------------- | ------- | ------- | ----- | ----- | ----- | ----------- |
| resnet56-resnet20       | 72.34   | 69.06   | 70.66 | 71.97 | 72.20 | not yet run |
| resnet110-resnet20      | 74.31   | 69.06   | 70.67 | 71.06 | 71.98 | not yet run |
| resnet110-resnet32      | 74.31   | 71.14   | 73.08 | 74.11 |       | not yet run |
| resnet32x4-resnet8x4    | 79.42   | 72.50   | 73.33 | 76.32 | 77.20 | not yet run |
| wrn_40_2-wrn_16_2       | 75.61   | 73.26   | 74.92 | 76.24 | 76.35 | not yet run |
| wrn_40_2-wrn_40_1       | 75.61   | 71.98   | 73.54 | 74.81 |       | not yet run |
| vgg13-vgg8              | 74.64   | 70.36   | 72.98 | 74.68 | 75.06 | not yet run |
| resnet32x4-ShuffleV1    | 79.42   | 70.50   | 74.07 | 76.45 | 76.46 | not yet run |
| resnet32x4-ShuffleV2    | 79.42   | 71.82   | 74.45 | 77.07 |       | not yet run |
| wrn_40_2-ShuffleV1      | 75.61   | 70.50   | 74.83 | 76.70 |       | not yet run |
| vgg13-MobileNetV2       | 74.64   | 64.60   | 67.37 | 69.71 |       | not yet run |
| ResNet50-MobileNetV2    | 79.34   | 64.60   | 67.35 | 70.35 |       | not yet run |

Time of a run: not yet measured. A run on a fifth of the images for 15 epochs: `configs/cifar100_laptop.py`.

The 240-epoch recipe of RepDistiller, mdistiller and the LDRLD code, with the LDRLD code's warm-up "official"; the
teacher's recipe has no warm-up, as published. alpha and beta are the official README's values for resnet32x4-resnet8x4.
None are published for other pairs, which use the same until a sweep (`experiments/ablations.py:weights`) finds better.
DKD's beta is 8 by default. Its authors use 2 for resnet56-resnet20 and resnet110-resnet32, and 6 for wrn_40_2-wrn_16_2,
wrn_40_2-wrn_40_1, vgg13-vgg8 and vgg13-MobileNetV2: add `--config.loss.dkd.beta=2` or `=6` when you run dkd on them.
"""

from ml_collections import ConfigDict

# The published learning rate of these students is a fifth of the others'.
_SMALL_RATE = ("MobileNetV2", "ShuffleV1", "ShuffleV2")


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
    rate = 0.01 if student in _SMALL_RATE else 0.05
    config.optim = ConfigDict({"learning_rate": rate, "weight_decay": 5e-4, "warmup": "official", "warmup_epochs": 20})
    config.student = ConfigDict({"model": student})
    config.teacher = ConfigDict({"model": teacher, "epochs": 240, "optim": {"learning_rate": 0.05, "warmup": "none"}})
    return config
