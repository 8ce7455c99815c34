"""The digits' main job in plain PyTorch: a ResNet20 is trained, then distils a ResNet8 by LDRLD in its published form.

python benchmarks/torch_digits.py
python benchmarks/torch_digits.py --compile --epochs 2

Networks, data, crops, batch size, epochs, optimizer, schedule, weight decay and the evaluation after each epoch are
those of `configs/digits.py`; the best weights are kept in memory and nothing is written. Batches are cropped as a
whole, in the channels-last layout, which is faster than a DataLoader. It imports no JAX and nothing of this project's
package. `benchmarks/digits.py` times it.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math

import numpy as np
from sklearn.datasets import load_digits

try:
    import torch
    from torch.nn import functional
    from torch_parts import MODELS, ResNet, published_loss
except ImportError:  # the flags are read without it
    torch = None

BATCH, PAD, SIDE, RATE = 64, 1, 8, 0.05
DEPTH, EPSILON, SCALE, DECAY = 7, 1.5, 2.0, 0.05
PAIRS = [  # of ranks, with their weights
    (i - 1, j - 1, SCALE * math.exp(-DECAY * (i + j)) / (j - i + EPSILON))
    for i, j in itertools.combinations(range(1, DEPTH + 1), 2)
]


def splits() -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
    """Returns images `[n, 1, 8, 8]`, normalised, and labels for training and, every fifth scan, for evaluation."""
    scans = load_digits()
    pixels = np.rint(scans.images * (255 / 16)).astype(np.float32) / 255
    images, labels = torch.from_numpy((pixels - np.float32(0.305)) / np.float32(0.376))[:, None], scans.target
    held_out = np.arange(len(labels)) % 5 == 4
    return tuple((images[kept], torch.from_numpy(labels[kept])) for kept in (~held_out, held_out))


def network(name: str) -> ResNet:
    net = ResNet(*MODELS[name], classes=10, channels=1)
    for module in net.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return net.to(memory_format=torch.channels_last)


def cropped(images: torch.Tensor) -> torch.Tensor:
    """Returns each image shifted by up to `PAD` pixels; black, which is not 0 once normalised, fills the border."""
    padded = functional.pad(images, (PAD,) * 4, value=-0.305 / 0.376)
    top, left = torch.randint(0, 2 * PAD + 1, (2, len(images), 1)) + torch.arange(SIDE)
    return padded[torch.arange(len(images))[:, None, None], 0, top[:, :, None], left[:, None, :]][:, None]


def rate(step: int, steps_per_epoch: int, epochs: int) -> float:
    """Returns the learning rate: a cosine after a linear warm-up of one epoch."""
    decay = (1 + math.cos(math.pi * step / (epochs * steps_per_epoch))) / 2
    return RATE * decay * min(1.0, (step + 1) / steps_per_epoch)


def train(name: str, teacher: ResNet | None, epochs: int, compile: bool) -> ResNet:
    """Trains a network, prints its accuracies, and returns it with its best weights."""
    (images, labels), (test_images, test_labels) = splits()
    net = network(name)
    optimizer = torch.optim.SGD(net.parameters(), RATE, momentum=0.9, weight_decay=5e-4)

    def loss_of(x, y):
        logits = net(x)
        loss = functional.cross_entropy(logits, y)
        if teacher is None:
            return loss
        with torch.no_grad():
            target = teacher(x)
        return loss + published_loss(target, logits, PAIRS, temperature=4.0, depth=DEPTH, alpha=10.5, beta=7.0)

    loss_of = torch.compile(loss_of) if compile else loss_of
    step, steps_per_epoch = 0, math.ceil(len(images) / BATCH)
    best, weights, top1 = -1.0, {}, 0.0
    for _ in range(epochs):
        net.train()
        for index in torch.randperm(len(images)).split(BATCH):
            optimizer.param_groups[0]["lr"] = rate(step, steps_per_epoch, epochs)
            optimizer.zero_grad()
            loss_of(cropped(images[index]), labels[index]).backward()
            optimizer.step()
            step += 1
        net.eval()
        with torch.no_grad():
            top1 = 100 * (net(test_images).argmax(1) == test_labels).double().mean().item()
        if top1 >= best:
            best, weights = top1, copy.deepcopy(net.state_dict())
    print(f"{name}: best top-1 {best:.2f}, last {top1:.2f}", flush=True)
    net.load_state_dict(weights)
    return net.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", action="store_true", help="by torch.compile")
    parser.add_argument("--epochs", type=int, default=20, help="of the teacher, and of the student")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if torch is None:
        parser.error("this needs PyTorch: pip install '.[torch]'")
    torch.manual_seed(args.seed)
    train("resnet8", train("resnet20", None, args.epochs, args.compile), args.epochs, args.compile)


if __name__ == "__main__":
    main()
