"""The engine: any height and width, the same numbers whatever the batch, and one member in memory at a time."""

from __future__ import annotations

import threading
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from smp_ensemble.architectures import create_network
from smp_ensemble.data.normalization import Normalization, imagenet
from smp_ensemble.ensembling.combiners import Mean
from smp_ensemble.ensembling.ensemble import Ensemble
from smp_ensemble.ensembling.member import Member
from smp_ensemble.exceptions import ConfigError
from smp_ensemble.inference import engine as engine_module
from smp_ensemble.inference.engine import Engine, to_tensor

STRIDE = 8


def make_member(seed: int, num_outputs: int = 3) -> Member:
    torch.manual_seed(seed)
    options = {"encoder_depth": 3, "decoder_channels": [8, 8, 8]}
    return Member(create_network("unet", num_outputs=num_outputs, model_options=options), imagenet())


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(Ensemble([make_member(0), make_member(1)], mode="multiclass", weights=[2, 1]), "cpu", "32")


def make_images(height: int, width: int, count: int = 1, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator)


@torch.inference_mode()
def forward(engine: Engine, images: torch.Tensor) -> torch.Tensor:
    """Without the engine's padding and cutting: members in the form that it runs, each image alone."""
    ensemble = engine.ensemble

    def alone(image):
        return ensemble.combine(ensemble.probabilities_of(run, image) for run in engine._runs)

    return torch.cat([alone(one.contiguous(memory_format=torch.channels_last)) for one in images.float().split(1)])


def test_the_stride_is_the_members(engine):
    assert engine.stride == STRIDE
    assert Engine(Ensemble([nn.Conv2d(3, 1, 1)], mode="binary"), "cpu").stride == 32


@settings(max_examples=15)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 2))
def test_any_size_comes_back_in_its_own_size(engine, height, width, count):
    found = engine(make_images(height, width, count))
    assert found.shape == (count, 3, height, width)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.sum(dim=1), torch.ones(count, height, width))


@settings(max_examples=10)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 2))
def test_sizes_that_divide_are_not_padded(engine, rows, columns, count):
    images = make_images(rows * STRIDE, columns * STRIDE, count)
    assert torch.equal(engine(images), forward(engine, images))


@settings(max_examples=10)
@given(st.integers(1, 30), st.integers(1, 30))
def test_other_sizes_are_padded_with_their_edge_and_cropped(engine, height, width):
    images = make_images(height, width)
    padded = np.pad(images.numpy(), ((0, 0), (0, 0), (0, -height % STRIDE), (0, -width % STRIDE)), mode="edge")
    expected = forward(engine, torch.from_numpy(padded))[..., :height, :width]
    assert torch.equal(engine(images), expected)


@pytest.fixture(scope="module")
def exact() -> Engine:
    """Its sums of whole numbers (over 1024) are exact in float32, whichever kernel oneDNN picks for a batch size."""
    members = [nn.Conv2d(3, 3, 3, padding=1) for _ in range(2)]
    generator = torch.Generator().manual_seed(0)
    for parameter in nn.ModuleList(members).parameters():
        nn.init.zeros_(parameter)
        parameter.data += torch.randint(-8, 9, parameter.shape, generator=generator) / 1024
    return Engine(Ensemble(members, mode="multiclass"), "cpu", "32")


def test_a_batch_is_its_images_bit_for_bit(exact):
    images = make_images(21, 13, count=5)
    together = exact(images)
    assert torch.equal(together, torch.cat([exact(image[None]) for image in images]))


@pytest.mark.parametrize("views", ["none", "d4"])
def test_a_batch_of_eight_is_eight_of_one_bit_for_bit_whatever_the_kernels(engine, views):
    images = make_images(40, 24, count=8)
    viewed = engine.with_options(views=views)
    assert torch.equal(viewed(images), torch.cat([viewed(image[None]) for image in images]))


def test_a_batch_is_its_images_in_half_precision(engine):
    images = make_images(40, 24, count=4)
    halved = Engine(engine.ensemble, "cpu", "bf16-mixed")
    torch.testing.assert_close(halved(images), torch.cat([halved(image[None]) for image in images]), rtol=0, atol=0.02)


def test_the_ensemble_is_left_alone():
    ensemble = Ensemble([make_member(0)], mode="multiclass")
    before = {name: (tensor.clone(), tensor.stride(), tensor.dtype) for name, tensor in ensemble.state_dict().items()}
    modules = dict(ensemble.named_modules())
    for precision in ("32", "bf16-mixed"):
        Engine(ensemble, "cpu", precision, views="flips")(make_images(16, 16))
    assert dict(ensemble.named_modules()) == modules
    for name, tensor in ensemble.state_dict().items():
        expected, stride, dtype = before[name]
        assert torch.equal(tensor, expected)
        assert (tensor.stride(), tensor.dtype) == (stride, dtype)


