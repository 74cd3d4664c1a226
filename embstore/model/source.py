"""From a located model to an embedder: probe once on a new store, take every setting from the spec on a resume.

Everything resolved here changes bytes, so it is decided by arithmetic and capabilities, never by a clock: two builds of the
same input must pin the same spec (docs/decisions/0003). The clock is only asked for the preflight's estimate.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from embstore.core.config import EmbeddingConfig, Space, format_bytes, pooling_rule, space_and_pooling
from embstore.core.density import NOISE_FLOOR, total_variation
from embstore.core.errors import BudgetError, ModelError, RowError
from embstore.core.events import Notice, Observer, StageFinished, StageStarted
from embstore.core.interfaces import PromptReader
from embstore.core.sampling import seeded_sample
from embstore.core.spec import PACKED_HEAD, PACKED_LAYERS, EmbeddingSpec, ModelIdentity
from embstore.host.device import capability_of, has_fast_bfloat16
from embstore.host.scratch import map_scratch
from embstore.host.threads import num_cores
from embstore.model.backbone import AffineHead, CappedHead, SplitModel
from embstore.model.basis import orthonormal_basis
from embstore.model.embed import DTYPES, LogitEmbedder, ModelParts
from embstore.model.estimates import MAX_WINDOW_ROWS, activation_bytes, is_streamed, window_bytes
from embstore.model.finish import identity_head, spanning_columns
from embstore.model.load import (
    AnyModelFiles,
    LoadedModel,
    as_loaded,
    load_model,
    resolve_device,
)
from embstore.model.packed import best_capability
from embstore.model.tokens import TOKEN_RULE, PromptTokenizer, TokenRow

_SAMPLE_ROWS = 256
_TIMED_ROWS = 32
_HEAD_PROBE_TOKENS = 128  # one [1, T, V] tensor of this length is the only place where logits of every token exist
_DTYPE_PROBE_K = 10
_DTYPE_MAX_TV = 1e-3
# In float32. On a CPU activations still fit the cores' caches, as do those of twice as many tokens in 16 bits
# (docs/decisions/0019); an accelerator wants more work at once (docs/performance.md).
_BATCH_TOKENS = {"cpu": 1024, "mps": 8192, "cuda": 16384}
_MIN_BATCH_TOKENS = 256
_DEVICE_MEMORY_SHARE = 4  # activations may take a quarter of an accelerator's memory
_HEADS = ("affine", "network", "capped", "streamed", "none")
_BASIS_OF = {"logits": "head", "hidden": "identity"}
# Nominal rates for "a window is about a minute of work"; a constant, so that the window does not depend on the day's load.
_NOMINAL_FLOPS = {"cpu": 1e11, "mps": 2e12, "cuda": 5e13}
_WINDOW_SECONDS = 60
_STREAMED_WINDOW_BYTES = 128 << 20  # of V-wide float32 means; two windows are under way at a time


class TorchSource:
    """A Hugging Face causal LM; implements ``core.embedder.EmbedderSource``."""

    def __init__(self, files: AnyModelFiles) -> None:
        self._files = files

    def identity(self) -> ModelIdentity:
        """Digests of weights, configuration and tokenizer; no model is loaded."""
        return self._files.identity()

    def hardware(self, config: EmbeddingConfig) -> dict[str, object]:
        """Device kind, its capability, and threads, as this run would use them."""
        device = resolve_device(config.device or "auto")
        return {"device": device.type, "capability": best_capability(device), "threads": config.threads or num_cores()}

    def create(
        self, prompts: PromptReader, config: EmbeddingConfig, *, memory_bytes: int, work: Path, observer: Observer
    ) -> LogitEmbedder:
        """Load the model, probe it on a seeded sample, resolve every setting, and make the basis.

        Raises
        ------
        ModelError, BudgetError, RowError
            The model cannot be used, cannot fit, or gives no usable row on any sampled prompt.
        """
        started = time.perf_counter()
        observer(StageStarted(stage="model", total=1, unit="model"))
        threads = config.threads or num_cores()
        torch.set_num_threads(threads)
        space, pooling = config.space or "logits", config.pooling or "mean"
        loaded = self._load(config.device or "auto", space)
        max_tokens = _max_tokens(config, loaded, observer)
        model = SplitModel(loaded.model, headless=space == "hidden")
        tokenizer = PromptTokenizer(loaded.tokenizer, max_tokens, model.num_tokens)
        sample = tokenizer.encode(prompts.sample(seeded_sample(len(prompts), _SAMPLE_ROWS, 0).tolist()))
        head, capped, columns = _head_and_columns(model, _probe_tokens(sample).to(loaded.device), space)
        if config.vocab == "tokenizer":
            columns = min(columns, len(loaded.tokenizer))
        parts = ModelParts(model=model, head=head, capped=capped, tokenizer=tokenizer, device=loaded.device)
        spec = EmbeddingSpec(
            dimension=columns,
            rank=0,
            columns="hidden" if space == "hidden" else config.vocab or "model",
            head=_kind_of(model, head, capped, space),
            head_scale=1.0 if head is None else head.scale,
            pooling=pooling_rule(space, pooling),
            normalization="l2",
            token_rule=TOKEN_RULE,
            max_tokens=max_tokens,
            batch_tokens=config.batch_tokens or _batch_tokens(loaded.device, model),
            dtype="float32",
            device=loaded.device.type,
            capability=capability_of(loaded.device),
            threads=threads,
            basis=_BASIS_OF[space] if head is not None else "range-finder",
        )
        window_rows = _window_rows(spec, model, sample, memory_bytes)
        spec = _fit_batch(spec, config, model, window_rows, memory_bytes)
        embedder = _with_basis(parts, spec, prompts, window_rows, work)
        wanted = config.dtype or "auto"
        if wanted == "auto" and _needs(embedder.spec, model, window_rows, "bfloat16") > memory_bytes:
            wanted = "float32"  # whose kernels are not made to shape, and kept
        dtype = self._pick_dtype(embedder, parts, wanted, sample, observer)
        if dtype != "float32":
            model.to_dtype(DTYPES[dtype])
            spec = dataclasses.replace(embedder.spec, dtype=dtype)
            # made anew: how many batches are in flight follows from their size
            embedder = LogitEmbedder(parts, _wider_batch(spec, config, model, window_rows, memory_bytes), embedder.basis_VR)
        _pack(embedder, window_rows, memory_bytes)
        _note_plan(embedder, sample, window_rows)
        observer(StageFinished(stage="model", seconds=time.perf_counter() - started))
        return embedder

    def _load(self, device: str, space: Space) -> LoadedModel:
        return load_model(self._files, device, space=space)

    def _pick_dtype(
        self, embedder: LogitEmbedder, parts: ModelParts, wanted: str, sample: Sequence[TokenRow], observer: Observer
    ) -> str:
        """The backbone's dtype; ``auto`` takes bfloat16 only where it is fast and a probe shows it moves no weight."""
        if wanted != "auto":
            return wanted
        if not has_fast_bfloat16(parts.device):
            return "float32"
        space = _space_of(embedder.spec)
        # a second copy, because rounding the weights in place could not be undone
        other = SplitModel(self._load(str(parts.device), space).model, headless=space == "hidden")
        if embedder.spec.head == "network":
            other.pool_features()
        other.to_dtype(torch.bfloat16)
        lower = LogitEmbedder(dataclasses.replace(parts, model=other), embedder.spec, embedder.basis_VR)
        tv = total_variation(_probe_distances(embedder, sample), _probe_distances(lower, sample))
        if tv <= _DTYPE_MAX_TV:
            return "bfloat16"
        observer(Notice(message=f"bfloat16 would move the weights by TV {tv:.1e} on {len(sample)} prompts: float32 used"))
        return "float32"

    def take_over(
        self, prompts: PromptReader, spec: EmbeddingSpec, basis_VR: NDArray[np.float32], *, memory_bytes: int
    ) -> LogitEmbedder:
        """Load the model under another store's settings and basis; no setting is decided, windows and cost are."""
        embedder = self.reopen(spec, basis_VR)
        sample = embedder.tokens(prompts.sample(seeded_sample(len(prompts), _SAMPLE_ROWS, 0).tolist()))
        _note_plan(embedder, sample, _window_rows(spec, embedder.model, sample, memory_bytes))
        return embedder

    def reopen(self, spec: EmbeddingSpec, basis_VR: NDArray[np.float32]) -> LogitEmbedder:
        """Load the model under a stored spec; nothing is probed or decided."""
        options = space_and_pooling(spec.pooling)
        if options is None or spec.head not in _HEADS or spec.token_rule != TOKEN_RULE:
            raise _not_ours(spec)
        torch.set_num_threads(spec.threads)
        loaded = self._load(spec.device, options[0])
        model = SplitModel(loaded.model, headless=options[0] == "hidden")
        head = None
        if spec.head == "none":
            head = identity_head(model.width, loaded.device)
        elif spec.head in ("affine", "network"):
            if spec.head == "network":
                model.pool_features()
            if (head := model.stored_affine_head(spec.head_scale)) is None:
                raise _not_ours(spec)
        capped = model.stored_capped_head() if spec.head == "capped" else None
        model.to_dtype(DTYPES[spec.dtype])
        if spec.has_packed_layers and not model.pack_layers():
            raise ModelError(
                f"linear layers of {type(loaded.model).__name__} cannot be packed here, as the store's spec has them",
                hint="continue with the versions of torch and transformers that began the store",
            )
        tokenizer = PromptTokenizer(loaded.tokenizer, spec.max_tokens, model.num_tokens)
        parts = ModelParts(model=model, head=head, capped=capped, tokenizer=tokenizer, device=loaded.device)
        embedder = LogitEmbedder(parts, spec, basis_VR)
        if spec.has_packed_head:
            embedder.pack_head()
        return embedder


