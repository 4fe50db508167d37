"""Artifacts made to do harm are refused: nothing outside is read, nothing is fetched, no memory is taken."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import struct
import tracemalloc
from pathlib import Path

import pytest
import torch

from smp_ensemble.architectures import create_network
from smp_ensemble.data.normalization import imagenet
from smp_ensemble.ensembling.artifact import ENSEMBLE_FILE, load_ensemble, save_ensemble
from smp_ensemble.ensembling.ensemble import Ensemble
from smp_ensemble.ensembling.member import CONFIG_FILE, WEIGHTS_FILE, Member, load_network
from smp_ensemble.exceptions import ConfigError, IntegrityError, NetworkError


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    options = {"encoder_depth": 3, "decoder_channels": [8, 8, 8]}
    network = create_network("unet", encoder_name="tu-test_resnet", model_options=options)
    folder = tmp_path_factory.mktemp("hostile") / "model"
    member = Member(network, imagenet(), training_images=["0" * 32])
    save_ensemble(Ensemble([member], mode="binary", class_names=("land", "roof")), folder)
    return folder


@pytest.fixture
def folder(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    tried = []

    def refuse(*address, **_):
        tried.append(address)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    yield
    assert tried == []


def rewrite(folder: Path, member: dict | None = None, files: dict | None = None, **change) -> None:
    """Changes `ensemble.json` as somebody would who knows the format."""
    content = json.loads((folder / ENSEMBLE_FILE).read_text())
    content["members"][0]["sha256"].update(files or {})
    content["members"][0].update(member or {})
    (folder / ENSEMBLE_FILE).write_text(json.dumps({**content, **change}))


def put(folder: Path, name: str, data: bytes) -> None:
    """Another file in a member's folder, with its right SHA-256."""
    (folder / "members" / "00" / name).write_bytes(data)
    rewrite(folder, files={name: hashlib.sha256(data).hexdigest()})


def put_config(folder: Path, **change) -> None:
    config = json.loads((folder / "members" / "00" / CONFIG_FILE).read_text())
    put(folder, CONFIG_FILE, json.dumps({**config, **change}).encode())


@pytest.mark.parametrize(
    "place",
    [
        "..", "../model/members/00", "members/../../model/members/00", "/etc", "/", "C:/windows", "C:",
        "\\\\host\\share", "members\\00", "//host/share", "nul", "members/CON", "com1.txt", "aux/00", "members/00.",
        "members/00 ", ".hidden", "members/./00", "members//00", "", ".", "a\0b", "\ud800", "~/x", "$HOME", "members/*",
        "a/" * 30 + "a", "m" * 300,
    ],
)  # fmt: skip
def test_a_member_in_a_place_that_is_not_the_artifacts_is_refused(folder, place):
    rewrite(folder, member={"folder": place})
    with pytest.raises(IntegrityError) as caught:
        load_ensemble(folder)
    assert "leaves the artifact: refused" in str(caught.value) or "surrogates not allowed" in str(caught.value)


@pytest.mark.parametrize("name", ["../../../etc/passwd", "/etc/passwd", "other.safetensors", "code.py", ""])
def test_a_file_that_members_do_not_have_is_refused(folder, name):
    rewrite(folder, files={name: "0" * 64})
    with pytest.raises(IntegrityError, match="lists the files"):
        load_ensemble(folder)


@pytest.mark.parametrize(
    "digest", ["no file", "a symbolic link to /etc/passwd", "", "0" * 63, "G" * 64, None, 5, ["0"]]
)
def test_a_digest_that_is_none_never_matches_what_is_said_of_a_file_that_is_not_there(folder, digest):
    (folder / "members/00" / WEIGHTS_FILE).unlink()
    rewrite(folder, files={WEIGHTS_FILE: digest})
    with pytest.raises(IntegrityError, match="expected a SHA-256 in hexadecimal"):
        load_ensemble(folder)
    rewrite(folder, files={WEIGHTS_FILE: "0" * 64}, combiner_sha256=digest if digest is not None else 0)
    with pytest.raises(IntegrityError, match="expected a SHA-256 in hexadecimal"):
        load_ensemble(folder)


