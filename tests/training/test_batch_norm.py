"""Batch-norm refresh against NumPy and torch's own train mode, and in each of the ways in which others fail."""

from __future__ import annotations

import copy
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader, TensorDataset

from smp_ensemble.architectures import create_network
from smp_ensemble.exceptions import ConfigError
from smp_ensemble.training.batch_norm import has_batch_norm, refresh_batch_norm


def batches(*sizes: int, seed: int = 0, side: int = 64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, 3, side, side, generator=generator) * (1 + index) for index, size in enumerate(sizes)]


def norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


@pytest.fixture
def make_network():
    """Makes Unets of which every layer is used."""

    def make() -> nn.Module:
        torch.manual_seed(0)
        return create_network("unet", model_options={"decoder_channels": [8] * 5})

    return make


def statistics(model: nn.Module) -> list[torch.Tensor]:
    return [buffer.clone() for layer in norms(model) for buffer in (layer.running_mean, layer.running_var)]


def everything(model: nn.Module) -> tuple:
    """What a refresh that failed must leave as it was."""
    return (
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        [module.training for module in model.modules()],
        [layer.momentum for layer in norms(model)],
        [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()],
    )


def assert_same(model: nn.Module, before: tuple) -> None:
    tensors, *rest = before
    now, *rest_now = everything(model)
    assert all(torch.equal(now[name], tensor) for name, tensor in tensors.items())
    assert rest_now == rest


def inputs_of(model: nn.Module, layer: nn.Module, images: list[torch.Tensor]) -> np.ndarray:
    """All that reaches `layer`, float64 `(pixels, channels)`."""
    seen = []
    with layer.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].double())), torch.no_grad():
        for batch in images:
            model(batch)
    return np.concatenate([one.movedim(1, -1).reshape(-1, one.shape[1]).numpy() for one in seen])


def test_unequal_batches_weigh_by_their_values():
    layer = nn.BatchNorm1d(1)
    refresh_batch_norm(layer, [torch.zeros(8, 1), torch.full((1, 1), 9.0)])
    assert layer.running_mean.item() == 1.0  # the mean of batch means would say 4.5
    assert layer.running_var.item() == 8.0


@given(st.lists(st.integers(1, 7), min_size=1, max_size=6), st.integers(0, 99), st.floats(-1e3, 1e3))
def test_any_batches_give_the_mean_and_variance_of_all_values(sizes, seed, offset):
    generator = torch.Generator().manual_seed(seed)
    images = [torch.randn(size, 2, 3, 2, generator=generator) + offset for size in sizes]
    layer = nn.BatchNorm2d(2)
    refresh_batch_norm(layer, images)
    values = torch.cat(images).double().numpy()
    assert layer.running_mean.numpy() == pytest.approx(values.mean(axis=(0, 2, 3)), rel=1e-5, abs=1e-5)
    assert layer.running_var.numpy() == pytest.approx(values.var(axis=(0, 2, 3)), rel=1e-4)


@pytest.mark.parametrize("encoder", ["resnet18", "tu-efficientvit_b0"])
def test_the_first_layer_of_an_smp_network_holds_numpys_numbers(encoder):
    network = create_network("fpn", encoder_name=encoder).eval()  # efficientvit's norms are timm's subclass
    images = batches(4, 1, 2)
    first = norms(network)[0]
    values = inputs_of(network, first, images)
    refresh_batch_norm(network, images)
    assert first.running_mean.numpy() == pytest.approx(values.mean(axis=0), rel=1e-5, abs=1e-6)
    assert first.running_var.numpy() == pytest.approx(values.var(axis=0), rel=1e-5)


def test_one_batch_gives_what_train_mode_gives_in_every_layer(make_network):
    network, reference = make_network(), make_network()
    images = batches(3)
    refresh_batch_norm(network, images)
    counts = []
    for layer in norms(reference):
        layer.register_forward_hook(lambda _, inputs, __: counts.append(inputs[0].numel() / inputs[0].shape[1]))
    update_bn(images, reference)
    for ours, torchs, count in zip(norms(network), norms(reference), counts, strict=True):
        assert torch.allclose(ours.running_mean, torchs.running_mean, atol=1e-5)
        assert torch.allclose(ours.running_var, torchs.running_var * ((count - 1) / count), rtol=1e-4)


