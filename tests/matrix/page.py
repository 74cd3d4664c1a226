"""Write ``docs/classes.md`` from the record: ``python -m tests.matrix.page``."""

from __future__ import annotations

from pathlib import Path

from tests.matrix.record import Record, read_record

PAGE = Path(__file__).parents[2] / "docs" / "classes.md"

_HEADS = {
    "affine": "affine: pooled before the head",
    "capped": "linear under a soft cap: fused",
    "streamed": "anything else: the class's own code, a few hundred tokens at a time",
}
_OUTCOMES = {
    "wrong": "its rows are wrong",
    "refused": "embstore stops",
    "impossible": "not a model of tokens alone",
}


def page() -> str:
    """The whole page."""
    record = read_record()
    right = [name for name, each in record.expected.items() if each.how == "right"]
    text = _head(record, len(right))
    text += "\n| head | model types | |\n|---|---|---|\n"
    for head, told in _HEADS.items():
        names = sorted(name for name in right if record.expected[name].head == head)
        text += f"| {told} | {len(names)} | {', '.join(names)} |\n"
    text += "\n## Exceptions\n\n| model type | what happens | why |\n|---|---|---|\n"
    for how, told in _OUTCOMES.items():
        for name in sorted(name for name, each in record.expected.items() if each.how == how):
            text += f"| {name} | {told} | {record.expected[name].reason} |\n"
    text += "\n## State in modules\n\n"
    text += "These classes leave something in their modules while they run, so two batches must not run at a time.\n"
    text += "\n| model type | what |\n|---|---|\n"
    text += "".join(f"| {name} | {told} |\n" for name, told in sorted(record.keeps_state.items()))
    return text


def _head(record: Record, num_right: int) -> str:
    return f"""# Model classes

Made by `python -m tests.matrix.page` from `tests/matrix/classes.toml`, which `tests/matrix/test_matrix.py` checks.

{num_right} of the {len(record.expected)} causal model types of transformers {record.transformers} give the rows of their own class. For each type a tiny random model is made from
its default configuration, with logits as large as those of a trained model. Rows from small batches in two threads are compared
with the mean of the class's own float32 logits, one prompt at a time. They may differ by 2e-6 (L2), or, where the class itself is
farther than that from float64, by twice its own distance from float64 (5e-5 at most).
"""


if __name__ == "__main__":
    PAGE.write_text(page())
