"""PyTorch checkpoints in every wrapping, the ones that do not fit, and the ones that must not be trusted."""

import io
import pathlib
import pickle
import tarfile

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open

import ldrld_jax
from ldrld_jax import UserError
from ldrld_jax.interop.torch_files import write_safetensors
from ldrld_jax.interop.torch_import import load_torch_checkpoint, save_torch_checkpoint, to_state_dict
from ldrld_jax.models import create_model, outline
from ldrld_jax.models.purify import purify

SHARED = pathlib.Path(__file__).parents[2] / "shared"


def state_dict(name="resnet8", num_classes=10, seed=0, **dtypes):
    """Random arrays under PyTorch's keys."""
    rng = np.random.default_rng(seed)
    _, *variables = purify(outline(name, num_classes, **dtypes))
    filled = jax.tree.map(lambda leaf: rng.random(leaf.shape).astype(leaf.dtype), variables)
    return to_state_dict(*filled)


def variables(model):
    return purify(model)[1:]


def assert_holds(model, state):
    ours = to_state_dict(*variables(model))
    assert ours.keys() == state.keys()
    for key, value in state.items():
        np.testing.assert_array_equal(ours[key], value, err_msg=key)


def without_counters(state):
    return {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="needs the torch extra")


@pytest.fixture
def as_torch(torch):
    return lambda state: {key: torch.from_numpy(np.array(value)) for key, value in state.items()}


def load(path, name="resnet8", num_classes=10, **kwargs):
    return load_torch_checkpoint(path, name, num_classes, **kwargs)


@pytest.mark.parametrize("name", ["resnet8", "wrn_16_1", "MobileNetV2", "vit_tiny_patch16_224"])
@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16])
def test_the_round_trip_is_bitwise(name, param_dtype, tmp_path):
    state = state_dict(name, param_dtype=param_dtype)
    write_safetensors(tmp_path / "a.safetensors", state)
    model = load(tmp_path / "a.safetensors", name, param_dtype=param_dtype)
    save_torch_checkpoint(tmp_path / "b.safetensors", *variables(model))
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert_holds(model, state)


def test_a_checkpoint_is_loaded_by_the_keywords_that_make_its_model(tmp_path):
    which = dict(name="resnet8", num_classes=7, in_channels=1)
    model = create_model(**which, rngs=nnx.Rngs(0))
    save_torch_checkpoint(tmp_path / "a.safetensors", *variables(model))
    chex.assert_trees_all_equal(variables(load_torch_checkpoint(tmp_path / "a.safetensors", **which)), variables(model))