def test_equal_batches_give_the_means_of_update_bn_in_every_layer(make_network):
    network, reference = make_network(), make_network()
    images = batches(2, 2, 2)
    refresh_batch_norm(network, images)
    update_bn(images, reference)
    for ours, torchs in zip(norms(network), norms(reference), strict=True):
        assert torch.allclose(ours.running_mean, torchs.running_mean, atol=1e-5)


def test_the_variance_counts_how_far_batches_lie_apart():
    images = [torch.tensor([[-1.0], [1.0]]) + shift for shift in (0.0, 5.0)]
    ours, torchs = nn.BatchNorm1d(1), nn.BatchNorm1d(1)
    refresh_batch_norm(ours, images)
    update_bn(images, torchs)
    assert ours.running_var.item() == pytest.approx(np.var(torch.cat(images).numpy())) == 7.25
    assert torchs.running_var.item() == pytest.approx(2.0)


def test_what_was_there_before_does_not_matter(make_network):
    network = make_network()
    images = batches(2, 3)
    refresh_batch_norm(network, images)
    once = statistics(network)
    for layer in norms(network):
        layer.running_mean.fill_(7.0)
    refresh_batch_norm(network, images)
    assert all(torch.equal(one, other) for one, other in zip(once, statistics(network), strict=True))


def test_the_encoder_that_smp_froze_is_untouched(make_network):
    network = make_network()
    refresh_batch_norm(network, batches(4, seed=1))  # pretrained statistics, so to speak
    network.freeze_encoder()
    network.train()
    before = everything(network)
    encoder = statistics(network.encoder)
    decoder = statistics(network.decoder)
    refresh_batch_norm(network, batches(4, 4, seed=2))
    assert all(torch.equal(one, other) for one, other in zip(encoder, statistics(network.encoder), strict=True))
    assert not any(torch.equal(one, other) for one, other in zip(decoder, statistics(network.decoder), strict=True))
    assert everything(network)[1:] == before[1:]

    peer = copy.deepcopy(network)
    update_bn(batches(4, 4, seed=2), peer)
    assert all(
        torch.equal(layer.running_mean, torch.zeros(1).expand_as(layer.running_mean)) for layer in norms(peer.encoder)
    )


def test_a_network_whose_every_norm_is_frozen_does_not_iterate_the_loader():
    class Frozen(nn.BatchNorm2d):
        def train(self, mode: bool = True):
            return super().train(False)

    model = nn.Sequential(
        nn.Conv2d(3, 2, 1), Frozen(2), nn.BatchNorm2d(2, track_running_stats=False), nn.GroupNorm(1, 2)
    )
    assert not has_batch_norm(model)
    refresh_batch_norm(model, iter(lambda: pytest.fail("the loader was asked"), None))
    assert has_batch_norm(nn.Sequential(model, nn.BatchNorm2d(2)))


def test_dropout_and_drop_path_rest_even_in_a_frozen_encoder():
    network = create_network("unet", encoder_name="tu-resnet18", model_options={"drop_path_rate": 0.5})
    network.decoder.blocks[0].conv1.append(nn.Dropout2d(0.5))
    network.freeze_encoder()  # smp leaves the encoder's drop path in train mode, and eval() does not change that
    network.train()
    assert has_batch_norm(network)
    images = batches(2, 2)
    state = torch.get_rng_state()
    refresh_batch_norm(network, images)
    assert torch.equal(torch.get_rng_state(), state)
    once = statistics(network)
    refresh_batch_norm(network, images)
    assert all(torch.equal(one, other) for one, other in zip(once, statistics(network), strict=True))