def test_engines_for_the_same_members_share_their_fast_forms(engine):
    first, second = engine.ensemble.members
    other = engine.with_ensemble(Ensemble([second, make_member(2)], mode="multiclass"))
    assert other._runs[0] is engine._runs[1]
    assert engine.with_options(views="d4")._runs[0] is engine._runs[0]
    assert len({id(run) for run in Engine(Ensemble([first] * 3, mode="multiclass"), "cpu", "32")._runs}) == 1
    images = make_images(16, 16)
    assert torch.equal(other(images), Engine(other.ensemble, "cpu", "32")(images))


@pytest.mark.parametrize("pixels", [1, 2 * 16 * 16, 3 * 16 * 16 + 5])
def test_cutting_large_batches_changes_nothing(exact, monkeypatch, pixels):
    images = make_images(16, 16, count=5)
    whole = exact(images)
    monkeypatch.setattr(engine_module, "MAX_BATCH_PIXELS", pixels)
    assert max(len(part) for part in exact.parts(images)) == max(1, pixels // 256)
    assert torch.equal(torch.cat(exact.parts(images)), images)
    assert torch.equal(exact(images), whole)


def test_images_of_several_sizes_keep_their_order(exact):
    sizes = [(16, 16), (9, 20), (16, 16), (9, 20), (1, 1)]
    images = [make_images(*size, seed=index)[0].permute(1, 2, 0).numpy() for index, size in enumerate(sizes)]
    found = exact.predict(images)
    assert [one.shape for one in found] == [(3, *size) for size in sizes]
    for image, one in zip(images, found, strict=True):
        assert np.array_equal(one, exact(to_tensor(image)[None])[0].numpy())


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.int64, np.float32, np.float64])
def test_any_type_of_image_means_the_same(engine, dtype):
    image = make_images(9, 9)[0].permute(1, 2, 0).numpy()
    assert np.array_equal(engine.predict([image.astype(dtype)])[0], engine.predict([image])[0])


def test_raw_values_beyond_8_bits_reach_the_member():
    network = nn.Conv2d(1, 1, 1)
    nn.init.ones_(network.weight)
    nn.init.zeros_(network.bias)
    member = Member(network, Normalization("none", [0.0], [1.0], 4095.0))
    engine = Engine(Ensemble([member], mode="binary"), "cpu", "32")
    found = engine.predict([np.full((2, 2, 1), 4095, dtype=np.uint16)])[0]
    np.testing.assert_allclose(found, np.full((1, 2, 2), 1 / (1 + np.exp(-1.0))), rtol=1e-6)


def test_the_image_is_left_alone(engine):
    images = make_images(16, 16).float()
    before = images.clone()
    engine(images)
    assert torch.equal(images, before)


def test_results_need_no_gradient_and_the_network_no_training_mode(engine):
    engine.ensemble.train()
    again = Engine(engine.ensemble, "cpu", "32")
    assert not any(module.training for module in again.ensemble.modules())
    assert not again(make_images(8, 8)).requires_grad


def test_memory_holds_one_members_probabilities_and_one_sum(monkeypatch):
    combined, alive = [], []

    class WatchedMean(Mean):
        def update(self, probabilities, weight=1.0):
            combined.append(weakref.ref(probabilities))
            super().update(probabilities, weight)

    class Watching(nn.Conv2d):
        def forward(self, images):
            alive.append(sum(one() is not None for one in combined))
            return super().forward(images)

    monkeypatch.setattr("smp_ensemble.ensembling.ensemble.combiner_class", lambda name: WatchedMean)
    Engine(Ensemble([Watching(3, 2, 1) for _ in range(4)], mode="multiclass"), "cpu", "32")(make_images(8, 8))
    assert len(combined) == 4
    assert alive == [0] * 4


def test_half_precision_stays_near_and_returns_float32(engine):
    images = make_images(16, 16)
    halved = Engine(engine.ensemble, "cpu", "bf16-mixed")
    assert halved(images).dtype == torch.float32
    torch.testing.assert_close(halved(images), engine(images), atol=0.05, rtol=0)


def test_the_callers_context_is_left_alone_between_members(engine):
    stream = engine.member_probabilities(make_images(8, 8))
    next(stream)
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


def test_bands_are_known_where_members_say(engine):
    assert engine.in_channels == 3
    assert Engine(Ensemble([nn.Conv2d(3, 1, 1)], mode="binary"), "cpu").in_channels is None


@pytest.mark.parametrize("shape", [(3, 8, 8), (0, 3, 8, 8), (1, 3, 0, 8), (1, 8, 8)])
def test_what_is_no_batch_is_refused(engine, shape):
    with pytest.raises(ConfigError, match=r"expected a batch of images of shape \(N, C, H, W\), got \("):
        engine(torch.zeros(shape))


def test_other_bands_are_refused(engine):
    with pytest.raises(ConfigError, match=r"expected images of shape \(N, 3, H, W\), got \(1, 4, 8, 8\)"):
        engine(torch.zeros(1, 4, 8, 8))


def test_an_image_without_bands_is_refused(engine):
    with pytest.raises(ConfigError, match=r"expected images of shape \(H, W, C\), image 1 has \(8, 8\)"):
        engine.predict([np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8), np.uint8)])


