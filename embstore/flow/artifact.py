"""Publishing a store: neighbours, weights, their metadata, and the manifest that makes them current all at once.

There is no torch and no search here: ``recompute_weights`` turns stored distances into new weights in seconds. Files are
named by the digest of what they were made from, so a new version never touches a file that a published manifest lists.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from embstore.core.config import WeightingConfig
from embstore.core.decode import shown
from embstore.core.density import NOISE_FLOOR, WeightsResult, mean_distance, sampling_weights
from embstore.core.diagnostics import concerns, effective_sample_size, hubness, rank_correlation, total_variation
from embstore.core.errors import ConfigError, CorruptStoreError
from embstore.core.factors import NO_FACTORS, Factors
from embstore.core.files import file_problem
from embstore.core.format import (
    CHUNKS,
    COORDINATES,
    DEFAULT_WEIGHTS,
    FORMAT_VERSION,
    NEIGHBORS,
    WEIGHTS,
    FileDigest,
    JsonObject,
    Manifest,
    canonical_json,
    document,
    is_superseded_name,
    is_weights_name,
    neighbors_paths,
    superseded_name,
    weights_paths,
)
from embstore.core.records import JournalState, chunk_table
from embstore.core.spec import StoreSpec
from embstore.flow.weight_factors import factors_metadata
from embstore.storage.atomic import make_directory, save_array, write_durable
from embstore.storage.reader import EmbeddingStore, open_store
from embstore.storage.row_files import row_files
from embstore.storage.writer import StoreWriter


def short_digest(value: object) -> str:
    """16 hex digits that name the files made from ``value``."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True, slots=True)
class NeighborFiles:
    """A written neighbour graph: its digest, arrays and spec, and the digests of its files."""

    digest: str
    ids_NK: NDArray[np.int32]
    distances_NK: NDArray[np.float32]
    groups_N: NDArray[np.int32]
    spec: JsonObject
    files: dict[str, FileDigest]


def write_neighbors(
    root: Path,
    digest: str,
    ids_NK: NDArray[np.int32],
    distances_NK: NDArray[np.float32],
    groups_N: NDArray[np.int32],
    spec: JsonObject,
) -> NeighborFiles:
    """Write a neighbour graph durably under its digest; it is unused until a manifest lists it."""
    try:
        found = document(spec)
    except ValueError:  # NaN in the spec: the coordinates contain NaN although their checksums match
        found = b""
    if not found or np.isnan(distances_NK).any():
        raise CorruptStoreError(
            f"{COORDINATES} yields distances that are NaN",
            hint=f"run embstore verify {root} --repair, then embstore build --resume",
        )
    paths = neighbors_paths(digest)
    make_directory(root / NEIGHBORS / digest, resync=True)
    files = {
        # one folder, synced once by the last file
        paths.ids: save_array(root / paths.ids, ids_NK, sync_directory=False),
        paths.distances: save_array(root / paths.distances, distances_NK, sync_directory=False),
        paths.groups: save_array(root / paths.groups, groups_N, sync_directory=False),
        paths.spec: write_durable(root / paths.spec, found),
    }
    return NeighborFiles(digest=digest, ids_NK=ids_NK, distances_NK=distances_NK, groups_N=groups_N, spec=spec, files=files)


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightFiles:
    """Written weights: digest, values, metadata, and the digests of both files."""

    digest: str
    result: WeightsResult
    metadata: JsonObject
    files: dict[str, FileDigest]


def write_weights(
    root: Path,
    spec: StoreSpec,
    state: JournalState,
    neighbors: NeighborFiles,
    residual_N: NDArray[np.float32],
    config: WeightingConfig,
    factors: Factors = NO_FACTORS,
) -> WeightFiles:
    """Compute weights from stored distances and factors, and write them durably with their metadata."""
    mean_distance_N = mean_distance(neighbors.distances_NK, config.k)
    with_vector = neighbors.groups_N >= 0
    if np.isnan(mean_distance_N).any() or not np.isfinite(residual_N[with_vector]).all():
        raise CorruptStoreError(
            "a row with a vector has a distance or residual that is not finite", hint=f"run embstore verify {root}"
        )
    noise_floor = float(neighbors.spec.get("noise_floor", NOISE_FLOOR))  # stores from before --center lack it
    result = sampling_weights(mean_distance_N, neighbors.groups_N, config, noise_floor=noise_floor, factors=factors)
    metadata = _metadata(spec, state, neighbors, mean_distance_N, residual_N, config, result, noise_floor)
    if factors is not NO_FACTORS:
        metadata["factors"] = factors_metadata(factors, result, neighbors.groups_N)
    # named by content: any change makes new files and leaves those that a manifest lists
    digest = short_digest({"weights": hashlib.sha256(result.weights.tobytes()).hexdigest(), "metadata": metadata})
    array, sidecar = weights_paths(digest)
    make_directory(root / WEIGHTS)
    files = {
        array: save_array(root / array, result.weights, sync_directory=False),
        sidecar: write_durable(root / sidecar, document(metadata)),
    }
    return WeightFiles(digest=digest, result=result, metadata=metadata, files=files)