def _pack(embedder: LogitEmbedder, window_rows: int, memory_bytes: int) -> None:
    """Pack linear layers, and the head with them, where the device and the class let it be done and the kernels fit.

    The spec says so then.
    """
    packed = dataclasses.replace(embedder.spec, capability=embedder.spec.capability + PACKED_LAYERS)
    fits = _needs(packed, embedder.model, window_rows, packed.dtype) <= memory_bytes
    if fits and embedder.model.pack_layers():
        embedder.spec = packed
        if embedder.pack_head():
            embedder.spec = dataclasses.replace(packed, capability=packed.capability + PACKED_HEAD)


def _note_plan(embedder: LogitEmbedder, sample: Sequence[TokenRow], window_rows: int) -> None:
    """What the plan of a new store asks for: rows of a window, the share that is cut, and a timed estimate."""
    started = time.perf_counter()
    embedder.pool(sample[:_TIMED_ROWS], _no_check)
    embedder.seconds_per_row = (time.perf_counter() - started) / len(sample[:_TIMED_ROWS])
    embedder.max_window_rows = window_rows
    embedder.truncated_share = sum(row.was_cut for row in sample) / len(sample)


class InMemorySource(TorchSource):
    """A causal LM of transformers that is loaded already, with its tokenizer. Copies are used: the model stays as it is."""

    def __init__(self, model: torch.nn.Module, tokenizer: Any) -> None:  # noqa: ANN401 - transformers is untyped
        self._model = model
        self._tokenizer = tokenizer

    def identity(self) -> ModelIdentity:
        """Names of classes alone: nothing that is made from it may be continued by another process."""
        return ModelIdentity(
            name="in memory",
            architecture=type(self._model).__name__,
            revision=None,
            weights_sha256="",
            config_sha256="",
            tokenizer_sha256="",
            trust_remote_code=False,
        )

    def _load(self, device: str, space: Space) -> LoadedModel:
        model: Any = copy.deepcopy(self._model).float()
        return as_loaded(model.base_model if space == "hidden" else model, self._tokenizer, device)


