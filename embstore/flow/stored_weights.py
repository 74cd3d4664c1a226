"""The weightings that a finished store has: their list, and taking some out. The manifest alone is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from embstore.core.errors import ConfigError
from embstore.core.files import check_content, read_committed
from embstore.core.format import (
    DEFAULT_WEIGHTS,
    MANIFEST,
    Manifest,
    decode_manifest,
    decode_metadata,
    follow_manifest,
    is_superseded_name,
    weights_paths,
)
from embstore.storage.reader import require_published
from embstore.storage.writer import StoreWriter


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredWeights:
    """One weighting of a store. Names of one ``digest`` share its files, of ``bytes`` in all."""

    name: str
    digest: str
    weighting: str
    k: int
    gamma: float
    ess_share: float
    bytes: int


def list_weights(path: str | Path) -> list[StoredWeights]:
    """The weightings of a finished store: the default, other names, and then those that were replaced.

    Raises
    ------
    StoreNotFoundError, IncompleteStoreError, CorruptStoreError
        There is no finished store, or the metadata of a weighting is damaged.
    """
    root = Path(path)
    require_published(root)
    return follow_manifest(lambda: read_committed(root, MANIFEST), lambda manifest: _weightings(root, manifest))


def _weightings(root: Path, manifest: Manifest) -> list[StoredWeights]:
    found = []
    for name in sorted(manifest.names, key=lambda name: (is_superseded_name(name), name != DEFAULT_WEIGHTS, name)):
        paths = weights_paths(manifest.names[name])
        content = read_committed(root, paths[1])
        check_content(root, paths[1], [content], manifest.files[paths[1]])
        metadata = decode_metadata(content, name=paths[1])
        found.append(
            StoredWeights(
                name=name,
                digest=manifest.names[name],
                weighting=metadata["weighting"]["weighting"],
                k=metadata["weighting"]["k"],
                gamma=metadata["weighting"]["gamma"],
                ess_share=metadata["ess_share"],
                bytes=sum(manifest.files[each].bytes for each in paths),
            )
        )
    return found


def drop_weights(path: str | Path, names: Sequence[str]) -> None:
    """Take weightings out of a finished store, all of ``names`` or none; files without another name are deleted.

    Runs that were begun with them cannot be resumed any more. Damaged ones can be dropped, too.

    Raises
    ------
    ConfigError
        A name is unknown, or is that of the default, which training maps.
    StoreNotFoundError, IncompleteStoreError, StoreLockedError, CorruptStoreError
        There is no finished store, it is being written, or its manifest is damaged.
    """
    root = Path(path)
    require_published(root)
    with StoreWriter(root, resume=True) as writer:
        require_published(root)  # again: under the lock nobody takes it back
        manifest = decode_manifest(read_committed(root, MANIFEST))
        for name in names:
            _refuse_to_drop(root, manifest, name)
        writer.publish(manifest.without(names))


def _refuse_to_drop(root: Path, manifest: Manifest, name: str) -> None:
    digest = manifest.weighting(name, store=root)
    owner = name if name in manifest.names else name.removesuffix(f"@{digest}")
    if owner == DEFAULT_WEIGHTS:
        raise ConfigError(
            f"{name} cannot be dropped: training maps these weights, and a store without them is not finished",
            hint=f"embstore weights {root} makes new ones; the old ones can be dropped then, as {DEFAULT_WEIGHTS}@{digest}",
        )
    if owner != name:
        raise ConfigError(
            f"{name} are the weights that {owner} has now",
            hint=f"by that name they can be dropped: embstore weights {root} --drop {owner}",
        )
