"""Tables of embedding and search: the pass against its floor, on a GPU, at full size; engines, graphs and coordinates."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.tables import DTYPES, Report, fill, machine_of, paragraphs, table

METHODS = {
    "original": "original method",
    "careful": "careful user",
    "backbone": "backbone alone (the floor)",
    "packed": "backbone with packed layers (a higher floor)",
    "rows": "embstore, rows dropped",
    "store": "embstore, store written",
}


def _conditions(report: Report, part: str) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items() if name != "embstore")
    return fill("`{command}`, {date}, ", report[part]) + f"{report['hardware']}; {versions}."


# --- the embedding pass -----------------------------------------------------------------------------------------------


def methods(embedding: Report, amx: Report) -> str:
    """Ways to embed, the two dtypes beside each other."""
    both = embedding["methods"]
    rows = [{"name": title, **{dtype: both[dtype][name] for dtype in DTYPES}} for name, title in METHODS.items()]
    columns = {"method": "{name}"}
    for dtype in DTYPES:
        columns[f"{dtype}, rows/s>"] = f"{{{dtype}[rows_per_second]:.0f}}"
        columns[f"share of the {dtype} floor>"] = f"{{{dtype}[share_of_floor]:.3f}}"
        columns[f"times the {dtype} original>"] = f"{{{dtype}[times_original]:.1f}}"
    memory = "{float32[peak_anonymous_bytes]:MiB} and {bfloat16[peak_anonymous_bytes]:MiB}"
    return paragraphs(
        _conditions(embedding, "methods"),
        table(rows, {**columns, "memory above the model, MiB>": memory}),
        table(
            [{"name": dtype, **both[dtype]} for dtype in DTYPES],
            {
                "embstore with a store": "{name}",
                "GFLOP/s of the floor>": "{backbone[gflops]:.0f}",
                "share of a large product's>": "{backbone[share_of_gemm_rate]:.0%}",
                "ms a row beyond the floor>": "{store[milliseconds_a_row_beyond_backbone]:.2f}",
                "beyond its packed backbone>": "{store[milliseconds_a_row_beyond_packed_backbone]:.2f}",
                "of that, tokenising>": "{store[milliseconds_a_row_tokenising]:.2f}",
                "time over that without a store>": "{store[seconds_over_without_store]:.3f}",
            },
        ),
        f"On another processor ({amx['hardware']} and AMX, one round, {amx['methods']['date']}, before "
        "[decision 0019](decisions/0019-sizes-of-batches-and-chunks.md)) embstore with a store reached "
        + fill("{store[share_of_floor]:.2f} of the float32 floor.", amx["methods"]["float32"]),
    )


def sweep(embedding: Report) -> str:
    """Rows a second of the backbone under every setting."""
    tables = []
    for dtype in DTYPES:
        found: dict[int, Report] = {}
        columns = {f"{dtype}: tokens a batch>": "{batch_tokens:,}", "padding>": "{padding_waste:.1%}"}
        for each in embedding["sweep"][dtype]["table"]:
            workers = f"{each['workers']} batches at once" if each["workers"] > 1 else "one batch"
            head = f"{'mask' if each['mask'] else 'no mask'}, {workers}, rows/s>"
            columns[head] = f"{{{head}:.0f}}"
            found.setdefault(each["batch_tokens"], dict(each))[head] = each["rows_per_second"]
        tables.append(table(found.values(), columns))
    return paragraphs(_conditions(embedding, "sweep"), *tables)


def streamed(embedding: Report) -> str:
    """Heads that are not affine against the original method."""
    titles = {"capped": "soft cap (NanoChat)"}
    rows = [{"title": titles[name], **each} for name, each in embedding["streamed"].items() if name in titles]
    columns = {
        "head": "{title}",
        "original, rows/s>": "{original[rows_per_second]:.1f}",
        "embstore, rows/s>": "{rows[rows_per_second]:.1f}",
        "times the original>": "{times_original:.1f}",
        "memory of each above the model, MiB>": "{original[peak_anonymous_bytes]:MiB} and {rows[peak_anonymous_bytes]:MiB}",
    }
    return paragraphs(_conditions(embedding, "streamed"), table(rows, columns))


def writer(embedding: Report) -> str:
    """The writer alone."""
    found = embedding["writer"]
    columns = {
        "chunks>": "{chunks}",
        "encoded, MiB>": "{bytes:MiB}",
        "raw durable writes through the page cache, MB/s>": "{raw_bytes_per_second:MB}",
        "raw durable writes past it, MB/s>": "{direct_bytes_per_second:MB}",
        "the writer, which compresses, MB/s>": "{writer_bytes_per_second:MB}",
    }
    return paragraphs(_conditions(embedding, "writer"), table([found], columns))


def scale(embedding: Report) -> str:
    """Rate and memory over the number of prompts."""
    columns = {
        "prompts>": "{rows:,}",
        "rows/s>": "{rows_per_second:.0f}",
        "memory above the baseline, MiB>": "{peak_anonymous_bytes:MiB}",
    }
    return paragraphs(_conditions(embedding, "scale"), table(embedding["scale"]["sizes"], columns))


def dtype(embedding: Report) -> str:
    """What a bfloat16 backbone does to neighbours and weights."""
    columns = {
        "prompts>": "{bfloat16[rows]:,}",
        "recall@10 of the bfloat16 neighbours>": "{recall_at_10:.4f}",
        "TV of the weights>": "{total_variation:.1e}",
        "float32, rows/s>": "{float32[rows_per_second]:.0f}",
        "bfloat16, rows/s>": "{bfloat16[rows_per_second]:.0f}",
        "`--dtype auto` took": "{auto_takes}",
    }
    return paragraphs(_conditions(embedding, "dtype"), table([embedding["dtype"]], columns))


def profile(embedding: Report) -> str:
    """Where the time of one window goes."""
    both = embedding["profile"]
    heads = dict.fromkeys(DTYPES, "milliseconds_a_row_on_one_thread")
    stages = [
        {"name": f"{stage}, ms a row", **{dtype: f"{both[dtype][part][stage]:.3f}" for dtype, part in heads.items()}}
        for stage in both["float32"]["milliseconds_a_row_on_one_thread"]
    ]
    operations = [
        {"name": f"`{name}`"}
        | {dtype: f"{both[dtype]['share_by_operation'].get(name, 0):.1%}".replace("%", " %") for dtype in DTYPES}
        for name in list(both["float32"]["share_by_operation"])[:6]
    ]
    columns = {"on one thread": "{name}", "float32>": "{float32}", "bfloat16>": "{bfloat16}"}
    return paragraphs(_conditions(embedding, "profile"), table([*stages, *operations], columns))


def gpu(report: Report) -> str:
    """Methods on a GPU, and what host, disk and compiler take of the time."""
    machine = report["machine"]
    ways, details = [], []
    for found in report["models"].values():
        floor, taken, embed = found["floor"], found["profile"], found["embed"]
        name = fill("{name}, {layers} layers of width {width}", found["model"])
        timed = {"original": found["original"], "backbone": floor | {"share_of_floor": 1.0}, **embed}
        ways += [{"model": name, "method": METHODS[key], **timed[key]} for key in ("original", "backbone", "rows", "store")]
        stages = taken["seconds_one_after_the_other"].values()
        own = floor["table"][-1]  # the best setting again, without cuDNN's attention
        same = [each for each in floor["table"] if all(each[key] == own[key] for key in ("batch_tokens", "mask"))]
        details.append(
            {
                "model": name,
                "store": embed["store"],
                "stages": ", ".join(f"{1e3 * each / taken['rows']:.3f}" for each in stages),
                "overlapped": 1e3 * taken["seconds_overlapped"] / taken["rows"],
                "busy": taken["device_busy_seconds"] / taken["seconds_overlapped"],
                "compile": found["compile"],
                "new_shapes": " and ".join(f"{each['rows_per_second_of_new_shapes']:,.0f}" for each in same),
            }
        )
    return paragraphs(
        fill("`{command}`, {machine[date]}, {machine[device]}, {machine[cores]} cores of {machine[cpu]}, torch "
             "{versions[torch]}, transformers {versions[transformers]}; bfloat16.", report),
        fill("Measured ceilings: bfloat16 products {bfloat16_flops:T} TFLOP/s, copies to pinned host memory "
             "{pinned_to_host_bytes_per_second:GB} GB/s, encoding on 4 threads {encode_4_bytes_per_second:GB} GB/s, durable "
             "writes {durable_write_4_bytes_per_second:GB} GB/s ({file_system}).", machine),
        table(ways, {
            "model": "{model}", "method": "{method}", "rows/s>": "{rows_per_second:,.0f}",
            "share of the floor>": "{share_of_floor:.3f}", "MFU>": "{mfu_of_measured:.1%}",
            "device memory, GiB>": "{peak_device_bytes:GiB}",
        }),
        table(details, {
            "model": "{model}",
            "store, GB/s of rows>": "{store[raw_bytes_per_second]:GB}",
            "encoded>": "{store[stored_bytes_per_second]:GB}",
            "ms a row: tokenise, pool, finish>": "{stages}",
            "overlapped>": "{overlapped:.3f}",
            "device busy>": "{busy:.0%}",
            "`torch.compile`, times the floor>": "{compile[times_uncompiled]:.2f} after {compile[compile_seconds]:.0f} s",
            "floor over new shapes, with cuDNN's attention and without, rows/s>": "{new_shapes}",
        }),
    )  # fmt: skip


def acceptance(report: Report) -> str:
    """The main job at full size: speed, kills, shards, an oracle."""
    killed = {"default memory budget": report["kills"], "small memory budget": report["shards"]["killed"]}
    date = report["speed"]["date"]
    return paragraphs(
        f"`python -m benchmarks.acceptance`, {date}, {machine_of(report)}, with other work on the machine.",
        table([report["speed"], report["shards"]], {
            "command": "`{command}`", "seconds>": "{build_seconds:.0f}", "embedding>": "{stage_seconds[embed]:.0f}",
            "search>": "{stage_seconds[knn]:.1f}", "rows/s>": "{rows_per_second:.0f}",
            "memory above the baseline, MiB>": "{peak_anonymous_MiB_above_baseline:.0f}", "HNSW shards>": "{shards}",
            "recall@10 of the audit (at least)>": "{audit[recall]:.5f} ({audit[recall_lower]:.5f})",
        }),
        table([{"title": title, "different": len(each["files_different"]), **each} for title, each in killed.items()], {
            "three SIGKILLs, then resumed": "{title}", "windows committed by then": "{windows_committed_at_each_kill}",
            "files compared with an uninterrupted build>": "{files_compared}", "different>": "{different}",
        }),
        table([report["oracle"]["shards_1"], report["oracle"]["shards_4"]], {
            f"HNSW shards, against exact float64 search over {report['oracle']['distinct_rows']:,} stored rows>": "{shards}",
            "recall@10>": "{recall_at_10:.5f}", "TV of the weights>": "{weights_tv:.1e}",
        }),
    )  # fmt: skip


# --- the search -------------------------------------------------------------------------------------------------------

_ENGINES = {
    "embstore-exact": "embstore exact",
    "faiss-flat": "faiss-cpu IndexFlatL2",
    "embstore-hnsw": "embstore HNSW shards",
    "hnswlib": "hnswlib",
    "usearch": "usearch, float16",
    "faiss-hnsw": "faiss-cpu HNSW",
}
_SEARCHED = {"seconds>": "{seconds:,.1f}", "memory, MiB>": "{memory_mib:,}", "recall@10>": "{recall:.4f}"}
_AUDITED = {"audit, at least>": "{audit_recall_lower:.5f}"}


def _sets(part: Report) -> Iterator[tuple[str, Report]]:
    """Points of a part as "easy, 28,000", and what was measured on them."""
    for title, found in part.items():
        if isinstance(found, dict) and title != "growth":
            kind, _, count = title.rpartition(" ")
            yield f"{kind}, {int(count):,}".removeprefix(", "), found


def knn_store(knn: Report) -> str:
    """The real rows: whole density stage against the original's search."""
    rows = []
    for count, found in _sets(knn["store"]):
        for title in ("sklearn", "auto", "hnsw", "hnsw, 4 shards"):
            (tried,) = found[title]["tried"]
            name = f"density stage, {title}" if title != "sklearn" else "scikit-learn, full rows"
            name += f" (took {tried['method']})" if title == "auto" else ""
            faster = found["times_faster"].get(title, 1)
            rows.append({"rows": count, "name": name, "faster": faster, **found[title], **tried})
    columns = {"rows>": "{rows}", "search": "{name}", **_SEARCHED, **_AUDITED, "times faster>": "{faster:,}"}
    return paragraphs(_conditions(knn, "store"), table(rows, columns))


