"""From a located model to an embedder: a new store decides every setting once, a resume takes them from its spec.

``TorchSource.create`` reads from top to bottom: load, take the model apart, examine its class, settle batches and windows,
find the basis, choose the dtype, pack, embed.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers
from numpy.typing import NDArray
from torch import nn

from embstore.core.config import DEFAULT_CHAT_DATE, EmbeddingConfig, Space
from embstore.core.errors import ModelError
from embstore.core.events import Notice, Observer, ignore, stage
from embstore.core.interfaces import PromptReader
from embstore.core.prompts import Prompt
from embstore.core.sampling import seeded_sample
from embstore.core.spec import EmbeddingSpec, ModelIdentity, Versions
from embstore.host.allocator import return_large_blocks
from embstore.host.device import capability_of, has_fast_bfloat16, library_versions, resolve_device
from embstore.host.threads import num_cores
from embstore.model.adapters import without_adapter
from embstore.model.backbone import SplitModel
from embstore.model.digests import KnownDigests, counted_bytes
from embstore.model.dtype_choice import takes_bfloat16
from embstore.model.embed import DTYPES, LogitEmbedder, ModelParts
from embstore.model.finish import AffineFinisher, Finisher, make_finisher
from embstore.model.formats import Checkpoint, LoadedCheckpoint
from embstore.model.heads import AffineHead, stays_float32
from embstore.model.packed import can_pack
from embstore.model.pilot import basis_of_sample, find_basis, largest_rank, note_plan
from embstore.model.positions import usable_positions
from embstore.model.probe import examine, open_head, packable_layers, probe_tokens
from embstore.model.settings import (
    Settings,
    capacity_bytes,
    does_not_fit,
    in_16_bits,
    settle_batches,
    window_rows_of,
)
from embstore.model.tokens import TOKEN_RULE, PromptTokenizer, TokenRow, template_reads_clock

_SAMPLE_ROWS = 256
_DEFAULT_MAX_TOKENS = 512
_EMULATED = (
    "this processor does not compute in bfloat16 and emulates it, which takes several times as long as float32; "
    "leave out --dtype bfloat16, unless other rows were made in it"
)
_BASIS_OF = {"affine": "gram", "none": "identity"}  # any other head: "range-finder"


class Template:
    """The chat template of a tokenizer; implements ``core.interfaces.ChatTemplate``."""

    def __init__(self, tokenizer: Any, chat_date: str | None) -> None:  # noqa: ANN401 - transformers is untyped
        self._tokenizer = PromptTokenizer(tokenizer, max_tokens=1, num_tokens=0, chat_date=chat_date)
        special = str(tokenizer.special_tokens_map)
        content = [TOKEN_RULE, transformers.__version__, tokenizer.chat_template, special, chat_date]
        self.digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def refusal(self, prompt: Prompt) -> str | None:
        """See ``PromptTokenizer.refusal``."""
        return self._tokenizer.refusal(prompt)


class TorchSource:
    """A Hugging Face causal LM; implements ``core.interfaces.EmbedderSource``."""

    def __init__(self, files: Checkpoint, *, model_memory_bytes: int | None = None) -> None:
        self._files, self._model_memory_bytes = files, model_memory_bytes

    def __getstate__(self) -> dict[str, object]:
        """With the digests of the files that were read: a worker on this host does not read them for that again."""
        return {**vars(self), "digests": KnownDigests.of_this_process()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state.pop("digests").learn()
        vars(self).update(state)

    def identity(self, observer: Observer = ignore) -> ModelIdentity:
        """Digests of weights, configuration and tokenizer; no model is loaded."""
        left = self._files.weight_bytes  # small files are read as well, and not counted
        with stage(observer, "hash", left, "bytes") as advance:

            def count(num_bytes: int) -> None:
                nonlocal left
                step, left = min(num_bytes, left), left - min(num_bytes, left)
                advance(step)

            with counted_bytes(count):
                return self._files.identity()

    def template(self, chat_date: str | None) -> Template | None:
        """The tokenizer's chat template, if it has one."""
        tokenizer = self._files.load_tokenizer()
        return Template(tokenizer, chat_date) if tokenizer.chat_template else None

    def device(self, name: str) -> str:
        """The device of this name as this process sees it."""
        return str(resolve_device(name))

    def hardware(self, config: EmbeddingConfig) -> dict[str, object]:
        """What this run would compute with, under the names of ``EmbeddingSpec``; packed is what could be packed."""
        device = resolve_device(config.device or "auto")
        return {
            "device": device.type,
            "capability": capability_of(device),
            "packed_layers": can_pack(device),
            "packed_head": can_pack(device),
            "threads": config.threads or num_cores(),
            "versions": _versions(),
        }

    def reads_clock(self) -> bool:
        """Whether the chat template asks for the current time; loads the tokenizer and not the model."""
        return template_reads_clock(self._files.load_tokenizer())

    def create(
        self, prompts: PromptReader, config: EmbeddingConfig, *, memory_bytes: int, work: Path | None, observer: Observer
    ) -> LogitEmbedder:
        """Load the model, probe it on a seeded sample, resolve every setting, and make the basis.

        Without ``work``, a basis that needs a sample of rows is not made.

        Raises
        ------
        ModelError, BudgetError, RowError
            The model cannot be used, cannot fit, or gives no usable row on any sampled prompt.
        """
        return_large_blocks()
        threads = config.threads or num_cores()
        torch.set_num_threads(threads)
        space: Space = config.space or "logits"
        device = resolve_device(config.device or "auto")
        with stage(observer, "load", self._files_bytes, "bytes"):
            loaded = self._load(space)
        with stage(observer, "probe"):
            positions = usable_positions(loaded.model)
            model = SplitModel(loaded.model, device, loaded.merges, headless=space == "hidden")
            chat_date = config.chat_date or DEFAULT_CHAT_DATE
            max_tokens = _max_tokens(config, positions, observer)
            tokenizer = PromptTokenizer(loaded.tokenizer, max_tokens, model.num_tokens, chat_date=chat_date)
            sample = _sampled(tokenizer.encode, prompts)
            self._settle(model, torch.float32, asked=False)
            head, columns = examine(model, None if space == "hidden" else probe_tokens(sample).to(device))
        parts = ModelParts(model=model, head=open_head(model, head), tokenizer=tokenizer, device=device)
        spec = EmbeddingSpec(
            dimension=min(columns, len(loaded.tokenizer)) if config.vocab == "tokenizer" else columns,
            rank=0,
            columns="hidden" if space == "hidden" else config.vocab or "model",
            head=head,
            space=space,
            pooling=config.pooling or "mean",
            normalization="l2",
            token_rule=TOKEN_RULE,
            max_tokens=tokenizer.max_tokens,
            batch_tokens=0,
            dtype="float32",
            device=device.type,
            capability=capability_of(device),
            threads=threads,
            basis=_BASIS_OF.get(head.kind, "range-finder"),
            token_limit=positions,
            versions=_versions(),
            chat_date=chat_date,
        )
        settings = settle_batches(spec, config, model, mean_tokens=_mean_tokens(sample), memory_bytes=memory_bytes)
        basis_VR = None
        if not head.pools_logits:
            with stage(observer, "basis"):
                basis_VR = find_basis(parts, settings, memory_bytes=memory_bytes)
            settings = settings.changed(rank=basis_VR.shape[1])
        finisher = make_finisher(settings.spec, parts.head, _empty(spec) if basis_VR is None else basis_VR, device)
        settings = self._with_dtype(parts, settings, finisher, config, sample, len(prompts), memory_bytes, observer)
        if basis_VR is None:  # of embedded rows, so it is found by the dtype that makes them
            if work is None:
                basis_VR, rank = _empty(spec), largest_rank(parts, spec.dimension)
            else:
                with stage(observer, "basis"):
                    basis_VR = basis_of_sample(parts, settings, prompts, work, memory_bytes=memory_bytes)
                rank = basis_VR.shape[1]
            settings = settings.changed(rank=rank)
            finisher = make_finisher(settings.spec, parts.head, basis_VR, device)
        with stage(observer, "pilot"):
            packed = settings.changed(packed_layers=True)
            if packed.needed_bytes(model) <= memory_bytes and self._pack_layers(model):
                settings = packed.changed(packed_head=_may_pack(parts, packed) and _pack_head(finisher))
            embedder = LogitEmbedder(parts, settings.spec, basis_VR, finisher, memory_bytes=memory_bytes)
            note_plan(embedder, sample, settings.window_rows)
        return embedder

    def take_over(
        self,
        prompts: PromptReader,
        spec: EmbeddingSpec,
        basis_VR: NDArray[np.float32],
        *,
        memory_bytes: int,
        device: str | None = None,
        observer: Observer = ignore,
    ) -> LogitEmbedder:
        """Load the model under another store's settings and basis, for a new store; only its windows are decided here."""
        _refuse_unknown(spec, hint="build without --reuse")
        embedder = self.reopen(spec, basis_VR, memory_bytes=memory_bytes, device=device, observer=observer)
        with stage(observer, "pilot"):
            sample = _sampled(embedder.tokens, prompts)
            window_rows = window_rows_of(spec, embedder.model, mean_tokens=_mean_tokens(sample), memory_bytes=memory_bytes)
            note_plan(embedder, sample, window_rows)
        return embedder

    def reopen(
        self,
        spec: EmbeddingSpec,
        basis_VR: NDArray[np.float32],
        *,
        memory_bytes: int = 0,
        device: str | None = None,
        observer: Observer = ignore,
    ) -> LogitEmbedder:
        """Load the model under a stored spec; nothing is decided.

        Raises
        ------
        ModelError
            The model cannot be loaded, or the spec has a head, pooling or token rule that this embstore does not compute.
        """
        _refuse_unknown(spec)
        return_large_blocks()
        torch.set_num_threads(spec.threads)
        with stage(observer, "load", self._files_bytes, "bytes"):
            loaded = self._load(_space_of(spec))
        with stage(observer, "probe"):
            return self._reopened(spec, basis_VR, loaded, resolve_device(device or spec.device), memory_bytes)

    def _reopened(
        self,
        spec: EmbeddingSpec,
        basis_VR: NDArray[np.float32],
        loaded: LoadedCheckpoint,
        device: torch.device,
        memory_bytes: int,
    ) -> LogitEmbedder:
        model = SplitModel(loaded.model, device, loaded.merges, headless=spec.space == "hidden")
        self._settle(model, torch.float32, asked=False)
        examine(model)
        head = open_head(model, spec.head)
        if spec.head.kind == "streamed":
            model.hold_head()
        self._settle(model, DTYPES[spec.dtype])
        if spec.packed_layers and not self._pack_layers(model):
            raise ModelError(
                "the store's rows were made with packed layers, which this version of torch cannot pack",
                hint="continue with the versions of torch and transformers that began the store",
            )
        tokenizer = PromptTokenizer(loaded.tokenizer, spec.max_tokens, model.num_tokens, chat_date=spec.chat_date)
        parts = ModelParts(model=model, head=head, tokenizer=tokenizer, device=device)
        finisher = make_finisher(spec, head, basis_VR, device)
        if spec.packed_head:
            _pack_head(finisher)
        return LogitEmbedder(parts, spec, basis_VR, finisher, memory_bytes=memory_bytes)

    def _load(self, space: Space) -> LoadedCheckpoint:
        return self._files.load(space)

    @property
    def _files_bytes(self) -> int | None:
        return self._files.weight_bytes

    def _settle(
        self, model: SplitModel, dtype: torch.dtype, packed: Sequence[nn.Linear] = (), *, asked: bool = True
    ) -> None:
        """Plain or layered order, by ``--model-memory``; a probe (not ``asked``) takes what it needs, a layer at a time."""
        capacity = capacity_bytes(model, dtype, self._model_memory_bytes if asked else None)
        try:
            model.settle(dtype, capacity, packed)
        except torch.OutOfMemoryError as error:
            raise does_not_fit(model, dtype, self._model_memory_bytes) from error

    def _pack_layers(self, model: SplitModel) -> bool:
        return bool(packable_layers(model, lambda layers: self._settle(model, model.dtype, layers)))

    def _with_dtype(
        self,
        parts: ModelParts,
        settings: Settings,
        finisher: Finisher,
        config: EmbeddingConfig,
        sample: Sequence[TokenRow],
        num_rows: int,
        memory_bytes: int,
        observer: Observer,
    ) -> Settings:
        """Settle the backbone's dtype, as asked or as ``dtype_choice`` finds; the settings that go with it."""
        model = parts.model
        narrow = in_16_bits(settings, config, model, memory_bytes=memory_bytes)
        if config.dtype in (None, "auto"):
            is_narrow = takes_bfloat16(
                parts,
                settings,
                finisher,
                sample,
                num_rows=num_rows,
                memory_bytes=memory_bytes,
                settle=lambda dtype: self._settle(model, dtype, asked=dtype == torch.bfloat16),
                observer=observer,
            )
        else:
            is_narrow = config.dtype == "bfloat16"
            if is_narrow and not has_fast_bfloat16(parts.device):
                observer(Notice(message=_EMULATED))
        self._settle(model, torch.bfloat16 if is_narrow else torch.float32)
        return narrow if is_narrow else settings


