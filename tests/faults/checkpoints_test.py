"""Checkpoints of other programs: any wrapping is read, several networks are named, damage and bombs are refused."""

import gzip
import pickle
import tarfile
import zipfile

import jax
import numpy as np
import pytest

from ldrld_jax.errors import UserError
from ldrld_jax.interop import torch_files
from ldrld_jax.interop.torch_files import write_safetensors
from ldrld_jax.models.purify import purify
from ldrld_jax.train.plan import Run
from tests.interop.torch_import_test import assert_holds, load, state_dict

STATE = state_dict()
OTHER = state_dict(seed=1)


def prefixed(prefix: str, state=STATE):
    return {prefix + key: value for key, value in state.items()}


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason="needs the torch extra")


@pytest.fixture
def save(torch, tmp_path):
    """`save(content)` writes a `.pth` file whose arrays are tensors."""

    def make(content, **options):
        tensors = jax.tree.map(lambda x: torch.from_numpy(np.array(x)) if isinstance(x, np.ndarray) else x, content)
        torch.save(tensors, tmp_path / "a.pth", **options)
        return tmp_path / "a.pth"

    return make


WRAPPINGS = {
    "lightning": {"state_dict": prefixed("model."), "epoch": 3, "hyper_parameters": {"lr": 0.1}},
    "net": {"state_dict": prefixed("net.")},
    "backbone": {"state_dict": prefixed("backbone.") | {"loss.margin": np.ones(2, np.float32)}, "meta": {}},
    "parallel": {"network": prefixed("module._orig_mod.")},
    "averaged": {"n_averaged": np.array(5)} | prefixed("module."),
    "list": {"networks": [state_dict("resnet14"), STATE]},
    "optimizer": {"weights": STATE, "optimizer": {"state": {0: {"momentum_buffer": np.ones((16, 3, 3, 3))}}}},
    "numpy beside": {"model": STATE, "best": np.bool_(True), "name": np.str_("x"), "n": np.int8(3), "f": np.float16(1)},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_a_network_is_found_under_any_key_and_prefix(save, wrapping, caplog):
    assert_holds(load(save(WRAPPINGS[wrapping])), STATE)
    assert "read what is under" in caplog.text


def test_arrays_of_numpy_are_as_good_as_tensors(torch, tmp_path):
    torch.save({"model": STATE}, tmp_path / "a.pth")
    np.savez(tmp_path / "a.npz", **STATE)
    np.savez_compressed(tmp_path / "b.npz", **prefixed("model/".replace("/", ".")))
    for name in ("a.pth", "a.npz", "b.npz"):
        assert_holds(load(tmp_path / name), STATE)
    np.savez(tmp_path / "c.npz", a=np.array([{}], object))
    with pytest.raises(UserError, match=r"c\.npz holds an array of Python objects"):
        load(tmp_path / "c.npz")


@pytest.mark.parametrize("separator", ["/", "."])
def test_names_and_layouts_of_flax_are_read(separator, tmp_path):
    _, params, stats = purify(load_from_state(tmp_path))
    flat = {
        separator.join([collection, *(str(part.key) for part in path)]): np.asarray(leaf)
        for collection, tree in (("params", params), ("batch_stats", stats))
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    write_safetensors(tmp_path / "flax.safetensors", flat)
    assert_holds(load(tmp_path / "flax.safetensors"), STATE)


def load_from_state(tmp_path):
    write_safetensors(tmp_path / "torch.safetensors", STATE)
    return load(tmp_path / "torch.safetensors")


@pytest.mark.parametrize(
    ("content", "keys"),
    [
        ({"state_dict": OTHER, "state_dict_ema": STATE}, ("state_dict", "state_dict_ema")),
        (prefixed("encoder_q.", OTHER) | prefixed("encoder_k."), ("encoder_q", "encoder_k")),
        (OTHER | prefixed("ema."), ("no key", "ema")),
        ({"models": [OTHER, STATE]}, ("models.0", "models.1")),
    ],
)
def test_of_several_networks_that_fit_one_is_chosen_by_its_key(save, content, keys):
    path = save(content)
    with pytest.raises(UserError, match=r"holds 2 networks that fit resnet8, under .*Choose one as .*::KEY") as error:
        load(path)
    assert all(key in str(error.value) for key in keys)
    assert_holds(load(f"{path}::{keys[1]}"), STATE)
    with pytest.raises(UserError, match=r"holds nothing under 'x'\. Its keys begin with: "):
        load(f"{path}::x")


@pytest.mark.parametrize("compressed", [False, True])
def test_a_flipped_bit_differs_from_the_checksum_of_an_archive(save, tmp_path, compressed):
    path = save(STATE)
    data = bytearray(path.read_bytes())
    if compressed:
        with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as tar:
            tar.add(path, "resnet8/a.pth")
        path = tmp_path / "a.tar.gz"
        data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"differs from its checksum|is a damaged archive"):
        load(path)


def test_what_unpacks_to_far_more_than_it_is_is_refused_unread(torch, tmp_path, monkeypatch):
    monkeypatch.setattr(torch_files, "_MOST_BYTES", 2**20)
    zeros = bytes(2**22)
    with zipfile.ZipFile(tmp_path / "a.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", zeros)
    np.savez_compressed(tmp_path / "a.npz", a=np.zeros(2**20, np.float32))
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(zeros))
    for name in ("a.pth", "a.npz", "a.tar.gz"):
        with pytest.raises(UserError, match=rf"{name} of [\d,]+ bytes unpacks to [\d,]+ or more"):
            load(tmp_path / name)
    # Of many, each may be small enough.
    for tensors in (
        {"fc.weight": torch.zeros(1).expand(2**40)},
        {f"{i}": torch.zeros(1).expand(2**14) for i in range(40)},
    ):
        torch.save(tensors, tmp_path / "b.pth")
        with pytest.raises(
            UserError, match=r"b\.pth of [\d,]+ bytes claims tensors of [\d,]+, which no checkpoint does"
        ):
            load(tmp_path / "b.pth")


