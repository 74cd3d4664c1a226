"""What the user chooses, as frozen values. An option is declared here and nowhere else (core.declared).

Text such as ``"2GiB"`` is parsed at the edge, never further in.

Fields are of three kinds. *Identity* fields change a byte of the rows: they are resolved once into ``spec.json``, and a
resume with another value is refused. *Density* fields change neighbours and weights: another value computes those again,
never rows. *Runtime* fields (memory budget, engine) may differ on every run.
"""

from __future__ import annotations

import dataclasses
import datetime
import math
import re
from dataclasses import dataclass
from typing import Literal

from embstore.core.declared import documented, option, python_only
from embstore.core.errors import BudgetError, ConfigError
from embstore.core.rows import divides_well

K_MAX = 32  # neighbours kept on disk, so that `embstore weights --k` up to this needs no search

DTypeChoice = Literal["auto", "float32", "bfloat16"]
Weighting = Literal["inverse-density", "legacy-inverse", "uniform"]
Duplicates = Literal["collapse", "keep"]
Compressor = Literal["lz4", "none"]
KnnMethod = Literal["auto", "hnsw", "exact"]
Space = Literal["logits", "hidden"]
Pooling = Literal["mean", "last"]
Columns = Literal["model", "tokenizer"]
Turns = Literal["all", "prompt"]

# For people: what a row is, for each pair of options.
_POOLING_RULES = {
    ("logits", "mean"): "mean of logits over own tokens",
    ("logits", "last"): "logits of the last own token",
    ("hidden", "mean"): "mean of hidden states over own tokens",
    ("hidden", "last"): "hidden state of the last own token",
    ("none", "none"): "rows of an array",
}


def pooling_rule(space: str, pooling: str) -> str:
    """What a row of this space and pooling is, in words."""
    return _POOLING_RULES.get((space, pooling), pooling)


def refuse_device_name(name: str) -> None:
    """Refuse what is not the name of a device that embstore computes on; whether it is here is not asked."""
    if re.fullmatch(r"mps(:\d+)?", name):
        raise ConfigError(
            "embstore does not compute on mps: that device has no float64, which the probes and the coordinates need",
            hint="use --device cpu, which auto means on a Mac",
        )
    if re.fullmatch(r"auto|cpu(:0)?|cuda(:\d+)?", name) is None:
        raise ConfigError(f"embstore does not compute on device {name!r}", hint="use auto, cpu, cuda or cuda:N")


def _refuse_no_date(text: str) -> None:
    try:
        is_date = datetime.date.fromisoformat(text).isoformat() == text
    except ValueError:
        is_date = False
    if not is_date:
        raise ConfigError(f"chat_date is not a day: {text!r}", hint=f"write it as YYYY-MM-DD, such as {DEFAULT_CHAT_DATE}")