def _max_tokens(config: EmbeddingConfig, loaded: LoadedModel, observer: Observer) -> int:
    wanted = config.max_tokens or 512
    if loaded.max_positions is not None and wanted > loaded.max_positions:
        observer(Notice(message=f"max_tokens {wanted} is more than the model's positions: {loaded.max_positions} used"))
        return loaded.max_positions
    return wanted


def _not_ours(spec: EmbeddingSpec) -> ModelError:
    return ModelError(
        f"the store has head {spec.head!r}, pooling {spec.pooling!r} and token rule {spec.token_rule!r}, which this "
        "embstore cannot continue",
        hint="continue it with the embstore release that began it",
    )


def _space_of(spec: EmbeddingSpec) -> Space:
    return "hidden" if spec.head == "none" else "logits"


def _kind_of(model: SplitModel, head: AffineHead | None, capped: CappedHead | None, space: Space) -> str:
    """Which way rows are made, one of _HEADS."""
    if space == "hidden":
        return "none"
    if head is not None:
        return "network" if model.pools_features else "affine"
    return "capped" if capped is not None else "streamed"


def _head_and_columns(
    model: SplitModel, probe_1T: torch.Tensor, space: Space
) -> tuple[AffineHead | None, CappedHead | None, int]:
    """The head as an affine or a capped map, neither where only its class can compute it, and the width of a row."""
    if space == "hidden":
        return identity_head(model.width, probe_1T.device), None, model.width
    with torch.inference_mode():
        head = model.affine_head(probe_1T)
        hidden_TD = model.hidden(probe_1T, torch.ones_like(probe_1T, dtype=torch.bool))[0]
        columns = model.head(hidden_TD[:1]).shape[1]
        capped = model.capped_head(probe_1T) if head is None else None
        if head is None and capped is None:
            head = model.network_head(probe_1T)
        return head, capped, columns