def test_an_expanded_tensor_is_read(torch, tmp_path):
    state = {name: torch.from_numpy(np.array(value)) for name, value in STATE.items()}
    name, statistic = next((name, value) for name, value in state.items() if name.endswith("running_var"))
    torch.save(state | {name: torch.ones(1).expand(len(statistic))}, tmp_path / "a.pth")
    ones = np.ones(len(statistic), np.float32)
    assert_holds(load(tmp_path / "a.pth"), STATE | {name: ones})


def test_a_pickle_of_another_protocol_is_named(torch, tmp_path):
    torch.save({"a": torch.zeros(2), "b": {"c": "x"}}, tmp_path / "a.pth", pickle_protocol=4)
    with pytest.raises(UserError, match=r"uses a pickle protocol other than PyTorch's"):
        load(tmp_path / "a.pth")
    (tmp_path / "b.pth").write_bytes(pickle.dumps({"a": list(range(9))}, protocol=5))
    with pytest.raises(UserError, match=r"b\.pth"):
        load(tmp_path / "b.pth")


def test_a_student_starts_from_all_but_the_last_layer_of_a_file_for_other_classes(tiny, tmp_path):
    state = state_dict(num_classes=100)
    state["conv1.weight"] = np.ascontiguousarray(state["conv1.weight"][:, :1])
    write_safetensors(tmp_path / "a.safetensors", state)
    flags = ["student.model=resnet8", f"student.checkpoint={tmp_path / 'a.safetensors'}"]
    with pytest.raises(UserError, match=r"student\.checkpoint_head=skip"):
        planned(tiny(*flags), tmp_path).make_student()
    _, (params, stats) = planned(tiny(*flags, "student.checkpoint_head=skip"), tmp_path).make_student()
    _, (random, _) = planned(tiny("student.model=resnet8"), tmp_path).make_student()
    np.testing.assert_array_equal(params["fc"]["kernel"], random["fc"]["kernel"])
    np.testing.assert_array_equal(params["conv1"]["kernel"], state["conv1.weight"].transpose(2, 3, 1, 0))
    np.testing.assert_array_equal(stats["bn1"]["mean"], state["bn1.running_mean"])


def planned(config, tmp_path):
    from ldrld_jax import config as config_lib

    return Run.plan(config_lib.resolve(config), tmp_path / "run")


def test_a_key_that_is_left_at_its_default_is_not_in_a_runs_identity(tiny):
    from ldrld_jax import config as config_lib
    from ldrld_jax.identity import identity

    assert "student.checkpoint_head" not in identity(config_lib.resolve(tiny()))
    given = tiny("student.checkpoint=a", "student.checkpoint_head=skip")
    assert identity(config_lib.resolve(given))["student.checkpoint_head"] == "skip"