def test_pytorch_loads_what_is_saved(torch, tmp_path):
    from safetensors.torch import load_file

    write_safetensors(tmp_path / "a.safetensors", state_dict())
    model = load(tmp_path / "a.safetensors")
    save_torch_checkpoint(tmp_path / "student.safetensors", *variables(model))
    state = load_file(tmp_path / "student.safetensors")
    norm = torch.nn.BatchNorm2d(16)
    norm.load_state_dict({key.removeprefix("bn1."): value for key, value in state.items() if key.startswith("bn1.")})
    conv = torch.nn.Conv2d(3, 16, 3, padding=1, bias=False)
    conv.load_state_dict({"weight": state["conv1.weight"]})
    x = np.random.default_rng(0).standard_normal((1, 8, 8, 3)).astype(np.float32)
    theirs = norm.eval()(conv(torch.from_numpy(x.transpose(0, 3, 1, 2)))).detach().numpy()
    ours = model.bn1(model.conv1(x), mode=ldrld_jax.models.layers.Mode(train=False))
    np.testing.assert_allclose(ours, theirs.transpose(0, 2, 3, 1), atol=1e-5)
    with safe_open(tmp_path / "student.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("prefix", ["", "module.", "student.", "teacher.", "module.student.", "student.module."])
def test_prefixes_are_taken_off(prefix, tmp_path):
    state = state_dict()
    write_safetensors(tmp_path / "a.safetensors", {prefix + key: value for key, value in state.items()})
    assert_holds(load(tmp_path / "a.safetensors"), state)


def test_a_models_own_first_name_is_no_prefix(tmp_path):
    state = state_dict("imagenet_mobilenetv1")
    write_safetensors(tmp_path / "a.safetensors", {f"module.{key}": value for key, value in state.items()})
    assert_holds(load(tmp_path / "a.safetensors", "imagenet_mobilenetv1"), state)


def test_of_a_student_and_a_teacher_the_one_that_fits_is_taken(tmp_path):
    small, large, other = state_dict("resnet8"), state_dict("resnet14"), state_dict("resnet8", seed=1)
    both = {f"student.{key}": value for key, value in small.items()}
    write_safetensors(tmp_path / "a.safetensors", both | {f"teacher.{key}": value for key, value in large.items()})
    assert_holds(load(tmp_path / "a.safetensors"), small)
    assert_holds(load(tmp_path / "a.safetensors", "resnet14"), large)
    write_safetensors(tmp_path / "b.safetensors", both | {f"teacher.{key}": value for key, value in other.items()})
    assert_holds(load(tmp_path / "b.safetensors"), small)


def test_counters_may_be_missing_as_in_old_files(tmp_path):
    state = state_dict()
    write_safetensors(tmp_path / "a.safetensors", without_counters(state))
    assert_holds(load(tmp_path / "a.safetensors"), state)


def test_weights_are_converted_to_the_parameters_dtype(tmp_path):
    state = {key: value.astype(np.float16) if value.ndim else value for key, value in state_dict().items()}
    write_safetensors(tmp_path / "a.safetensors", state)
    model = load(tmp_path / "a.safetensors", dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables(model))} == {jnp.dtype(jnp.float32)}
    assert_holds(model, {key: value.astype(np.float32) if value.ndim else value for key, value in state.items()})


WRAPPINGS = {
    "bare": lambda state: state,
    "model": lambda state: {"epoch": 240, "model": state, "best_acc": np.float64(72.3), "accuracy": 72.1},
    "state_dict": lambda state: {"state_dict": state, "arch": "resnet8"},
    "nested": lambda state: {"model": {"state_dict": state}},
}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_torch_files_in_every_wrapping(wrapping, legacy, torch, as_torch, tmp_path):
    state = state_dict()
    torch.save(WRAPPINGS[wrapping](as_torch(state)), tmp_path / "a.pth.tar", _use_new_zipfile_serialization=not legacy)
    assert_holds(load(tmp_path / "a.pth.tar"), state)


def test_bfloat16_tensors_of_torch(torch, as_torch, tmp_path):
    state = state_dict()
    torch.save({key: value.bfloat16() for key, value in as_torch(state).items()}, tmp_path / "a.pth")
    state = {key: value.astype(jnp.bfloat16).astype(value.dtype) for key, value in state.items()}
    assert_holds(load(tmp_path / "a.pth"), state)


