"""From a located model to an embedder: a new store decides every setting once, a resume takes them from its spec.

``TorchSource.create`` reads from top to bottom: load, take the model apart, find its head, settle batches and windows, find
the basis, choose the dtype, pack, embed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers
from numpy.typing import NDArray

from embstore.core.config import EmbeddingConfig, Space
from embstore.core.errors import ModelError
from embstore.core.events import Notice, Observer, ignore, stage
from embstore.core.interfaces import PromptReader
from embstore.core.prompts import Prompt
from embstore.core.sampling import seeded_sample
from embstore.core.spec import EmbeddingSpec, ModelIdentity, Versions
from embstore.host.device import capability_of, has_fast_bfloat16, library_versions, resolve_device
from embstore.host.threads import num_cores
from embstore.model.digests import KnownDigests, counted_bytes
from embstore.model.embed import DTYPES, LogitEmbedder, ModelParts
from embstore.model.finish import AffineFinisher, Finisher, make_finisher
from embstore.model.load import Checkpoint, LoadedModel, as_loaded, load_model
from embstore.model.packed import can_pack, pack_layers
from embstore.model.pilot import find_basis, note_plan, weights_moved
from embstore.model.probe import find_head, open_head, probe_tokens, split_model
from embstore.model.settings import Settings, in_16_bits, settle_batches, window_rows_of
from embstore.model.tokens import TOKEN_RULE, PromptTokenizer, TokenRow

_SAMPLE_ROWS = 256
_DEFAULT_MAX_TOKENS = 512
_DTYPE_MAX_TV = 1e-3
_BASIS_OF = {"affine": "head", "none": "identity"}  # any other head: "range-finder"


class TorchSource:
    """A Hugging Face causal LM; implements ``core.interfaces.EmbedderSource``."""

    def __init__(self, files: Checkpoint) -> None:
        self._files = files

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

    def create(
        self, prompts: PromptReader, config: EmbeddingConfig, *, memory_bytes: int, work: Path, observer: Observer
    ) -> LogitEmbedder:
        """Load the model, probe it on a seeded sample, resolve every setting, and make the basis.

        Raises
        ------
        ModelError, BudgetError, RowError
            The model cannot be used, cannot fit, or gives no usable row on any sampled prompt.
        """
        threads = config.threads or num_cores()
        torch.set_num_threads(threads)
        space: Space = config.space or "logits"
        with stage(observer, "load", self._files_bytes, "bytes"):
            loaded = self._load(config.device or "auto", space)
        device = loaded.device
        with stage(observer, "probe"):
            model = split_model(loaded.model, headless=space == "hidden")
            tokenizer = PromptTokenizer(loaded.tokenizer, _max_tokens(config, loaded, observer), model.num_tokens)
            sample = _sampled(tokenizer.encode, prompts)
            head, columns = find_head(model, probe_tokens(sample).to(device), space)
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
            token_limit=loaded.max_positions,
            versions=_versions(),
        )
        settings = settle_batches(spec, config, model, mean_tokens=_mean_tokens(sample), memory_bytes=memory_bytes)
        with stage(observer, "basis"):
            basis_VR = find_basis(parts, settings, prompts, work)
            settings = settings.changed(rank=basis_VR.shape[1])
            finisher = make_finisher(settings.spec, parts.head, basis_VR, device)
        if self._takes_bfloat16(parts, settings, finisher, config, sample, memory_bytes, observer):
            model.to_dtype(torch.bfloat16)
            settings = in_16_bits(settings, config, model, memory_bytes=memory_bytes)
        with stage(observer, "pilot"):
            packed = settings.changed(packed_layers=True)
            if packed.needed_bytes(model) <= memory_bytes and pack_layers(model):
                settings = packed.changed(packed_head=_pack_head(parts, finisher))
            embedder = LogitEmbedder(parts, settings.spec, basis_VR, finisher)
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
        embedder = self.reopen(spec, basis_VR, device=device, observer=observer)
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
        device: str | None = None,
        observer: Observer = ignore,
    ) -> LogitEmbedder:
        """Load the model under a stored spec; nothing is probed or decided.

        Raises
        ------
        ModelError
            The model cannot be loaded, or the spec has a head, pooling or token rule that this embstore does not compute.
        """
        _refuse_unknown(spec)
        torch.set_num_threads(spec.threads)
        with stage(observer, "load", self._files_bytes, "bytes"):
            return self._reopened(spec, basis_VR, self._load(device or spec.device, _space_of(spec)))

    def _reopened(self, spec: EmbeddingSpec, basis_VR: NDArray[np.float32], loaded: LoadedModel) -> LogitEmbedder:
        model = split_model(loaded.model, headless=spec.space == "hidden")
        head = open_head(model, spec.head)
        model.to_dtype(DTYPES[spec.dtype])
        if spec.packed_layers and not pack_layers(model):
            raise ModelError(
                "the store's rows were made with packed layers, which this version of torch cannot pack",
                hint="continue with the versions of torch and transformers that began the store",
            )
        tokenizer = PromptTokenizer(loaded.tokenizer, spec.max_tokens, model.num_tokens)
        parts = ModelParts(model=model, head=head, tokenizer=tokenizer, device=loaded.device)
        finisher = make_finisher(spec, head, basis_VR, loaded.device)
        if spec.packed_head:
            _pack_head(parts, finisher)
        return LogitEmbedder(parts, spec, basis_VR, finisher)

    def _load(self, device: str, space: Space) -> LoadedModel:
        return load_model(self._files, device, space=space)

    @property
    def _files_bytes(self) -> int | None:
        return self._files.weight_bytes

    def _takes_bfloat16(
        self,
        parts: ModelParts,
        settings: Settings,
        finisher: Finisher,
        config: EmbeddingConfig,
        sample: Sequence[TokenRow],
        memory_bytes: int,
        observer: Observer,
    ) -> bool:
        """Whether the backbone runs in bfloat16; ``auto`` takes it where it is fast and moves weights by a TV below 1e-3."""
        if config.dtype not in (None, "auto"):
            return config.dtype == "bfloat16"
        # kernels of bfloat16 are made for every shape, and kept: where they do not fit, float32 may
        if settings.changed(dtype="bfloat16").needed_bytes(parts.model) > memory_bytes or not has_fast_bfloat16(
            parts.device
        ):
            return False
        with stage(observer, "dtype"):
            # a second copy: casting in place would lose the float32 weights
            space = _space_of(settings.spec)
            other = split_model(self._load(str(parts.device), space).model, headless=space == "hidden")
            other.to_dtype(torch.bfloat16)
            tv = weights_moved(parts, other, settings, finisher, sample)
        if tv <= _DTYPE_MAX_TV:
            return True
        limits = f"limit {_DTYPE_MAX_TV:g}, {len(sample)} sampled prompts"
        observer(Notice(message=f"using float32: bfloat16 would change the weights by TV {tv:.1e} ({limits})"))
        return False


class InMemorySource(TorchSource):
    """A causal LM of transformers that is loaded already, with its tokenizer. It is copied, and stays as it is."""

    def __init__(self, model: torch.nn.Module, tokenizer: Any) -> None:  # noqa: ANN401 - transformers is untyped
        self._model = model
        self._tokenizer = tokenizer

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

    def _load(self, device: str, space: Space) -> LoadedModel:
        model: Any = copy.deepcopy(self._model).float()
        return as_loaded(model.base_model if space == "hidden" else model, self._tokenizer, device)

    @property
    def _files_bytes(self) -> int | None:
        return None


def _versions() -> Versions:
    return library_versions(transformers=transformers.__version__, tokenizers=tokenizers.__version__)


def _sampled(encode: Callable[[Sequence[Prompt]], list[TokenRow]], prompts: PromptReader) -> list[TokenRow]:
    return encode(prompts.sample(seeded_sample(len(prompts), _SAMPLE_ROWS, 0).tolist()))


def _mean_tokens(sample: Sequence[TokenRow]) -> float:
    return float(np.mean([len(row.ids_T) for row in sample]))


def _max_tokens(config: EmbeddingConfig, loaded: LoadedModel, observer: Observer) -> int:
    wanted = config.max_tokens or _DEFAULT_MAX_TOKENS
    if loaded.max_positions is not None and wanted > loaded.max_positions:
        taken = f"{loaded.max_positions}, the most that this model takes"
        observer(Notice(message=f"--max-tokens {wanted} is reduced to {taken}"))
        return loaded.max_positions
    return wanted


def _pack_head(parts: ModelParts, finisher: Finisher) -> bool:
    """Pack the output layer, where rows are products with it; the model gives no logits from then on."""
    if not isinstance(finisher, AffineFinisher):
        return False
    finisher.pack()
    parts.model.drop_head()
    return True


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
