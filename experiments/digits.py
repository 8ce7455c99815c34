"""Every method with three seeds on a tenth of the digits, for one CPU: 144 images, a teacher that has seen all 1438.

python -m ldrld_jax.sweep experiments/digits.py --workdir runs/digits
"""

_SHORT = {"kd_warmup_epochs": 3}  # 20 of 240 epochs in the published recipes

RUNS = [
    {"method": "ce"},
    {"method": "kd"},
    {"method": "kd", "standardize": True, "loss.kd.temperature": 2.0, "kd_weight": 9.0},
    {"method": "kd", "loss.kd.entropy_weighting": True},
    {"method": "dkd", **_SHORT},
    {"method": "dkd", "loss.dkd.entropy_weighting": True, **_SHORT},
    {"method": "dkd", "loss.dkd.top_k": 5, **_SHORT},
    {"method": "dkd+kd", **_SHORT},
    {"method": "nkd"},
    {"method": "wsld"},
    {"method": "dist"},
    {"method": "ttm"},
    {"method": "wttm"},
    {"method": "rld", **_SHORT},
    {"method": "ldrld"},
    {"method": "mlkd"},
    {"method": "ctkd"},
    {"method": "abkd"},
    {"method": "skd"},
    {"method": "wkd", "loss_schedule.gamma": "cosine:600@25:0@40"},  # from 150 to 240 of 240 epochs as published
    {"method": "luminet", **_SHORT},
    {"method": "crld"},
    {"method": "sld", "loss.sld.student_swap_epoch": 25},  # 150 of 240 as published
    {"method": "bild"},
    {"method": "topk_tail"},
    {"method": "topk_tail", "loss.topk_tail.top_k": 5, "loss.topk_tail.beta": 0.0},
]


def get_sweep() -> dict:
    return {
        "config": "configs/digits.py",
        "overrides": {
            "epochs": 40,
            "batch_size": 32,
            "eval_every_epochs": 20,
            "data.fraction": 0.1,
            "data.loader": "resident",
            "teacher.data.fraction": 1.0,
            "teacher.batch_size": 64,
        },
        "runs": RUNS,
        "grid": {"seed": [0, 1, 2]},
    }
