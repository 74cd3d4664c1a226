"""The weights of ``kat_train_grpo``: precomputed, else online, else uniform. Each fallback prints a prominent warning.

A line gets the weight of its prompt: found by content, or, where the prompt was embedded with another text, by an id that
belongs to one prompt only. All processes of a run use the same weights: if one process cannot read them, none uses them.

Shapes: N lines of the training data.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass

import numpy as np
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from numpy.typing import NDArray

import embstore
from embstore.core.config import USUAL_FIELDS
from embstore.core.decode import printable
from embstore.core.errors import EmbstoreError, KeyMismatchError, WeightsError
from embstore.core.format import decode_manifest
from embstore.core.row_keys import StoredKeys, key_of
from embstore.training import load_weights
from embstore.training.join import Join, align_weights, join_dataset, notices
from embstore.training.published import read_aliases, read_keys, read_manifest
from embstore.training.reading import other_form
from scripts.kat_files import PromptLine, read_lines, require
from scripts.kat_hints import COMPUTE, spelled
from scripts.kat_original import is_original, read_original
from scripts.kat_trainer import Policy

Found = NDArray[np.float64]

PRECOMPUTED, ONLINE, UNIFORM = "precomputed", "online", "uniform"

_SHOWN_CHARACTERS = 160
_OTHER_PROMPTS = (
    f"make the prompts from these pairs (python -m scripts.kat_make_prefixes), and then their weights ({COMPUTE})"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Failed:
    """Why weights of one kind are not available."""

    message: str
    hint: str | None


def find_weights(
    options: argparse.Namespace, lines: Sequence[PromptLine], policy: Policy
) -> tuple[NDArray[np.float64], str]:
    """Weights float64 [N] of the lines, in their order, and where they come from.

    Raises
    ------
    WeightsError
        ``--require_density`` was given, and the first requested kind of weights is not available.
    """
    if not options.density_aware:
        return np.ones(len(lines)), UNIFORM

    def say(message: str) -> None:
        if policy.is_first_process:
            print(printable(message), file=sys.stderr, flush=True)

    kinds: list[tuple[str, Callable[[], NDArray[np.float64]], str]] = []
    if options.use_precomputed_embeddings:
        kinds.append(
            (PRECOMPUTED, lambda: _precomputed(options, lines, say), "the online pass over all prompts, which is slow")
        )
    kinds.append((ONLINE, lambda: _online(options, lines, policy), "uniform sampling, without density"))
    for kind, compute, instead in kinds:
        found = _agreed(compute, policy.processes, is_shared=kind == ONLINE)
        if not isinstance(found, _Failed):
            return found, kind
        if options.require_density:
            raise WeightsError(f"{kind} weights are not available: {found.message}", hint=found.hint)
        if policy.is_first_process:
            _announce(kind, found, instead, {f"--{name}" for name in vars(options)})
    return np.ones(len(lines)), UNIFORM


def _precomputed(options: argparse.Namespace, lines: Sequence[PromptLine], say: Callable[[str], None]) -> Found:
    """The weights of a store, or of a folder that the original script wrote."""
    if is_original(options.embeddings_dir):
        original = read_original(options.embeddings_dir)
        say(original.notice)
        return shared(lines, [original.name_of(line) for line in lines], original.weight_of)
    store = options.embeddings_dir
    weights = load_weights(store)
    manifest = decode_manifest(read_manifest(store))
    reading = dataclasses.replace(weights.reading(), fields=USUAL_FIELDS)  # of the records below
    keys_N = read_keys(store, manifest, full=True)
    join = join_dataset(keys_N, [line.record for line in lines], reading)
    for notice in notices(dataclasses.replace(join, form=""), manifest.rule, str(store)):
        say(f"note: {notice}")  # that prompts_all.jsonl has the texts of chats is by design of these scripts
    if (join.rows_M < 0).any():
        join = _with_other_texts(join, lines, StoredKeys(keys_N), read_aliases(store, manifest), say)
    try:
        joined_N = align_weights(weights.array, join, store=str(store), on_missing="error", duplicates="divide")
    except KeyMismatchError as error:
        error.hint = _OTHER_PROMPTS
        raise
    return joined_N.astype(np.float64)


def _with_other_texts(
    join: Join, lines: Sequence[PromptLine], stored: StoredKeys, aliases: Mapping[str, int], say: Callable[[str], None]
) -> Join:
    """The join with rows for lines whose prompts the store has with another text: as text or chat, or by their id."""
    rows_N = join.rows_M.copy()
    num_by_id = 0
    for position in np.flatnonzero(rows_N < 0).tolist():
        other = other_form(lines[position].prompt)
        if other is not None:
            rows_N[position] = stored.rows(np.array([key_of(other)], dtype=np.uint64))[0]
        if rows_N[position] < 0:
            rows_N[position] = _row_by_id(lines[position], aliases)
            num_by_id += int(rows_N[position] >= 0)
    if num_by_id:
        say(f"note: {num_by_id:,} of {len(lines):,} lines are joined by the ids of their prompts, not by their texts")
    first = next((f"item {position}, {_shown(lines[position])}" for position in np.flatnonzero(rows_N < 0).tolist()), "")
    return dataclasses.replace(join, rows_M=rows_N, unknown=first)


def _row_by_id(line: PromptLine, aliases: Mapping[str, int]) -> int:
    """The row with the line's prompt id; -1 where there is none, or where several rows were derived from its message."""
    name = line.joined_id
    if name is None or (name == line.prompt.derived_id and f"{name}-2" in aliases):
        return -1
    return aliases.get(name, -1)


