"""Weights of a finished store: mapped read-only, fully validated, joined to a dataset, tempered. numpy only.

Shapes: N rows, M items of a dataset.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from embstore.core.config import CURRENT_RULE, PromptRule
from embstore.core.errors import (
    ConfigError,
    CorruptStoreError,
    InvalidWeightsError,
    KeyMismatchError,
    LengthMismatchError,
    OrderMismatchError,
    StoreNotFoundError,
)
from embstore.core.files import check_array, map_array, map_file, storage_errors
from embstore.core.format import (
    KEYS,
    WEIGHTS,
    WEIGHTS_TOLERANCE,
    Manifest,
    decode_manifest,
    follow_manifest,
    weights_paths,
)
from embstore.training.published import read_aliases, read_keys, read_manifest, read_metadata

if TYPE_CHECKING:
    from embstore.training.join import Duplicates, Join, OnMissing
    from embstore.training.reading import PromptReading

Verify = Literal["full", "shape", "off"]

_FILE_OF_STORE = re.compile(rf"{WEIGHTS}/([0-9a-f]{{16}})\.npy")


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Sampling weights, of a store's rows or (after ``align``) of a dataset's items.

    ``array`` is float32 [N], finite, >= 0, with sum 1 (less is checked if ``verify`` was not "full"). As loaded it is a
    read-only memory map and is pickled as its path, so that a spawned worker maps the file again. ``store`` is the folder to
    join with, None for a bare file and after a join. ``steps`` lists what was done to the published weights, in order.
    ``order_checked``: the dataset's keys were compared with the store's (``expect_keys``). Paths are absolute, so that they
    hold in another working folder, too.
    """

    path: Path
    array: NDArray[np.float32]
    metadata: Mapping[str, object]
    store: Path | None = None
    steps: tuple[str, ...] = ()
    digest: str | None = None
    order_checked: bool = False

    def __post_init__(self) -> None:
        for name in ("path", "store"):
            if (path := getattr(self, name)) is not None:
                object.__setattr__(self, name, Path(path).absolute())

    def __len__(self) -> int:
        return len(self.array)

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 of the published file; for a bare file or derived weights, of the values, which are then read once."""
        return self.digest or sha256_of(self.array)

    @property
    def weighting(self) -> str | None:
        """Digest that names the weighting in its store, also after a join; None for weights that no store names.

        ``load_weights(STORE, name="default@DIGEST")`` maps it as long as the store keeps it.
        """
        named = _FILE_OF_STORE.fullmatch("/".join(self.path.parts[-2:]))
        return named[1] if named else None

    def ess(self) -> float:
        """Kish's effective sample size, in rows."""
        from embstore.core.diagnostics import effective_sample_size  # noqa: PLC0415

        return effective_sample_size(self.array)

    def align(
        self, keys: ArrayLike | Sequence[str], *, on_missing: OnMissing = "error", duplicates: Duplicates = "repeat"
    ) -> Weights:
        """The same weights in the order of a dataset.

        Parameters
        ----------
        keys
            uint64 [M] row keys of the items (``prompt_keys`` makes them), or their ids as text.
        on_missing
            Weight of an item that is not in the store: "error" refuses it, "drop" gives 0, "mean" the mean weight of the
            other items, a number that multiple of the mean.
        duplicates
            Items that are the same row (pairs of one prompt): "repeat" gives each the row's weight, "divide" an equal share,
            so that the prompt as a whole keeps its weight.

        Returns
        -------
        Weights float32 [M] of sum 1; rows of the store without an item are ignored.

        Raises
        ------
        KeyMismatchError
            Items are not in the store and ``on_missing`` is "error", or no item has a weight above 0.
        ConfigError
            These weights come from a bare file, or are joined already.
        """
        from embstore.training.join import is_ids, join_ids, join_keys  # noqa: PLC0415 - a third of the import cost

        root = self._joinable()
        manifest = self._manifest(root)
        if is_ids(keys):
            names = [str(name) for name in np.asarray(keys, dtype=object)]
            join = join_ids(read_aliases(root, manifest), names)
        else:
            keys_M = (
                np.asarray(keys).astype(np.uint64) if isinstance(keys, np.ndarray) else np.asarray(keys, dtype=np.uint64)
            )
            join = join_keys(read_keys(root, manifest, full=True), keys_M)
        return self._joined(join, on_missing, duplicates)

    def for_dataset(
        self,
        dataset: Iterable[Any],
        *,
        key_column: str | None = None,
        id_column: str | None = None,
        on_missing: OnMissing = "error",
        duplicates: Duplicates = "repeat",
    ) -> Weights:
        """The same weights in the order of a dataset, joined by content or by id; see ``docs/prompts.md``.

        Parameters
        ----------
        dataset
            A Hugging Face dataset (one split), a table of pandas, polars or pyarrow, or anything with items: records, texts,
            or lists of messages. Rows found for a ``datasets.Dataset`` are kept in the user's cache folder.
        key_column
            The column with the prompt. None looks for those that the build read, then for the usual ones.
        id_column
            Join by the ids in this column instead: any id of the prompts file or of ``ids.json``.
        on_missing, duplicates
            See ``align``. An item without a prompt counts as missing.

        Returns
        -------
        Weights float32 [M] of sum 1. A warning says if chats were cut before their answer as in the build, or if items were
        found in another form: chats of one user turn in a store of plain texts, or texts in a store of such chats.

        Raises
        ------
        KeyMismatchError
            See ``align``. The message shows the first missing item and counts the others by cause.
        ConfigError
            See ``align``; or there is no such column, or this is not a dataset.
        """
        from embstore.training.join import join_dataset, join_ids, read_ids  # noqa: PLC0415
        from embstore.training.join_cache import kept_join  # noqa: PLC0415

        root = self._joinable()
        manifest = self._manifest(root)
        if id_column is not None and key_column is not None:
            raise ConfigError(f"join by content ({key_column}) or by id ({id_column}), not both", hint="name one column")
        if id_column is not None:
            join = join_ids(read_aliases(root, manifest), read_ids(dataset, id_column))
            return self._joined(join, on_missing, duplicates)
        reading = self.reading(key_column)
        join = kept_join(
            dataset,
            reading,
            keys=manifest.files[KEYS].sha256,
            num_rows=manifest.rows,
            explains=on_missing == "error",
            compute=lambda: join_dataset(read_keys(root, manifest, full=True), dataset, reading),
        )
        return self._joined(join, on_missing, duplicates, rule=manifest.rule)

    def temper(self, alpha: float = 1.0, *, uniform_mix: float = 0.0, clip: tuple[float, float] | None = None) -> Weights:
        """Flatter or bounded weights. Rows of weight 0 stay at 0; the uniform part is spread over all others.

        Parameters
        ----------
        alpha
            Exponent: 1 changes nothing, 0 makes the weights equal.
        uniform_mix
            Share of the probability that is spread evenly, 0 to 1; applied last.
        clip
            Lowest and highest weight after the exponent, in units of the mean weight.
        """
        low, high = clip or (0.0, np.inf)
        if not 0 <= alpha <= 1024 or not 0 <= uniform_mix <= 1 or not 0 <= low <= high or not high > 0:
            raise ConfigError(
                f"temper needs 0 <= alpha <= 1024, 0 <= uniform_mix <= 1 and 0 <= low <= high > 0, "
                f"got {alpha}, {uniform_mix}, {clip}"
            )
        drawn_N = self.array > 0
        value_N = np.where(drawn_N, self.array.astype(np.float64), 0.0)
        value_N[drawn_N] = (value_N[drawn_N] / value_N.max()) ** alpha
        value_N[drawn_N] = np.clip(value_N[drawn_N] / value_N[drawn_N].mean(), low, high)
        value_N *= (1 - uniform_mix) / value_N.sum()
        value_N[drawn_N] += uniform_mix / np.count_nonzero(drawn_N)
        step = f"temper(alpha={alpha}, uniform_mix={uniform_mix}, clip={clip})"
        return self._derived((value_N / value_N.sum()).astype(np.float32), step, store=self.store)

    def reading(self, key_column: str | None = None) -> PromptReading:
        """How the items of a dataset become prompts: by the rule and in the fields of the store; see ``for_dataset``."""
        from embstore.training.reading import PromptReading  # noqa: PLC0415

        manifest = self._manifest(self._joinable())
        return PromptReading(rule=manifest.rule, fields=manifest.fields, column=key_column)

    def _joinable(self) -> Path:
        if self.store is None:
            reason = "are joined to a dataset already" if self.steps else "come from a bare file, which has no keys"
            raise ConfigError(
                f"these weights ({self.path}) {reason}", hint="load_weights(STORE) returns weights that can be joined"
            )
        return self.store

    def _manifest(self, root: Path) -> Manifest:
        manifest = decode_manifest(read_manifest(root))
        if manifest.rows != len(self.array):
            raise LengthMismatchError(
                f"{root} now has {manifest.rows} rows, these weights have {len(self.array)}",
                hint="the store was replaced since then: call load_weights again",
            )
        return manifest

    def _joined(self, join: Join, on_missing: OnMissing, duplicates: Duplicates, rule: PromptRule = CURRENT_RULE) -> Weights:
        from embstore.training.join import align_weights, notices  # noqa: PLC0415

        aligned_M = align_weights(self.array, join, store=str(self.store), on_missing=on_missing, duplicates=duplicates)
        said = notices(join, rule, str(self.store))
        for notice in said:
            warnings.warn(notice, stacklevel=3)
        return self._derived(aligned_M, f"align(on_missing={on_missing!r}, duplicates={duplicates!r})", *said, store=None)

    def _derived(self, array: NDArray[np.float32], *steps: str, store: Path | None) -> Weights:
        array.flags.writeable = False
        return dataclasses.replace(self, array=array, store=store, steps=(*self.steps, *steps), digest=None)

    def __reduce__(self) -> tuple[object, ...]:
        fields = {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self)}
        fields["metadata"] = dict(self.metadata)
        if not self.steps:
            del fields["array"]
        return _restore, (fields,)