@pytest.mark.parametrize("what", [ENSEMBLE_FILE, "members", "members/00", f"members/00/{CONFIG_FILE}"])
def test_a_link_anywhere_is_refused_even_to_whole_files(folder, whole, what):
    path = folder / what
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    path.symlink_to(whole / what, target_is_directory=(whole / what).is_dir())
    with pytest.raises(IntegrityError, match="a symbolic link"):
        load_ensemble(folder)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes in folders")
@pytest.mark.parametrize("what", [ENSEMBLE_FILE, f"members/00/{CONFIG_FILE}", f"members/00/{WEIGHTS_FILE}"])
def test_a_pipe_does_not_hang_it(folder, what):
    (folder / what).unlink()
    os.mkfifo(folder / what)
    with pytest.raises(IntegrityError, match="regular file|no file"):
        load_ensemble(folder)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"[" * 200_000, "levels of lists and objects"),
        (b'{"a":' * 40 + b"1" + b"}" * 40, "levels of lists and objects"),
        (b" " * (4 * 2**20) + b"{}", "expected at most 4194304 bytes"),
        (b'{"format": 1' + b"0" * 5000 + b"}", "cannot read"),
        (b'{"format": ' + b"9" * 30 + b"}", "has format 9+, this version reads"),
        (b'{"mode": "' + b"x" * 5000 + b'"}', "strings of at most 4096 characters"),
        (b"\xff\xfe{}", "cannot read"),
        (b"null", "does not hold what it should"),
        (b"[]", "does not hold what it should"),
    ],
)
def test_a_description_without_bounds_is_refused(folder, data, message):
    (folder / ENSEMBLE_FILE).write_bytes(data)
    with pytest.raises(IntegrityError, match=message) as caught:
        load_ensemble(folder)
    assert len(str(caught.value)) < 600


def test_numbers_of_members_classes_and_bands_have_limits(folder):
    whole_text = (folder / ENSEMBLE_FILE).read_text()
    entry = json.loads(whole_text)["members"][0]
    many = [{**entry, "folder": f"members/{index}"} for index in range(1001)]
    for change, message in (
        ({"members": many}, "expected 1 to 1000 members, got 1001"),
        ({"members": []}, "expected 1 to 1000 members, got 0"),
        ({"members": [entry, entry]}, "a folder for each member"),
        ({"class_names": ["x"] * 100_000}, "expected 1 to 1000 class names, got 100000"),
        ({"in_channels": 10**9}, "expected 1 to 4096 bands"),
        ({"in_channels": 4}, "4 bands, and 3 in the normalization"),
        ({"views": ["scales:" + ",".join(f"1.{index:04d}" for index in range(500))]}, "at most 32 factors"),
        ({"postprocess": {"crf": {"window": 10**7 + 1}}}, "crf.window as a whole number of at most 255"),
        ({"postprocess": {"opening": 10**15}}, "opening as a whole number of at most"),
    ):
        rewrite(folder, **change)
        with pytest.raises(IntegrityError, match=message):
            load_ensemble(folder)
        (folder / ENSEMBLE_FILE).write_text(whole_text)
    load_ensemble(folder)


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("name", ["weight", "threshold", "temperature"])
def test_numbers_are_finite(folder, name, value):
    content = json.loads((folder / ENSEMBLE_FILE).read_text())
    for owner in (content, content["members"][0]):
        if name in owner:
            owner[name] = "HERE"
    (folder / ENSEMBLE_FILE).write_text(json.dumps(content).replace('"HERE"', value))
    with pytest.raises(IntegrityError, match="does not hold what it should"):
        load_ensemble(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"_model_class": "os.system"},
        {"_model_class": "Module"},
        {"_model_class": "__class__"},
        {"_model_class": ["Unet"]},
        {"encoder_name": "tu-hf-hub:somebody/something"},
        {"encoder_name": "tu-hf_hub:somebody/something"},
        {"encoder_name": "tu-local-dir:/tmp"},
        {"encoder_name": "tu-../../etc/passwd"},
        {"encoder_name": "http://example.org/weights.pth"},
        {"checkpoint_path": "weights.pth"},
        {"pretrained": True},
        {"pretrained_cfg": {"url": "weights"}},
        {"pretrained_cfg_overlay": {"file": "weights"}},
        {"cache_dir": "folder"},
        {"device": "cuda"},
        {"nested": {"checkpoint_path": "weights.pth"}},
        {"decoder_channels": [10**9, 10**9, 10**9]},
        {"decoder_channels": [16384, 16384, 16384]},
        {"decoder_channels": [8] * 5000},
        {"decoder_channels": [float("inf"), 8, 8]},
        {"classes": 10**6},
        {"classes": -1},
        {"in_channels": 16384 * 64},
        {"encoder_depth": 10**9},
        {"encoder_depth": -3},
        {"activation": "sigmoid"},
        {"aux_params": {"classes": 2}},
        {"_dropout": "yes"},
        {"unknown_option": 1},
    ],
    ids=lambda change: "-".join(map(str, change)),
)
def test_a_configuration_cannot_fetch_open_or_flood(folder, change):
    put_config(folder, **change)
    tracemalloc.start()
    try:
        with pytest.raises(NetworkError):
            load_ensemble(folder)
        assert tracemalloc.get_traced_memory()[1] < 64 * 2**20
    finally:
        tracemalloc.stop()


