"""What a training run imports: map the weights of a finished store, validate them fully, draw prompts. numpy only.

Import cost is numpy's; mapping and validating a million weights takes milliseconds, so nothing is left unchecked by default.
The map is read-only and shared through the page cache by every rank on a node.

    weights = load_weights("STORE", expect_len=len(dataset))
    loader = DataLoader(dataset, batch_size=32, sampler=DensitySampler(weights, seed=0))

Shapes: N rows.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import stat
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from embstore.core.decode import HEADER_BYTES, decode_array_header
from embstore.core.density import effective_sample_size
from embstore.core.errors import (
    ConfigError,
    CorruptStoreError,
    IncompleteStoreError,
    InvalidWeightsError,
    KeyMismatchError,
    LengthMismatchError,
    StoreNotFoundError,
    WeightsError,
)
from embstore.core.format import (
    DOCUMENT_BYTES,
    JOURNAL,
    KEYS,
    MANIFEST,
    WEIGHTS_TOLERANCE,
    FileDigest,
    Manifest,
    follow_manifest,
    parse_document,
    weights_paths,
)

Verify = Literal["full", "shape", "off"]

_READ_BYTES = 8 << 20
_STATE_VERSION = 1
_METHOD = "systematic-1"  # names the drawing algorithm; another order needs another name


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Sampling weights of one store.

    ``array`` is a read-only memory map, float32 [N], finite, >= 0, sum 1 (or what ``verify`` let through). Pickles by path,
    so a spawned worker maps the file instead of receiving it.
    """

    path: Path
    array: NDArray[np.float32]
    fingerprint: str
    metadata: Mapping[str, object]

    def __len__(self) -> int:
        return len(self.array)

    def ess(self) -> float:
        """Kish's effective sample size, in rows."""
        return effective_sample_size(self.array)

    def __reduce__(self) -> tuple[object, ...]:
        return _reopen, (self.path, self.fingerprint, dict(self.metadata))


def load_weights(
    path: str | Path,
    *,
    name: str = "default",
    expect_len: int | None = None,
    expect_keys: ArrayLike | None = None,
    verify: Verify = "full",
) -> Weights:
    """Map the weights of a finished store, or of a bare ``.npy`` file.

    Parameters
    ----------
    path
        A store's folder (the manifest is followed), or a ``.npy`` of weights (no provenance: a warning says so).
    name
        Which weighting of the store.
    expect_len
        Length of the dataset these weights are for.
    expect_keys
        uint64 [N] row keys in dataset order; they must equal the store's ``keys.npy``.
    verify
        "full" checks digests, dtype, finiteness, sign and sum; "shape" only dtype and length; "off" nothing.

    Returns
    -------
    Weights

    Raises
    ------
    StoreNotFoundError, IncompleteStoreError
        Nothing is there, or the store is not finished.
    CorruptStoreError
        The bytes are not those that were published.
    LengthMismatchError, KeyMismatchError, InvalidWeightsError
        The weights do not fit the dataset, or are no weights.
    """
    root = Path(path)
    if root.is_dir():
        return follow_manifest(
            lambda: _read_manifest(root),
            lambda manifest: _load(root, manifest, name, expect_len=expect_len, expect_keys=expect_keys, verify=verify),
        )
    if not root.is_file():
        raise StoreNotFoundError(f"{root} does not exist", hint="run embstore build PROMPTS --model MODEL --out STORE")
    warnings.warn(f"{root} is a bare file: no manifest says what it belongs to", stacklevel=2)
    array = _map(root)
    if verify != "off":
        _check(root, array, None, rows=None, full=verify == "full")
    _check_len(root, array, expect_len)
    if expect_keys is not None:
        raise ConfigError(f"{root} is a bare file and has no keys", hint="pass the store's folder")
    return Weights(path=root, array=array, fingerprint=_sha256(array), metadata={})


def _load(
    root: Path,
    manifest: Manifest,
    name: str,
    *,
    expect_len: int | None,
    expect_keys: ArrayLike | None,
    verify: Verify,
) -> Weights:
    """The weights called ``name`` as ``manifest`` publishes them."""
    if name not in manifest.names:
        raise ConfigError(f"no weights are called {name!r}; there are {', '.join(sorted(manifest.names))}")
    array_name, sidecar = weights_paths(manifest.names[name])
    file, digest = root / array_name, manifest.files[array_name]
    metadata = _read_metadata(root, sidecar, manifest)
    _refuse_irregular(root, array_name)
    array = _map(file)
    if verify != "off":
        _check(file, array, digest, rows=manifest.rows, full=verify == "full")
    _check_len(root, array, expect_len)
    if expect_keys is not None:
        _check_keys(root, np.asarray(expect_keys, dtype=np.uint64), manifest, full=verify == "full")
    return Weights(path=file, array=array, fingerprint=digest.sha256, metadata=metadata)