class InMemorySource(TorchSource):
    """A causal LM of transformers that is loaded already, with its tokenizer. It is copied, and stays as it is."""

    def __init__(self, model: torch.nn.Module, tokenizer: Any) -> None:  # noqa: ANN401 - transformers is untyped
        if isinstance(model, nn.parallel.DistributedDataParallel):  # every process has all of it
            model = model.module
        self._model, self._tokenizer, self._model_memory_bytes = model, tokenizer, None

    def identity(self, observer: Observer = ignore) -> ModelIdentity:
        """Only the names of classes: another process cannot continue what is made from this model."""
        return ModelIdentity(
            name="in memory",
            architecture=type(self._model).__name__,
            revision=None,
            weights_sha256="",
            config_sha256="",
            tokenizer_sha256="",
            trust_remote_code=False,
        )

    def reads_clock(self) -> bool:
        """See ``TorchSource.reads_clock``."""
        return template_reads_clock(self._tokenizer)

    def template(self, chat_date: str | None) -> Template | None:
        """That of the tokenizer at hand."""
        return Template(self._tokenizer, chat_date) if self._tokenizer.chat_template else None

    def _load(self, space: Space) -> LoadedCheckpoint:
        _refuse_scattered(self._model)
        # its structure is copied, because layers are replaced while they compute; the weights are the caller's own
        shared = {id(tensor): tensor for tensor in (*self._model.parameters(), *self._model.buffers())}
        model: Any = copy.deepcopy(self._model, shared)
        model, merges = without_adapter(model) if hasattr(model, "peft_config") else (model, {})
        if getattr(model.config, "_attn_implementation", "sdpa") not in ("eager", "sdpa"):
            model.set_attn_implementation("sdpa")  # the copy's: kernels of training refuse float32, and builds use this one
        part = model.base_model if space == "hidden" else model
        return LoadedCheckpoint(model=part.eval(), tokenizer=self._tokenizer, merges=merges)

    @property
    def _files_bytes(self) -> int | None:
        return None