def add(tar, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


@pytest.fixture
def archive(tmp_path):
    """Teachers as they are shipped: a folder each in one archive."""

    def make(states, mode="w"):
        with tarfile.open(tmp_path / "teachers.tar", mode) as tar:
            for name, state in states.items():
                write_safetensors(tmp_path / "one", state)
                add(tar, name, (tmp_path / "one").read_bytes())
        return tmp_path / "teachers.tar"

    return make


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_an_archive_gives_the_member_that_names_the_model(mode, archive, tmp_path):
    small, large = state_dict("resnet8"), state_dict("resnet8x4")
    path = archive(
        {"t/resnet8_vanilla/ckpt.safetensors": small, "t/resnet8x4_vanilla/ckpt.safetensors": large, "t/README": {}},
        mode,
    )
    before = sorted(tmp_path.iterdir())
    assert_holds(load(path), small)
    assert_holds(load(path, "resnet8x4"), large)
    assert_holds(load(f"{path}::t/resnet8x4_vanilla/ckpt.safetensors", "resnet8x4"), large)
    assert sorted(tmp_path.iterdir()) == before


def test_an_archive_without_the_one_member_lists_what_it_has(archive):
    path = archive({"resnet8/a.safetensors": state_dict(), "resnet8/b.safetensors": state_dict()})
    with pytest.raises(UserError, match=r"2 members for resnet8.*::MEMBER from: resnet8/a.*resnet8/b"):
        load(path)
    with pytest.raises(UserError, match=r"no members for wrn_16_1.*resnet8/a"):
        load(path, "wrn_16_1")
    with pytest.raises(UserError, match=r"no member 'x'.*resnet8/a"):
        load(f"{path}::x")


def test_links_and_paths_that_leave_the_archive_are_never_followed(tmp_path):
    path, secret = tmp_path / "teachers.tar", tmp_path / "secret.safetensors"
    write_safetensors(secret, state_dict())
    with tarfile.open(path, "w") as tar:
        link = tarfile.TarInfo("resnet8/link.safetensors")
        link.type, link.linkname = tarfile.SYMTYPE, str(secret)
        tar.addfile(link)
        add(tar, "../../resnet8/escape.safetensors", b"")
    with pytest.raises(UserError, match=r"escape.safetensors is empty"):
        load(path)
    assert sorted(tmp_path.iterdir()) == [secret, path]


def test_another_architecture_is_reported_whole(tmp_path):
    write_safetensors(tmp_path / "a.safetensors", state_dict("resnet14"))
    with pytest.raises(UserError, match=r"does not fit resnet8 with 10 classes.*30 unexpected \(.* and 26 more\)"):
        load(tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"does not fit vgg8.*missing.*unexpected"):
        load(tmp_path / "a.safetensors", "vgg8")


def test_missing_unexpected_and_misshapen_keys_come_in_one_report(tmp_path):
    state = state_dict(num_classes=100)
    del state["bn1.weight"]
    state["extra.weight"] = np.zeros(3, np.float32)
    state["bn1.bias"] = np.zeros(16, np.int8)
    write_safetensors(tmp_path / "a.safetensors", state)
    with pytest.raises(UserError) as error:
        load(tmp_path / "a.safetensors")
    message = str(error.value)
    assert "1 missing (bn1.weight)" in message
    assert "1 unexpected (extra.weight)" in message
    assert "3 of another shape or type" in message
    assert "fc.weight is float32[100, 64], the model's is [10, 64]" in message
    assert "bn1.bias is int8[16], the model's is [16]" in message
    assert "\n" not in message


class Shell:
    """A pickle that leaves a file behind if it is ever run."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (pathlib.Path(self.path),)


class System:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return __import__("os").system, (f"touch {self.path}",)


@pytest.mark.parametrize("attack", [Shell, System])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_runs_code_is_refused(attack, legacy, torch, tmp_path):
    mark, path = tmp_path / "ran", tmp_path / "a.pth"
    torch.save({"model": attack(mark)}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(
        UserError, match=r"a.pth asks to run '(posix.system|getattr|pathlib\S*)' on loading, which is refused"
    ):
        load(path)
    path.write_bytes(pickle.dumps(attack(mark)))
    with pytest.raises(UserError, match=r"a\.pth"):
        load(path)
    assert not mark.exists()


def test_a_pickled_module_is_refused_with_the_way_out(torch, tmp_path):
    torch.save(torch.nn.Linear(2, 3), tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"'torch.nn.modules.linear.Linear'.*save model.state_dict\(\)"):
        load(tmp_path / "a.pth")


HTML = b"<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123456789abcdef\nsize 1158021\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("page.pth", HTML, r"page.pth is text that begins '<!DOCTYPE html>.*Download the file itself"),
        ("page.safetensors", HTML, r"page.safetensors is text that begins"),
        ("pointer.pth", POINTER, r"pointer.pth is text that begins 'version https"),
        ("empty.pth", b"", r"empty.pth is empty"),
        ("noise.safetensors", bytes(range(200, 256)), r"noise.safetensors is truncated or damaged"),
        ("a.tar", b"\x1f\x8bxx", r"a.tar is a damaged archive"),
    ],
)
def test_what_is_no_checkpoint_is_one_clear_line(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        load(tmp_path / name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kept", [1, 7, 8, 100, 0.5, 0.99])
def test_truncated_safetensors(kept, tmp_path):
    path = tmp_path / "a.safetensors"
    write_safetensors(path, state_dict())
    data = path.read_bytes()
    path.write_bytes(data[: kept if isinstance(kept, int) else int(kept * len(data))])
    with pytest.raises(UserError, match="truncated or damaged"):
        load(path)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("kept", [9, 0.5, 0.99])
def test_truncated_torch_files(kept, legacy, torch, as_torch, tmp_path):
    path = tmp_path / "a.pth"
    torch.save(as_torch(state_dict()), path, _use_new_zipfile_serialization=not legacy)
    data = path.read_bytes()
    path.write_bytes(data[: kept if isinstance(kept, int) else int(kept * len(data))])
    with pytest.raises(UserError, match="truncated or no PyTorch checkpoint") as error:
        load(path)
    assert "\n" not in str(error.value)


def test_a_file_without_a_state_dict_says_what_it_holds(torch, tmp_path):
    torch.save({"optimizer": {"lr": 0.1}, "epoch": 3}, tmp_path / "a.pth")
    with pytest.raises(UserError, match="holds no state_dict but the keys optimizer, epoch"):
        load(tmp_path / "a.pth")
    torch.save([torch.zeros(3)], tmp_path / "b.pth")
    with pytest.raises(UserError, match="holds no state_dict but"):
        load(tmp_path / "b.pth")


def test_an_empty_state_dict_misses_everything(tmp_path):
    write_safetensors(tmp_path / "a.safetensors", {})
    with pytest.raises(UserError, match=r"47 missing \(.* and 43 more\)\. Give the model"):
        load(tmp_path / "a.safetensors")


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(UserError, match=r"there is no checkpoint .*x\.pth"):
        load(tmp_path / "x.pth")
    with pytest.raises(UserError, match="is a folder"):
        load(tmp_path)


def test_a_torch_file_without_torch_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    (tmp_path / "a.pth").write_bytes(b"PK\x03\x04" + bytes(range(128, 255)))
    with pytest.raises(UserError, match=r"pip install 'ldrld_jax\[torch\]'"):
        load(tmp_path / "a.pth")


def test_a_scalar_stays_a_scalar():
    assert to_state_dict({"logit_scale": jnp.ones(())}, {})["logit_scale"].shape == ()


@pytest.mark.parametrize("dimensions", [0, 1, 2, 3])
def test_a_kernel_has_pytorchs_layout_in_any_number_of_dimensions(dimensions, rng):
    """A linear layer has none; PyTorch's own convolution of that layout gives Flax's output."""
    torch = pytest.importorskip("torch")
    kernel = rng.normal(size=(*(3,) * dimensions, 2, 5))
    tensor = to_state_dict({"layer": {"kernel": kernel}}, {})["layer.weight"]
    x = rng.normal(size=(4, *(6,) * dimensions, 2))
    if dimensions == 0:
        ours, theirs = x @ kernel, torch.nn.functional.linear(torch.from_numpy(x), torch.from_numpy(tensor)).numpy()
    else:
        letters = "DHW"[:dimensions]
        names = f"N{letters}C", f"{letters}IO", f"N{letters}C"
        with jax.enable_x64(True):
            ours = jax.lax.conv_general_dilated(x, kernel, (1,) * dimensions, "VALID", dimension_numbers=names)
        conv = getattr(torch.nn.functional, f"conv{dimensions}d")
        theirs = np.moveaxis(conv(torch.from_numpy(np.moveaxis(x, -1, 1)), torch.from_numpy(tensor)).numpy(), 1, -1)
    np.testing.assert_allclose(ours, theirs, rtol=1e-12)


def test_an_archive_of_numpy_files_gives_the_member_that_names_the_model(tmp_path):
    state = state_dict("resnet8")
    np.savez(tmp_path / "one.npz", **state)
    with tarfile.open(tmp_path / "teachers.tar", "w") as tar:
        add(tar, "t/resnet8_vanilla.npz", (tmp_path / "one.npz").read_bytes())
    assert_holds(load(tmp_path / "teachers.tar"), state)
