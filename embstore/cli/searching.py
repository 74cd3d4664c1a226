"""How neighbours are found: the options that ``build`` and ``import`` share."""

from __future__ import annotations

from typing import Annotated

import typer

from embstore.core.config import KnnMethod

Knn = Annotated[
    KnnMethod,
    typer.Option("--knn", help="How neighbours are found; auto: exactly, unless a graph is much faster and as good."),
]
Shards = Annotated[int | None, typer.Option("--shards", help="HNSW shards; default what memory and cores ask for.")]
Center = Annotated[
    bool, typer.Option("--center", help="Distances between directions from the mean row: other neighbours and weights.")
]
