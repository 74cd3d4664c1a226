"""From coordinates to an audited neighbour graph: group, centre, search, audit, repair.

Distances are those between centred coordinates. HNSW graphs or the exact engine find candidates, and float64 direct
differences with ties by row decide, whichever found them (docs/decisions/0006). Each result is audited on nodes that are
drawn for this and never repaired. If graphs miss the target, the exact engine follows; if the target is still missed, the
metadata says so.

Shapes: N rows, G nodes (distinct vectors), K neighbours kept, R coordinates.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from embstore.core.config import K_MAX, DensityConfig
from embstore.core.density import NOISE_FLOOR
from embstore.core.events import Notice, Observer, StageFinished, StageStarted
from embstore.core.format import JsonObject
from embstore.core.interfaces import BlockStore, NothingKept
from embstore.host.allocator import give_back
from embstore.search.audit import Audit, compare, sample_nodes
from embstore.search.directions import directions_from_mean
from embstore.search.exact.pairwise import brute_force
from embstore.search.hnsw.shards import BLOCK_ROWS, Effort
from embstore.search.node_search import NeighborSearch
from embstore.search.nodes import centred, expand, group_rows
from embstore.search.remote import RemoteSearch
from embstore.search.search_plan import plan_search

AUDIT_K = 10
_REPAIRED_SHARE = 0.05


@dataclass(frozen=True, kw_only=True, slots=True)
class KnnGraph:
    """Nearest distinct vectors of every row.

    ``ids_NK`` int32 rows (-1 none), ``distances_NK`` float32 metric (+inf none), both ascending by distance, self and own
    group excluded; they may be maps of files in the work folder. ``groups_N`` int32: the first row with the same vector (-1
    for failed rows). ``config``: what was asked for. ``noise_floor``: distances below it are noise. ``method``: the engine
    that gave the result; ``pilot_recall``: what a graph found in a sample, where one was tried. ``audit`` is None when there
    are too few distinct vectors to have neighbours. ``meets_target``: the audit reached the targets of recall and TV.
    """

    config: DensityConfig
    ids_NK: NDArray[np.int32]
    distances_NK: NDArray[np.float32]
    groups_N: NDArray[np.int32]
    num_nodes: int
    noise_floor: float
    method: str
    pilot_recall: float | None
    shards: int
    effort: Effort | None
    audit: Audit | None
    meets_target: bool
    repaired_nodes: int

    def as_record(self) -> JsonObject:
        """How the neighbours were found, as the store keeps it."""
        return {
            "knn": self.config.knn,
            "method": self.method,
            "pilot_recall": self.pilot_recall,
            "center": self.config.center,
            "noise_floor": self.noise_floor,
            "k_max": K_MAX,
            "shards": self.shards,
            "seed": self.config.seed,
            "effort": dataclasses.asdict(self.effort) if self.effort else None,
            "distinct_vectors": self.num_nodes,
            "repaired_vectors": self.repaired_nodes,
            "audit": dataclasses.asdict(self.audit) if self.audit else None,
            "target_recall": self.config.target_recall,
            "target_tv": self.config.target_tv,
            "meets_target": self.meets_target,
        }


def build_graph(
    coord_NR: NDArray[np.float32],
    failed_N: NDArray[np.bool_],
    config: DensityConfig,
    *,
    sequence_N: NDArray[np.uint64] | None = None,
    threads: int,
    memory_bytes: int,
    work: Path,
    observer: Observer,
    kept: BlockStore | None = None,
    device: str = "cpu",
    remote: RemoteSearch | None = None,
) -> KnnGraph:
    """Neighbours of every row; see the module docstring. With ``config.center``, of its direction from the mean row.

    Parameters
    ----------
    coord_NR
        float32 [N, R] coordinates as stored (uncentred); may be a memory map. Failed rows are ignored.
    failed_N
        Rows without a vector.
    sequence_N
        uint64 [N], digests of the tokens that rows were made from, 0 where unknown: see ``nodes.group_rows``.
    threads, memory_bytes
        Cores to use, and anonymous memory the search may take.
    work
        Scratch folder on the store's disk: large arrays are files there, mapped.
    kept
        Where finished blocks survive a killed run; small searches keep none.
    device
        Where the exact engine may compute its tiles. The result is the same on every device.
    remote
        Workers that build the graphs and compute the tiles, instead of this process. The result is the same.
    """
    noise_floor = NOISE_FLOOR
    if config.center:
        centered = directions_from_mean(coord_NR, failed_N, work, sequence_N=sequence_N)
        coord_NR, noise_floor = centered.coord_NR, NOISE_FLOOR * centered.stretch
        sequence_N = None  # rows of one sequence are bit-equal now
    rows_G, node_N = group_rows(coord_NR, failed_N, sequence_N)
    num_nodes = len(rows_G)
    plan = plan_search(num_nodes, coord_NR.shape[1], config, threads=threads, memory_bytes=memory_bytes)
    coord_GR = centred(coord_NR, rows_G, work)
    blocks = kept if kept is not None and num_nodes > BLOCK_ROWS else NothingKept()
    search = NeighborSearch(
        coord_GR, config, plan, threads=threads, work=work, kept=blocks, observer=observer, device=device, remote=remote
    )
    started = time.perf_counter()
    observer(StageStarted(stage="knn", total=search.total, unit="node visits"))
    search.run()
    observer(StageFinished(stage="knn", seconds=time.perf_counter() - started))
    started = time.perf_counter()
    observer(StageStarted(stage="audit", total=min(num_nodes, config.audit_rows)))
    audit, meets_target, repaired = _audit_and_repair(search, config, observer)
    observer(StageFinished(stage="audit", seconds=time.perf_counter() - started))
    ids_NK, distances_NK = expand(search.ids_GK, search.distances_GK, rows_G, node_N, work)
    return KnnGraph(
        config=config,
        ids_NK=ids_NK,
        distances_NK=distances_NK,
        groups_N=np.where(node_N >= 0, rows_G[node_N] if num_nodes else -1, -1).astype(np.int32),
        num_nodes=num_nodes,
        noise_floor=noise_floor,
        method="exact" if search.effort is None else "hnsw",
        pilot_recall=search.pilot_recall,
        shards=plan.shards if search.effort is not None else 0,
        effort=search.effort,
        audit=audit,
        meets_target=meets_target,
        repaired_nodes=repaired,
    )


def _audit_and_repair(search: NeighborSearch, config: DensityConfig, observer: Observer) -> tuple[Audit | None, bool, int]:
    """Audit, and search again exactly where graphs miss the targets; then repair.

    Returns the last audit, whether it meets the targets, and the number of repaired nodes.
    """
    to_repair = _worth_repair(search)
    audit = _audit(search, to_repair, config, draw=0)
    if audit is not None and not _meets(audit, config) and search.may_search_exactly:
        observer(Notice(message=f"audit: {_seen(audit, config)}; searching again, exactly"))
        search.search_exactly()
        to_repair = _worth_repair(search)
        audit = _audit(search, to_repair, config, draw=1)
    meets_target = audit is None or _meets(audit, config)
    if audit is not None and not meets_target:
        advice = "" if search.effort is None else "; --knn exact finds every neighbour"
        message = f"audit: {_seen(audit, config)}: the target is NOT met, and the metadata says so{advice}"
        observer(Notice(message=message))
    search.repair(to_repair)
    return audit, meets_target, len(to_repair)


def _seen(audit: Audit, config: DensityConfig) -> str:
    return f"recall@{audit.k} lower bound {audit.recall_lower:.5f} (target {config.target_recall}), TV {audit.tv:.1e}"


def _audit(search: NeighborSearch, to_repair: NDArray[np.int64], config: DensityConfig, *, draw: int) -> Audit | None:
    """Recall and TV on a fresh sample of the nodes that no repair touches; None when there are too few nodes."""
    num_nodes = len(search.coord_GR)
    if num_nodes <= AUDIT_K:
        return None
    others = np.setdiff1d(np.arange(num_nodes), to_repair, assume_unique=True)
    sample = others[sample_nodes(len(others), config.audit_rows, seed=config.seed, draw=draw)]
    give_back()  # memory that the search freed would count against the budget
    exact = brute_force(search.coord_GR, sample, AUDIT_K)[1]
    found = search.distances_GK[sample, :AUDIT_K].astype(np.float64)
    return compare(found, exact, num_nodes=len(others))


def _meets(audit: Audit, config: DensityConfig) -> bool:
    return audit.recall_lower >= config.target_recall and audit.tv <= config.target_tv


def _worth_repair(search: NeighborSearch) -> NDArray[np.int64]:
    """Nodes to compute exactly after an approximate search, ascending: top weights, and nodes that missed themselves.

    HNSW errs on one side (distances too large) and most on isolated nodes, which get the largest weights.
    """
    num_nodes = len(search.coord_GR)
    if search.effort is None or num_nodes <= AUDIT_K:
        return np.zeros(0, dtype=np.int64)
    mean_G = search.distances_GK[:, :AUDIT_K].mean(axis=1, dtype=np.float64)
    top = np.argsort(-mean_G, kind="stable")[: int(_REPAIRED_SHARE * num_nodes)]
    return np.union1d(top, np.flatnonzero(search.missed_self_G))