def _batch_tokens(device: torch.device, model: SplitModel) -> int:
    """Padded tokens of a batch: a constant of the device's kind, halved while activations would crowd its memory."""
    tokens = _BATCH_TOKENS[device.type]
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory // _DEVICE_MEMORY_SHARE
        while tokens > _MIN_BATCH_TOKENS and activation_bytes(tokens, model.width, model.inner_width) > memory:
            tokens //= 2
    return tokens


def _probe_tokens(sample: Sequence[TokenRow]) -> torch.Tensor:
    longest = max(sample, key=lambda row: len(row.ids_T)).ids_T[:_HEAD_PROBE_TOKENS]
    # two at least, as everywhere
    return torch.from_numpy(np.resize(longest, max(2, len(longest))) if len(longest) else np.zeros(2, dtype=np.int64))[None]


def _window_rows(spec: EmbeddingSpec, model: SplitModel, sample: Sequence[TokenRow], memory_bytes: int) -> int:
    """Rows of one window: 4096, about a minute of work at most, and what V-wide means allow on the streaming path."""
    mean_tokens = float(np.mean([len(row.ids_T) for row in sample]))
    minute = int(_WINDOW_SECONDS * _NOMINAL_FLOPS[spec.device] / max(1.0, 2 * model.backbone_parameters * mean_tokens))
    wide = MAX_WINDOW_ROWS
    if is_streamed(spec):
        wide = min(_STREAMED_WINDOW_BYTES, memory_bytes // 8) // (4 * spec.dimension)
    return max(16, min(MAX_WINDOW_ROWS, minute, wide))


def _needs(spec: EmbeddingSpec, model: SplitModel, window_rows: int, dtype: str) -> int:
    """Bytes of a window with the smallest chunk."""
    trial = dataclasses.replace(spec, dtype=dtype)
    return window_bytes(trial, model.width, model.inner_width, chunk_rows=16, window_rows=window_rows)


def _fit_batch(
    spec: EmbeddingSpec, config: EmbeddingConfig, model: SplitModel, window_rows: int, memory_bytes: int
) -> EmbeddingSpec:
    """Halve the batch until a window with the smallest chunk fits the budget; an explicit batch is taken as it is."""
    dtype = config.dtype if config.dtype in DTYPES else "float32"
    full = dataclasses.replace(spec, rank=min(model.width + 1, spec.dimension))

    def needs(tokens: int) -> int:
        return _needs(dataclasses.replace(full, batch_tokens=tokens), model, window_rows, dtype)

    tokens = spec.batch_tokens
    while config.batch_tokens is None and tokens > _MIN_BATCH_TOKENS and needs(tokens) > memory_bytes:
        tokens //= 2
    if needs(tokens) > memory_bytes:
        raise BudgetError(
            f"embedding needs at least {format_bytes(needs(tokens))}, --memory-budget is {format_bytes(memory_bytes)}",
            hint=f"give --memory-budget {-(-needs(tokens) // (1 << 20))}MiB or more",
        )
    return dataclasses.replace(spec, batch_tokens=tokens)


def _wider_batch(
    spec: EmbeddingSpec, config: EmbeddingConfig, model: SplitModel, window_rows: int, memory_bytes: int
) -> EmbeddingSpec:
    """On a CPU twice the tokens in 16 bits, which take the same bytes, unless batches were chosen or made to fit."""
    full = _BATCH_TOKENS["cpu"]
    wider = dataclasses.replace(spec, batch_tokens=2 * full)
    is_free = spec.device == "cpu" and config.batch_tokens is None and spec.batch_tokens == full
    return wider if is_free and _needs(wider, model, window_rows, spec.dtype) <= memory_bytes else spec


def _with_basis(
    parts: ModelParts, spec: EmbeddingSpec, prompts: PromptReader, window_rows: int, work: Path
) -> LogitEmbedder:
    """An embedder with its basis: the head's own span, or that of min(N, 4 R) embedded prompts."""
    max_rank = min(parts.model.width + 1, spec.dimension)
    if parts.head is not None:
        read_block, width = spanning_columns(parts.head, spec.dimension)
    else:
        pilot_NV = _pilot_rows(parts, spec, prompts, 4 * max_rank, window_rows, work)
        width = len(pilot_NV)

        def read_block(start: int, stop: int) -> torch.Tensor:
            return torch.from_numpy(np.asarray(pilot_NV[:, start:stop])).T

    # a mapped scratch file: the basis does not count as anonymous memory
    flat = map_scratch(work / "basis.npy", (spec.dimension * min(max_rank, width),), np.float32)
    basis_VR = orthonormal_basis(read_block, spec.dimension, width, max_rank=max_rank, scratch=flat)
    return LogitEmbedder(parts, dataclasses.replace(spec, rank=basis_VR.shape[1]), basis_VR)


def _pilot_rows(
    parts: ModelParts, spec: EmbeddingSpec, prompts: PromptReader, wanted: int, window_rows: int, work: Path
) -> NDArray[np.float32]:
    """Unit rows float32 [n, V] of a seeded sample, in a mapped scratch file."""
    rows = seeded_sample(len(prompts), wanted, 0).tolist()
    pilot_NV = map_scratch(work / "pilot.npy", (len(rows), spec.dimension), np.float32)
    pilot = LogitEmbedder(parts, spec, np.zeros((spec.dimension, 0), dtype=np.float32))
    count = 0
    for start in range(0, len(rows), window_rows):
        window = pilot.pool(parts.tokenizer.encode(prompts.sample(rows[start : start + window_rows])), _no_check)
        unit_BV, _, norm_B = pilot.unit_rows(window, 0, len(window.ok_W))
        norms = norm_B.cpu().numpy()
        chosen = unit_BV.cpu().numpy()[window.ok_W & np.isfinite(norms) & (norms > 0)]
        pilot_NV[count : count + len(chosen)] = chosen
        count += len(chosen)
    if count == 0:
        raise RowError("no sampled prompt gives a usable row", hint="can this model process any of these prompts?")
    return pilot_NV[:count]


def _probe_distances(embedder: LogitEmbedder, sample: Sequence[TokenRow]) -> NDArray[np.float64]:
    """Floored mean distance of each sampled prompt to its nearest others in the sample."""
    window = embedder.pool(sample, _no_check)
    coordinates = embedder.unit_rows(window, 0, len(sample))[1].cpu().numpy()
    coordinates = coordinates[np.isfinite(coordinates).all(axis=1)]
    k = min(_DTYPE_PROBE_K, len(coordinates) - 1)
    if k < 1:
        return np.ones(max(1, len(coordinates)))
    points = torch.from_numpy(coordinates.astype(np.float64))
    # differences, not a Gram matrix: at these distances cancellation would be felt even in float64
    distances = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(torch.inf)
    nearest = distances.topk(k, largest=False).values.numpy()
    floored: NDArray[np.float64] = np.maximum(nearest.mean(axis=1), NOISE_FLOOR)
    return floored


def _no_check() -> None:
    """Probes are short: nothing interrupts them."""
