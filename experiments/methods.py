"""The paper's table for one pair: every method that it compares, with three seeds each.

python -m ldrld_jax.sweep experiments/methods.py --gpus 0,1,2,3
python -m ldrld_jax.sweep experiments/methods.py --config configs/cifar100.py:resnet56-resnet20 --workdir runs/r56-r20

The methods' defaults are for the default pair; `configs/cifar100.py` names DKD's beta for others.
"""


def get_sweep() -> dict:
    return {
        "config": "configs/cifar100.py:resnet32x4-resnet8x4",
        "grid": {"method": ["ce", "kd", "dkd", "dist", "wttm", "ldrld"], "seed": [0, 1, 2]},
    }
