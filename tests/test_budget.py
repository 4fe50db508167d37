"""A network is built within what goes with its weights, and is what it would be without being watched."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from smp_ensemble.architectures import create_network, from_config, network_config
from smp_ensemble.budget import MOST_NUMBER, MOST_TENSORS, SPARE_BYTES, Budget, check_options
from smp_ensemble.exceptions import NetworkError


@pytest.mark.parametrize(
    ("arch", "encoder"),
    [("unet", "resnet50"), ("fpn", "mit_b0"), ("unet", "tu-convnext_atto"), ("linknet", "efficientnet-b0")],
)
def test_what_is_built_is_the_same_as_without_a_budget(arch, encoder):
    torch.manual_seed(0)
    network = create_network(arch, encoder_name=encoder)
    size = sum(tensor.nbytes for tensor in network.state_dict().values())
    torch.manual_seed(0)
    again = from_config(network_config(network), size)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Linear(10**6, 10**6),
        lambda: torch.zeros(SPARE_BYTES),
        lambda: torch.zeros(size=(SPARE_BYTES,)),
        lambda: torch.full((2**20, 2**12), 1.0),
        lambda: torch.arange(SPARE_BYTES),
        lambda: torch.ones(2**20).repeat(2**12),
        lambda: torch.ones(2**10, 2).tile(2**16, 2**6),
        lambda: torch.ones(2**16).expand(2**16, 2**16).contiguous(),
        lambda: torch.stack(torch.meshgrid(torch.arange(2**16), torch.arange(2**16), indexing="ij")),
        lambda: [torch.empty(2**26) for _ in range(10**6)],
    ],
    ids=range(10),
)
def test_what_is_too_large_stops_before_the_memory_is_asked_for(build):
    with pytest.raises(NetworkError, match="far larger than its weights, which are 1000 bytes"), Budget(1000):
        build()


def test_many_small_tensors_stop_too():
    with pytest.raises(NetworkError, match=f"more than {MOST_TENSORS} tensors"), Budget(0):
        for _ in range(10**9):
            torch.empty(1)
    with pytest.raises(NetworkError, match=f"more than {MOST_TENSORS} tensors"), Budget(0), torch.device("meta"):
        for _ in range(10**9):
            torch.empty(1)


def test_weights_allow_for_a_network_of_their_size():
    with Budget(SPARE_BYTES):
        torch.empty(SPARE_BYTES // 4 + 10**6)  # reserved, not touched
    with Budget(0), torch.device("meta"):
        torch.empty(10**12)


def test_options_are_plain():
    check_options(
        {"encoder_name": "tu-resnet18.a1_in1k", "decoder_channels": [MOST_NUMBER, 8], "x": None, "y": {"z": 0.5}}
    )
    for bad in (
        {"checkpoint_path": None},
        {"deep": [{"pretrained_cfg": {}}]},
        {"x": "a/b"},
        {"x": "a:b"},
        {"x": "a\\b"},
        {"x": ["a" * 201]},
        {"x": MOST_NUMBER + 1},
        {"x": -float("inf")},
        {"x": float("nan")},
        {"x": [0] * 1001},
        {str(index): 0 for index in range(1001)},
    ):
        with pytest.raises(NetworkError):
            check_options(bad)
