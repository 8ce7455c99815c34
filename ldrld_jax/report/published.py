"""The published figures that the table shows beside ours, as the papers report them: never measured here."""

import re
from collections.abc import Mapping
from typing import Any

# method: where its figures are from, and what they are
PAPERS = {
    "ce": ("as later papers tabulate it", "most often the last epoch"),
    "kd": ("as later papers tabulate it", "most often the last epoch"),
    "kd standardised": ("CVPR 2024", ""),
    "dkd": ("CVPR 2022", "best epoch, mean of 5 runs"),
    "nkd": ("ICCV 2023", ""),
    "dist": ("NeurIPS 2022", ""),
    "wttm": ("ICLR 2024", ""),
    "ldrld": ("ICCV 2025", "best or last epoch not stated"),
}

EPOCHS = {"cifar100": 240, "imagenet2012": 100}
_UNCHANGED = {
    "data.train_split": "train",
    "data.fraction": 1,
    "data.imbalance": 1,
    "data.label_noise_rate": 0,
    "data.held_out": 0,
}

_PARTS = r"kd_weight$|loss\.\w+\.(use_\w+|alpha|beta|gamma)$"  # what leaves out a part of a loss if it is 0 or False

_COLUMNS = ("ce", "kd", "dkd", "dist", "kd standardised", "wttm", "ldrld")
_CIFAR100 = {
    ("resnet56", "resnet20"): "69.06 70.66 71.97 71.75 71.43 71.92 72.20",
    ("resnet110", "resnet20"): "69.06 70.67 71.06 71.65 71.48 71.67 71.98",
    ("resnet110", "resnet32"): "71.14 73.08 74.11 73.69 74.17 74.13 -",
    ("resnet32x4", "resnet8x4"): "72.50 73.33 76.32 76.31 76.62 76.06 77.20",
    ("wrn_40_2", "wrn_16_2"): "73.26 74.92 76.24 75.51 76.11 76.37 76.35",
    ("wrn_40_2", "wrn_40_1"): "71.98 73.54 74.81 74.73 74.37 74.58 -",
    ("vgg13", "vgg8"): "70.36 72.98 74.68 73.89 74.36 74.44 75.06",
    ("resnet32x4", "ShuffleV1"): "70.50 74.07 76.45 76.34 - 74.37 76.46",
    ("resnet32x4", "ShuffleV2"): "71.82 74.45 77.07 77.35 75.56 76.55 -",
    ("wrn_40_2", "ShuffleV1"): "70.50 74.83 76.70 76.40 - 75.42 -",
    ("vgg13", "MobileNetV2"): "64.60 67.37 69.71 68.50 68.61 69.16 -",
    ("ResNet50", "MobileNetV2"): "64.60 67.35 70.35 68.66 69.02 69.59 -",
}
# kd on ImageNet differs with the repository.
_IMAGENET = {
    ("imagenet_resnet34", "imagenet_resnet18"): {
        **dict(kd="70.66 to 71.37", dkd="71.70", nkd="71.96", dist="72.07", wttm="72.19", ldrld="71.88"),
    },
    ("imagenet_resnet50", "imagenet_mobilenetv1"): {
        **dict(kd="70.50", dkd="72.05", nkd="72.58", dist="73.24", wttm="73.09", ldrld="73.12"),
    },
}
# dataset, teacher, student: method: top-1 in percent
PUBLISHED: dict[tuple[str, str, str], dict[str, str]] = {
    **{("cifar100", *pair): dict(zip(_COLUMNS, row.split(), strict=True)) for pair, row in _CIFAR100.items()},
    **{("imagenet2012", *pair): row for pair, row in _IMAGENET.items()},
}


def published(config: Mapping[str, Any]) -> str:
    """Returns the published top-1 of the run that a config (dotted keys) describes; "" if there is none.

    Example:
      >>> published({"data.name": "cifar100", "epochs": 240, "method": "ldrld", "student.model": "resnet8x4",
      ...            "teacher.model": "resnet32x4"})
      '77.20'
    """
    data = data_set(config)
    ablated = any(not value for key, value in config.items() if re.match(_PARTS, key))
    changed = any(config.get(key, value) != value for key, value in _UNCHANGED.items())
    if config["epochs"] != EPOCHS.get(data) or changed or ablated:
        return ""
    return figures(config).get(name_of(config), "")


def figures(config: Mapping[str, Any]) -> dict[str, str]:
    """Returns the published top-1 of each method for a run's dataset, teacher and student, whatever its recipe."""
    pairs = [pair for pair in PUBLISHED if (pair[0], pair[2]) == (data_set(config), config["student.model"])]
    if config["method"] != "ce":
        pairs = [pair for pair in pairs if pair[1] == config.get("teacher.model")]
    return {name: value for name, value in PUBLISHED[pairs[0]].items() if value != "-"} if pairs else {}


def name_of(config: Mapping[str, Any]) -> str:
    """Returns the name of a run's method in the tables."""
    return config["method"] + " standardised" * bool(config.get("standardize"))


def protocol(config: Mapping[str, Any]) -> str:
    """Describes under what a run trained, in the terms of the papers: epochs, and the data if not all as they are.

    Example:
      >>> protocol({"epochs": 15, "data.fraction": 0.2})
      '15 epochs, fraction=0.2'
    """
    changed = [f"{key.removeprefix('data.')}={config[key]}" for key, v in _UNCHANGED.items() if config.get(key, v) != v]
    return ", ".join([f"{config['epochs']} epochs", *changed])


def data_set(config: Mapping[str, Any]) -> str:
    """Returns the name of a run's dataset in the tables."""
    return re.split("[:/]", config["data.name"])[0]
