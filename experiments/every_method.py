"""Every method with three seeds under one protocol for a CPU: `experiments/every_method.py:NAME`, see PROTOCOLS.

python -m ldrld_jax.sweep experiments/every_method.py:digits --workdir runs/digits
python -m ldrld_jax.sweep experiments/every_method.py:laptop --workdir runs/every --config.data.data_dir=data \
    --config.teacher.checkpoint=resnet20.pth --config.logits.dir=runs/logits
"""

PROTOCOLS = {
    # A tenth of the digits, 144 images, for the student; its teacher has seen all 1,438.
    "digits": {
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
    },
    # A fifth of CIFAR-100.
    "laptop": {"config": "configs/cifar100_laptop.py", "overrides": {"epochs": 15, "data.loader": "resident"}},
}


def runs(epochs: int, no_store: dict) -> list[dict]:
    """Returns the methods with their published weights, and what depends on the epoch scaled from 240 epochs.

    ctkd's ramp over 10 epochs is not scaled: no key sets it.

    Args:
      epochs: of a run.
      no_store: what methods need that compare two views, or take the teacher's last layer.
    """
    warmup = {"kd_warmup_epochs": epochs * 20 // 240}
    late = epochs * 150 // 240
    return [
        {"method": "ce"},
        {"method": "kd"},
        {"method": "kd", "standardize": True, "loss.kd.temperature": 2.0, "kd_weight": 9.0},
        {"method": "kd", "loss.kd.entropy_weighting": True},
        {"method": "dkd", **warmup},
        {"method": "dkd", "loss.dkd.entropy_weighting": True, **warmup},
        {"method": "dkd", "loss.dkd.top_k": 5, **warmup},
        {"method": "dkd+kd", **warmup},
        {"method": "nkd"},
        {"method": "wsld"},
        {"method": "dist"},
        {"method": "ttm"},
        {"method": "wttm"},
        {"method": "rld", **warmup},
        {"method": "ldrld"},
        {"method": "mlkd"},
        {"method": "ctkd"},
        {"method": "abkd"},
        {"method": "skd"},
        {"method": "wkd", "loss_schedule.gamma": f"cosine:600@{late}:0@{epochs}", **no_store},
        {"method": "luminet", **warmup},
        {"method": "crld", "data.loader": "stream", **no_store},  # the resident loader makes one view of an image
        {"method": "sld", "data.loader": "stream", "loss.sld.student_swap_epoch": late, **no_store},
        {"method": "bild"},
        {"method": "topk_tail"},
        {"method": "topk_tail", "loss.topk_tail.top_k": 5, "loss.topk_tail.beta": 0.0},
    ]


def get_sweep(name: str = "digits") -> dict:
    if name not in PROTOCOLS:
        raise ValueError(f"there is no protocol {name!r}. Known: {', '.join(PROTOCOLS)}.")
    protocol = PROTOCOLS[name]
    no_store = {"logits.dir": None} if name == "laptop" else {}  # for the digits no command sets a store
    return protocol | {"runs": runs(protocol["overrides"]["epochs"], no_store), "grid": {"seed": [0, 1, 2]}}