@documented
@dataclass(frozen=True, kw_only=True, slots=True)
class EmbeddingConfig:
    """How prompts become rows. None means "choose for me" for a new store and "as stored" on a resume."""

    model: str | None = option(None, "Folder or Hugging Face hub id of a causal language model.", "model")
    revision: str | None = option(None, "Revision of a model on the hub.")
    device: str | None = option(None, "Where the model runs: auto, cpu, cuda or cuda:N.", "model")
    dtype: DTypeChoice | None = option(
        None,
        "Type of the layers; pooling and head are float32. auto: bfloat16 if the hardware has it and the weights hardly "
        "change (TV <= 1e-3), else float32; the checkpoint's own where comparing would take over 5 % of the pass.",
        "model",
    )
    max_tokens: int | None = option(None, "Keep the first N tokens of each prompt. Default: 512.", "model", unit="tokens")
    vocab: Columns | None = option(None, "All columns of logits, or without those that only pad the vocabulary.")
    chat_date: str | None = option(
        None, "The day that chat templates print as today. Default: 2024-07-26, so that rows do not depend on the day."
    )
    space: Space | None = option(None, "Rows of logits, or of final hidden states (also of encoders).", "model")
    pooling: Pooling | None = option(None, "Average over all tokens of a prompt (mean), or use only the last one.")
    batch_tokens: int | None = option(
        None, "Tokens per batch, padding included. Default: 1024 on a CPU (2048 in 16 bits), 16384 on CUDA.", unit="tokens"
    )
    window_rows: int | None = option(None, "Rows per commit, the most a kill can cost. Default: at most 4096.", unit="rows")
    chunk_rows: int | None = option(None, "Rows per chunk file. Default: about 32 MiB of them.", unit="rows")
    threads: int | None = option(None, "CPU threads. Default: all that this process may use.", "resources")
    compressor: Compressor | None = option(None, "none: store chunks uncompressed, so they can be memory-mapped.")
    trust_remote_code: bool | None = option(None, "Run Python code that comes with the model. Recorded in the store.")
    trust_tokenizer_pickle: bool | None = option(None, "Load nanochat's tokenizer.pkl. Unpickling can run any code.")

    def __post_init__(self) -> None:
        for name in ("max_tokens", "batch_tokens", "window_rows", "chunk_rows", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        if self.window_rows is not None and self.chunk_rows is not None and self.window_rows % self.chunk_rows:
            whole = max(1, round(self.window_rows / self.chunk_rows)) * self.chunk_rows
            raise ConfigError(
                f"window_rows must be a multiple of chunk_rows, got {self.window_rows} and {self.chunk_rows}",
                hint=f"give --window-rows {whole} --chunk-rows {self.chunk_rows}, or leave out one of them",
            )
        if self.window_rows is not None and self.chunk_rows is None and not divides_well(self.window_rows):
            whole = max(1, round(self.window_rows / 256)) * 256
            raise ConfigError(
                f"a window of {self.window_rows} rows cannot be divided into equal chunks of a useful size",
                hint=f"give --window-rows {whole}, or a pair such as --window-rows {whole} --chunk-rows 256",
            )
        if self.chat_date is not None:
            _refuse_no_date(self.chat_date)
        if self.device is not None:
            refuse_device_name(self.device)
        if self.space == "hidden" and self.vocab is not None:
            raise ConfigError(f"vocab {self.vocab} chooses columns of logits, but space is hidden", hint="leave out --vocab")


@documented
@dataclass(frozen=True, kw_only=True, slots=True)
class DensityConfig:
    """How neighbours are found."""

    knn: KnnMethod = option(
        "auto", "hnsw: an approximate graph, audited. auto: exact, unless a graph is much faster and as good.", "search"
    )
    center: bool = option(False, "Subtract the mean row before measuring distances (changes neighbours and weights).")
    shards: int | None = option(None, "HNSW graphs to split the rows into. Default: chosen from memory and cores.")
    links: int = python_only(16, "Links per node of an HNSW graph (hnswlib's M).")
    ef_construction: int = python_only(100, "Candidates considered when a node is inserted.")
    ef: int = python_only(64, "Candidates considered per query, in the first attempt.")
    seed: int = python_only(0, "Seed of audit samples and graphs.")
    target_recall: float = python_only(0.999, "Recall@10 that the audit must confirm with 95 % confidence.")
    target_tv: float = python_only(1e-3, "Largest total variation between audited weights and exact ones.")
    audit_rows: int = python_only(2000, "Rows searched again exactly to audit a search.", unit="rows")

    def __post_init__(self) -> None:
        if self.shards is not None and self.shards < 1:
            raise ConfigError(f"shards must be at least 1, got {self.shards}")
        if not 0 < self.target_recall < 1:
            raise ConfigError(f"target_recall must lie strictly between 0 and 1, got {self.target_recall}")


@documented
@dataclass(frozen=True, kw_only=True, slots=True)
class WeightingConfig:
    """How mean neighbour distances become weights (core.density). In Python, ``max_ratio`` None sets no limit."""

    weighting: Weighting = option(
        "inverse-density", "legacy-inverse favours crowds, as the original scripts did; it is for comparison only."
    )
    k: int = option(10, "Number of nearest distinct vectors (at most 32); their mean distance measures rarity.", "weights")
    gamma: float = option(1.0, "Exponent: a weight is proportional to mean distance ** gamma.", "weights")
    target_ess: float | None = option(
        None, "Choose gamma for this effective sample size, as a share of the rows: 0.5 for half.", "weights"
    )
    uniform_mix: float = option(0.0, "Share of uniform sampling mixed in: a floor under every weight.")
    max_ratio: float | None = option(
        10.0, "Largest weight of a vector, as a multiple of the mean. inf: no limit.", "weights"
    )
    duplicates: Duplicates = option(
        "collapse",
        "Rows with equal vectors: collapse divides one weight among them, keep gives each row the full weight.",
    )

    def __post_init__(self) -> None:
        if not 1 <= self.k <= K_MAX:
            raise ConfigError(f"k must lie in 1..{K_MAX} (the neighbours kept on disk), got {self.k}")
        if not 0 <= self.gamma <= 1024:
            raise ConfigError(f"gamma must lie in 0..1024, got {self.gamma}")
        if self.target_ess is not None and not 0 < self.target_ess <= 1:
            raise ConfigError(f"target_ess is a share of the rows in (0, 1], got {self.target_ess}", hint="0.5 for half")
        if not 0 <= self.uniform_mix <= 1:
            raise ConfigError(f"uniform_mix must lie in 0..1, got {self.uniform_mix}")
        if self.max_ratio is not None and not 1 <= self.max_ratio < math.inf:
            raise ConfigError(f"max_ratio is a multiple of the mean weight, at least 1, got {self.max_ratio}")
        if self.target_ess is not None and self.max_ratio is not None and self.target_ess * self.max_ratio < 1:
            raise ConfigError(
                f"target_ess {self.target_ess:g} is out of reach: with max_ratio {self.max_ratio:g} it is at least "
                f"{1 / self.max_ratio:g}",
                hint=f"raise max_ratio to {1 / self.target_ess:g} or more",
            )
        if self.target_ess is not None and self.weighting != "inverse-density":
            raise ConfigError(f"target_ess needs weighting inverse-density, got {self.weighting}")


@documented
@dataclass(frozen=True, kw_only=True, slots=True)
class PromptFields:
    """Names of the fields of a line, where they are not the usual ones.

    If ``text`` or ``messages`` is given, the prompt is taken from no other field.
    """

    text: str | None = option(
        None, "Field with the prompt. Default: prompt, messages, prefix or conversations.", "input", flag="--text-field"
    )
    messages: str | None = option(None, "Field with a list of messages.", flag="--messages-field")
    id: str | None = option(None, "Field with the id. Default: id.", "input", flag="--id-field")

    @property
    def names(self) -> frozenset[str]:
        """Fields that belong to the prompt; the others are kept with its row."""
        if self.text is None and self.messages is None:
            return frozenset({self.id or "id", "prompt", "messages", "prefix"})
        return frozenset({self.id or "id", *(name for name in (self.text, self.messages) if name is not None)})


USUAL_FIELDS = PromptFields()
DEFAULT_CHAT_DATE = "2024-07-26"  # what templates of Llama 3.1 print where nobody gives a date


ALL_SPLITS = "all"


@documented
@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetChoice:
    """What is read of a folder or of a dataset on the hub, where it has several parts."""

    split: str | None = option(None, "Split of a folder or of a dataset on the hub; all: every one.", flag="--split")
    config: str | None = option(None, "Configuration of a folder or of a dataset on the hub.", flag="--config")


WHOLE = DatasetChoice()


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptRule:
    """How the lines of a store became prompts; the journal and the manifest record it.

    ``version`` 2 is the canonical form of ``core.prompts``; stores from before December 2026 have 1. ``turns`` says which
    part of a chat is the prompt: all of it, or what comes before the assistant's answer.
    """

    version: int = 2
    turns: Turns = "all"


CURRENT_RULE = PromptRule()
FIRST_RULE = PromptRule(version=1)


@documented
@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """Where windows and searches are computed. The store is the same, so it may differ on every run."""

    engine: Literal["local", "ray"] = option("local", "Compute in this process, or in workers on a Ray cluster.", "workers")
    ray_address: str | None = option(None, "Ray cluster to join: auto, or host:port. Default: a new one on this machine.")
    num_workers: int | None = option(None, "Workers, each with its own copy of the model. Default: as many as fit.")
    gpus_per_worker: float | None = option(None, "GPUs that Ray gives each worker. Default: 1, or 0 for a model on CPUs.")
    devices: tuple[str, ...] = option(
        (), "Devices of this machine, one worker for each: cuda:0,cuda:1. No cluster needed.", "workers", separator=","
    )
    start_seconds: float = python_only(600, "Give up if no worker could start in this time.", unit="seconds")

    def __post_init__(self) -> None:
        if not self.is_remote and (self.ray_address or self.num_workers or self.gpus_per_worker):
            raise ConfigError("options of workers were given, but the engine is local", hint="add --engine ray")
        if self.num_workers is not None and self.num_workers < 1:
            raise ConfigError(f"num_workers must be at least 1, got {self.num_workers}")
        address = self.ray_address
        if address is not None and address != "auto" and re.fullmatch(r"[^:/]+:\d{1,5}", address) is None:
            raise ConfigError(
                f"a Ray address is auto or host:port, got {address!r}", hint="run the command on a machine of the cluster"
            )
        if self.gpus_per_worker is not None and not 0 < self.gpus_per_worker < math.inf:
            raise ConfigError(f"gpus_per_worker must be above 0, got {self.gpus_per_worker}")
        if self.devices and (self.ray_address or self.gpus_per_worker or self.num_workers not in (None, len(self.devices))):
            raise ConfigError(
                f"devices {','.join(self.devices)} get one worker each, on this machine",
                hint="leave out --ray-address, --gpus-per-worker and --num-workers, or --devices",
            )
        strange = [name for name in self.devices if re.fullmatch(r"cpu|cuda:\d+", name) is None]
        if strange or len({name.partition(":")[0] for name in self.devices}) > 1:
            raise ConfigError(f"devices must be like cuda:0,cuda:1, or cpu once per worker, got {','.join(self.devices)}")

    @property
    def is_remote(self) -> bool:
        """Whether workers are separate processes."""
        return self.engine == "ray" or bool(self.devices)


DEFAULT_MEMORY_BYTES = 2 << 30


@documented
@dataclass(frozen=True, kw_only=True, slots=True)
class BuildConfig:
    """Everything a build needs besides prompts and the store's path."""

    embedding: EmbeddingConfig = EmbeddingConfig()
    density: DensityConfig = DensityConfig()
    weighting: WeightingConfig = WeightingConfig()
    memory_budget_bytes: int = option(
        DEFAULT_MEMORY_BYTES,
        "Memory besides the loaded model and mapped files.",
        "resources",
        flag="--memory-budget",
        unit="bytes",
    )
    model_memory_bytes: int | None = option(
        None,
        "Memory for the weights of layers: they take turns where not all fit. Default: all of a small model, two layers of "
        "a large one; on a GPU, all that fit.",
        flag="--model-memory",
        unit="bytes",
    )
    on_error: Literal["stop", "quarantine"] = option(
        "stop", "If a row cannot be embedded: stop, or keep its number with an empty row of weight 0 (quarantine)."
    )
    turns: Turns | None = option(
        None, "The prompt is all of a chat, or what comes before its last assistant turn (prompt). Default: all."
    )
    strict: bool = option(False, "Refuse the file if any line does not contain a prompt.")
    max_quarantined: float = option(
        0.1, "Refuse the prompts if a larger share of their lines has no usable prompt: 0.1 for a tenth."
    )
    limit: int | None = option(None, "Use only the first N distinct prompts, or rows of an array.", "input", unit="rows")
    allow_drift: bool = option(
        False, "Resume on other hardware, threads or versions, or without --reuse stores. Bytes may differ."
    )
    trust_journal: bool = option(False, "Resume without reading committed rows back to check them.")
    reuse: tuple[str, ...] = option(
        (), "Store to copy rows of equal prompts from, also an unfinished one. Repeatable.", "input"
    )
    fields: PromptFields = USUAL_FIELDS
    dataset: DatasetChoice = WHOLE
    engine: EngineConfig = EngineConfig()

    def __post_init__(self) -> None:
        if not 0 <= self.max_quarantined <= 1:
            raise ConfigError(f"max_quarantined is a share in 0..1, got {self.max_quarantined}", hint="0.1 for a tenth")
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"limit must be at least 1, got {self.limit}")
        kinds = {name.partition(":")[0] for name in self.engine.devices}
        device = self.embedding.device
        if kinds and device not in (None, "auto") and device.partition(":")[0] not in kinds:
            raise ConfigError(
                f"device {device} contradicts devices {','.join(self.engine.devices)}", hint="leave out --device"
            )

    @property
    def for_workers(self) -> BuildConfig:
        """The same, with the device that the engine's workers have."""
        if not self.engine.devices:
            return self
        embedding = dataclasses.replace(self.embedding, device=self.engine.devices[0])
        return dataclasses.replace(self, embedding=embedding)