def _refuse_scattered(model: torch.nn.Module) -> None:
    """Refuse a model whose weights are not whole in this process, or that is not a model of transformers."""
    scattered = [(name, "FSDP") for name, part in model.named_modules() if type(part).__name__ == "FullyShardedDataParallel"]
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "device_mesh"):
            scattered.append((name, "FSDP2 or tensor parallelism"))
        elif hasattr(parameter, "ds_id"):
            scattered.append((name, "DeepSpeed ZeRO-3"))
        elif parameter.is_meta:
            scattered.append((name, "offloading"))
    for name, by in scattered[:1]:
        raise ModelError(
            f"{'.'.join(filter(None, (type(model).__name__, name)))} is not whole in this process, because of {by}",
            hint="embstore build PROMPTS --model MODEL --out STORE, from the checkpoint; load_weights(STORE) in the trainer",
        )
    if not hasattr(model, "config"):
        raise ModelError(
            f"{type(model).__name__} is not a model of transformers: it has no config",
            hint="give the model that it wraps: model.module, or accelerator.unwrap_model(model)",
        )


def _versions() -> Versions:
    return library_versions(transformers=transformers.__version__, tokenizers=tokenizers.__version__)


def _sampled(encode: Callable[[Sequence[Prompt]], list[TokenRow]], prompts: PromptReader) -> list[TokenRow]:
    return encode(prompts.sample(seeded_sample(len(prompts), _SAMPLE_ROWS, 0).tolist()))


