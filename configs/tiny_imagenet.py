"""Tiny-ImageNet-200 at 64 px, read from the unpacked zip: `configs/tiny_imagenet.py:TEACHER-STUDENT`.

curl -LO http://cs231n.stanford.edu/tiny-imagenet-200.zip && unzip -q tiny-imagenet-200.zip
python -m ldrld_jax.main --config configs/tiny_imagenet.py --workdir runs/tiny \
    --config.data.data_dir tiny-imagenet-200

python -m ldrld_jax.main --config configs/tiny_imagenet.py:ResNet18-ShuffleV2 --workdir runs/tiny-shuffle \
    --config.data.data_dir tiny-imagenet-200

published  the pairs are mdistiller's: ResNet18 -> MobileNetV2 and ResNet18 -> ShuffleNetV2
ours       not yet run; alpha and beta are CIFAR-100's
time       not yet measured
The 200-epoch recipe of mdistiller, also for the teacher, and mdistiller's networks: a ResNet18 with a 3x3 stem of
stride 1 and no pooling, and a MobileNetV2 that is not CIFAR's. Checkpoints are read under their published keys.
"""

from ml_collections import ConfigDict


def get_config(pair: str = "ResNet18-tinyimagenet_mobilenetv2") -> ConfigDict:
    teacher, _, student = pair.partition("-")
    config = ConfigDict()
    config.epochs = 200
    config.batch_size = 256
    config.data = ConfigDict(
        {
            "name": "tiny_imagenet",
            "data_dir": "tiny-imagenet-200",
            "eval_split": "val",
            "augment": "rotate",
            "rotate_degrees": 20.0,
            "flip": True,
            "mean": (0.4802, 0.4481, 0.3975),
            "std": (0.2302, 0.2265, 0.2262),
        }
    )
    config.optim = ConfigDict(
        {"learning_rate": 0.2, "weight_decay": 5e-4, "decay_epochs": (60, 120, 160), "decay_rate": 0.1}
    )
    config.student = ConfigDict({"model": student})
    config.teacher = ConfigDict({"model": teacher, "epochs": 200})
    return config
