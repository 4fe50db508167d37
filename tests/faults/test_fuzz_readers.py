"""Readers of small files and of run lengths: whatever they are given, they accept it or say why not, in one line."""

from __future__ import annotations

import json
import shutil
import socket
import struct

import pytest
import torch
from faults.fuzzing import NASTY, as_json, check_message, fuzz, mutate, mutate_json
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from smp_ensemble.architectures import create_network
from smp_ensemble.data import rle
from smp_ensemble.data.normalization import imagenet
from smp_ensemble.data.sidecars import read_classes, read_splits
from smp_ensemble.ensembling.artifact import ENSEMBLE_FILE, load_ensemble, read_spec
from smp_ensemble.ensembling.ensemble import Ensemble
from smp_ensemble.ensembling.member import CONFIG_FILE, WEIGHTS_FILE, Member, load_network, read_weights
from smp_ensemble.exceptions import ConfigError, DataError, IntegrityError, NetworkError
from smp_ensemble.tracking.flavor import save_model
from smp_ensemble.tracking.manifest import MANIFEST_FILE, read_manifest
from smp_ensemble.tracking.verification import verify_mlmodel

pytestmark = pytest.mark.faults

SPEC_KEYS = (
    "format",
    "mode",
    "members",
    "folder",
    "sha256",
    "postprocess",
    "opening",
    "crf",
    "window",
    "views",
    "reject",
)
CONFIG_KEYS = (
    "encoder_name", "encoder_depth", "decoder_channels", "encoder_weights", "classes", "in_channels", "activation",
    "aux_params", "decoder_use_norm", "decoder_attention_type", "pretrained_cfg", "checkpoint_path", "cache_dir",
    "_model_class", "_architecture", "_dropout", "device", "act_layer", "norm_layer", "depths", "num_classes",
)  # fmt: skip
CONFIG_VALUES = (
    *NASTY, "tu-hf-hub:somebody/something", "tu-hf_hub:a/b", "tu-local-dir:/tmp", "tu-../../x", "tu-resnet18.a1_in1k",
    "tu-test_vit", "resnet18", "imagenet", "sigmoid", "Unet", "UnetPlusPlus", "Linknet", "FPN", "DPT", "os.system",
    "fcn", "scse", "relu", 16384, 65536, [16384] * 5, [64, 32, 16, 8, 4], {"url": "http://example.org/w.pth"}, 5, 32, 8,
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A snapshot as it is stored, with the smallest encoder."""
    torch.manual_seed(0)
    options = {"encoder_depth": 3, "decoder_channels": [8, 8, 8]}
    network = create_network("unet", encoder_name="tu-test_resnet", model_options=options)
    member = Member(network, imagenet(), training_images=["0" * 32, "1" * 32])
    folder = tmp_path_factory.mktemp("fuzz") / "model"
    save_model(Ensemble([member], mode="binary", class_names=("background", "roof")), folder)
    return folder


@pytest.fixture
def no_network(monkeypatch):
    """Fails at any connection, and at any name that is looked up."""
    tried = []

    def refuse(*address, **_):
        tried.append(address)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    yield
    assert tried == []


def test_run_lengths():
    texts = ["1 3 10 2", "", "1 192", "5 1 7 1 9 100"]
    alphabet = [*"0123456789      -.e\0\t\n", "999999999999", "1 1 ", "\u0661"]

    def make(rng):
        if rng.integers(2):
            return mutate(texts[rng.integers(len(texts))].encode(), rng).decode("latin-1")
        return "".join(rng.choice(alphabet, rng.integers(60)))

    def read(text):
        mask = rle.decode(text, 12, 16)
        assert mask.shape == (12, 16)
        assert set(mask.ravel().tolist()) <= {0, 1}

    fuzz("rle.decode", make, read, DataError)


@given(st.text(max_size=200), st.integers(-2, 40), st.integers(-2, 40))
def test_run_lengths_of_any_text_for_any_size(text, height, width):
    try:
        mask = rle.decode(text, height, width)
    except DataError:
        return
    assert mask.shape == (height, width)
    assert mask.sum() == sum(int(length) for length in text.split()[1::2])


def test_the_description_of_an_ensemble(model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "model")
    content = json.loads((model / ENSEMBLE_FILE).read_text())

    def read(data):
        (folder / ENSEMBLE_FILE).write_bytes(data)
        load_ensemble(folder)

    allowed = (IntegrityError, ConfigError, NetworkError)
    tally = fuzz("ensemble.json", lambda rng: as_json(mutate_json(content, rng, SPEC_KEYS), rng), read, allowed)
    assert tally.accepted  # a name or a weight may be another


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@pytest.fixture(scope="module")
def spot(tmp_path_factory):
    return tmp_path_factory.mktemp("spot")


@given(
    JSON, st.sampled_from(["members", "class_names", "mode", "views", "weight", "normalization", "sha256", "folder"])
)
def test_a_description_with_any_value_anywhere(model, spot, value, key):
    content = json.loads((model / ENSEMBLE_FILE).read_text())
    owner = content if key in content else content["members"][0]
    owner[key] = value
    (spot / ENSEMBLE_FILE).write_text(json.dumps(content))
    try:
        spec = read_spec(spot)
    except IntegrityError as error:
        check_message(error, key)
    else:
        assert spec.members


def test_the_configuration_of_a_network(model, tmp_path, no_network):
    folder = shutil.copytree(model / "members" / "00", tmp_path / "member")
    content = json.loads((folder / CONFIG_FILE).read_text())

    def read(data):
        (folder / CONFIG_FILE).write_bytes(data)
        load_network(folder)

    def make(rng):
        return as_json(mutate_json(content, rng, CONFIG_KEYS, CONFIG_VALUES), rng)

    assert fuzz("config.json", make, read, (NetworkError, ConfigError)).accepted


def test_weights(tmp_path):
    tensors = {"a": torch.ones(2, 3), "b": torch.ones(4, dtype=torch.float16), "c": torch.tensor(3)}
    whole = save(tensors, metadata={"format": "pt"})
    length = struct.unpack("<Q", whole[:8])[0]
    header, body = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    dtypes = (
        "F64",
        "BF16",
        "I8",
        "U64",
        "BOOL",
        "F8_E4M3",
        "F4",
        "C64",
        "F128",
        [2, 3],
        [4],
        [2**62, 2**62],
        [0, 2**62],
    )
    path = tmp_path / WEIGHTS_FILE

    def make(rng):
        if rng.integers(3) == 0:
            return mutate(whole, rng)
        changed = as_json(mutate_json(header, rng, ("dtype", "shape", "data_offsets"), (*NASTY, *dtypes)), rng)
        more = rng.bytes(rng.integers(20)) if rng.integers(4) == 0 else b""
        return struct.pack("<Q", len(changed)) + changed + body + more

    def read(data):
        path.write_bytes(data)
        for tensor in read_weights(path).values():
            assert tensor.nbytes <= len(data)

    assert fuzz("model.safetensors", make, read, NetworkError).accepted


def test_the_description_that_mlflow_reads(model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "model")
    (folder / MANIFEST_FILE).unlink()
    text = (model / "MLmodel").read_text().replace("manifest: files.sha256", "members_of: nothing")
    deep = [b"flavors: " + b"[" * 100_000, b"- " * 100_000, b"flavors: {smp_ensemble: " + b"{a: " * 5000]

    def make(rng):
        return deep[rng.integers(3)] if rng.integers(50) == 0 else mutate(text.encode(), rng)

    def read(data):
        (folder / "MLmodel").write_bytes(data)
        verify_mlmodel(folder)

    assert fuzz("MLmodel", make, read, IntegrityError).accepted


def test_the_list_of_files(model, tmp_path):
    whole = (model / MANIFEST_FILE).read_bytes()

    def read(data):
        (tmp_path / MANIFEST_FILE).write_bytes(data)
        read_manifest(tmp_path)
        assert data == whole

    fuzz("files.sha256", lambda rng: mutate(whole, rng), read, IntegrityError)


def test_class_names_and_splits(tmp_path):
    classes = {"names": ["background", "roof", "road"], "task": "multiclass", "ignore_index": 255}
    splits = b"image,split,group\na.png,train,x\nb.png,val,y\nc.png,test,z\n"

    def read_one(name, read):
        def run(data):
            (tmp_path / name).write_bytes(data)
            read(tmp_path / name)

        return run

    deep = b"[" * 100_000
    fuzz(
        "classes.json",
        lambda rng: deep if rng.integers(50) == 0 else as_json(mutate_json(classes, rng), rng),
        read_one("classes.json", read_classes),
        DataError,
    )
    fuzz(
        "splits.csv",
        lambda rng: mutate(splits, rng),
        read_one("splits.csv", lambda path: read_splits(path.parent)),
        DataError,
    )