def _mean_tokens(sample: Sequence[TokenRow]) -> float:
    return float(np.mean([len(row.ids_T) for row in sample]))


def _max_tokens(config: EmbeddingConfig, positions: int | None, observer: Observer) -> int:
    wanted = config.max_tokens or _DEFAULT_MAX_TOKENS
    if positions is not None and wanted > positions:
        taken = f"{positions}, the most that this model takes"
        observer(Notice(message=f"--max-tokens {wanted} is reduced to {taken}"))
        return positions
    return wanted


def _pack_head(finisher: Finisher) -> bool:
    """Pack the output layer, where rows are products with it."""
    if not isinstance(finisher, AffineFinisher):
        return False
    finisher.pack()
    return True


def _empty(spec: EmbeddingSpec) -> NDArray[np.float32]:
    return np.zeros((spec.dimension, 0), dtype=np.float32)


def _may_pack(parts: ModelParts, settings: Settings) -> bool:
    """Whether a new store may hold the output layer in float32; an old one does what its spec says."""
    return isinstance(parts.head, AffineHead) and stays_float32(parts.head, settings.spec.dimension)


def _space_of(spec: EmbeddingSpec) -> Space:
    return "hidden" if spec.space == "hidden" else "logits"


def _refuse_unknown(spec: EmbeddingSpec, *, hint: str | None = None) -> None:
    if spec.head.kind == "network":
        raise ModelError(
            "this store pools after a network in front of the output layer; embstore no longer does, so new rows would "
            "differ from the stored ones",
            hint=hint
            or "begin again with embstore build PROMPTS --model MODEL and another --out, or finish it with the embstore "
            "release that began it",
        )
    known = (spec.head.kind in ("affine", "capped", "streamed", "none"), spec.pooling in ("mean", "last"))
    if not all(known) or spec.token_rule != TOKEN_RULE:
        raise ModelError(
            f"embstore cannot continue head {spec.head.kind!r}, pooling {spec.pooling!r}, token rule {spec.token_rule!r}",
            hint=hint or "continue it with the embstore release that began it",
        )