def test_unknown_precision_is_refused(engine):
    with pytest.raises(ConfigError, match="unknown precision 'bf61'"):
        Engine(engine.ensemble, "cpu", "bf61")


def dropping_member(seed: int) -> Member:
    torch.manual_seed(seed)
    options = {"encoder_depth": 3, "decoder_channels": [8, 8, 8], "dropout": 0.5}
    return Member(create_network("unet", num_outputs=3, model_options=options), imagenet())


@pytest.fixture(scope="module")
def dropping() -> Ensemble:
    return Ensemble([dropping_member(0), dropping_member(1)], mode="multiclass", weights=[2, 1])


@torch.inference_mode()
def passes_by_hand(member: Member, images: torch.Tensor, passes: int, seed: int) -> np.ndarray:
    """The mean of softmax over passes, with the member itself switched, and computed by NumPy."""
    member.network.head_dropout.train()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            raw = images.float().contiguous(memory_format=torch.channels_last)
            logits = np.stack([member(raw).numpy() for _ in range(passes)]).astype(np.float64)
    finally:
        member.network.head_dropout.eval()
    powers = np.exp(logits - logits.max(axis=2, keepdims=True))
    return (powers / powers.sum(axis=2, keepdims=True)).mean(axis=0)


def test_passes_are_averaged_for_each_member_and_then_combined(dropping):
    images = make_images(16, 16, count=2)
    engine = Engine(dropping, "cpu", "32", passes=3)
    by_hand = [passes_by_hand(member, images, 3, seed) for seed, member in enumerate(dropping.members)]
    for one, expected in zip(engine.member_probabilities(images), by_hand, strict=True):
        np.testing.assert_allclose(one.numpy(), expected, atol=1e-6)
    np.testing.assert_allclose(engine(images).numpy(), (2 * by_hand[0] + by_hand[1]) / 3, atol=1e-6)


def test_members_of_equal_weights_draw_apart():
    ensemble = Ensemble([dropping_member(0), dropping_member(0)], mode="multiclass")
    first, second = Engine(ensemble, "cpu", "32", passes=2).member_probabilities(make_images(16, 16))
    assert not torch.equal(first, second)


def test_one_pass_is_the_deterministic_one(dropping):
    images = make_images(16, 16)
    assert torch.equal(Engine(dropping, "cpu", "32", passes=1)(images), Engine(dropping, "cpu", "32")(images))
    assert torch.equal(Engine(dropping, "cpu", "32", passes=1)(images), forward(Engine(dropping, "cpu", "32"), images))


@pytest.mark.parametrize("precision", ["32", "bf16-mixed"])
def test_passes_repeat_and_leave_state_and_members_alone(dropping, precision):
    images = make_images(13, 21)
    engine = Engine(dropping, "cpu", precision, passes=3)
    weights = {name: tensor.clone() for name, tensor in dropping.state_dict().items()}
    state = torch.get_rng_state()
    first = engine(images)
    torch.rand(5)
    assert torch.equal(engine(images), first)
    assert torch.equal(Engine(dropping, "cpu", precision, passes=3)(images), first)
    torch.set_rng_state(state)
    engine(images)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module.training for module in dropping.modules())
    assert all(torch.equal(tensor, weights[name]) for name, tensor in dropping.state_dict().items())


def test_an_error_in_a_pass_leaves_everything_as_it_was(dropping, monkeypatch):
    engine = Engine(dropping, "cpu", "32", passes=3)
    state = torch.get_rng_state()

    def broken(member, images):
        torch.rand(1)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(dropping, "probabilities_of", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        engine(make_images(8, 8))
    monkeypatch.undo()
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module.training for module in dropping.modules())
    assert not torch.is_inference_mode_enabled()
    engine(make_images(8, 8))


def test_a_deterministic_call_beside_a_stochastic_one_stays_deterministic(dropping):
    images = make_images(32, 32)
    plain, stochastic = Engine(dropping, "cpu", "32"), Engine(dropping, "cpu", "32", passes=40)
    expected, expected_mean = plain(images), stochastic(images)
    found = []
    threads = [threading.Thread(target=lambda: found.append(stochastic(images))) for _ in range(2)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert torch.equal(plain(images), expected)
    for thread in threads:
        thread.join()
    assert all(torch.equal(one, expected_mean) for one in found)


def test_another_number_of_passes_is_another_engine(dropping):
    images = make_images(16, 16)
    engine = Engine(dropping, "cpu", "32")
    assert engine.with_options(passes=1) is engine
    several = engine.with_options(passes=3)
    assert several.ensemble is engine.ensemble
    assert torch.equal(several(images), Engine(dropping, "cpu", "32", passes=3)(images))
    assert torch.equal(engine(images), several.with_options(passes=1)(images))


def test_passes_without_dropout_are_refused_by_name(engine):
    with pytest.raises(ConfigError, match=r"passes=4 needs dropout, but member 0 \(Unet\) holds none"):
        Engine(engine.ensemble, "cpu", passes=4)
    with pytest.raises(ConfigError, match="passes=4 needs dropout"):
        engine.with_options(passes=4)