def publish(
    writer: StoreWriter,
    spec: StoreSpec,
    neighbors: NeighborFiles,
    weights: WeightFiles,
    *,
    name: str,
    kept: Manifest | None,
) -> Manifest:
    """Seal the row files, write the chunk table, and publish the manifest.

    ``kept`` is the current manifest, None if there is none (a repair takes it back). All its weights stay listed, because
    training runs may use them; those that ``name`` had are called by name and digest from now on. Other files that only it
    lists are deleted.
    """
    state = writer.state
    if state.prompts is None or state.spec is None:
        raise CorruptStoreError(
            "journal.jsonl does not commit the prompts and the spec that a manifest lists", hint="run embstore verify STORE"
        )
    others = _other_weightings(writer, kept, name, weights.digest)
    names = {
        DEFAULT_WEIGHTS: weights.digest,
        **{other: digest for other, (digest, _) in others.items()},
        name: weights.digest,
    }
    files = {path: digest for _, listed in others.values() for path, digest in listed.items()}
    files |= state.prompts.files | state.spec.files | neighbors.files | weights.files
    if kept is None:
        files |= writer.seal_rows(spec)
        chunks = [chunk for window in state.windows.values() for chunk in window.chunks]
        files[CHUNKS] = write_durable(writer.root / CHUNKS, chunk_table(chunks))
    else:
        files |= {path: kept.files[path] for path in (*row_files(spec), CHUNKS)}
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        rows=spec.rows,
        dimension=spec.embedding.dimension,
        neighbors=neighbors.digest,
        names=names,
        files=files,
        rule=state.prompts.rule,
        fields=state.prompts.fields,
    )
    writer.publish(manifest)
    return manifest


def _other_weightings(
    writer: StoreWriter, kept: Manifest | None, name: str, digest: str
) -> dict[str, tuple[str, dict[str, FileDigest]]]:
    """Weightings that stay when ``name`` gets ``digest``: digest and files by name. After a repair, only sound ones."""
    before = kept or writer.withdrawn()
    if before is None:
        return {}
    found = {}
    for other, own in before.names.items():
        files = {path: before.files[path] for path in weights_paths(own)}
        if (other, own) == (name, digest) or not (kept or _are_sound(writer.root, files)):
            continue
        found[superseded_name(name, own) if other == name else other] = own, files
    return found


def _are_sound(root: Path, files: Mapping[str, FileDigest]) -> bool:
    return all(file_problem(root, path, digest) is None for path, digest in files.items())


def recompute_weights(
    path: str | Path, config: WeightingConfig, *, name: str = DEFAULT_WEIGHTS, factors: Factors = NO_FACTORS
) -> JsonObject:
    """New weights from the neighbours that a store already has, in seconds and without a search.

    Parameters
    ----------
    path
        A finished store.
    config
        Method, k (at most the neighbours kept), gamma or target_ess, uniform_mix, max_ratio, duplicates.
    name
        ``default`` replaces the weights that training uses; weights of another name are kept in addition. What had this name
        stays as ``NAME@DIGEST``, until ``drop_weights``.
    factors
        Scores and shares; see ``flow.weight_factors``.

    Returns
    -------
    The metadata of the new weights.

    Raises
    ------
    IncompleteStoreError, StoreLockedError, ConfigError, CorruptStoreError
        The store is unfinished, being written, the settings are out of range, or a file is damaged.
    """
    if not is_weights_name(name):  # a manifest with such a name would be refused by every reader
        raise ConfigError(
            f"the name of weights must be one line of 1 to 200 characters without a slash, got {shown(name)}",
            hint="give another --name",
        )
    if is_superseded_name(name):
        raise ConfigError(
            f"{name} is a name for weights that were replaced, which embstore gives",
            hint="give another --name",
        )
    store = open_store(path)
    with StoreWriter(store.root, resume=True) as writer:
        store = open_store(path)  # again: under the lock it cannot be replaced
        if store.manifest is None:
            raise AssertionError("open_store returned an unfinished store")
        neighbors = read_neighbors(store)
        weights = write_weights(store.root, store.spec, writer.state, neighbors, store.residuals, config, factors)
        publish(writer, store.spec, neighbors, weights, name=name, kept=store.manifest)
    return weights.metadata


def read_neighbors(store: EmbeddingStore) -> NeighborFiles:
    """The published neighbour graph, checked against the manifest, so that weights never come from damaged distances.

    Price: one read and sha256 of 264 bytes a row.
    """
    if store.manifest is None:
        raise AssertionError("an unfinished store has no neighbours")
    paths = dataclasses.asdict(neighbors_paths(store.manifest.neighbors))
    for path in paths.values():
        problem = file_problem(store.root, path, store.manifest.files[path])
        if problem is not None:
            raise CorruptStoreError(
                f"{path} {problem}", hint=f"run embstore verify {store.root} --repair, then embstore build --resume"
            )
    return NeighborFiles(
        digest=store.manifest.neighbors,
        ids_NK=store.neighbor_ids,
        distances_NK=store.neighbor_distances,
        groups_N=store.groups,
        spec=store.neighbor_spec,
        files={path: store.manifest.files[path] for path in paths.values()},
    )