@pytest.mark.parametrize("training", [True, False])
def test_only_means_and_variances_change(make_network, training):
    network = make_network().train(training)
    norms(network)[0].momentum = None
    norms(network)[1].num_batches_tracked.fill_(41)
    before = everything(network)
    refresh_batch_norm(network, batches(2, 1))
    after = everything(network)
    assert after[1:] == before[1:]
    changed = {name for name, tensor in before[0].items() if not torch.equal(tensor, after[0][name])}
    assert changed == {name for name in before[0] if name.endswith(("running_mean", "running_var"))}
    assert not any(parameter.grad is not None for parameter in network.parameters())


def test_a_last_batch_of_one_goes_through_global_pooling():
    network = create_network("deeplabv3plus", encoder_name="resnet18")
    pooling = [module for module in network.decoder.modules() if type(module).__name__ == "ASPPPooling"]
    layer = pooling[0][2]
    images = batches(3, 1)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        update_bn(images, copy.deepcopy(network))
    seen = []
    layer.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0].double(), output)))
    refresh_batch_norm(network, images)
    values = torch.cat([inputs for inputs, _ in seen])[:, :, 0, 0].numpy()
    assert layer.running_mean.numpy() == pytest.approx(values.mean(axis=0), rel=1e-5, abs=1e-6)
    assert layer.running_var.numpy() == pytest.approx(values.var(axis=0), rel=1e-4, abs=1e-12)
    expected = (values[-1] - values.mean(axis=0)) / np.sqrt(values.var(axis=0) + layer.eps)
    assert seen[-1][1][0, :, 0, 0].detach().numpy() == pytest.approx(expected, abs=1e-4)


def test_a_layer_with_one_value_in_all_keeps_its_statistics():
    model = nn.Sequential(nn.BatchNorm2d(1), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(1))
    refresh_batch_norm(model, [torch.arange(4.0).view(1, 1, 2, 2)])
    assert (model[0].running_mean.item(), model[0].running_var.item()) == (1.5, 1.25)
    assert (model[2].running_mean.item(), model[2].running_var.item()) == (0.0, 1.0)


def test_layers_that_nothing_reaches_keep_their_statistics(make_tiny_network):
    network = make_tiny_network()  # its encoder is cut short: smp keeps the stages behind the cut
    unused = statistics(network.encoder.layer4)
    refresh_batch_norm(network, batches(2))
    assert all(torch.equal(one, other) for one, other in zip(unused, statistics(network.encoder.layer4), strict=True))


def test_synchronized_layers_need_no_other_process():
    layer = nn.SyncBatchNorm(1)
    refresh_batch_norm(layer, [torch.tensor([[0.0], [2.0]])])
    assert (layer.running_mean.item(), layer.running_var.item()) == (1.0, 1.0)


def test_a_layer_that_is_used_twice_pools_both():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(1)

        def forward(self, x):
            return self.norm(x), self.norm(x + 2)

    model = Twice()
    refresh_batch_norm(model, [torch.tensor([[0.0], [2.0]])])
    assert (model.norm.running_mean.item(), model.norm.running_var.item()) == (2.0, 2.0)


FORMS = {
    "tensor": lambda x: x,
    "tuple": lambda x: (x, "masks"),
    "list": lambda x: [x, 1],
    "image": lambda x: {"mask": 0, "x": 0, "image": x},
    "images": lambda x: {"images": x, "labels": 0},
    "input": lambda x: {"input": x},
    "inputs": lambda x: {"inputs": x},
    "x": lambda x: {"x": x},
    "pixel_values": lambda x: {"pixel_values": x},
    "uint8": lambda x: {"image": x.to(torch.uint8)},
    "int32": lambda x: (x.to(torch.int32),),
}


@pytest.mark.parametrize("form", FORMS)
def test_batches_of_any_form(form):
    layer = nn.BatchNorm2d(1)
    refresh_batch_norm(layer, [FORMS[form](torch.arange(6.0).view(3, 1, 2, 1)) for _ in range(2)])
    assert layer.running_mean.item() == 2.5


