"""Five methods with three seeds on a fifth of CIFAR-100, a comparison that two CPU cores can run.

python -m ldrld_jax.sweep experiments/laptop.py --jobs 2 --config.teacher.checkpoint=resnet20.pth \
    --config.logits.dir=runs/logits
"""


def get_sweep() -> dict:
    return {
        "config": "configs/cifar100_laptop.py",
        "runs": [
            {"method": "ce"},
            {"method": "kd"},
            {"method": "dkd", "kd_warmup_epochs": 1},  # 20 of 240 epochs in the published recipe
            {"method": "dist"},
            {"method": "ldrld"},
        ],
        "grid": {"seed": [0, 1, 2]},
    }
