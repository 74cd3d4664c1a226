"""Write ``docs/classes.md`` from the record: ``python -m tests.matrix.page``."""

from __future__ import annotations

from pathlib import Path

from tests.matrix.record import read_record

PAGE = Path(__file__).parents[2] / "docs" / "classes.md"

_HEADS = {
    "affine": "affine: pooled before the head",
    "capped": "linear under a soft cap: fused",
    "streamed": "anything else: the class's own code, a few hundred tokens at a time",
}
_OUTCOMES = {
    "wrong": "its rows are wrong",
    "refused": "embstore stops",
    "impossible": "not compared",
}


_HEAD = """# Model classes

Made by `python -m tests.matrix.page` from `tests/matrix/classes.toml`, which `tests/matrix/test_matrix.py` checks.

For each causal model type of transformers {transformers} a tiny random model is made from its default configuration, with
logits as large as those of a trained model. Its rows, from small batches in two threads, are compared with the mean of the
class's own float32 logits, one prompt at a time. They may differ by 2e-6 (L2), or, where the class itself is farther than
that from float64, by twice its own distance (5e-5 at most). The layered order, in the least memory that it takes, gives the
same bits as the plain order. Parameters and buffers are those of `from_pretrained`, in float32 and in bfloat16.

**Rows are right for {right} of {all} model types.** Model types that share a class are counted one by one.
"""


def page() -> str:
    """The whole page."""
    record = read_record()
    right = {name: each for name, each in record.expected.items() if each.how == "right"}
    text = _HEAD.format(transformers=record.transformers, right=len(right), all=len(record.expected))
    text += "\n| head | number | model types |\n|---|---|---|\n"
    for head, told in _HEADS.items():
        names = sorted(name for name, each in right.items() if each.head == head)
        text += f"| {told} | {len(names)} | {', '.join(names)} |\n"
    exceptions = [(how, name) for how in _OUTCOMES for name, each in record.expected.items() if each.how == how]
    text += "\n## Exceptions\n\n| model type | what happens | why |\n|---|---|---|\n"
    text += "".join(f"| {name} | {_OUTCOMES[how]} | {record.expected[name].reason} |\n" for how, name in exceptions)
    for title, told, known in (
        ("Plain order only", "These run with all weights in memory.", record.plain_only),
        ("float32 only", "The class itself fails in bfloat16.", record.float32_only),
        ("State in modules", "These leave something in their modules when they have run.", record.keeps_state),
    ):
        if known:
            text += f"\n## {title}\n\n{told}\n\n| model type | what |\n|---|---|\n"
            text += "".join(f"| {name} | {what} |\n" for name, what in known.items())
    return text


if __name__ == "__main__":
    PAGE.write_text(page())
