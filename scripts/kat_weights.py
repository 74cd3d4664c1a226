"""The weights of ``kat_train_grpo``: precomputed, else online, else uniform. Each fallback prints a prominent warning.

All processes of a run use the same weights: if one process cannot read them, none uses them.

Shapes: N lines of the training data.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from numpy.typing import NDArray

import embstore
from embstore.core.decode import printable
from embstore.core.errors import EmbstoreError, KeyMismatchError, WeightsError
from embstore.training import load_weights
from scripts.kat_files import PromptLine, read_lines, require
from scripts.kat_trainer import Policy

Found = NDArray[np.float64]

PRECOMPUTED, ONLINE, UNIFORM = "precomputed", "online", "uniform"


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
    kinds: list[tuple[str, Callable[[], NDArray[np.float64]], str]] = []
    if options.use_precomputed_embeddings:
        kinds.append((PRECOMPUTED, lambda: _precomputed(options, lines), "the online pass over all prompts, which is slow"))
    kinds.append((ONLINE, lambda: _online(options, lines, policy), "uniform sampling, without density"))
    for kind, compute, instead in kinds:
        found = _agreed(compute, policy.processes, is_shared=kind == ONLINE)
        if not isinstance(found, _Failed):
            return found, kind
        if options.require_density:
            raise WeightsError(f"{kind} weights are not available: {found.message}", hint=found.hint)
        if policy.is_first_process:
            _announce(kind, found, instead)
    return np.ones(len(lines)), UNIFORM


def _precomputed(options: argparse.Namespace, lines: Sequence[PromptLine]) -> Found:
    """The store's weights, joined by content, or where the store has other texts for these prompts, by prompt id."""
    weights = load_weights(options.embeddings_dir)
    try:
        with warnings.catch_warnings():
            # by design of these scripts, prompts_all.jsonl has the texts of chats
            warnings.filterwarnings("ignore", message=".* contains plain texts")
            joined = weights.for_dataset([line.record for line in lines], duplicates="divide")
    except KeyMismatchError as without_row:  # which shows the text of a missing prompt
        try:
            joined = weights.align([line.prompt_id for line in lines], duplicates="divide")
        except KeyMismatchError:
            raise without_row from None
    return joined.array.astype(np.float64)


def _online(options: argparse.Namespace, lines: Sequence[PromptLine], policy: Policy) -> Found:
    """Weights computed now with the policy's initial model, once for each distinct prompt."""
    embedded = lines
    if options.pairs_path and options.prompts_path:
        path = require(options.prompts_path, command="python -m scripts.kat_make_prefixes")
        embedded = list(read_lines(path, report=lambda message: print(message, file=sys.stderr)))
    texts: dict[str, str] = {}
    known_as: dict[str, str] = {}
    for line in embedded:
        texts.setdefault(line.content_id, line.prompt.rendered)
        known_as.setdefault(line.prompt_id, line.content_id)
    sampler = embstore.DensityAwareSampler(
        list(texts.values()), policy.model, policy.tokenizer, policy.processes.device, k=options.density_k
    )
    weight_of = dict(zip(texts, sampler.density_weights.tolist(), strict=True))
    return join(lines, weight_of, known_as)


def join(lines: Sequence[PromptLine], weight_of: Mapping[str, float], known_as: Mapping[str, str]) -> Found:
    """Weights float64 [N]: for each line the weight of its prompt, divided by the number of lines with that prompt.

    ``weight_of`` maps content ids; ``known_as`` gives those of prompt ids, for lines with another text than was embedded.

    Raises
    ------
    KeyMismatchError
        A line's prompt has no weight.
    """
    ids = [line.content_id if line.content_id in weight_of else known_as.get(line.prompt_id, "") for line in lines]
    missing = [position for position, content_id in enumerate(ids) if content_id not in weight_of]
    if missing:
        first = lines[missing[0]]
        raise KeyMismatchError(
            f"the prompts of {len(missing)} of {len(lines)} lines were not embedded; the first is line {first.number}, "
            f"prompt id {first.prompt_id!r}",
            hint="make the prompts from these pairs: python -m scripts.kat_make_prefixes",
        )
    counts = Counter(ids)
    return np.array([weight_of[content_id] / counts[content_id] for content_id in ids])


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


def _announce(kind: str, failed: _Failed, instead: str) -> None:
    bar = "!" * 100
    lines = [bar, f"{kind} weights are not available: {printable(failed.message)}"]
    lines += [f"hint: {printable(failed.hint)}"] if failed.hint else []
    lines += [f"FALLING BACK to {instead}. --require_density makes this an error.", bar]
    print("\n".join(lines), file=sys.stderr, flush=True)
