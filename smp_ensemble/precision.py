"""Which device computes, and in which number format: Lightning's words, resolved once for training and inference."""

from __future__ import annotations

import torch

from smp_ensemble.exceptions import ConfigError
from smp_ensemble.registry import nearest

_WORDS = {
    "32-true": "32-true",
    "32": "32-true",
    "bf16-mixed": "bf16-mixed",
    "bf16": "bf16-mixed",
    "16-mixed": "16-mixed",
    "16": "16-mixed",
}
_DTYPES = {"32-true": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
_CPU_BF16 = ("amx_bf16", "avx512_bf16", "bf16", "sve_bf16")


def _multiplies_bf16(device: torch.device) -> bool:
    """Whether the hardware multiplies bf16 itself; emulation would be slower than float32."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        return any(bool(capabilities.get(name)) for name in _CPU_BF16)
    return False


def resolve_precision(name: str, device: torch.device) -> str:
    """Turns a precision as users write it into one of Lightning's words.

    Args:
        name: `auto`, `32`, `32-true`, `bf16-mixed`, `16-mixed`, or Lightning's short forms `bf16` and `16`. `auto` is
            `bf16-mixed` where the hardware multiplies bf16, else `16-mixed` on CUDA and `32-true` elsewhere.
        device: Where the computation will run.

    Returns:
        `32-true`, `bf16-mixed` or `16-mixed`.

    Raises:
        ConfigError: The word is unknown, or the device cannot compute in it.

    Example:
        >>> resolve_precision("32", torch.device("cpu"))
        '32-true'
    """
    if name == "auto":
        if _multiplies_bf16(device):
            return "bf16-mixed"
        return "16-mixed" if device.type == "cuda" else "32-true"
    if name not in _WORDS:
        raise ConfigError(f"unknown precision '{name}': {nearest(name, ['auto', *_WORDS])}")
    word = _WORDS[name]
    if word == "16-mixed" and device.type == "cpu":
        raise ConfigError("precision '16-mixed' needs a GPU, came the CPU: use 'auto', 'bf16-mixed' or '32'")
    return word


def autocast_dtype(precision: str) -> torch.dtype | None:
    """The type that `torch.autocast` computes in under a resolved precision; None: no autocast.

    Args:
        precision: What `resolve_precision` returned, or another of Lightning's words; not `auto`.

    Raises:
        ConfigError: The word is unknown, or is `auto`, which only a device can resolve.

    Example:
        >>> autocast_dtype("bf16-mixed")
        torch.bfloat16
    """
    if precision == "auto":
        raise ConfigError("precision 'auto' has no type before a device is known: call resolve_precision first")
    if precision not in _WORDS:
        raise ConfigError(f"unknown precision '{precision}': {nearest(precision, _WORDS)}")
    return _DTYPES[_WORDS[precision]]


def choose_device(accelerator: str = "auto") -> torch.device:
    """The device that stands for an accelerator's name.

    Args:
        accelerator: `auto` (the best there is), `gpu` (CUDA or MPS), `cuda`, `cuda:N`, `mps` or `cpu`.

    Raises:
        ConfigError: The name is unknown, or this machine has no such device.

    Example:
        >>> choose_device("cpu")
        device(type='cpu')
    """
    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    mps = torch.backends.mps.is_available()
    best_gpu = "cuda" if gpus else "mps" if mps else None
    available = {"cpu": "cpu", "auto": best_gpu or "cpu", **{gpu: gpu for gpu in gpus}}
    if best_gpu is not None:
        available |= {"gpu": best_gpu, best_gpu: best_gpu}
    if mps:
        available["mps"] = "mps"
    if accelerator in available:
        return torch.device(available[accelerator])
    if accelerator in {"gpu", "cuda", "mps"} or accelerator.removeprefix("cuda:").isdigit():
        raise ConfigError(
            f"accelerator '{accelerator}' is not on this machine: choose one of {', '.join(sorted(available))}"
        )
    raise ConfigError(f"unknown accelerator '{accelerator}': {nearest(accelerator, available)}")
