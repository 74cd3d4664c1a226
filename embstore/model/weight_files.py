"""Weight files: complete or refused by name, then mapped, not read.

A download that stopped, a Git LFS pointer in place of the weights and an archive that is cut off are found from the first
bytes and the length of a file, before any class is constructed.
"""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from embstore.core.decode import words_of
from embstore.core.errors import ModelError

_POINTER = b"version https://git-lfs.github.com"
_LENGTH_BYTES = 8  # a safetensors file begins with the length of its header, little endian
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_HINT = "download it again: hf download MODEL, or git lfs pull in its repository"


def check_files(paths: Sequence[Path]) -> None:
    """Refuse files that are not what their name says: Git LFS pointers, empty and cut-off files.

    Raises
    ------
    ModelError
        It names the file, its size, and the size that it should have where the file itself says so.
    """
    for path in paths:
        try:
            with path.open("rb") as file:
                first = file.read(max(len(_POINTER), _LENGTH_BYTES))
                size = path.stat().st_size
                if first.startswith(_POINTER):
                    raise ModelError(f"{path} is a Git LFS pointer of {size:,} bytes, not the file itself", hint=_HINT)
                if not first:
                    raise ModelError(f"{path} is empty", hint=_HINT)
                if path.suffix == ".safetensors":
                    _check_length(path, first, size)
        except OSError as error:
            raise ModelError(f"{path} cannot be read: {error.strerror}", hint=_HINT) from error


def _check_length(path: Path, first: bytes, size: int) -> None:
    header_bytes = int.from_bytes(first[:_LENGTH_BYTES], "little")
    if len(first) < _LENGTH_BYTES or header_bytes > _MAX_HEADER_BYTES:
        raise ModelError(f"{path} is not a safetensors file ({size:,} bytes)", hint=_HINT)
    needed = _LENGTH_BYTES + header_bytes
    if needed <= size:
        with path.open("rb") as file:
            file.seek(_LENGTH_BYTES)
            try:
                header = json.loads(file.read(header_bytes))
                needed += max(
                    (entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0
                )
            except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
                raise ModelError(f"{path} is not a safetensors file: its header cannot be read", hint=_HINT) from error
    if needed != size:
        cut = "cut off: it has" if size < needed else "too long: it has"
        raise ModelError(f"{path} is {cut} {size:,} bytes, its header describes {needed:,}", hint=_HINT)


def mapped_tensors(paths: Sequence[Path]) -> dict[str, Tensor]:
    """Every tensor of these files by its name, in the dtype of the file; pages are read when they are used.

    Archives of torch before 1.6 cannot be mapped and are read. Nothing is unpickled but tensors.

    Raises
    ------
    ModelError
        A file cannot be read, or contains more than tensors.
    """
    tensors: dict[str, Tensor] = {}
    for path in paths:
        try:
            if path.suffix == ".safetensors":
                with safe_open(path, framework="pt") as file:
                    tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
                continue
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except pickle.UnpicklingError as error:
            raise ModelError(
                f"{path} contains more than tensors, which could run code", hint="save the model with safetensors"
            ) from error
        except (SafetensorError, OSError, RuntimeError, ValueError, EOFError, KeyError) as error:
            raise ModelError(f"{path} cannot be read: {words_of(error)}", hint=_HINT) from error
        if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
            raise ModelError(f"{path} is not a dictionary of tensors", hint="save the model with safetensors")
        tensors |= state
    return tensors
