"""The device that computes: which one, what it computes fast, and what decides its bits. CUDA or the CPU."""

from __future__ import annotations

import importlib

import torch

from embstore.core.config import refuse_device_name
from embstore.core.errors import ConfigError
from embstore.core.spec import Versions


def resolve_device(device: str) -> torch.device:
    """The device of this name, a GPU with its index; ``auto`` is CUDA where there is a GPU, else the CPU.

    ``cuda`` without an index is the calling thread's current device. It is resolved once, because other threads have
    another one: new threads begin with GPU 0.

    Raises
    ------
    ConfigError
        The name is not that of a device, this machine does not have it, or embstore does not compute on it.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    refuse_device_name(device)
    kind, has_index, number = device.partition(":")
    if kind == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = int(number) if has_index else torch.cuda.current_device() if count else 0
    if index >= count:
        seen = f"torch sees {count} CUDA device{'' if count == 1 else 's'} here"
        last = f", or cuda:0 to cuda:{count - 1}" if count else ""
        raise ConfigError(f"device {device!r} is not available: {seen}", hint=f"use --device auto or cpu{last}")
    return torch.device("cuda", index)


def library_versions(*, transformers: str | None = None, tokenizers: str | None = None) -> Versions:
    """Versions of embstore and torch, with torch's build (``+cu128``), and of what else makes rows."""
    own = importlib.import_module("embstore").__version__  # by name: the package's root knows every layer
    return Versions(embstore=own, torch=str(torch.__version__), transformers=transformers, tokenizers=tokenizers)


def capability_of(device: torch.device) -> str:
    """What decides a kernel's bits on this device: the GPU's model, or the CPU's vector instructions."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"{torch.cuda.get_device_name(device)} sm_{major}{minor}"
    return str(torch.backends.cpu.get_cpu_capability())


def free_device_bytes(device: torch.device) -> int | None:
    """Memory of a GPU that nobody has taken, this process's unused share included; None for a CPU."""
    if device.type != "cuda":
        return None
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + unused


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether the hardware computes bfloat16 itself; emulated, it is several times slower than float32."""
    if device.type == "cuda":
        with torch.cuda.device(device):  # torch asks the current one
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return _cpu_has_bfloat16()


def _cpu_has_bfloat16() -> bool:
    if hasattr(torch.cpu, "get_capabilities"):
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    # torch before 2.11 only has private functions; every processor with AMX tiles multiplies bfloat16 in them
    asked = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in asked)


def give_back_device() -> None:
    """Return this process's free CUDA memory to the device, for other processes."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