class DensitySampler:
    """Draws dataset indices in proportion to their weights; a sampler for any loader that takes an iterable with a length.

    Each pass is a systematic resample (Kitagawa 1996): an index is drawn floor or ceil of ``num_samples * weight`` times,
    then the pass is shuffled. Quotas therefore hold within one in every pass, where independent draws would never see a
    third of the rows. The order is a pure function of (weights, num_samples, seed, epoch), from raw Philox words, which
    numpy promises not to change. Rank-agnostic: trainers that shard by themselves (TRL, accelerate, verl) get the same
    sequence on every rank.

    Parameters
    ----------
    weights
        ``Weights``, or any non-negative vector with a positive sum.
    num_samples
        Draws per pass; default one per row.
    seed
        0 <= seed < 2**64.

    Raises
    ------
    InvalidWeightsError
        The vector is empty, not finite, negative somewhere, or sums to 0.
    """

    def __init__(self, weights: Weights | ArrayLike, *, num_samples: int | None = None, seed: int = 0) -> None:
        array = weights.array if isinstance(weights, Weights) else np.asarray(weights)
        _check_vector("weights", array)
        self._fingerprint = weights.fingerprint if isinstance(weights, Weights) else _sha256(array)
        if not 0 <= seed < 1 << 64:
            raise ConfigError(f"seed must lie in 0..2**64 - 1, got {seed}")
        if num_samples is not None and num_samples < 1:
            raise ConfigError(f"num_samples must be at least 1, got {num_samples}")
        self._weights_N = array
        self._num_samples = len(array) if num_samples is None else num_samples
        self._seed = seed
        self._epoch = 0
        self._position = 0

    def __len__(self) -> int:
        return self._num_samples

    @property
    def num_rows(self) -> int:
        """Length of the dataset that is drawn from."""
        return len(self._weights_N)

    def seek(self, position: int) -> None:
        """Go to a draw of the current pass, 0 <= position < num_samples."""
        if not 0 <= position < self._num_samples:
            raise ConfigError(f"a pass has draws 0 to {self._num_samples - 1}, not {position}")
        self._position = position

    def set_epoch(self, epoch: int) -> None:
        """Choose the pass; a new epoch starts at its beginning."""
        if epoch != self._epoch:
            self._epoch, self._position = epoch, 0

    def plan(self, epoch: int) -> NDArray[np.int64]:
        """All indices of one pass, in order, int64 [num_samples]."""
        stream = np.random.Philox(key=np.array([self._seed, epoch], dtype=np.uint64))
        offset, *_ = stream.random_raw(1)
        # one uniform offset, then evenly spaced points through the cumulative weights
        cumulative_N = np.cumsum(self._weights_N, dtype=np.float64)
        points = (np.arange(self._num_samples) + float(offset >> np.uint64(11)) * 2.0**-53) / self._num_samples
        drawn = np.searchsorted(cumulative_N, points * cumulative_N[-1], side="right")
        # rounding at the very end must not fall off, nor onto a row of weight 0
        drawn = np.minimum(drawn, int(np.flatnonzero(self._weights_N)[-1])).astype(np.int64)
        shuffled: NDArray[np.int64] = drawn[np.argsort(stream.random_raw(self._num_samples), kind="stable")]
        return shuffled

    def __iter__(self) -> Iterator[int]:
        order = self.plan(self._epoch)
        for position in range(self._position, len(order)):
            # the state names the next draw, also while the consumer holds this one
            self._position = position + 1
            if self._position == len(order):
                self._epoch, self._position = self._epoch + 1, 0
            yield int(order[position])

    def state_dict(self) -> dict[str, object]:
        """Where the next draw is; plain values, safe to save anywhere."""
        return {
            "version": _STATE_VERSION,
            "method": _METHOD,
            "seed": self._seed,
            "epoch": self._epoch,
            "position": self._position,
            "num_samples": self._num_samples,
            "fingerprint": self._fingerprint,
        }

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Continue exactly where ``state_dict`` was taken.

        Raises
        ------
        WeightsError
            The state is of other weights, another method, seed or length.
        """
        own = self.state_dict()
        for field in ("version", "method", "seed", "num_samples", "fingerprint"):
            if state.get(field) != own[field]:
                raise WeightsError(
                    f"sampler state differs in {field}: saved {state.get(field)!r}, here {own[field]!r}",
                    hint="make the sampler from the same store and settings as the saved run",
                )
        self._epoch, self._position = int(str(state["epoch"])), int(str(state["position"]))


class GroupRepeat:
    """The order in which TRL's trainers take prompts: in batches, each index of a batch ``group_size`` times in a row.

    Each batch comes ``repeat_count`` times; draws that do not fill a last batch are left out.

    Parameters
    ----------
    sampler
        Draws every prompt once for its group.
    group_size
        Completions of a prompt.
    prompts_per_batch
        Prompts for which completions are generated at a time.
    repeat_count
        How often a generated batch is used.
    """

    def __init__(
        self, sampler: DensitySampler, *, group_size: int, prompts_per_batch: int = 1, repeat_count: int = 1
    ) -> None:
        if min(group_size, prompts_per_batch, repeat_count) < 1:
            raise ConfigError(
                f"group_size {group_size}, prompts_per_batch {prompts_per_batch} and repeat_count {repeat_count} must be "
                "at least 1"
            )
        self._sampler = sampler
        self._group_size = group_size
        self._prompts_per_batch = prompts_per_batch
        self._repeat_count = repeat_count

    def __len__(self) -> int:
        prompts = len(self._sampler) // self._prompts_per_batch * self._prompts_per_batch
        return prompts * self._group_size * self._repeat_count

    def set_epoch(self, epoch: int) -> None:
        """Choose the pass; a new epoch starts at its beginning."""
        self._sampler.set_epoch(epoch)

    def __iter__(self) -> Iterator[int]:
        batch: list[int] = []
        for drawn in self._sampler:
            batch.append(drawn)
            if len(batch) == self._prompts_per_batch:
                for _ in range(self._repeat_count):
                    for index in batch:
                        yield from itertools.repeat(index, self._group_size)
                batch = []


def _read_manifest(root: Path) -> bytes:
    try:
        _refuse_irregular(root, MANIFEST)
        return _read(root / MANIFEST)
    except FileNotFoundError:
        if (root / JOURNAL).exists():
            raise IncompleteStoreError(
                f"{root} is not finished: no weights are published", hint=f"run embstore build --resume --out {root}"
            ) from None
        raise StoreNotFoundError(
            f"{root} holds no store", hint="run embstore build PROMPTS --model MODEL --out STORE"
        ) from None
    except OSError as error:
        raise _unreadable(root / MANIFEST, error) from error


def _read_metadata(root: Path, sidecar: str, manifest: Manifest) -> Mapping[str, object]:
    _refuse_irregular(root, sidecar)
    try:
        content = _read(root / sidecar)
    except OSError as error:
        raise _unreadable(root / sidecar, error) from error
    if hashlib.sha256(content).hexdigest() != manifest.files[sidecar].sha256:
        raise CorruptStoreError(f"{root / sidecar} is not what was published", hint=f"run embstore verify {root}")
    return parse_document(content, name=sidecar)


def _refuse_irregular(root: Path, name: str) -> None:
    """A store may be anybody's: a link could lead anywhere, and a FIFO or device in place of a file never ends."""
    file = root / name
    is_linked = file.parent != root and file.parent.is_symlink()
    if is_linked or (os.path.lexists(file) and not stat.S_ISREG(file.lstat().st_mode)):
        raise CorruptStoreError(
            f"{file} is a link or no regular file; a store holds its files and folders itself",
            hint=f"run embstore verify {root}",
        )