def test_a_torch_loader_of_a_tensor_dataset_serves():
    layer = nn.BatchNorm1d(1)
    refresh_batch_norm(layer, DataLoader(TensorDataset(torch.arange(5.0)[:, None]), batch_size=2))
    assert layer.running_mean.item() == 2.0
    assert layer.running_var.item() == 2.0


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        ([], "expected at least one batch to refresh batch norm, got an empty loader"),
        ([{"picture": 0, "mask": 1}], "got the keys picture, mask: rename one of them"),
        ([{"image": "a.png"}], "got str in a dict"),
        ([[]], "got list"),
        ([None], "got NoneType"),
    ],
)
def test_what_is_no_batch_is_named_and_nothing_changes(make_network, loader, message):
    network = make_network()
    before = everything(network)
    with pytest.raises(ConfigError, match=message):
        refresh_batch_norm(network, loader)
    assert_same(network, before)


def test_after_an_exception_the_model_is_as_before(make_network):
    network = make_network().train()
    network.encoder.eval()
    norms(network)[0].momentum = None

    def breaking():
        yield from batches(2, 1)
        raise OSError("the disk is gone")

    before = everything(network)
    with pytest.raises(OSError, match="the disk is gone"):
        refresh_batch_norm(network, breaking())
    assert_same(network, before)
    with pytest.raises(RuntimeError, match="to have 3 channels"):
        refresh_batch_norm(network, [*batches(2), torch.zeros(1, 4, 64, 64)])
    assert_same(network, before)


def test_a_data_parallel_wrapper_is_looked_through(make_network):
    network, plain = make_network(), make_network()
    refresh_batch_norm(nn.DataParallel(network), batches(2))
    refresh_batch_norm(plain, batches(2))
    assert all(torch.equal(one, other) for one, other in zip(statistics(network), statistics(plain), strict=True))


def test_half_precision_inputs_are_measured_in_float32():
    layer = nn.BatchNorm1d(1)
    values = torch.full((4096, 1), 100.0, dtype=torch.bfloat16)
    values[::2] = 102.0
    refresh_batch_norm(layer, [values])
    assert (layer.running_mean.item(), layer.running_var.item()) == (101.0, 1.0)


@pytest.mark.slow
def test_processes_agree_with_one_that_sees_all_batches(tmp_path):
    """Two processes, with two batches and one; then with three and none."""
    script = textwrap.dedent(
        """
        import sys
        import torch
        import torch.distributed as dist
        from torch import nn
        from torch.nn.parallel import DistributedDataParallel
        from smp_ensemble.exceptions import ConfigError
        from smp_ensemble.training.batch_norm import refresh_batch_norm
        from smp_ensemble.training.processes import leave_group

        torch.set_num_threads(1)
        rank, world, folder = int(sys.argv[1]), 2, sys.argv[2]
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3), nn.BatchNorm2d(2))
        images = [torch.randn(size, 3, 8, 8) * (1 + size) for size in (5, 1, 2)]
        refresh_batch_norm(DistributedDataParallel(network), images[rank::2])
        shared = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        refresh_batch_norm(network, [] if rank else images)
        torch.save((shared, network.state_dict(), images), f"{folder}/{rank}.pt")
        try:
            refresh_batch_norm(network, [])
        except ConfigError as error:
            assert "empty loader" in str(error)
        else:
            raise AssertionError("two empty loaders")
        leave_group()
        """
    )
    command = [sys.executable, "-W", "ignore", "-c", script]
    processes = [
        subprocess.Popen([*command, str(rank), str(tmp_path)], stderr=subprocess.PIPE, text=True) for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=200)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], errors
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    alone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3), nn.BatchNorm2d(2))
    alone.load_state_dict(results[0][0])
    refresh_batch_norm(alone, results[0][2])
    for name, tensor in alone.state_dict().items():
        assert torch.equal(results[0][0][name], results[1][0][name])
        for shared, uneven, _ in results:
            assert torch.allclose(shared[name], tensor, rtol=1e-6, atol=1e-7), name
            assert torch.allclose(uneven[name], tensor, rtol=1e-6, atol=1e-7), name