def _online(options: argparse.Namespace, lines: Sequence[PromptLine], policy: Policy) -> Found:
    """Weights computed now with the policy's initial model, once for each distinct prompt."""
    embedded = lines
    if options.pairs_path and options.prompts_path:
        path = require(options.prompts_path, command="python -m scripts.kat_make_prefixes")
        embedded = list(read_lines(path, report=lambda message: print(message, file=sys.stderr)))
    texts: dict[str, str] = {}
    contents: dict[str, set[str]] = {}
    for line in embedded:
        texts.setdefault(line.content_id, line.prompt.rendered)
        if line.joined_id is not None:
            contents.setdefault(line.joined_id, set()).add(line.content_id)
    sampler = embstore.DensityAwareSampler(
        list(texts.values()), policy.model, policy.tokenizer, policy.processes.device, k=options.density_k
    )
    weight_of = dict(zip(texts, sampler.density_weights.tolist(), strict=True))
    return join(lines, weight_of, {name: min(found) for name, found in contents.items() if len(found) == 1})


def join(lines: Sequence[PromptLine], weight_of: Mapping[str, float], known_as: Mapping[str, str]) -> Found:
    """Weights float64 [N]: for each line the weight of its prompt, divided by the number of lines with that prompt.

    ``weight_of`` maps content ids; ``known_as`` gives those of ids that one prompt has, for lines with another text.

    Raises
    ------
    KeyMismatchError
        A line's prompt has no weight.
    """

    def name_of(line: PromptLine) -> str:
        other = other_form(line.prompt)
        names = [line.content_id, other.digest.hex() if other is not None else "", known_as.get(line.joined_id or "", "")]
        return next((name for name in names if name in weight_of), "")

    return shared(lines, [name_of(line) for line in lines], weight_of)


def shared(lines: Sequence[PromptLine], names: Sequence[str], weight_of: Mapping[str, float]) -> Found:
    """Weights float64 [N] of the prompts with these names; lines of one prompt get equal parts of its weight."""
    missing = [position for position, name in enumerate(names) if name not in weight_of]
    if missing:
        first = lines[missing[0]]
        raise KeyMismatchError(
            f"the prompts of {len(missing)} of {len(lines)} lines were not embedded; the first is line {first.number}, "
            f"prompt id {first.prompt_id!r}, {_shown(first)}",
            hint=_OTHER_PROMPTS,
        )
    counts = Counter(names)
    return np.array([weight_of[name] / counts[name] for name in names])


def _shown(line: PromptLine) -> str:
    return printable(repr(line.prompt.rendered[:_SHOWN_CHARACTERS]))


def _agreed(compute: Callable[[], Found], processes: PartialState, *, is_shared: bool) -> Found | _Failed:
    """The result of ``compute``, or why it failed on one process; with ``is_shared`` the first process computes for all."""
    found: Found | _Failed = _Failed(message="computed by the first process", hint=None)
    if processes.is_main_process or not is_shared:
        try:
            found = compute()
        except (EmbstoreError, OSError, RuntimeError, MemoryError) as error:
            found = _Failed(message=str(error) or type(error).__name__, hint=getattr(error, "hint", None))
    if processes.num_processes == 1:
        return found
    if is_shared:
        shared: list[Found | _Failed] = broadcast_object_list([found])
        return shared[0]
    if isinstance(found, _Failed):
        everywhere = gather_object([found])
    else:
        everywhere = gather_object([hashlib.sha256(found.tobytes()).hexdigest()])
    failed = next((each for each in everywhere if isinstance(each, _Failed)), None)
    if failed is not None:
        return failed
    if len(set(everywhere)) > 1:
        return _Failed(message="processes read different weights", hint="give all of them the same store")
    return found


def _announce(kind: str, failed: _Failed, instead: str, flags: Set[str]) -> None:
    bar = "!" * 100
    lines = [bar, f"{kind} weights are not available: {printable(failed.message)}"]
    lines += [f"hint: {printable(spelled(failed.hint, flags))}"] if failed.hint else []
    lines += [f"FALLING BACK to {instead}. --require_density makes this an error.", bar]
    print("\n".join(lines), file=sys.stderr, flush=True)
