"""Torch's settings that change the bits of a product, set for a while and put back.

Most of them belong to the process, so a training script that calls ``torch.set_float32_matmul_precision("medium")`` would
change every row of a store it builds. Others belong to the calling thread (autocast, inference mode, the default device);
threads that start later have torch's own. ``exact_arithmetic`` has them all.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

# Read and written as one: a setting of an operator that says "none" takes that of its backend, and this one the generic one.
_PRECISIONS = (
    ("generic", "all"),
    ("cuda", "all"),
    ("mkldnn", "all"),
    ("cuda", "matmul"),
    ("cuda", "conv"),
    ("cuda", "rnn"),
    ("mkldnn", "matmul"),
    ("mkldnn", "conv"),
    ("mkldnn", "rnn"),
)
# Sums of 16-bit products in 16 bits, which cuBLAS takes for some shapes; the exact search's bounds assume float32.
_REDUCTIONS = ("allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction")

_backends: Any = torch.backends  # its modules have properties that no stub knows
_Setting = tuple[Callable[[], Any], Callable[[Any], object], Any]  # read, write, and the value that is wanted
_lock = threading.Lock()
_inside: list[None] = []  # one for each thread that is in ``exact_arithmetic``
_undo = contextlib.ExitStack()  # how the first of them found the process


@contextlib.contextmanager
def exact_arithmetic() -> Iterator[None]:
    """Products in full precision, whatever the process or the calling thread has set; put back at the end, also on errors.

    Enter and leave it in one thread. Other threads of the process have the process-wide part of it meanwhile. Where several
    threads are in it, the last one to leave puts that part back.
    """
    with contextlib.ExitStack() as undo:
        undo.enter_context(full_precision())
        for kind in ("cpu", "cuda"):
            _set(undo, _called(torch.is_autocast_enabled, kind), _called(torch.set_autocast_enabled, kind), False)
        # a thread count is set later, by whoever computes, for this thread and for those that start after it
        undo.callback(torch.set_num_threads, torch.get_num_threads())
        undo.enter_context(torch.inference_mode(False))
        undo.enter_context(torch.no_grad())
        if torch.get_default_device() != torch.device("cpu"):
            undo.enter_context(torch.device("cpu"))
        yield


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """The process-wide part of ``exact_arithmetic``: sums and products in full float32 precision.

    A generator may hold it while it waits: nothing of the calling thread changes.
    """
    with _lock:
        _inside.append(None)
        try:
            if len(_inside) == 1:
                _quietly(_set_precision, _undo)
                for setting in _settings():
                    _set(_undo, *setting)
        except BaseException:
            _leave()
            raise
    try:
        yield
    finally:
        with _lock:
            _leave()


def _leave() -> None:
    _inside.pop()
    if not _inside:
        _undo.close()


def _set(undo: contextlib.ExitStack, read: Callable[[], Any], write: Callable[[Any], object], wanted: object) -> None:
    before = read()
    if before != wanted:
        undo.callback(write, before)
        write(wanted)


def _settings() -> Iterator[_Setting]:
    """Every setting of the process, besides the precision of float32 products."""
    yield torch.get_default_dtype, torch.set_default_dtype, torch.float32
    yield torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode, 0
    yield _attribute(_backends.mkldnn, "enabled", True)
    if hasattr(_backends.mkldnn, "deterministic"):
        yield _attribute(_backends.mkldnn, "deterministic", False)
    yield _attribute(_backends.cudnn, "enabled", True)
    yield _attribute(_backends.cudnn, "benchmark", False)
    yield _attribute(_backends.cudnn, "deterministic", False)
    yield _attribute(_backends.opt_einsum, "enabled", _backends.opt_einsum.is_available())
    cuda = _backends.cuda
    for name in _REDUCTIONS:
        yield _reduction(name)
    if hasattr(cuda.matmul, "allow_fp16_accumulation"):
        yield _attribute(cuda.matmul, "allow_fp16_accumulation", False)
    # attention: which kernels may be taken, on a CPU as well
    yield cuda.flash_sdp_enabled, cuda.enable_flash_sdp, True
    yield cuda.mem_efficient_sdp_enabled, cuda.enable_mem_efficient_sdp, True
    yield cuda.math_sdp_enabled, cuda.enable_math_sdp, True
    yield cuda.cudnn_sdp_enabled, cuda.enable_cudnn_sdp, True
    yield cuda.fp16_bf16_reduction_math_sdp_allowed, cuda.allow_fp16_bf16_reduction_math_sdp, False


def _called(function: Callable[..., Any], *first: object) -> Callable[..., Any]:
    return lambda *rest: function(*first, *rest)


def _attribute(module: Any, name: str, wanted: object) -> _Setting:  # noqa: ANN401 - torch's modules have properties
    return lambda: getattr(module, name), lambda value: setattr(module, name, value), wanted


def _reduction(name: str) -> _Setting:
    """Whether sums may be in 16 bits, with the second half that later versions of torch have."""
    matmul = _backends.cuda.matmul

    def read() -> object:
        split = getattr(matmul, f"{name}_split_k", None)
        return getattr(matmul, name) if split is None else (getattr(matmul, name), split)

    is_pair = isinstance(read(), tuple)
    return read, lambda value: setattr(matmul, name, value), (False, True) if is_pair else False


# --- the precision of float32 products: two interfaces to one state, of which torch refuses mixtures --------------------


def _set_precision(undo: contextlib.ExitStack) -> None:
    """Every float32 product in float32. All values are read before any is wanted: reading one may depend on others."""
    precisions = _take_precisions()
    matmul, cudnn = torch.get_float32_matmul_precision(), _allows_cudnn_tf32()
    onednn = getattr(_backends.mkldnn, "allow_tf32", None)  # gone, or None, where there are precisions

    def put_back() -> None:
        torch.set_float32_matmul_precision(matmul)
        _backends.cudnn.allow_tf32 = cudnn
        if onednn is not None:
            _backends.mkldnn.allow_tf32 = onednn
        for (backend, operator), value in precisions.items():
            torch._C._set_fp32_precision_setter(backend, operator, value)

    undo.callback(_quietly, put_back)
    torch.set_float32_matmul_precision("highest")
    _backends.cudnn.allow_tf32 = False
    if onednn is not None:
        _backends.mkldnn.allow_tf32 = False


def _quietly(change: Callable[..., None], *arguments: object) -> None:
    """Some versions of torch warn of the older interface, which is part of the state all the same."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        change(*arguments)


def _take_precisions() -> dict[tuple[str, str], str]:
    """The precision of each backend and operator (torch from 2.9 on), and none of them is set from here on.

    The public properties are not enough: mkldnn's sets the generic one (torch 2.13), and cudnn has none for rnn.
    """
    if not hasattr(torch._C, "_get_fp32_precision_getter"):
        return {}
    found = {}
    for backend, operator in _PRECISIONS:  # from the top down, so that what is read is not what was inherited
        found[backend, operator] = torch._C._get_fp32_precision_getter(backend, operator)
        torch._C._set_fp32_precision_setter(backend, operator, "none")
    return found


def _allows_cudnn_tf32() -> bool:
    """The older setting, behind the precisions that were taken away: torch refuses to read it if it is True then."""
    try:
        return bool(_backends.cudnn.allow_tf32)
    except RuntimeError:
        return True
