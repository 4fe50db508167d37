"""A member: its own normalisation before its network, and two files that smp opens without us and offline."""

from __future__ import annotations

import json
import socket

import pytest
import segmentation_models_pytorch as smp
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from smp_ensemble.architectures import create_network
from smp_ensemble.data.normalization import Normalization, imagenet
from smp_ensemble.ensembling.member import CONFIG_FILE, WEIGHTS_FILE, Member, load_network, load_weights, save_network
from smp_ensemble.exceptions import NetworkError

TINY = {"encoder_depth": 3, "decoder_channels": [8, 8, 8]}


def make_network(num_outputs: int = 2, **options) -> nn.Module:
    """A small Unet whose batch norms have seen something."""
    torch.manual_seed(0)
    network = create_network("unet", num_outputs=num_outputs, model_options={**TINY, **options})
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return network.eval()


@pytest.fixture(scope="module")
def network() -> nn.Module:
    return make_network()


@pytest.fixture
def folder(network, tmp_path):
    save_network(network, tmp_path / "00")
    return tmp_path / "00"


@pytest.fixture
def offline(monkeypatch):
    def refuse(*arguments):
        raise AssertionError("something wants to connect to the network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


@torch.inference_mode()
def logits_of(network: nn.Module) -> torch.Tensor:
    images = torch.linspace(-2, 2, 3 * 16 * 24).reshape(1, 3, 16, 24)
    return network(images)


def test_a_member_normalises_first(network):
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    with torch.inference_mode():
        assert torch.equal(Member(network, imagenet())(images), network(imagenet()(images)))


def test_members_with_other_normalisation_differ():
    network = nn.Conv2d(1, 1, 1, bias=False)
    images = torch.full((1, 1, 2, 2), 51)
    plain, shifted = (Member(network, Normalization("none", [mean], [1.0])) for mean in (0.0, 0.2))
    torch.testing.assert_close(plain(images), network(torch.full((1, 1, 2, 2), 0.2)))
    torch.testing.assert_close(shifted(images), torch.zeros(1, 1, 2, 2))


def test_weights_hold_the_network_alone(network):
    assert {name.partition(".")[0] for name in Member(network, imagenet()).state_dict()} == {"network"}


@pytest.mark.parametrize(("option", "value"), [("activation", "sigmoid"), ("aux_params", {"classes": 2})])
def test_networks_that_give_no_logits_are_refused(option, value):
    network = smp.Unet("resnet18", encoder_weights=None, encoder_depth=3, decoder_channels=(8, 8, 8), **{option: value})
    with pytest.raises(NetworkError, match=f"this network has '{option}'"):
        Member(network, imagenet())


def test_smp_opens_it_offline_bit_for_bit(network, folder, offline):
    opened = smp.from_pretrained(folder).eval()
    assert torch.equal(logits_of(opened), logits_of(network))


def test_it_comes_back_bit_for_bit_in_evaluation_mode(network, folder, offline):
    loaded = load_network(folder)
    assert not any(module.training for module in loaded.modules())
    assert torch.equal(logits_of(loaded), logits_of(network))
    for name, tensor in network.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_two_files_and_no_pickle(folder):
    assert sorted(file.name for file in folder.iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]
    assert json.loads((folder / CONFIG_FILE).read_text())["encoder_weights"] is None


def test_saving_twice_gives_the_same_bytes(network, folder, tmp_path):
    save_network(network, tmp_path / "again")
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_shared_and_strided_tensors_are_saved(tmp_path):
    network = make_network().to(memory_format=torch.channels_last)
    block = network.encoder.layer1[0]
    block.conv2.weight = block.conv1.weight
    flat = torch.randn(2 * block.bn1.weight.numel())
    block.bn1.bias.data, block.bn2.bias.data = flat.chunk(2)
    save_network(network, tmp_path)
    assert torch.equal(logits_of(load_network(tmp_path)), logits_of(network.to(memory_format=torch.contiguous_format)))


def test_another_number_of_classes_names_the_tensor_and_both_shapes(network, folder):
    tensors = load_file(folder / WEIGHTS_FILE)
    with pytest.raises(
        NetworkError,
        match=r"^old\.pt: tensor 'segmentation_head\.0\.weight' has shape \(2, 8, 3, 3\), "
        r"the network expects \(5, 8, 3, 3\): other architecture, encoder or number of classes\?$",
    ):
        load_weights(make_network(num_outputs=5), tensors, "old.pt")


def test_the_first_tensor_that_differs_is_named_in_the_order_of_the_network(network, folder):
    tensors = load_file(folder / WEIGHTS_FILE)
    with pytest.raises(
        NetworkError, match=r"tensor 'encoder\.conv1\.weight' has shape \(64, 3, 7, 7\).*\(64, 4, 7, 7\)"
    ):
        load_weights(create_network("unet", in_channels=4, num_outputs=5, model_options=TINY), tensors, "old.pt")


def test_missing_and_unknown_tensors_are_named(network, folder):
    tensors = load_file(folder / WEIGHTS_FILE)
    bias = tensors.pop("segmentation_head.0.bias")
    with pytest.raises(NetworkError, match=r"old\.pt lacks the tensor 'segmentation_head\.0\.bias' \(2,\)"):
        load_weights(network, tensors, "old.pt")
    tensors |= {"segmentation_head.0.bias": bias, "head.extra": bias}
    with pytest.raises(NetworkError, match=r"old\.pt holds the tensor 'head\.extra', which the network does not have"):
        load_weights(network, tensors, "old.pt")


def test_a_refused_state_dict_changes_nothing(folder):
    network = make_network()
    before = logits_of(network)
    tensors = {name: torch.zeros_like(tensor) for name, tensor in load_file(folder / WEIGHTS_FILE).items()}
    tensors["segmentation_head.0.bias"] = torch.zeros(7)
    with pytest.raises(NetworkError):
        load_weights(network, tensors, "old.pt")
    assert torch.equal(logits_of(network), before)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (CONFIG_FILE, None, "cannot read .*config.json"),
        (CONFIG_FILE, b"{", "cannot read .*config.json"),
        (CONFIG_FILE, b"\xff\xfe", "cannot read .*config.json"),
        (CONFIG_FILE, b"[" * 100_000, "cannot read .*config.json"),
        (CONFIG_FILE, b"[1]", "expected an object in .*config.json, got list"),
        (CONFIG_FILE, b'{"_model_class": "Popen"}', "names the class 'Popen', which smp does not have"),
        (WEIGHTS_FILE, None, "cannot read .*model.safetensors"),
        (WEIGHTS_FILE, b"not tensors", "cannot read .*model.safetensors"),
    ],
)
def test_broken_files_are_named(folder, name, content, message):
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    with pytest.raises(NetworkError, match=message):
        load_network(folder)


def test_weights_of_another_network_are_refused(folder):
    save_file({"weight": torch.zeros(1)}, folder / WEIGHTS_FILE)
    with pytest.raises(
        NetworkError, match=r"model.safetensors lacks the tensor 'encoder.conv1.weight' \(64, 3, 7, 7\)"
    ):
        load_network(folder)