def vector_of(weights: Weights | ArrayLike, *, positional: bool) -> NDArray[Any]:
    """The weights as an array, whose item i is that of the dataset's item i.

    Raises
    ------
    ConfigError
        They are in the order of a store's rows, and nobody said that the dataset is, too (``positional``).
    """
    if not isinstance(weights, Weights):
        return np.asarray(weights)
    if weights.store is not None and not weights.order_checked and not positional:
        raise ConfigError(
            f"these weights are in the order of the rows of {weights.store}, and were not joined to a dataset",
            hint=f"join them: load_weights({str(weights.store)!r}).for_dataset(dataset). To draw the store's own row "
            "numbers, pass positional=True",
        )
    return weights.array


def check_vector(name: str, array: NDArray[np.floating]) -> float:
    """Refuse a vector that cannot be sampled from; returns its float64 sum. Makes no copy."""
    if array.ndim != 1 or not len(array):
        raise InvalidWeightsError(f"{name}: weights must be a non-empty vector, got shape {array.shape}")
    with np.errstate(invalid="ignore"):
        is_sound = array.min() >= 0 and np.isfinite(array.max())  # NaN is never >= 0
    if not is_sound:
        bad = np.flatnonzero(~(np.isfinite(array) & (array >= 0)))
        raise InvalidWeightsError(f"{name}: weight {int(bad[0])} is {array[bad[0]]}, not finite and >= 0")
    total = float(array.sum(dtype=np.float64))
    if total <= 0:
        raise InvalidWeightsError(f"{name}: the weights sum to {total}")
    return total


