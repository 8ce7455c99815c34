"""The same training step in PyTorch: plain, as in public code, and strong, with PyTorch's optimisations."""

import contextlib
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from loss import pair_weights, torch_loss
from torch import nn
from torch.nn import functional

if TYPE_CHECKING:
    from train import Recipe


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

    def __init__(self, widths: tuple[int, ...], counts: tuple[int, ...], classes: int):
        super().__init__()
        inputs, imagenet = widths[0], len(counts) == 4
        stem = nn.Conv2d(3, inputs, *((7, 2, 3) if imagenet else (3, 1, 1)), bias=False)
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


class Scans(torch.utils.data.Dataset):
    """Images on the host, each padded, cropped, mirrored and normalised on access."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, recipe: "Recipe"):
        self.images, self.labels, self.recipe = images, labels, recipe
        self.mean, self.std = (np.asarray(values, np.float32) for values in (recipe.mean, recipe.std))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int):
        image, pad = self.images[index], self.recipe.pad
        if pad:
            top, left = np.random.randint(0, 2 * pad + 1, 2)
            image = np.pad(image, ((pad, pad), (pad, pad), (0, 0)))
            image = image[top : top + self.recipe.size, left : left + self.recipe.size]
            image = image[:, ::-1] if np.random.rand() < 0.5 else image
        pixels = (image.astype(np.float32) / 255 - self.mean) / self.std
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))), int(self.labels[index])


class Step:
    """Contestant whose `run(count)` trains `count` steps and waits for the last.

    `strong` keeps and crops the images on the device, uses the channels-last layout, uses autocast for bfloat16, and
    compiles if `compile` is True.
    """

    def __init__(self, recipe: "Recipe", images: np.ndarray, labels: np.ndarray, *, strong: bool, compile: bool):
        self.recipe, self.strong = recipe, strong
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.backends.cudnn.benchmark = True
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True  # JAX's default
        self.student = self._model(recipe.student).train()
        self.teacher = None if recipe.teacher is None else self._model(recipe.teacher).eval()
        self.pairs = pair_weights()
        self.optimizer = torch.optim.SGD(self.student.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)
        self.loss = torch.compile(self._loss) if strong and compile else self._loss
        self.batches = self._resident(images, labels) if strong else self._loaded(images, labels)

    def run(self, count: int) -> float:
        for _ in range(count):
            x, y = next(self.batches)
            self.optimizer.zero_grad()
            loss = self.loss(x, y)
            loss.backward()
            self.optimizer.step()
        return loss.item()

    def _model(self, name: str) -> Any:
        model = ResNet(*MODELS[name], self.recipe.classes).to(self.device)
        return model.to(memory_format=torch.channels_last) if self.strong else model

    def _loss(self, x, y):
        half = self.strong and self.recipe.precision == "bfloat16"
        scope = torch.autocast(self.device.type, torch.bfloat16) if half else contextlib.nullcontext()
        with scope:
            logits = self.student(x).float()
            loss = functional.cross_entropy(logits, y)
            if self.teacher is not None:
                with torch.no_grad():
                    teacher_logits = self.teacher(x).float()
        return loss if self.teacher is None else loss + torch_loss(teacher_logits, logits, self.pairs)

    def _loaded(self, images, labels):
        data = Scans(images, labels, self.recipe)
        loader = torch.utils.data.DataLoader(data, self.recipe.batch, shuffle=True, drop_last=True)
        while True:
            for x, y in loader:
                yield x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)

    def _resident(self, images, labels):
        pad, size, device = self.recipe.pad, self.recipe.size, self.device
        padded = np.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
        stored, labels = torch.from_numpy(padded).to(device), torch.from_numpy(labels).long().to(device)
        mean, std = (torch.tensor(values, device=device) for values in (self.recipe.mean, self.recipe.std))
        side = torch.arange(size, device=device)
        while True:
            index = torch.randint(len(stored), (self.recipe.batch,), device=device)
            top, left = torch.randint(0, 2 * pad + 1, (2, len(index)), device=device)
            columns = torch.where((torch.rand(len(index), device=device) < 0.5)[:, None], side, size - 1 - side)
            columns = left[:, None] + (columns if pad else side)
            rows = top[:, None] + side
            x = stored[index[:, None, None], rows[:, :, None], columns[:, None, :]]
            yield ((x.float() / 255 - mean) / std).permute(0, 3, 1, 2), labels[index]
