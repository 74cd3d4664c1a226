"""One neighbour search in a process of its own: ``python -m benchmarks.knn_engines ENGINE FOLDER OPTIONS``.

Prints JSON: seconds and recall for each setting tried, and the largest anonymous memory above what the points and imports
took. FOLDER holds points.npy and the truth. Every engine gets the same points, k = 10 and both cores.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import knn_sets
from embstore.core.config import DensityConfig
from embstore.host.memory import MemoryMeter
from embstore.host.threads import num_cores

K = knn_sets.TRUTH_K
Figures = dict[str, Any]
Ids = NDArray[np.integer[Any]]
Engine = Callable[[knn_sets.Points, Figures], Iterator[tuple[Figures, Ids]]]


def main() -> None:
    """Run one engine and print its figures."""
    engine, folder, options = ENGINES[sys.argv[1]], Path(sys.argv[2]), json.loads(sys.argv[3])
    points = np.load(folder / "points.npy", mmap_mode="r" if options.get("mapped") else None, allow_pickle=False)
    rows, true_QK = np.load(folder / "rows.npy"), np.load(folder / "true.npy")
    tried = []
    with MemoryMeter() as meter:
        _import(sys.argv[1])
        meter.set_baseline()
        for figures, ids_NK in engine(points, options):
            tried.append({**figures, "recall": round(knn_sets.recall(points, rows, true_QK, ids_NK), 5)})
    print(json.dumps({"tried": tried, "memory_mib": round((meter.peak_anonymous_bytes or 0) / 2**20)}))


def _import(engine: str) -> None:
    """What an engine imports is not its memory."""
    if engine.startswith("faiss"):
        import faiss  # noqa: F401, PLC0415
    elif engine == "usearch":
        import usearch.index  # noqa: F401, PLC0415
    elif engine.startswith("sklearn"):
        import sklearn.neighbors  # noqa: F401, PLC0415
    else:
        from embstore.search import graph  # noqa: F401, PLC0415
        from embstore.search.exact import scan  # noqa: F401, PLC0415


def sklearn(points: knn_sets.Points, options: Figures) -> Iterator[tuple[Figures, Ids]]:
    """The original's way: NearestNeighbors over the full float32 [N, V] matrix, k + 1, self dropped."""
    from sklearn.neighbors import NearestNeighbors  # noqa: PLC0415

    rows_NV = _full_rows(options) if options.get("store") else points
    started = time.perf_counter()
    _, ids = NearestNeighbors(n_neighbors=K + 1, algorithm="brute").fit(rows_NV).kneighbors(rows_NV)
    yield {"seconds": round(time.perf_counter() - started, 2), "columns": rows_NV.shape[1]}, ids


def _full_rows(options: Figures) -> NDArray[np.float32]:
    """Every distinct row of the store at full width, as the original holds them."""
    from embstore import open_store  # noqa: PLC0415

    store = open_store(options["store"])
    coordinates = np.asarray(store.coordinates[: options["rows"]])
    _, first = np.unique(coordinates.astype(np.float64), axis=0, return_index=True)
    rows_NV = np.empty((len(first), store.spec.embedding.dimension), dtype=np.float32)
    for start in range(0, len(first), 2048):
        wanted = np.sort(first)[start : start + 2048]
        rows_NV[start : start + len(wanted)] = store.embeddings.oindex[wanted]
    return rows_NV


def faiss_flat(points: knn_sets.Points, options: Figures) -> Iterator[tuple[Figures, Ids]]:
    """faiss-cpu IndexFlatL2."""
    import faiss  # noqa: PLC0415

    faiss.omp_set_num_threads(num_cores())
    started = time.perf_counter()
    index = faiss.IndexFlatL2(points.shape[1])
    index.add(points)
    _, ids = index.search(points, K + 1)
    yield {"seconds": round(time.perf_counter() - started, 2)}, ids


def faiss_hnsw(points: knn_sets.Points, options: Figures) -> Iterator[tuple[Figures, Ids]]:
    """faiss-cpu IndexHNSWFlat, M 16, both threads in one graph."""
    import faiss  # noqa: PLC0415

    faiss.omp_set_num_threads(num_cores())
    started = time.perf_counter()
    index = faiss.IndexHNSWFlat(points.shape[1], 16)
    index.hnsw.efConstruction = options["ef_construction"]
    index.add(points)
    build = time.perf_counter() - started
    for ef in options["ef"]:
        index.hnsw.efSearch = ef
        started = time.perf_counter()
        _, ids = index.search(points, K + 1)
        yield _graph_figures(ef, build, started), ids