def knn_shards(knn: Report) -> str:
    """One effort over more and more graphs."""
    rows = [
        {"points": kind.replace("store", "real rows"), "graphs": count, **found["tried"][0]}
        for title, found in knn["shards"].items()
        if isinstance(found, dict)
        for kind, count in [title.split()]
    ]
    head = f"{knn['shards']['rows']:,} points"
    columns = {head: "{points}", "graphs>": "{graphs}", "seconds>": "{seconds:.1f}", "recall@10>": "{recall:.4f}"}
    return paragraphs(_conditions(knn, "shards"), table(rows, columns))


def knn_engines(knn: Report) -> str:
    """Engines beside each other: each at its fastest setting of recall 0.999, or at the one that comes nearest."""
    rows = []
    for points, found in _sets(knn["engines"]):
        flat = found["faiss-flat"]["tried"][0]["seconds"]
        for engine, name in _ENGINES.items():
            if engine in found:
                tried = found[engine]["tried"]
                good = [each for each in tried if each["recall"] >= 0.999 or "ef" not in each]
                best = good or [max(tried, key=lambda each: float(each["recall"]))]
                least = min(best, key=lambda each: float(each["seconds"]))
                rows.append({"points": points, "name": name, "over": least["seconds"] / flat, **found[engine], **least})
    columns = {
        "points": "{points}",
        "engine": "{name}",
        "ef>": "{ef}",
        **_SEARCHED,
        "time over the flat index's>": "{over:.2f}",
    }
    return paragraphs(_conditions(knn, "engines"), table(rows, columns))