_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
for _number, _letter in enumerate("kmgt", start=1):
    _UNITS[_letter] = _UNITS[f"{_letter}ib"] = 1 << 10 * _number


def parse_bytes(text: str) -> int:
    """Bytes from a size such as ``"2GiB"``, ``"2G"`` (the same), ``"500 MB"`` or ``"1048576"``.

    Examples
    --------
    >>> parse_bytes("2GiB"), parse_bytes("1.5 kB")
    (2147483648, 1500)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].lower() not in _UNITS:
        raise ConfigError(f"not a size: {text!r}", hint="write a number and a unit, such as 2GiB, 512M or 500MB")
    return int(float(match[1]) * _UNITS[match[2].lower()])


def format_bytes(count: float) -> str:
    """A size for people, in binary units.

    Examples
    --------
    >>> format_bytes(33554432), format_bytes(12)
    ('32.0 MiB', '12 B')
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def over_memory_budget(needs: str, needed_bytes: int, budget_bytes: int, *, hint: str = "") -> BudgetError:
    """The refusal of work that ``needs`` ("embedding needs") more memory than the budget; ``hint`` adds another way out."""
    return BudgetError(
        f"{needs} {format_bytes(needed_bytes)}, --memory-budget is {format_bytes(budget_bytes)}",
        hint=f"give --memory-budget {-(-needed_bytes // (1 << 20))}MiB or more{hint}",
    )