def hnswlib(points: knn_sets.Points, options: Figures) -> Iterator[tuple[Figures, Ids]]:
    """Plain hnswlib, M 16, rows in file order, both threads in one graph."""
    import hnswlib as library  # noqa: PLC0415

    started = time.perf_counter()
    index = library.Index(space="l2", dim=points.shape[1])
    index.init_index(max_elements=len(points), M=16, ef_construction=options["ef_construction"])
    index.add_items(points, np.arange(len(points)), num_threads=num_cores())
    build = time.perf_counter() - started
    for ef in options["ef"]:
        index.set_ef(max(ef, K + 1))
        started = time.perf_counter()
        labels, _ = index.knn_query(points, k=K + 1, num_threads=num_cores())
        yield _graph_figures(ef, build, started), labels.astype(np.int64)


def usearch(points: knn_sets.Points, options: Figures) -> Iterator[tuple[Figures, Ids]]:
    """Usearch with float16 vectors, connectivity 16."""
    from usearch.index import Index  # noqa: PLC0415

    started = time.perf_counter()
    index = Index(
        ndim=points.shape[1], metric="l2sq", dtype="f16", connectivity=16, expansion_add=options["ef_construction"]
    )
    index.add(np.arange(len(points)), points, threads=num_cores())
    build = time.perf_counter() - started
    for ef in options["ef"]:
        index.expansion_search = ef
        started = time.perf_counter()
        matches = index.search(points, K + 1, threads=num_cores())
        yield _graph_figures(ef, build, started), matches.keys.astype(np.int64)


def embstore_hnsw(points: knn_sets.Points, options: Figures) -> Iterator[tuple[Figures, Ids]]:
    """HNSW shards as embstore builds and asks them, with its exact re-rank; no audit, no repair, k as for the others."""
    from embstore.core.interfaces import NothingKept  # noqa: PLC0415
    from embstore.search.distances import rerank  # noqa: PLC0415
    from embstore.search.hnsw import shards  # noqa: PLC0415
    from embstore.search.hnsw.shards import Effort, hnsw_candidates  # noqa: PLC0415

    if options.get("shuffled"):  # all in one cell: the order of the shuffle, as before docs/decisions/0022
        vars(shards)["cells"] = lambda coord_GR, seed: np.zeros(len(coord_GR), dtype=np.int32)
    for ef in options["ef"]:
        started = time.perf_counter()
        effort = Effort(links=16, ef_construction=options["ef_construction"], ef=ef)
        found = hnsw_candidates(
            points,
            K + 1,
            effort=effort,
            shards=options.get("shards", num_cores()),
            threads=num_cores(),
            seed=0,
            work=Path(options["work"]),
            kept=NothingKept(),
        )
        ids, _ = rerank(points, np.arange(len(points)), found.ids_GC, K)
        yield {"ef": ef, "seconds": round(time.perf_counter() - started, 2)}, ids


def embstore_exact(points: knn_sets.Points, options: Figures) -> Iterator[tuple[Figures, Ids]]:
    """The exact engine alone, k as for the others; and with the 32 neighbours that a store keeps."""
    from embstore.search.exact.scan import all_neighbors  # noqa: PLC0415

    for k in options["k"]:
        ids = np.empty((len(points), k), dtype=np.int32)
        started = time.perf_counter()
        blocks = all_neighbors(points, k, threads=num_cores(), memory_bytes=1 << 30, work=Path(options["work"]))
        for block in blocks:
            ids[block.nodes_N] = block.ids_NK
        yield {"k": k, "seconds": round(time.perf_counter() - started, 2)}, ids


def embstore_stage(points: knn_sets.Points, options: Figures) -> Iterator[tuple[Figures, Ids]]:
    """The whole density stage as a build runs it: grouping, centring, search, audit, repair, under a memory budget."""
    from embstore.core.events import ignore  # noqa: PLC0415
    from embstore.search.graph import build_graph  # noqa: PLC0415

    started = time.perf_counter()
    graph = build_graph(
        points,
        np.zeros(len(points), dtype=np.bool_),
        DensityConfig(knn=options["knn"], shards=options.get("shards")),
        threads=num_cores(),
        memory_bytes=options["memory_bytes"],
        work=Path(options["work"]),
        observer=ignore,
    )
    figures = {
        "seconds": round(time.perf_counter() - started, 2),
        "method": graph.method,
        "pilot_recall": graph.pilot_recall,
        "shards": graph.shards,
        "repaired": graph.repaired_nodes,
        "meets_target": graph.meets_target,
        "audit_recall_lower": round(graph.audit.recall_lower, 6) if graph.audit else None,
        "audit_tv": graph.audit.tv if graph.audit else None,
    }
    yield figures, graph.ids_NK


def _graph_figures(ef: int, build: float, started: float) -> Figures:
    query = time.perf_counter() - started
    return {"ef": ef, "seconds": round(build + query, 2), "build_seconds": round(build, 2)}


ENGINES: dict[str, Engine] = {
    "sklearn": sklearn,
    "faiss-flat": faiss_flat,
    "faiss-hnsw": faiss_hnsw,
    "hnswlib": hnswlib,
    "usearch": usearch,
    "embstore-hnsw": embstore_hnsw,
    "embstore-exact": embstore_exact,
    "embstore": embstore_stage,
}

if __name__ == "__main__":
    main()
