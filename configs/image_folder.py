"""Your own images in DIR/train/CLASS/*.jpg and DIR/val/CLASS/*.jpg: `configs/image_folder.py:TEACHER-STUDENT`.

python -m ldrld_jax.main --config configs/image_folder.py --workdir runs/mine --config.data.data_dir DIR

published  none: the data is yours
ResNet34 is trained first and then distilled into ResNet18, both at 224 px as for ImageNet, with a shorter
cosine schedule. To use your own teacher, set teacher.checkpoint (and teacher.model). A tenth of the
training images can be held out to choose the best epoch: --config.data.held_out=.1.
"""

from ml_collections import ConfigDict


def get_config(pair: str = "imagenet_resnet34-imagenet_resnet18") -> ConfigDict:
    teacher, _, student = pair.partition("-")
    config = ConfigDict()
    config.epochs = 50
    config.batch_size = 64
    config.eval_batch_size = 64
    config.data = ConfigDict(
        {
            "name": "image_folder",
            "eval_split": "val",
            "augment": "random_resized_crop",
            "flip": True,
            "resize_size": 256,
            "crop_size": 224,
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
        }
    )
    config.optim = ConfigDict(
        {
            "learning_rate": 0.025,  # ImageNet's .2 at batch 512
            "weight_decay": 1e-4,
            "schedule": "cosine",
            "warmup": "linear",
            "warmup_epochs": 5,
        }
    )
    config.student = ConfigDict({"model": student})
    config.teacher = ConfigDict({"model": teacher, "epochs": 50})
    return config
