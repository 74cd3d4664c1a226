"""Properties of a device: which dtypes it computes fast, and which kernels it chooses."""

from __future__ import annotations

import torch


def capability_of(device: torch.device) -> str:
    """The hardware properties that determine rounding on this device; see ``core.spec.EmbeddingSpec``."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"{torch.cuda.get_device_name(device)} sm_{major}{minor}"
    if device.type == "cpu":
        return str(torch.backends.cpu.get_cpu_capability())
    return device.type


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether the hardware computes bfloat16 itself; emulated, it is several times slower than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return False


def give_back_device() -> None:
    """Return this process's free CUDA memory to the device, for other processes."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
