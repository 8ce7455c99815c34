"""mdistiller's networks for Tiny-ImageNet against PyTorch modules written here: keys, logits in both modes, costs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldrld_jax.interop.torch_import import from_state_dict, to_state_dict
from ldrld_jax.models import outline
from ldrld_jax.models.layers import BatchNorm
from ldrld_jax.models.purify import purify
from ldrld_jax.models.table import summarize
from tests.models.torch_zoo import weight

torch = pytest.importorskip("torch", reason="needs the torch extra")
from torch import nn  # noqa: E402


class Residual(nn.Module):
    """Two 3x3 convolutions beside a projection that exists where the shape changes."""

    def __init__(self, inputs, width, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        changes = stride > 1 or inputs != width
        projection = (nn.Conv2d(inputs, width, 1, stride, bias=False), nn.BatchNorm2d(width))
        self.shortcut = nn.Sequential(*projection) if changes else nn.Sequential()

    def forward(self, x):
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(y + self.shortcut(x))


class ResNet(nn.Module):
    def __init__(self, counts, classes):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64)
        widths = (64, 64, 128, 256, 512)
        for i, count in enumerate(counts, start=1):
            inputs, width, stride = widths[i - 1], widths[i], 1 if i == 1 else 2
            blocks = [Residual(width if j else inputs, width, 1 if j else stride) for j in range(count)]
            setattr(self, f"layer{i}", nn.Sequential(*blocks))
        self.linear = nn.Linear(512, classes)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.linear(x.mean((2, 3)))


class Inverted(nn.Module):
    def __init__(self, inputs, width, stride, expansion):
        super().__init__()
        hidden = inputs * expansion
        self.adds = stride == 1 and inputs == width
        expand = (nn.Conv2d(inputs, hidden, 1), nn.BatchNorm2d(hidden), nn.ReLU6())
        filters = (nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden), nn.BatchNorm2d(hidden), nn.ReLU6())
        self.residual = nn.Sequential(*expand, *filters, nn.Conv2d(hidden, width, 1), nn.BatchNorm2d(width))

    def forward(self, x):
        return self.residual(x) + x if self.adds else self.residual(x)


class MobileNetV2(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.pre = nn.Sequential(nn.Conv2d(3, 32, 1, padding=1), nn.BatchNorm2d(32), nn.ReLU6())
        self.stage1 = Inverted(32, 16, 1, 1)
        plan = {2: (16, 24, 2, 2), 3: (24, 32, 3, 2), 4: (32, 64, 4, 2), 5: (64, 96, 3, 1), 6: (96, 160, 3, 1)}
        for i, (inputs, width, count, stride) in plan.items():
            blocks = [Inverted(width if j else inputs, width, 1 if j else stride, 6) for j in range(count)]
            setattr(self, f"stage{i}", nn.Sequential(*blocks))
        self.stage7 = Inverted(160, 320, 1, 6)
        self.conv1 = nn.Sequential(nn.Conv2d(320, 1280, 1), nn.BatchNorm2d(1280), nn.ReLU6())
        self.conv2 = nn.Conv2d(1280, classes, 1)

    def forward(self, x):
        x = self.pre(x)
        for i in range(1, 8):
            x = getattr(self, f"stage{i}")(x)
        return self.conv2(self.conv1(x).mean((2, 3), keepdim=True)).flatten(1)


THEIRS = {
    "ResNet18": lambda: ResNet((2, 2, 2, 2), 200),
    "ResNet34": lambda: ResNet((3, 4, 6, 3), 200),
    "tinyimagenet_mobilenetv2": lambda: MobileNetV2(200),
}


def ours_and_theirs(name):
    """Our pure function and the PyTorch module with the same weights, drawn from their names, in float64."""
    theirs = THEIRS[name]().double()
    state = {key: weight(key, list(value.shape)) for key, value in theirs.state_dict().items()}
    theirs.load_state_dict({key: torch.from_numpy(value) for key, value in state.items()})
    shapes = outline(name, 200, dtype=jnp.float64, param_dtype=jnp.float64)
    apply, *variables = purify(shapes)
    return apply, from_state_dict(state, *variables), theirs, state


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ResNet18", "tinyimagenet_mobilenetv2"])
def test_logits_in_both_modes_are_those_of_an_independent_pytorch_module(name, x64):
    apply, variables, theirs, _ = ours_and_theirs(name)
    apply = jax.jit(apply, static_argnames="train", compiler_options={"xla_backend_optimization_level": 0})
    images = np.random.default_rng(0).standard_normal((3, 16, 16, 3))
    for train in (False, True):
        theirs.train(train)
        expected = theirs(torch.from_numpy(images.transpose(0, 3, 1, 2))).detach().numpy()
        logits, stats = apply(*variables, jnp.asarray(images), train=train)
        np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-10 * np.abs(expected).max())
    after = theirs.state_dict()
    for key, value in to_state_dict(variables[0], stats).items():
        if key.endswith(("running_mean", "running_var")):
            np.testing.assert_allclose(value, after[key].numpy(), rtol=1e-8, atol=1e-12, err_msg=key)


@pytest.mark.parametrize("name", THEIRS)
def test_the_keys_are_pytorchs_and_the_weights_come_back_bit_for_bit(name, x64):
    _, variables, _, state = ours_and_theirs(name)
    back = to_state_dict(*variables)
    assert {key: value.shape for key, value in back.items()} == {key: value.shape for key, value in state.items()}
    for key, value in state.items():
        np.testing.assert_array_equal(back[key], value, err_msg=key)


@pytest.mark.parametrize("name", THEIRS)
def test_the_table_counts_the_parameters_of_the_pytorch_module(name):
    row = summarize(name)
    theirs = sum(parameter.numel() for parameter in THEIRS[name]().parameters())
    assert row.parameters == theirs - (200 - row.num_classes) * 513
    assert (row.image_size, row.num_classes) == ((64, 200) if name.startswith("tiny") else (32, 100))


def test_resnet18_keeps_the_resolution_in_its_stem_and_reduces_64_pixels_to_8(monkeypatch):
    shapes = []
    monkeypatch.setattr(BatchNorm, "__call__", lambda self, x, mode: (shapes.append(x.shape), x)[1])
    apply, *variables = purify(outline("ResNet18", 200))
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    jax.eval_shape(lambda *args: apply(*args, train=False), *variables, images)
    assert (shapes[0], shapes[-1]) == ((1, 64, 64, 64), (1, 8, 8, 512))