def sha256_of(array: NDArray[np.generic]) -> str:
    """sha256 of an array's values; type and shape do not count."""
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()


def _restore(fields: dict[str, Any]) -> Weights:
    return Weights(**{"array": _map_bare(fields["path"]), **fields} if "array" not in fields else fields)


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
        A store's folder, or a ``.npy`` file of weights (of unknown provenance, which gives a warning).
    name
        Name of the weighting in the store. ``NAME@DIGEST`` stays the same weighting when NAME gets another one.
    expect_len
        Length of the dataset these weights are for; equal lengths say nothing of the order.
    expect_keys
        uint64 [N] row keys in dataset order; they must equal the store's ``keys.npy``. Samplers then take the weights as
        they are.
    verify
        "full" checks digests, dtype, finiteness, sign and sum; "shape" only dtype and length, which takes the same time for
        any N; "off" nothing.

    Returns
    -------
    Weights

    Raises
    ------
    StoreNotFoundError, IncompleteStoreError
        There is no store or file, or the store is not finished.
    StorageError
        The operating system refused to read: no permission, too many open files. That is not damage.
    CorruptStoreError
        The bytes differ from those that were published.
    LengthMismatchError, OrderMismatchError, KeyMismatchError, InvalidWeightsError
        The weights do not fit the dataset, or are not valid weights.
    """
    if verify not in ("full", "shape", "off"):
        raise ConfigError(f"verify must be 'full', 'shape' or 'off', got {verify!r}")
    root = Path(path)
    with storage_errors("reading", root):
        is_folder, is_file = root.is_dir(), root.is_file()
    if is_folder:
        return follow_manifest(
            lambda: read_manifest(root),
            lambda manifest: _load(root, manifest, name, expect_len=expect_len, expect_keys=expect_keys, verify=verify),
        )
    if not is_file:
        raise StoreNotFoundError(f"{root} does not exist", hint="run embstore build PROMPTS --model MODEL --out STORE")
    warnings.warn(f"{root} is a bare file: no manifest says which prompts it belongs to", stacklevel=2)
    array = _map_bare(root)
    if verify != "off":
        _check_weights(root, array, full=verify == "full")
    if expect_len is not None and expect_len != len(array):
        raise LengthMismatchError(
            f"{root} has {len(array)} weights, the dataset has {expect_len} items",
            hint="a bare file cannot be joined: pass the store's folder and call for_dataset(dataset) instead of expect_len",
        )
    if expect_keys is not None:
        raise ConfigError(f"{root} is a bare file and has no keys", hint="pass the store's folder")
    return Weights(path=root, array=array, metadata={})


def _load(
    root: Path,
    manifest: Manifest,
    name: str,
    *,
    expect_len: int | None,
    expect_keys: ArrayLike | None,
    verify: Verify,
) -> Weights:
    """The weights called ``name`` as published by ``manifest``."""
    array_name, sidecar = weights_paths(manifest.weighting(name, store=root))
    metadata = read_metadata(root, sidecar, manifest)
    file, digest = root / array_name, manifest.files[array_name]
    array = map_array(root, array_name)
    if verify != "off":
        if array.ndim == 1 and len(array) != manifest.rows:
            raise CorruptStoreError(
                f"{file} has {len(array)} weights, the manifest says {manifest.rows}", hint=f"run embstore verify {root}"
            )
        if verify == "full":
            check_array(root, array_name, array, digest)
        _check_weights(file, array, full=verify == "full")
    if expect_len is not None and expect_len != len(array):
        raise LengthMismatchError(
            f"{root} has {len(array)} weights, the dataset has {expect_len} items",
            hint=f"weights are per distinct prompt: load_weights({str(root)!r}).for_dataset(dataset) instead of expect_len",
        )
    if expect_keys is not None:
        _check_keys(root, np.asarray(expect_keys, dtype=np.uint64), manifest, full=verify == "full")
    return Weights(
        path=file,
        array=array,
        metadata=metadata,
        store=root,
        digest=digest.sha256,
        order_checked=expect_keys is not None,
    )


def _map_bare(path: Path) -> NDArray[Any]:
    """Map a ``.npy`` file that the user named; unlike a file of a store it may be a link."""
    with storage_errors("reading", path):
        try:
            file = path.open("rb")
        except FileNotFoundError:
            raise StoreNotFoundError(
                f"{path} does not exist",
                hint="load the weights again: the store was moved or made again, or this weighting was dropped",
            ) from None
        with file:
            return map_file(file, str(path), hint="numpy.save(FILE, weights) writes such a file")


def _check_weights(file: Path, array: NDArray[Any], *, full: bool) -> None:
    if array.ndim != 1 or array.dtype != np.float32:
        raise InvalidWeightsError(f"{file} contains {array.dtype} of shape {array.shape}, not float32 of one dimension")
    if full and abs((total := check_vector(str(file), array)) - 1) > WEIGHTS_TOLERANCE:
        raise InvalidWeightsError(f"{file} sums to {total!r}, not 1")


def _check_keys(root: Path, given_M: NDArray[np.uint64], manifest: Manifest, *, full: bool) -> None:
    stored_N = read_keys(root, manifest, full=full)
    hint = f"join instead of expect_keys: load_weights({str(root)!r}).align(keys), or for_dataset(dataset)"
    overlap = min(len(given_M), len(stored_N))
    different = np.flatnonzero(stored_N[:overlap] != given_M[:overlap])
    at = "the shorter one is a prefix of the other"
    if len(different):
        first = int(different[0])
        at = f"first at position {first}: the store has key {int(stored_N[first]):016x}, given {int(given_M[first]):016x}"
    if len(given_M) != len(stored_N):
        raise LengthMismatchError(f"{root} has {len(stored_N)} rows, expect_keys has {len(given_M)}; {at}", hint=hint)
    if not len(different):
        return
    if np.array_equal(np.sort(stored_N), np.sort(given_M)):
        raise OrderMismatchError(f"{root}: the same prompts in another order; {at}", hint=hint)
    raise KeyMismatchError(f"{root}: other prompts; {at}", hint=hint)
