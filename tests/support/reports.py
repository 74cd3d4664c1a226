"""Stores and report data for the report's tests: hostile prompts, and maps of any size without a build."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from embstore.views.report.data import ReportData
from tests.support.stores import build_small, with_weighting, write_lines

# each tries to become markup, script, or to end the element that holds it
HOSTILE = (
    "<script>window.pwned = 1</script>",
    "</script><script>window.pwned = 2</script>",
    "<!--<script>window.pwned = 3//-->",
    "<img src=x onerror=window.pwned=4>",
    '"><svg/onload=window.pwned=5>',
    "'-window.pwned--'</bdi></blockquote></main>",
    "<b>bold</b> <a href='javascript:window.pwned=6'>link</a>",
    "{{7*7}} ${window.pwned=7} `${window.pwned=8}` %{customdata} &lt;b&gt; &amp; &#60;",
    "line\u2028separator\u2029and\u0085next",
    "right\u202eto left\u202c, \u2066isolated\u2069, arabic \u0627\u0644\u0639\u0631\u0628\u064a\u0629",
    "nul \x00 escape \x1b[31m bell \x07 delete \x7f c1 \x9b",
    "\ufeffbyte order mark, \ufffe\uffff no characters, \U0001f9d1\u200d\U0001f680 joined, e\u0301 composed",
    '\\u003cscript\\u003e \\\\ \\" \\n',
    "<" * 300,
)


def hostile_store(folder: Path) -> Path:
    """A finished store whose texts, ids, sources and field names are hostile, among sixty plain prompts."""
    lines: list[dict[str, Any]] = [
        {"id": f"{index}{text}", "prompt": f"{index} {text}", "src": text} for index, text in enumerate(HOSTILE)
    ]
    lines += [{"prompt": f"Plain prompt number {index}", "src": "plain"} for index in range(60)]
    lines += [{"prompt": f"same: {HOSTILE[0]} {index}", "src": "plain"} for index in range(3)]
    for index, line in enumerate(lines):
        line[HOSTILE[3]] = "ab"[index % 2]
    lines += [lines[0], lines[0]]
    build_small(write_lines(folder / "prompts.jsonl", lines), folder / "store", config=with_weighting(k=5))
    return folder / "store"


def enlarged(data: ReportData, rows: int, *, with_umap: bool = False) -> ReportData:
    """The same report with a map of ``rows`` prompts of about 260 characters."""
    random = np.random.default_rng(5)
    weight_M = np.sort(random.lognormal(0, 0.4, rows))
    words = [f"word{number}" for number in range(2000)]
    texts = [f"number-{row} " + " ".join(words[word] for word in random.integers(0, 2000, 32)) for row in range(rows)]
    pca_M2 = random.standard_normal((rows, 2))
    pca_M2[-1] = 6  # alone, where a mouse finds it
    shown = dataclasses.replace(
        data.map,
        rows=np.arange(rows),
        pca=pca_M2,
        umap=pca_M2[::-1] * [3, 1] if with_umap else None,
        ids=[f"{row:016x}" for row in range(rows)],
        text=texts,
    )
    return dataclasses.replace(
        data,
        weight=weight_M / weight_M.mean(),
        mean_distance=weight_M / 30,
        length=np.array([len(text) for text in texts], dtype=np.int32),
        source=random.integers(0, len(data.source_values), rows).astype(np.int16),
        map=shown,
    )
