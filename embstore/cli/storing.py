"""How a store is written and continued: the options that ``build`` and ``import`` share."""

from __future__ import annotations

from typing import Annotated

import typer

from embstore.core.config import Compressor

Resume = Annotated[bool, typer.Option("--resume", help="Continue what is there; starts anew if nothing is.")]
CompressorOption = Annotated[Compressor | None, typer.Option("--compressor", help="none: chunks can be mapped.")]
WindowRows = Annotated[int | None, typer.Option("--window-rows", help="Rows of one commit.")]
ChunkRows = Annotated[int | None, typer.Option("--chunk-rows", help="Rows of one chunk file.")]
Threads = Annotated[int | None, typer.Option("--threads", help="CPU threads; default all this process may use.")]
TrustJournal = Annotated[bool, typer.Option("--trust-journal", help="Resume without reading committed rows back.")]