def extremes(mean_distance_N: NDArray[np.float64], count: int) -> tuple[list[int], list[int]]:
    """Rows with the largest and the smallest mean neighbour distance: the rarest and the most crowded prompts."""
    finite = np.flatnonzero(np.isfinite(mean_distance_N))
    order = finite[np.argsort(mean_distance_N[finite], kind="stable")]
    return [int(row) for row in order[::-1][:count]], [int(row) for row in order[:count]]


def _metadata(
    spec: StoreSpec,
    state: JournalState,
    neighbors: NeighborFiles,
    mean_distance_N: NDArray[np.float64],
    residual_N: NDArray[np.float32],
    config: WeightingConfig,
    result: WeightsResult,
    noise_floor: float,
) -> JsonObject:
    weights_N = result.weights.astype(np.float64)
    valid = neighbors.groups_N >= 0
    num_valid = int(np.count_nonzero(valid))
    group_sizes = np.bincount(neighbors.groups_N[valid]) if num_valid else np.zeros(0, dtype=np.int64)
    shared = group_sizes[group_sizes > 1]
    ess = effective_sample_size(weights_N)
    ess_share = ess / max(1, num_valid)
    reused = {} if state.reuse is None else {"reuse": _reuse(state)}
    uniform = valid.astype(np.float64)
    found = valid & np.isfinite(mean_distance_N)
    hubs = hubness(neighbors.ids_NK, neighbors.groups_N, config.k)
    floored_share = float((mean_distance_N[found] < noise_floor).mean()) if found.any() else 0.0
    alone = found & (np.bincount(np.maximum(neighbors.groups_N, 0), minlength=spec.rows)[neighbors.groups_N] == 1)
    correlation = rank_correlation(weights_N[alone], -mean_distance_N[alone]) if alone.any() else None
    return {
        # the original's keys, in its order, with correct values
        "n_prompts": spec.rows,
        "n_items": spec.rows,
        "embedding_dim": spec.embedding.dimension,
        "embedding_dtype": "float16",
        "weights_dtype": "float32",
        "normalization": spec.embedding.normalization,
        "weights_min": float(weights_N.min()),
        "weights_max": float(weights_N.max()),
        "weights_mean": float(weights_N.mean()),
        "weights_std": float(weights_N.std()),
        "format_version": FORMAT_VERSION,
        "model": spec.model.name,
        "prompts_fingerprint": spec.prompts_fingerprint,
        "direction": "distance up, density down, weight up" if result.method != "legacy-inverse" else "inverted",
        "weighting": {**dataclasses.asdict(config), "weighting": result.method, "gamma": result.gamma},
        "requested_weighting": config.weighting,
        "noise_floor": noise_floor,
        "share_below_noise_floor": floored_share,
        "ess": ess,
        "ess_share": ess_share,
        "max_over_mean": float(weights_N.max() * max(1, num_valid)),
        "max_over_mean_vector": result.max_over_mean_vector,
        "limited_rows": result.limited_rows,
        "tv_to_uniform": total_variation(weights_N, uniform),
        "mean_distance": _quantiles(mean_distance_N[np.isfinite(mean_distance_N)]),
        "residual": _quantiles(np.asarray(residual_N, dtype=np.float64)[valid]),
        "vector_groups": {"groups": len(shared), "rows": int(shared.sum())},
        "failed_rows": spec.rows - num_valid,
        "hubness": dataclasses.asdict(hubs) if hubs is not None else None,
        "weight_density_correlation": correlation,
        "neighbors": {"digest": neighbors.digest, **neighbors.spec},
        "byte_identity_voided": state.voids_identity,
        **reused,
        "warnings": [
            *result.warnings,
            *concerns(
                ess_share=ess_share,
                hubs=hubs,
                floored_share=floored_share,
                noise_floor=noise_floor,
                correlation=correlation,
            ),
        ],
    }


def _reuse(state: JournalState) -> JsonObject:
    """Origin of reused rows: how many were copied, how many old rows were dropped, and the digest of each store's rows."""
    stores = state.reuse.stores if state.reuse is not None else []
    return {
        "rows": sum(rows.num_rows for rows in state.reused),
        "dropped": sum(store.rows - store.found for store in stores),
        "stores": [dataclasses.asdict(store) for store in stores],
    }


def _quantiles(values: NDArray[np.float64]) -> Mapping[str, float] | None:
    if not len(values):
        return None
    low, median, high = (float(value) for value in np.quantile(values, [0.05, 0.5, 0.95]))
    return {"min": float(values.min()), "q05": low, "median": median, "q95": high, "max": float(values.max())}
