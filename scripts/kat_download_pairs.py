"""Preference pairs as one JSONL file: ``python -m scripts.kat_download_pairs [--only hh|uf|se] [--from-files FILE ...]``.

Downloads Anthropic/hh-rlhf (hh), HuggingFaceH4/ultrafeedback_binarized (uf) and
HuggingFaceH4/stack-exchange-preferences (se) with the ``datasets`` library, or reads local files in the format of hh-rlhf. A
line is ``{"id", "prefix": {"messages": [...]}, "chosen", "rejected", "src", "prefix_id"}``; the prefix ends with a user
message. Ids are functions of the content, so the same input gives the same file.
"""

from __future__ import annotations

import argparse
import json
import re
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embstore.core.errors import ConfigError, PromptError
from embstore.core.prompts import Prompt, collapse_whitespace
from embstore.storage.atomic import DurableFile
from embstore.storage.prompt_source import open_records
from scripts.kat_files import PAIRS, data_folder, run
from scripts.kat_hints import own_hints

Record = Mapping[str, Any]
Pair = tuple[list[dict[str, str]], str, str]  # messages that end with the user, chosen answer, rejected answer


@dataclass(frozen=True, kw_only=True, slots=True)
class _Source:
    """A data set of the hub: its name in ``src``, the splits in reading order, and the function from record to pair."""

    name: str
    hub_id: str
    splits: tuple[str, ...]
    pair_of: Callable[[Record], Pair | None]


_FEW = 1000
_ROLES = {"Human:": "user", "Assistant:": "assistant"}


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the pairs, or raise an error that says why there are none."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", choices=list(SOURCES), help="this data set alone")
    for name, source in SOURCES.items():
        parser.add_argument(f"--no-{name}", action="store_true", help=f"leave out {source.hub_id}")
    parser.add_argument(
        "--from-files",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="local .jsonl or .jsonl.gz files in the format of hh-rlhf; nothing is downloaded",
    )
    parser.add_argument("--out", type=Path, default=data_folder() / PAIRS, help="default: %(default)s")
    with own_hints(parser):
        _download(parser.parse_args(arguments))


def _download(options: argparse.Namespace) -> None:
    found: tuple[tuple[_Source, Iterator[Record]], ...]
    if options.from_files:
        found = ((SOURCES["hh"], _from_files(options.from_files)),)
    else:
        chosen = [options.only] if options.only else list(SOURCES)
        found = tuple((SOURCES[name], _downloaded(SOURCES[name])) for name in chosen if not getattr(options, f"no_{name}"))
    if not found:
        raise ConfigError("every data set is left out", hint="drop one of --no-hh, --no-uf, --no-se")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    total = skipped = 0
    with DurableFile(options.out) as file:
        for source, records in found:
            for record in records:
                pair = source.pair_of(record)
                if pair is None:
                    skipped += 1
                    continue
                file.write(_line(*pair, source=source.name, number=total))
                total += 1
                if total % 10_000 == 0:
                    print(f"{total:,} pairs")
        if not total:
            raise PromptError(
                f"no pair was found in {skipped} records",
                hint="records need the fields chosen and rejected, as in hh-rlhf",
            )
    if total < _FEW:
        print(f"warning: only {total} pairs; the full data sets have tens of thousands")
    print(f"written: {options.out}, {total:,} pairs; skipped {skipped:,} records without a usable pair")
    print(f"next: python -m scripts.kat_make_prefixes --pairs_path {options.out} (or kat_make_prompts, for plain texts)")


def _line(messages: list[dict[str, str]], chosen: str, rejected: str, *, source: str, number: int) -> bytes:
    record: dict[str, object] = {
        "prefix": {"messages": messages},
        "chosen": chosen,
        "rejected": rejected,
        "src": source,
    }
    name = json.dumps([number, record], ensure_ascii=False)  # with its number, because some pairs occur twice
    prompt = Prompt(id=None, messages=tuple(messages))
    record = {"id": str(uuid.uuid5(uuid.NAMESPACE_OID, name)), **record, "prefix_id": prompt.derived_id}
    return json.dumps(record, ensure_ascii=False).encode() + b"\n"


def _from_files(paths: Iterable[Path]) -> Iterator[Record]:
    for path in paths:
        with open_records(path) as records:
            for number, line in enumerate(records, start=1):
                try:
                    record = json.loads(line) if isinstance(line, bytes) else line
                except (ValueError, RecursionError) as error:
                    raise PromptError(
                        f"line {number} of {path} is not JSON ({error})", hint="correct or remove the line"
                    ) from error
                yield record if isinstance(record, dict) else {}


