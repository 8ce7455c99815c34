"""ImageNet-1K: `configs/imagenet.py:TEACHER-STUDENT`; default: the pair that every paper reports.

python -m ldrld_jax.main --config configs/imagenet.py --workdir runs/r34-r18 \
    --config.data.data_dir DIR --config.teacher.checkpoint resnet34-b627a593.pth
python -m ldrld_jax.main --config configs/imagenet.py:imagenet_resnet50-imagenet_mobilenetv1 --workdir runs/r50-mv1 \
    --config.data.data_dir DIR --config.teacher.checkpoint resnet50-0676ba61.pth

published  ResNet34 (73.31) -> ResNet18 (69.76): LDRLD 71.88 (ICCV 2025), DKD 71.70, KD 70.66 to 71.37
           ResNet50 (76.13) -> MobileNetV1: LDRLD 73.12 (ICCV 2025), DKD 72.05, KD 70.50
           with T 1, weights of .5 and .5 for KD, beta .5 (MobileNetV1: 2) and a warm-up of 1 epoch for DKD and RLD.
           The methods' defaults are CIFAR-100's; the published ImageNet settings are
           KD    loss.kd.temperature=1 ce_weight=.5 kd_weight=.5
           DKD   loss.dkd.temperature=1 loss.dkd.beta=.5 kd_warmup_epochs=1
           RLD   loss.rld.temperature=1 loss.rld.beta=.5 kd_warmup_epochs=1
           NKD   loss.nkd.temperature=1 loss.nkd.gamma=1.5
           WSLD  loss.wsld.temperature=2 loss.wsld.alpha=2.5
           DIST  loss.dist.temperature=1
ours       not yet run; alpha and beta are CIFAR-100's, since none are published for ImageNet
time       not yet measured
The 100-epoch recipe of torchvision's and the distillation papers' ResNets. The teacher is torchvision's
IMAGENET1K_V1 file; the newer V2 weights of ResNet50 (80.86) would be a different benchmark.
To try it on a laptop: --config.data.fraction=.001 --config.batch_size=16 --config.epochs=1.
"""

from ml_collections import ConfigDict

# torchvision's top-1 minus the roughly one point that a wrong resize, normalisation or file costs.
_MIN_TOP1 = {"imagenet_resnet18": 69.0, "imagenet_resnet34": 72.5, "imagenet_resnet50": 75.5}


def get_config(pair: str = "imagenet_resnet34-imagenet_resnet18") -> ConfigDict:
    teacher, _, student = pair.partition("-")
    config = ConfigDict()
    config.epochs = 100
    config.batch_size = 512
    config.data = ConfigDict(
        {
            "name": "imagenet2012",
            "eval_split": "validation",
            "augment": "random_resized_crop",
            "flip": True,
            "resize_size": 256,
            "crop_size": 224,
            "exif": False,  # torchvision ignores the EXIF orientation too
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
        }
    )
    config.optim = ConfigDict(
        {"learning_rate": 0.2, "weight_decay": 1e-4, "decay_epochs": (30, 60, 90), "decay_rate": 0.1}
    )
    config.student = ConfigDict({"model": student})
    # Without teacher.checkpoint the teacher is trained first, with the same recipe.
    config.teacher = ConfigDict({"model": teacher, "epochs": 100, "min_top1": _MIN_TOP1.get(teacher, 0.0)})
    return config