def _read(path: Path) -> bytes:
    with path.open("rb") as file:
        content = file.read(DOCUMENT_BYTES + 1)
    if len(content) > DOCUMENT_BYTES:
        raise CorruptStoreError(f"{path} has more than {DOCUMENT_BYTES} bytes", hint="is this a store?")
    return content


def _unreadable(path: Path, error: OSError) -> CorruptStoreError:
    return CorruptStoreError(f"{path} cannot be read ({error.strerror})", hint="run embstore verify STORE")


def _map(file: Path) -> NDArray[np.float32]:
    """Read-only memory map of a plain ``.npy`` array; its header is compared with the file's size, nothing is unpickled."""
    try:
        with file.open("rb") as opened:
            size, start = os.fstat(opened.fileno()).st_size, opened.read(HEADER_BYTES)
        header = decode_array_header(start, name=str(file))
        dtype = np.dtype(header.descr)
        if (needed := header.offset + dtype.itemsize * math.prod(header.shape)) > size:
            raise ValueError(f"it has {size} bytes, its header asks for {needed}")
        order: Literal["F", "C"] = "F" if header.is_fortran else "C"
        return np.memmap(file, dtype=dtype, mode="r", offset=header.offset, shape=header.shape, order=order)
    except (OSError, ValueError, OverflowError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise CorruptStoreError(f"{file} cannot be mapped ({reason})", hint="run embstore verify STORE") from error


def _check(file: Path, array: NDArray[np.float32], digest: FileDigest | None, *, rows: int | None, full: bool) -> None:
    if array.ndim != 1 or array.dtype != np.float32:
        raise InvalidWeightsError(f"{file} holds {array.dtype} of shape {array.shape}, not float32 of one dimension")
    if rows is not None and len(array) != rows:
        raise CorruptStoreError(
            f"{file} has {len(array)} weights, the manifest says {rows}", hint="run embstore verify STORE"
        )
    if not full:
        return
    if digest is not None:
        _check_digest(file, digest)
    total = _check_vector(str(file), array)
    if abs(total - 1) > WEIGHTS_TOLERANCE:
        raise InvalidWeightsError(f"{file} sums to {total!r}, not 1")


def _check_digest(file: Path, digest: FileDigest) -> None:
    total = hashlib.sha256()
    try:
        with file.open("rb") as opened:
            if (size := os.fstat(opened.fileno()).st_size) != digest.bytes:
                raise CorruptStoreError(
                    f"{file} has {size} bytes, published were {digest.bytes}", hint="run embstore verify STORE"
                )
            while block := opened.read(_READ_BYTES):
                total.update(block)
    except OSError as error:
        raise _unreadable(file, error) from error
    if (found := total.hexdigest()) != digest.sha256:
        raise CorruptStoreError(
            f"{file} has sha256 {found[:16]}, published was {digest.sha256[:16]}", hint="run embstore verify STORE"
        )


def _check_vector(name: str, array: NDArray[np.floating]) -> float:
    """Refuse what cannot be sampled from; returns the float64 sum."""
    if array.ndim != 1 or not len(array):
        raise InvalidWeightsError(f"{name}: weights must be a non-empty vector, got shape {array.shape}")
    with np.errstate(invalid="ignore"):
        is_sound = array.min() >= 0 and np.isfinite(array.max())  # NaN is never >= 0; no copy is made
    if not is_sound:
        bad = np.flatnonzero(~(np.isfinite(array) & (array >= 0)))
        raise InvalidWeightsError(f"{name}: weight {int(bad[0])} is {array[bad[0]]}, not finite and >= 0")
    total = float(array.sum(dtype=np.float64))
    if total <= 0:
        raise InvalidWeightsError(f"{name}: the weights sum to {total}")
    return total


def _check_len(root: Path, array: NDArray[np.float32], expected: int | None) -> None:
    if expected is not None and expected != len(array):
        raise LengthMismatchError(
            f"{root} has {len(array)} weights, the dataset has {expected} items",
            hint="weights are per distinct prompt: expand by line_rows.npy, or join by keys.npy",
        )


def _check_keys(root: Path, given_N: NDArray[np.uint64], manifest: Manifest, *, full: bool) -> None:
    _refuse_irregular(root, KEYS)
    stored_N = _map(root / KEYS)
    if stored_N.ndim != 1 or stored_N.dtype != np.uint64:
        raise CorruptStoreError(
            f"{root / KEYS} holds {stored_N.dtype} of shape {stored_N.shape}, not uint64 of one dimension"
        )
    if full:
        _check_digest(root / KEYS, manifest.files[KEYS])
    if len(given_N) != len(stored_N):
        raise LengthMismatchError(f"{root} has {len(stored_N)} rows, expect_keys has {len(given_N)}")
    different = np.flatnonzero(stored_N != given_N)
    if len(different):
        first = int(different[0])
        same_set = np.array_equal(np.sort(stored_N), np.sort(given_N))
        reason = "the same prompts in another order" if same_set else "other prompts"
        raise KeyMismatchError(
            f"{root}: {reason}; first at position {first}: the store has key {int(stored_N[first]):016x}, "
            f"given {int(given_N[first]):016x}",
            hint="reorder the dataset, or look weights up by keys.npy",
        )


def _sha256(array: NDArray[np.generic]) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()


def _reopen(path: Path, fingerprint: str, metadata: Mapping[str, object]) -> Weights:
    return Weights(path=path, array=_map(path), fingerprint=fingerprint, metadata=metadata)