def knn_copies(knn: Report) -> str:
    """What repeated prompts do to a graph."""
    part = knn["copies"]
    rows = [{"name": f"hnswlib, ef {each['ef']}", **each} for each in part["hnswlib"]["tried"]]
    rows += [{"name": "density stage, `--knn hnsw`", **each} for each in part["embstore"]["tried"]]
    return table(rows, {"8 groups of 500 copies among 4,000 distinct points": "{name}", "recall@10>": "{recall:.4f}"})


def knn_large(knn: Report) -> str:
    """The density stage under 2 GiB, graphs alone beside it, and the fitted growth."""
    rows = []
    for points, found in _sets(knn["large"]):
        for engine in [name for name in ("auto", "one graph", "two graphs") if name in found]:
            for tried in found[engine]["tried"]:
                name = f"density stage (took {tried['method']})" if engine == "auto" else f"{engine} alone"
                rows.append({"points": points, "name": name, **found[engine], **tried})
    growth = ", ".join(f"{name} {exponent:.2f}" for name, exponent in knn["large"]["growth"].items())
    return paragraphs(
        _conditions(knn, "large"),
        table(rows, {"points": "{points}", "search": "{name}", "ef>": "{ef}", **_SEARCHED, **_AUDITED}),
        f"Seconds grow as a power of the rows, fitted at recall 0.99 or more: {growth}.",
    )


def coordinates(report: Report) -> str:
    """What coordinates lose behind a soft cap."""
    bases = {
        "as built": "range_finder",
        "with residuals": "range_finder_and_residuals",
        "twice the rank": "double_rank",
        "head's span": "head_basis",
    }
    columns = {
        "class": "{class}",
        "cap>": "{cap}",
        "logit sd>": "{logit_std:.1f}",
        "shared>": "{shared_norm:.3f}",
        "median distance>": "{median_distance:.3f}",
        "residual, median (max)>": "{stored_residual[median]:.1e} ({stored_residual[max]:.1e})",
        **{f"{title}>": f"{{{name}[recall]:.4f}} {{{name}[tv]:.1e}}" for title, name in bases.items()},
    }
    rows = [
        each | {"class": each["class"].removesuffix("ForCausalLM"), "cap": each["cap"] or "none"} for each in report["cases"]
    ]
    return paragraphs(fill("`{command}`, {date}, ", report) + machine_of(report) + ".", table(rows, columns))
