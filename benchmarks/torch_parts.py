"""Networks and the published form of LDRLD in PyTorch, for the programs that compare with it; imports no JAX."""

import torch
from torch import nn
from torch.nn import functional


class Block(nn.Module):
    """Residual block of two 3x3 convolutions."""

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        projection = [nn.Conv2d(inputs, width, 1, stride, bias=False), nn.BatchNorm2d(width)]
        self.shortcut = nn.Sequential(*(projection if stride != 1 or inputs != width else []))

    def forward(self, x):
        y = functional.relu(self.bn1(self.conv1(x)), inplace=True)
        return functional.relu(self.bn2(self.conv2(y)) + self.shortcut(x), inplace=True)


class ResNet(nn.Module):
    """ResNet with three stages after a 3x3 stem (CIFAR), or four after a 7x7 stem and a pool (ImageNet)."""

    def __init__(self, widths: tuple[int, ...], counts: tuple[int, ...], classes: int, channels: int = 3):
        super().__init__()
        inputs, imagenet = widths[0], len(counts) == 4
        stem = nn.Conv2d(channels, inputs, *((7, 2, 3) if imagenet else (3, 1, 1)), bias=False)
        layers = [stem, nn.BatchNorm2d(inputs), nn.ReLU(inplace=True)]
        layers += [nn.MaxPool2d(3, 2, 1)] if imagenet else []
        for stage, (width, count) in enumerate(zip(widths[1:], counts, strict=True)):
            for block in range(count):
                layers.append(Block(inputs, width, 2 if stage > 0 and block == 0 else 1))
                inputs = width
        self.features, self.fc = nn.Sequential(*layers), nn.Linear(inputs, classes)

    def forward(self, x):
        return self.fc(self.features(x).mean((2, 3)))


_NARROW, _WIDE, _LARGE = (16, 16, 32, 64), (32, 64, 128, 256), (64, 64, 128, 256, 512)
MODELS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    **{f"resnet{depth}": (_NARROW, ((depth - 2) // 6,) * 3) for depth in (8, 14, 20, 32, 44, 56, 110)},
    **{f"resnet{depth}x4": (_WIDE, ((depth - 2) // 6,) * 3) for depth in (8, 32)},
    "imagenet_resnet18": (_LARGE, (2, 2, 2, 2)),
    "imagenet_resnet34": (_LARGE, (3, 4, 6, 3)),
}


def published_loss(
    teacher, student, pairs: list[tuple[int, int, float]], *, temperature: float, depth: int, alpha: float, beta: float
):
    """Computes the published form: a masked softmax over all C classes per pair, for all d and for the rest.

    Classes are masked by subtracting 1000 from their logits, as published.
    """

    def kl(hidden):
        log_p, log_q = (torch.log_softmax(z / temperature - 1000.0 * hidden, dim=1) for z in (teacher, student))
        loss = torch.nn.functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
        return loss * temperature**2

    def hidden_but(indices):
        return torch.ones_like(student).scatter_(1, indices, 0.0)

    top = torch.topk(student.detach(), depth, dim=1).indices
    local = sum(weight * kl(hidden_but(top[:, [i, j]])) for i, j, weight in pairs) + kl(hidden_but(top))
    rest = kl(1 - hidden_but(top))
    return alpha * local / (len(pairs) + 1) + beta * rest