def _downloaded(source: _Source) -> Iterator[Record]:
    import datasets  # noqa: PLC0415 - an optional dependency, not needed for local files

    for split in source.splits:
        print(f"downloading {source.hub_id}, {split}")
        try:
            records = datasets.load_dataset(source.hub_id, split=split)
        except (OSError, ValueError) as error:
            raise PromptError(
                f"{source.hub_id} cannot be downloaded: {str(error).splitlines()[0][:200]}",
                hint="check the network, or give local files with --from-files",
            ) from error
        yield from records


# --- one function per data set ----------------------------------------------------------------------------------------


def _hh_pair(record: Record) -> Pair | None:
    """Two transcripts of ``Human:`` and ``Assistant:`` turns that differ in the last answer."""
    chosen, rejected = (_turns(str(record.get(name) or "")) for name in ("chosen", "rejected"))
    answers = [turns[-1]["content"] if turns and turns[-1]["role"] == "assistant" else "" for turns in (chosen, rejected)]
    return _pair(chosen[:-1], *answers)


def _turns(transcript: str) -> list[dict[str, str]]:
    """Turns of a transcript, whitespace collapsed; a repeated marker of the same role continues the turn."""
    turns: list[dict[str, str]] = []
    for line in transcript.split("\n"):
        marker = next((marker for marker in _ROLES if line.startswith(marker)), None)
        if marker is not None and (not turns or turns[-1]["role"] != _ROLES[marker]):
            turns.append({"role": _ROLES[marker], "content": ""})
        if turns:
            turns[-1]["content"] += f" {line.removeprefix(marker or '')}"
    return [{"role": turn["role"], "content": collapse_whitespace(turn["content"])} for turn in turns]


def _uf_pair(record: Record) -> Pair | None:
    """Answers are texts to ``prompt``, or whole conversations, as in the published data set."""
    chosen, rejected = record.get("chosen"), record.get("rejected")
    if isinstance(chosen, list) and isinstance(rejected, list) and chosen and rejected:
        messages = [
            {"role": str(turn["role"]), "content": collapse_whitespace(str(turn["content"]))} for turn in chosen[:-1]
        ]
        return _pair(messages, str(chosen[-1]["content"]), str(rejected[-1]["content"]))
    prompt = collapse_whitespace(str(record.get("prompt") or ""))
    return _pair([{"role": "user", "content": prompt}], str(chosen or ""), str(rejected or ""))


def _se_pair(record: Record) -> Pair | None:
    """The best and the worst of a question's answers by ``pm_score``; HTML becomes text."""
    question = record.get("question")
    body = question.get("body") if isinstance(question, Mapping) else question
    answers = sorted(record.get("answers") or (), key=lambda answer: float(answer["pm_score"]))
    if len(answers) < 2 or answers[0]["pm_score"] == answers[-1]["pm_score"]:
        return None
    messages = [{"role": "user", "content": _without_html(str(body or ""))}]
    return _pair(messages, _without_html(str(answers[-1]["text"])), _without_html(str(answers[0]["text"])))


def _without_html(text: str) -> str:
    return collapse_whitespace(re.sub(r"<[^>]+>", " ", text))


def _pair(messages: list[dict[str, str]], chosen: str, rejected: str) -> Pair | None:
    """The pair; None if the messages do not end with a non-empty user message, or an answer is empty."""
    chosen, rejected = collapse_whitespace(chosen), collapse_whitespace(rejected)
    if not messages or messages[-1]["role"] != "user" or not messages[-1]["content"] or not chosen or not rejected:
        return None
    return messages, chosen, rejected


SOURCES = {
    "hh": _Source(name="hh-rlhf", hub_id="Anthropic/hh-rlhf", splits=("train", "test"), pair_of=_hh_pair),
    "uf": _Source(
        name="ultrafeedback-binarized",
        hub_id="HuggingFaceH4/ultrafeedback_binarized",
        splits=("train_prefs",),
        pair_of=_uf_pair,
    ),
    "se": _Source(
        name="stack-exchange-preferences",
        hub_id="HuggingFaceH4/stack-exchange-preferences",
        splits=("train",),
        pair_of=_se_pair,
    ),
}


if __name__ == "__main__":
    run(main)
