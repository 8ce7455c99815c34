"""A fifth of CIFAR-100's images for 15 epochs: the paper's comparison at minutes per run on two CPU cores.

python -m ldrld_jax.main --config configs/cifar100_laptop.py --workdir runs/laptop
python -m ldrld_jax.sweep experiments/laptop.py --jobs 2 --config.teacher.checkpoint=resnet20.pth

published  none: the 240-epoch recipe is cut to a sixteenth, with decays after 9, 11 and 13 epochs and a linear
           warm-up of one epoch, because the official form would not lower the rate at all in so short a warm-up
ours       experiments/README.md: five methods, three seeds; about 12 minutes of CPU time per run
All seeds use the same crops (`data.augment_seed`), so that their runs can share one logit store. Without
`teacher.checkpoint` the teacher is trained first, on all images.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

_FULL = runpy.run_path(str(pathlib.Path(__file__).with_name("cifar100.py")))["get_config"]


def get_config(pair: str = "resnet20-resnet8") -> ConfigDict:
    teacher, _, student = pair.partition("-")
    config = ConfigDict()
    config.epochs = 15
    config.batch_size = 64
    config.eval_every_epochs = 3
    config.loss = ConfigDict({"ldrld": {"depth": 7, "temperature": 4.0, "alpha": 10.5, "beta": 7.0}})
    config.data = ConfigDict(
        {
            "name": "cifar100",
            "fraction": 0.2,
            "augment_seed": 0,
            "pad": 4,
            "flip": True,
            "mean": (0.5071, 0.4867, 0.4408),
            "std": (0.2675, 0.2565, 0.2761),
        }
    )
    config.optim = ConfigDict(
        {
            "learning_rate": _FULL(pair).optim.learning_rate,  # it depends on the student
            "weight_decay": 5e-4,
            "decay_epochs": (9, 11, 13),
            "warmup": "linear",
            "warmup_epochs": 1,
        }
    )
    config.student = ConfigDict({"model": student})
    config.teacher = ConfigDict(
        {
            "model": teacher,
            "epochs": 14,
            "batch_size": 128,
            "data": {"fraction": 1.0},
            "optim": {"learning_rate": 0.1},
        }
    )
    return config
