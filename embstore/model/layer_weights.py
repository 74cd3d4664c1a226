"""Stored weights made ready to compute with, one unit at a time: merged, cast, packed, and on the device.

A checkpoint stays as it was loaded, usually mapped from its files. What a unit computes with is a fresh copy, in the same
memory layout whichever order runs it, so rows have the same bits in both. The place of a unit that is not in memory holds
NaN of the right shape, dtype and device, which takes no memory: code that reads it by a way we do not know of spoils its
rows visibly.

Embedding tables are never copied on a CPU: only the rows of a batch's tokens are.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from embstore.host.allocator import give_back
from embstore.model.dtypes import compute_dtypes, fresh_buffers, set_config_dtype
from embstore.model.packed import expect_packed, expect_plain, packed_for_tokens
from embstore.model.units import Parts, Place, Unit

# The merged weight of an adapted module, given its weight in the dtype of the pass.
Merges = Mapping[nn.Module, Callable[[Tensor], Tensor]]

_SMALL_TABLE_BYTES = 1 << 20


class Weights:
    """The weights of a backbone under one dtype and device; ``settle`` chooses both."""

    def __init__(self, module: Any, parts: Parts, merges: Merges, device: torch.device) -> None:  # noqa: ANN401
        self._module, self._merges = module, merges
        self.parts, self.device = parts, device
        self.dtype = torch.float32
        self._packed: frozenset[nn.Module] = frozenset()
        # asked before anything is replaced: tied parameters are recognised by being one object
        self._rules = {dtype: _dtype_of_each(module, dtype) for dtype in (torch.float32, torch.bfloat16)}
        self._stored_buffers: dict[str, Tensor] = dict(module.named_buffers(remove_duplicate=False))
        self._stages = _Stages(device) if device.type == "cuda" else None

    @torch.inference_mode()
    def settle(self, dtype: torch.dtype, packed: Iterable[nn.Module] = (), *, tables_here: bool = False) -> None:
        """Compute in ``dtype`` from now on, with these linear layers packed; every unit is dropped.

        ``tables_here`` holds embedding tables on the device instead of looking rows up where they are mapped.
        """
        for layer in self._packed:
            expect_plain(layer)
        self.dtype, self._packed = dtype, frozenset(packed)
        if isinstance(self._module, transformers.PreTrainedModel):
            set_config_dtype(self._module.config, dtype)
        for layer in self._packed:
            expect_packed(layer)
        for unit in self.parts.units:
            self.drop(unit)
        give_back()  # another dtype makes blocks of other sizes, and those of before would stay
        for name, buffer in self._buffers(dtype).items():
            owner, own = _owner(self._module, name)
            owner._buffers[own] = buffer if buffer.device == self.device else buffer.to(self.device)
        self._make(self.parts.base)
        for place in self.parts.tables:
            self._settle_table(place, tables_here)
        if self._stages is not None:
            self._stages.ready()()

    def bytes_of(self, unit: Unit, dtype: torch.dtype | None = None) -> int:
        """Memory of a unit once it is made, under ``dtype`` (default: the settled one)."""
        return self._bytes(unit.places, dtype or self.dtype)

    def base_bytes(self, dtype: torch.dtype) -> int:
        """Memory of what always stays."""
        return self._bytes(self.parts.base, dtype)

    def _bytes(self, places: Iterable[Place], dtype: torch.dtype) -> int:
        distinct = {id(place.stored): place.stored.numel() for place in places}
        return sum(count * self._rules[dtype][stored].itemsize for stored, count in distinct.items())

    @torch.inference_mode()
    def make(self, unit: Unit) -> Callable[[], None]:
        """Put a unit's weights in their places. Call the result in the stream that uses them: the copy may still run."""
        self._make(unit.places)
        return self._stages.ready() if self._stages is not None else _nothing

    def drop(self, unit: Unit) -> None:
        """Free a unit's weights; NaN takes their places."""
        for place in unit.places:
            current = place.module._parameters[place.name]
            if self._stages is not None and current is not None and current.device == self.device:
                current.record_stream(torch.cuda.current_stream(self.device))
            self._put_nothing(place)

    # --- one parameter ----------------------------------------------------------------------------------------------

    def _make(self, places: Iterable[Place]) -> None:
        made: dict[object, nn.Parameter] = {}  # shared ones stay shared
        scratch = _Scratch()
        for place in places:
            is_packed, merge = self._is_packed(place), self._merge_of(place)
            key = (id(place.stored), is_packed, merge)
            if key not in made:
                tensor = self._packed_copy(place, merge, scratch) if is_packed else self._copy(place, merge)
                made[key] = nn.Parameter(tensor, requires_grad=False)
            place.module._parameters[place.name] = made[key]

    def _copy(self, place: Place, merge: Callable[[Tensor], Tensor] | None) -> Tensor:
        dtype = self._rules[self.dtype][id(place.stored)]
        if merge is not None:
            return merge(place.stored.to(dtype)).to(self.device)
        if self._stages is not None:
            return self._stages.copy(place.stored, dtype)
        # always a copy: a kernel depends on alignment, and a mapped tensor lies anywhere
        return place.stored.to(dtype) if dtype != place.stored.dtype else place.stored.clone()

    def _packed_copy(self, place: Place, merge: Callable[[Tensor], Tensor] | None, scratch: _Scratch) -> Tensor:
        dtype = self._rules[self.dtype][id(place.stored)]
        if merge is not None:
            return packed_for_tokens(merge(place.stored.to(dtype)))
        return packed_for_tokens(place.stored if dtype == place.stored.dtype else scratch.cast(place.stored, dtype))

    def _is_packed(self, place: Place) -> bool:
        return place.name == "weight" and place.module in self._packed

    def _merge_of(self, place: Place) -> Callable[[Tensor], Tensor] | None:
        return self._merges.get(place.module) if place.name == "weight" else None

    def _put_nothing(self, place: Place) -> None:
        nothing = _nan(place.stored.shape, self._rules[self.dtype][id(place.stored)], self.device)
        place.module._parameters[place.name] = nn.Parameter(nothing, requires_grad=False)

    def _buffers(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Buffers in the form that the class gives them for this dtype; persistent ones come from the file."""
        fresh, dtype_of = fresh_buffers(self._module, dtype), compute_dtypes(self._module, dtype)
        made: dict[int, Tensor] = {}  # shared ones stay shared
        for name, buffer in self._stored_buffers.items():
            if id(buffer) not in made:
                made[id(buffer)] = fresh[name] if name in fresh else buffer.to(dtype_of.get(name, buffer.dtype))
        return {name: made[id(buffer)] for name, buffer in self._stored_buffers.items()}

    # --- embedding tables -------------------------------------------------------------------------------------------

    def _settle_table(self, place: Place, here: bool) -> None:
        dtype = self._rules[self.dtype][id(place.stored)]
        is_small = place.stored.numel() * dtype.itemsize <= _SMALL_TABLE_BYTES
        if place.module in self._merges or is_small or (here and self.device.type != "cpu"):
            self._make([place])
        else:
            place.module._parameters[place.name] = _Table.over(place.stored, dtype, self.device)  # type: ignore[assignment]


class _Table(Tensor):
    """An embedding table under another dtype or device than the mapped one it reads: single rows are cast, on look-up."""

    _stored: Tensor

    @classmethod
    def over(cls, stored: Tensor, dtype: torch.dtype, device: torch.device) -> _Table:
        table: _Table = Tensor._make_subclass(cls, _nan(stored.shape, dtype, device), False)
        table._stored = stored
        return table

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        if func is nn.functional.embedding:
            tokens, table = args[0], args[1]
            with torch._C.DisableTorchFunctionSubclass():
                rows = nn.functional.embedding(tokens.to(table._stored.device), table._stored)
                return rows.to(device=tokens.device, dtype=table.dtype)
        return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]


class _Scratch:
    """Memory for one cast weight at a time, which goes back to the kernel at the end.

    A block of the allocator that is freed between two packed weights would be lost: glibc before 2.38 does not find it again
    for an aligned block of the same size, so the packed layers of a model took twice their memory.
    """

    def __init__(self) -> None:
        self._bytes: Tensor | None = None

    def cast(self, stored: Tensor, dtype: torch.dtype) -> Tensor:
        """The tensor in another dtype, until the next call."""
        num_bytes = max(1, stored.numel() * dtype.itemsize)
        if self._bytes is None or len(self._bytes) < num_bytes:
            self._bytes = torch.frombuffer(mmap.mmap(-1, num_bytes), dtype=torch.uint8)
        return self._bytes[: stored.numel() * dtype.itemsize].view(dtype).view(stored.shape).copy_(stored)


class _Stages:
    """Copies from mapped files to a GPU: through two pinned buffers in turn, on its own stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._buffers = [torch.empty(0, dtype=torch.uint8), torch.empty(0, dtype=torch.uint8)]
        self._free: list[torch.cuda.Event | None] = [None, None]
        self._turn = 0
        self._lock = threading.Lock()

    def copy(self, stored: Tensor, dtype: torch.dtype) -> Tensor:
        """The tensor on the device in ``dtype``; complete once ``ready`` was waited for."""
        with self._lock, torch.cuda.stream(self._stream):
            self._turn = 1 - self._turn
            free = self._free[self._turn]
            if free is not None:
                free.synchronize()  # the copy from this buffer before last
            num_bytes = stored.numel() * stored.element_size()
            if len(self._buffers[self._turn]) < num_bytes:
                self._buffers[self._turn] = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
            pinned = self._buffers[self._turn][:num_bytes].view(stored.dtype).view(stored.shape)
            pinned.copy_(stored)
            here = pinned.to(self._device, non_blocking=True)
            self._free[self._turn] = self._stream.record_event()
            return here.to(dtype)  # on the same stream, behind the copy

    def ready(self) -> Callable[[], None]:
        """What the stream that uses the copies made so far must wait for."""
        event = self._stream.record_event()
        return lambda: torch.cuda.current_stream(self._device).wait_event(event)


def _nan(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of NaN that takes the memory of one number."""
    return torch.full((), torch.nan, dtype=dtype, device=device).expand(shape)


def _dtype_of_each(module: nn.Module, dtype: torch.dtype) -> dict[int, torch.dtype]:
    """The dtype of each parameter by its identity."""
    found = compute_dtypes(module, dtype)
    return {id(each): found[name] for name, each in module.named_parameters() if name in found}


def _owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, own = name.rpartition(".")
    return module.get_submodule(path), own


def _nothing() -> None:
    """The weights are there already."""
