"""The published architectures: their keys, the weights that the golden logits were computed with, and those logits.

`torch_models` holds the CIFAR zoo and the ImageNet models; `torch_models_more`, in the same form, ResNet-101 of
torchvision 0.28.0 and the transformers of timm 1.0.31 at 224 x 224 and, with `dynamic_img_size`, at 96 x 160.
"""

import functools
import json
import pathlib
import zlib

import numpy as np

_GOLDEN = pathlib.Path(__file__).parent.parent / "golden"
_FILES = ("torch_models", "torch_models_more")

KEYS: dict[str, dict[str, list[int]]] = {}
for _name in _FILES:
    KEYS |= json.loads((_GOLDEN / f"{_name}.json").read_text())


def num_classes(model: str) -> int:
    return 1000 if model.startswith(("imagenet_", "vit_")) else 100


def images(model: str, kind: str = "eval") -> np.ndarray:
    """`[N, H, W, 3]`, float64."""
    shape = (2, 3, 224, 224) if num_classes(model) == 1000 else (4, 3, 32, 32)
    nchw = np.random.default_rng(0).standard_normal(shape)
    if kind == "eval_96x160":
        nchw = nchw[:, :, :96, :160]
    return nchw.transpose(0, 2, 3, 1)


@functools.lru_cache(maxsize=1)
def state_dict(model: str) -> dict[str, np.ndarray]:
    """Every weight, drawn from its name."""
    return {key: weight(key, shape) for key, shape in KEYS[model].items()}


def logits() -> dict[tuple[str, str], np.ndarray]:
    """Returns the logits by model and kind: `eval`, `train`, `eval_96x160`."""
    golden = {}
    for name in _FILES:
        with np.load(_GOLDEN / f"{name}.npz") as file:
            golden |= {tuple(key.split("/")): file[key] for key in file}
    return golden


def weight(key: str, shape: list[int]) -> np.ndarray:
    """The weight of this key and shape in PyTorch's layout, float64."""
    if key.endswith("num_batches_tracked"):
        return np.zeros((), np.int64)
    normal = np.random.default_rng(zlib.crc32(key.encode())).standard_normal(shape)
    if key.endswith("running_var"):
        return 1 + 0.1 * abs(normal)
    if len(shape) >= 2:
        return normal * np.sqrt(2 / np.prod(shape[1:]))
    return 1 + 0.1 * normal if key.endswith("weight") else 0.1 * normal
