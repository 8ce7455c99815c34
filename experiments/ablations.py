"""The paper's ablations and robustness tables, one sweep each: `experiments/ablations.py:NAME`, see ABLATIONS.

python -m ldrld_jax.sweep experiments/ablations.py:parts --workdir runs/parts --grid seed=0,1,2
python -m ldrld_jax.sweep experiments/ablations.py:depth --workdir runs/depth --config configs/cifar100_laptop.py

All runs of a sweep with the same teacher recipe share one teacher; sweeps over a biased teacher have one per bias.
"""

_METHODS = ["ce", "kd", "dkd", "ldrld"]
# A bias of the student's data does not apply to the teacher's data, and vice versa.
_CLEAN_TEACHER = {
    "teacher.data.label_noise": "none",
    "teacher.data.label_noise_rate": 0.0,
    "teacher.data.imbalance": 1.0,
}
_CLEAN_STUDENT = {"data.label_noise": "none", "data.label_noise_rate": 0.0, "data.imbalance": 1.0}

ABLATIONS = {
    # The whole loss, and the loss without each part.
    "parts": {
        "runs": [
            {},
            {"loss.ldrld.use_irw": False},
            {"loss.ldrld.use_erd": False},
            {"loss.ldrld.use_irw": False, "loss.ldrld.use_erd": False},
            {"loss.ldrld.use_integrity": False},
            {"loss.ldrld.use_remainder": False},
        ]
    },
    "depth": {"grid": {"loss.ldrld.depth": [2, 3, 5, 7, 9, 11, 13]}},
    "rank_by": {"grid": {"loss.ldrld.rank_by": ["student", "teacher"]}},
    "reduction": {"grid": {"loss.ldrld.pair_reduction": ["mean", "sum"]}},
    "alpha": {"grid": {"loss.ldrld.alpha": [1.0, 3.0, 7.0, 10.5, 14.0, 21.0]}},
    "beta": {"grid": {"loss.ldrld.beta": [0.0, 1.0, 3.0, 7.0, 10.0, 14.0]}},
    # For pairs without published weights: choose the best by accuracy on a held-out part of the training set.
    "weights": {
        "overrides": {"data.held_out": 0.1},
        "grid": {"loss.ldrld.alpha": [1.0, 3.5, 10.5], "loss.ldrld.beta": [0.5, 2.0, 7.0]},
    },
    "temperature": {"grid": {"loss.ldrld.temperature": [1.0, 2.0, 4.0, 6.0, 8.0]}},
    "noise": {
        "overrides": _CLEAN_TEACHER,
        "runs": [{"data.label_noise": kind} for kind in ("symmetric", "asymmetric")],
        "grid": {"data.label_noise_rate": [0.1, 0.2, 0.3, 0.4], "method": _METHODS},
    },
    "imbalance": {"overrides": _CLEAN_TEACHER, "grid": {"data.imbalance": [10.0, 50.0, 100.0], "method": _METHODS}},
    "noisy_teacher": {
        "overrides": _CLEAN_STUDENT | {"teacher.data.label_noise": "symmetric"},
        "grid": {"teacher.data.label_noise_rate": [0.1, 0.2, 0.3, 0.4], "method": ["kd", "dkd", "ldrld"]},
    },
    "long_tailed_teacher": {
        "overrides": _CLEAN_STUDENT,
        "grid": {"teacher.data.imbalance": [10.0, 50.0, 100.0], "method": ["kd", "dkd", "ldrld"]},
    },
}


def get_sweep(name: str = "parts") -> dict:
    if name not in ABLATIONS:
        raise ValueError(f"there is no ablation {name!r}. Known: {', '.join(ABLATIONS)}.")
    return {"config": "configs/cifar100.py:resnet32x4-resnet8x4"} | ABLATIONS[name]
