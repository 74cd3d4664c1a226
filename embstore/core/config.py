"""What the user chooses, as frozen values: strings such as ``"2GiB"`` are parsed at the edge, never further in.

Fields are of two kinds. *Identity* fields change a byte of the rows; they are resolved once into ``spec.json`` and a resume
with another value is refused. *Density* fields change neighbours and weights; another value redoes those, never rows.
Runtime fields (memory budget, observer) may differ on every run.
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from typing import Literal

from embstore.core.errors import ConfigError

K_MAX = 32  # neighbours kept on disk, so that `embstore weights --k` up to this needs no search

Weighting = Literal["inverse-density", "legacy-inverse", "uniform"]
Duplicates = Literal["collapse", "keep"]
Compressor = Literal["lz4", "none"]
KnnMethod = Literal["auto", "hnsw", "exact"]
Space = Literal["logits", "hidden"]
Pooling = Literal["mean", "last"]

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


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbeddingConfig:
    """Identity fields as the user gave them; None means "decide for me" on a new store, "as stored" on resume."""

    model: str | None = None
    revision: str | None = None
    device: str | None = None
    dtype: Literal["auto", "float32", "bfloat16"] | None = None
    max_tokens: int | None = None
    vocab: Literal["model", "tokenizer"] | None = None
    space: Space | None = None
    pooling: Pooling | None = None
    batch_tokens: int | None = None
    window_rows: int | None = None
    chunk_rows: int | None = None
    threads: int | None = None
    compressor: Compressor | None = None
    trust_remote_code: bool | None = None
    trust_tokenizer_pickle: bool | None = None  # a permission, for this run only

    def __post_init__(self) -> None:
        for name in ("max_tokens", "batch_tokens", "window_rows", "chunk_rows", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        if self.space == "hidden" and self.vocab is not None:
            raise ConfigError(f"vocab {self.vocab} chooses columns of logits, space hidden has none", hint="drop --vocab")


@dataclass(frozen=True, kw_only=True, slots=True)
class DensityConfig:
    """How neighbours are found. ``shards`` None lets the memory budget and the cores decide.

    ``center``: distances between directions from the mean row, not between rows (compute.centering).
    """

    knn: KnnMethod = "auto"
    center: bool = False
    shards: int | None = None
    links: int = 16  # hnswlib's M
    ef_construction: int = 100
    ef: int = 64
    seed: int = 0
    target_recall: float = 0.999
    target_tv: float = 1e-3
    audit_rows: int = 2000

    def __post_init__(self) -> None:
        if self.shards is not None and self.shards < 1:
            raise ConfigError(f"shards must be at least 1, got {self.shards}")
        if not 0 < self.target_recall < 1:
            raise ConfigError(f"target_recall must lie strictly between 0 and 1, got {self.target_recall}")


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightingConfig:
    """How mean neighbour distances become weights.

    ``max_ratio`` bounds a vector's weight in units of their mean, None not at all; ``duplicates`` says whether rows with
    bit-equal vectors share one weight or have it each (core.density).
    """

    weighting: Weighting = "inverse-density"
    k: int = 10
    gamma: float = 1.0
    target_ess: float | None = None
    uniform_mix: float = 0.0
    max_ratio: float | None = 10.0
    duplicates: Duplicates = "collapse"

    def __post_init__(self) -> None:
        if not 1 <= self.k <= K_MAX:
            raise ConfigError(f"k must lie in 1..{K_MAX} (the neighbours kept on disk), got {self.k}")
        if not 0 <= self.gamma <= 1024:
            raise ConfigError(f"gamma must lie in 0..1024, got {self.gamma}")
        if self.target_ess is not None and not 0 < self.target_ess <= 1:
            raise ConfigError(f"target_ess is a share of the rows in (0, 1], got {self.target_ess}")
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


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptFields:
    """Which fields of a line hold the text, the messages and the id, where they have other names than the usual ones.

    With ``text`` or ``messages`` given, no other field is looked at for the prompt.
    """

    text: str | None = None
    messages: str | None = None
    id: str | None = None

    @property
    def names(self) -> frozenset[str]:
        """Fields that are part of the prompt; others are kept beside it."""
        if self.text is None and self.messages is None:
            return frozenset({self.id or "id", "prompt", "messages", "prefix"})
        return frozenset({self.id or "id", *(name for name in (self.text, self.messages) if name is not None)})


USUAL_FIELDS = PromptFields()


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """Where windows and searches are computed; the store is the same, so it may differ on every run.

    ``devices`` are of this machine (``cuda:0``, ``cpu``), one worker each, and need no cluster. A build gives up when no
    worker could start for ``start_seconds``, or when a task failed ``max_attempts`` times.
    """

    engine: Literal["local", "ray"] = "local"
    ray_address: str | None = None
    num_workers: int | None = None
    gpus_per_worker: float | None = None
    devices: tuple[str, ...] = ()
    start_seconds: float = 600
    max_attempts: int = 3

    def __post_init__(self) -> None:
        if not self.is_remote and (self.ray_address or self.num_workers or self.gpus_per_worker):
            raise ConfigError("workers are an engine's, and the engine is local", hint="add --engine ray")
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
                f"devices {','.join(self.devices)} are one worker each, on this machine",
                hint="leave out --ray-address, --gpus-per-worker and --num-workers, or --devices",
            )
        strange = [name for name in self.devices if re.fullmatch(r"cpu|cuda:\d+", name) is None]
        if strange or len({name.partition(":")[0] for name in self.devices}) > 1:
            raise ConfigError(
                f"devices are cuda:0,cuda:1 and so on, or cpu as often as workers are wanted, got {','.join(self.devices)}"
            )

    @property
    def is_remote(self) -> bool:
        """Whether workers are processes of their own."""
        return self.engine == "ray" or bool(self.devices)


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildConfig:
    """Everything a build needs besides prompts and the store's path."""

    embedding: EmbeddingConfig = EmbeddingConfig()
    density: DensityConfig = DensityConfig()
    weighting: WeightingConfig = WeightingConfig()
    memory_budget_bytes: int = 2 << 30
    on_error: Literal["stop", "quarantine"] = "stop"
    strict: bool = False
    limit: int | None = None
    allow_drift: bool = False
    trust_journal: bool = False
    reuse: tuple[str, ...] = ()  # folders of finished stores to copy rows from
    fields: PromptFields = USUAL_FIELDS
    engine: EngineConfig = EngineConfig()

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"limit must be at least 1, got {self.limit}")
        kinds = {name.partition(":")[0] for name in self.engine.devices}
        device = self.embedding.device
        if kinds and device not in (None, "auto") and device.partition(":")[0] not in kinds:
            raise ConfigError(
                f"device {device} is not of the kind of devices {','.join(self.engine.devices)}", hint="leave out --device"
            )

    @property
    def for_workers(self) -> BuildConfig:
        """The same, with the device that the engine's workers have."""
        if not self.engine.devices:
            return self
        embedding = dataclasses.replace(self.embedding, device=self.engine.devices[0])
        return dataclasses.replace(self, embedding=embedding)


_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40}


def parse_bytes(text: str) -> int:
    """Bytes from a size such as ``"2GiB"``, ``"500 MB"`` or ``"1048576"``.

    Examples
    --------
    >>> parse_bytes("2GiB"), parse_bytes("1.5 kB")
    (2147483648, 1500)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].lower() not in _UNITS:
        raise ConfigError(f"not a size: {text!r}", hint="write a number and a unit, such as 2GiB or 500MB")
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
