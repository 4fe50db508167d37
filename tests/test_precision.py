"""Precision words, autocast types and devices; hardware is simulated, so that the tests hold on any machine."""

from __future__ import annotations

import pytest
import torch

from smp_ensemble.exceptions import ConfigError
from smp_ensemble.precision import autocast_dtype, choose_device, resolve_precision

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch):
    """Pretends that there are two GPUs; returns a function that says whether they multiply bf16."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda.device, "__enter__", lambda _: None)
    monkeypatch.setattr(torch.cuda.device, "__exit__", lambda *_: False)

    def set_bf16(native: bool) -> None:
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native
        )

    return set_bf16


@pytest.mark.parametrize(
    ("name", "word"),
    [("32", "32-true"), ("32-true", "32-true"), ("bf16-mixed", "bf16-mixed"), ("bf16", "bf16-mixed")],
)
def test_words_resolve_to_lightnings(name: str, word: str) -> None:
    assert resolve_precision(name, CPU) == word


@pytest.mark.parametrize("feature", ["amx_bf16", "avx512_bf16", "bf16"])
def test_auto_is_bf16_where_the_cpu_multiplies_it(monkeypatch: pytest.MonkeyPatch, feature: str) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, feature: True}, raising=False)
    assert resolve_precision("auto", CPU) == "bf16-mixed"
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, feature: False})
    assert resolve_precision("auto", CPU) == "32-true"


def test_auto_is_float32_where_the_cpu_does_not_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert resolve_precision("auto", CPU) == "32-true"


def test_auto_on_a_gpu_does_not_count_emulation(gpu) -> None:
    gpu(native=True)
    assert resolve_precision("auto", CUDA) == "bf16-mixed"
    gpu(native=False)
    assert resolve_precision("auto", CUDA) == "16-mixed"
    assert resolve_precision("16", CUDA) == "16-mixed"


def test_auto_elsewhere_is_float32() -> None:
    assert resolve_precision("auto", torch.device("mps")) == "32-true"


def test_unknown_words_and_impossible_ones() -> None:
    with pytest.raises(ConfigError, match="unknown precision 'bf16-mix': did you mean 'bf16-mixed'"):
        resolve_precision("bf16-mix", CPU)
    with pytest.raises(ConfigError, match="needs a GPU, came the CPU"):
        resolve_precision("16-mixed", CPU)


def test_autocast_types() -> None:
    assert autocast_dtype("32-true") is None
    assert autocast_dtype("bf16-mixed") is torch.bfloat16
    assert autocast_dtype("16-mixed") is torch.float16
    with pytest.raises(ConfigError, match="call resolve_precision first"):
        autocast_dtype("auto")
    with pytest.raises(ConfigError, match=r"unknown precision '8'.* Known: "):
        autocast_dtype("8")


@pytest.mark.parametrize(
    ("accelerator", "device"),
    [("auto", "cuda"), ("gpu", "cuda"), ("cuda", "cuda"), ("cuda:1", "cuda:1"), ("cpu", "cpu")],
)
def test_devices_with_gpus(gpu, accelerator: str, device: str) -> None:
    gpu(native=True)
    assert choose_device(accelerator) == torch.device(device)


def test_devices_on_a_mac(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    for accelerator in ("auto", "gpu", "mps"):
        assert choose_device(accelerator) == torch.device("mps")


def test_devices_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert choose_device() == CPU
    for accelerator in ("gpu", "cuda", "cuda:3", "mps"):
        with pytest.raises(ConfigError, match=f"'{accelerator}' is not on this machine: choose one of auto, cpu"):
            choose_device(accelerator)
    with pytest.raises(ConfigError, match="unknown accelerator 'cpus': did you mean 'cpu'"):
        choose_device("cpus")
