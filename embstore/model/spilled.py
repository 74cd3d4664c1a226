"""Tensors that are computed while a model is loaded, kept in scratch files: their pages are not anonymous memory.

Experts that a class has fused, and weights that were stored in 8 or 4 bits, exist in no file as the class wants them. Each
is written once and mapped, so a model takes no more anonymous memory than its largest tensor while it is loaded.
"""

from __future__ import annotations

import contextlib
import importlib
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from embstore.core.config import format_bytes
from embstore.core.errors import StorageError
from embstore.host.allocator import give_back

_SMALL_BYTES = 1 << 20  # smaller ones stay in memory
_LOADING = threading.Lock()


def spilled(tensor: Tensor, scratch: Path | None) -> Tensor:
    """The same values in a mapped file under ``scratch`` (by default the system's folder for temporary files).

    The file has no name any more when this returns; its blocks are free when the tensor is.

    Raises
    ------
    StorageError
        The disk is full, or fails.
    """
    size = tensor.numel() * tensor.element_size()
    if size <= _SMALL_BYTES:
        return tensor
    try:
        # written, not mapped for writing: a full disk is an error, not a signal
        with tempfile.NamedTemporaryFile(prefix="embstore-weights-", dir=scratch) as file:
            tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tofile(file)
            file.flush()
            mapped = torch.from_file(file.name, shared=False, size=tensor.numel(), dtype=tensor.dtype)
    except OSError as error:
        where = scratch or tempfile.gettempdir()
        failure = StorageError(
            f"writing {format_bytes(size)} of converted weights to {where} failed: {error.strerror or error}",
            hint="free some space there, or set TMPDIR to a folder with more",
        )
        failure.errno = error.errno
        raise failure from error
    return mapped.view(tensor.shape)


@contextlib.contextmanager
def conversions_spilled(sources: dict[str, Tensor], scratch: Path | None) -> Iterator[None]:
    """While a model is loaded in this thread, what transformers converts goes to scratch files; ``sources`` are mapped.

    transformers 4 converts nothing.
    """
    try:
        converter: Any = importlib.import_module("transformers.core_model_loading").WeightConverter
    except ImportError:
        yield
        return
    mapped = {tensor.untyped_storage().data_ptr() for tensor in sources.values()}
    owner = threading.get_ident()

    def kept(tensor: Tensor) -> Tensor:
        is_view = tensor.untyped_storage().data_ptr() in mapped
        return tensor if is_view else spilled(tensor, scratch)

    def convert(self: Any, *args: Any, **options: Any) -> Any:  # noqa: ANN401 - as the method it stands for
        found = original(self, *args, **options)
        if threading.get_ident() != owner:
            return found
        kept_found = {
            name: [kept(each) for each in value] if isinstance(value, list) else kept(value) for name, value in found.items()
        }
        del found
        give_back()  # glibc does not reuse the blocks of aligned allocations, and every converted tensor is one
        return kept_found

    with _LOADING:
        original = converter.convert
        converter.convert = convert
        try:
            yield
        finally:
            converter.convert = original
