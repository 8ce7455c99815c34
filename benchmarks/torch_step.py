"""The same training step in PyTorch: plain, as in public code; strong, with its optimisations; compiled."""

import contextlib
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from loss import pair_weights, torch_loss
from torch.nn import functional
from torch_parts import MODELS, ResNet

if TYPE_CHECKING:
    from train import Recipe


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

    `strong` keeps and crops the images on the device, uses the channels-last layout and autocast for bfloat16.
    `compile` compiles both networks and the loss, with their gradient.
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
        self.loss = torch.compile(self._loss) if compile else self._loss
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