def test_weights_are_never_fetched_whatever_the_configuration_says(folder):
    put_config(folder, encoder_weights="imagenet")
    load_ensemble(folder)


@pytest.mark.parametrize("name", ["os:system", "fcn2", "../fcn"])
def test_only_installed_architectures_are_built(folder, name):
    put(folder, CONFIG_FILE, json.dumps({"_architecture": name, "in_channels": 3, "classes": 1}).encode())
    with pytest.raises(ConfigError, match="unknown architecture"):
        load_ensemble(folder)


def test_an_installed_architecture_fetches_nothing_and_stays_within_its_weights(folder):
    config = {"_architecture": "fcn", "encoder_name": "resnet18", "encoder_weights": "imagenet", "in_channels": 3}
    put(folder, CONFIG_FILE, json.dumps({**config, "classes": 1}).encode())
    with pytest.raises(NetworkError, match="lacks the tensor"):
        load_ensemble(folder)
    put(folder, CONFIG_FILE, json.dumps({**config, "classes": 10**9}).encode())
    with pytest.raises(NetworkError, match="far larger than its weights"):
        load_ensemble(folder)


def safetensors(header: dict, body: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


@pytest.mark.parametrize(
    "data",
    [
        safetensors({"x": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}),
        safetensors({"x": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 4]}}, b"0000"),
        safetensors({"x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, b"0000"),
        safetensors({"x": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}, b"0000"),
        safetensors({"x": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, b"00000000"),
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 2**40) + b"{}",
        safetensors({}),
        b"\x80\x04\x95pickle",
        b"",
    ],
)
def test_weights_whose_header_lies_are_refused(folder, data):
    put(folder, WEIGHTS_FILE, data)
    with pytest.raises(NetworkError):
        load_ensemble(folder)


@pytest.mark.parametrize("data", [b"\xff" * 20, "\u00e9".encode()])
def test_training_images_that_are_no_text_are_damage(folder, data):
    put(folder, "training_images.txt", data)
    with pytest.raises(IntegrityError, match="cannot read .*training_images.txt"):
        load_ensemble(folder)


def test_a_network_alone_is_as_careful(folder):
    member = folder / "members" / "00"
    (member / CONFIG_FILE).write_bytes(b"[" * 100_000)
    with pytest.raises(NetworkError, match=r"cannot read .*config.json"):
        load_network(member)
