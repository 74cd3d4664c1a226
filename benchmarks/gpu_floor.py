"""The model without embstore: the floor, the floor compiled, and the original method. Parts of ``benchmarks.gpu``.

Shapes: B rows of a batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from benchmarks.gpu_run import DEVICE, Figures, Run, Subject
from benchmarks.methods import MAX_TOKENS, plain
from embstore.model.settings import MAX_WINDOW_ROWS

SWEPT_TOKENS = (8192, 16384, 32768, 65536)
Batches = Sequence[tuple[torch.Tensor, torch.Tensor | None]]


def floor(run: Run, subject: Subject) -> Figures:
    """The backbone alone under every setting, and under the best of them without cuDNN's attention.

    The first pass meets shapes that no kernel has seen, as an embedding pass does all the time; the second one counts.
    Settings without a mask, as embstore runs causal models, come first: where time runs out the masked ones are left out.
    """
    model, _ = _load(subject)
    parameters = _backbone_parameters(model)
    num_rows = subject.swept_rows
    step = len(subject.texts) // num_rows
    flops = subject.flops(parameters, range(0, num_rows * step, step), head=False)
    num_tokens = int(subject.lengths_N[: num_rows * step : step].sum())
    deadline = time.perf_counter() + run.options.limit
    _pass_seconds(model.base_model, [(subject.tokens_NT[:8], None)])  # libraries are loaded

    def timed(batch_tokens: int, *, mask: bool, cudnn: bool) -> Figures:
        batches = _batches(subject, num_rows, batch_tokens, mask=mask)
        with _cudnn_attention(cudnn):
            first, second = (_pass_seconds(model.base_model, batches) for _ in range(2))
        return {
            "batch_tokens": batch_tokens,
            "mask": mask,
            "cudnn_attention": cudnn,
            "rows_per_second": num_rows / min(first, second),
            "rows_per_second_of_new_shapes": num_rows / first,
            "flops": flops / min(first, second),
            "padding": 1 - num_tokens / _padded(batches),
        }

    def best() -> Figures:
        return max(table, key=lambda each: float(each["rows_per_second"]))

    table: list[Figures] = []
    for mask, batch_tokens in itertools.product((False, True), SWEPT_TOKENS):
        if not table or time.perf_counter() < deadline:
            table.append(timed(batch_tokens, mask=mask, cudnn=True))
    table.append(timed(best()["batch_tokens"], mask=best()["mask"], cudnn=False))
    return best() | {
        "table": table,
        "rows": num_rows,
        "tokens_per_second": best()["rows_per_second"] * float(subject.lengths_N.mean()),
        "backbone_parameters": parameters,
        **run.utilisation(best()["flops"]),
    }


def compiled(run: Run, subject: Subject) -> Figures:
    """The best setting of the floor with every layer compiled for any shape, and how long that takes.

    Where that setting has a mask, the same without one is under ``without_mask``. ``times_uncompiled`` compares with the
    floor's best, whatever its mask.
    """
    model, _ = _load(subject)
    best = run.results["models"][subject.name]["floor"]
    for layer in model.base_model.layers:
        layer.compile(dynamic=True)  # one layer is compiled, the others are the same code

    def timed(*, mask: bool) -> Figures:
        batches = _batches(subject, subject.swept_rows, best["batch_tokens"], mask=mask)
        torch.compiler.reset()
        started = time.perf_counter()
        _pass_seconds(model.base_model, [batches[0], batches[-1], batches[len(batches) // 2]])
        compile_seconds = time.perf_counter() - started
        rate = subject.swept_rows / min(_pass_seconds(model.base_model, batches) for _ in range(2))
        return {
            "compile_seconds": compile_seconds,
            "rows_per_second": rate,
            "times_uncompiled": rate / best["rows_per_second"],
            "mask": mask,
        }

    try:
        with _cudnn_attention(best["cudnn_attention"]):
            return timed(mask=best["mask"]) | ({"without_mask": timed(mask=False)} if best["mask"] else {})
    finally:
        torch.compiler.reset()


@torch.inference_mode()
def original(run: Run, subject: Subject) -> Figures:
    """Batches of 8 in file order, padded to the longest, full float32 logits, plain mean; bfloat16 model, as the others."""
    model, tokenizer = _load(subject)
    step = max(1, len(subject.texts) // subject.original_rows)
    texts = subject.texts[::step][: subject.original_rows]
    rows = 0
    deadline = float("inf")
    for start in range(-8, len(texts), 8):  # the first batch is not counted
        if time.perf_counter() > deadline:
            break
        batch = tokenizer(
            texts[max(start, 0) :][:8], return_tensors="pt", padding=True, truncation=True, max_length=MAX_TOKENS
        ).to(DEVICE)
        logits_BTV = model(input_ids=batch.input_ids, use_cache=False).logits.float()
        torch.nn.functional.normalize(logits_BTV.mean(dim=1), dim=1).cpu().numpy()
        if start < 0:
            started = time.perf_counter()
            deadline = started + run.options.limit
        else:
            rows += len(batch.input_ids)
    rate = rows / (time.perf_counter() - started)
    known = run.results["models"][subject.name].get("floor", {})
    return {"rows": rows, "rows_per_second": rate, "tokens_per_second": rate * float(subject.lengths_N.mean())} | (
        {"share_of_floor": rate / known["rows_per_second"]} if "rows_per_second" in known else {}
    )


def _load(subject: Subject) -> tuple[Any, Any]:
    """Model in bfloat16 on the device, and tokenizer."""
    model, tokenizer = plain({"model": str(subject.folder), "dtype": "bfloat16"})
    return model.requires_grad_(False).to(DEVICE), tokenizer


def _backbone_parameters(model: Any) -> int:  # noqa: ANN401
    table = model.get_input_embeddings().weight.numel()
    return int(sum(parameter.numel() for parameter in model.base_model.parameters()) - table)


def _batches(subject: Subject, num_rows: int, batch_tokens: int, *, mask: bool) -> Batches:
    """Padded tokens and mask [B, T] on the device, sorted by length inside windows as embstore's are."""
    batches = []
    lengths_N = torch.from_numpy(subject.lengths_N).to(DEVICE)
    step = len(subject.texts) // num_rows
    rows = range(0, num_rows * step, step)
    for begin in range(0, num_rows, MAX_WINDOW_ROWS):
        order = sorted(rows[begin : begin + MAX_WINDOW_ROWS], key=lambda row: -int(subject.lengths_N[row]))
        start = 0
        while start < len(order):
            longest = int(subject.lengths_N[order[start]])
            part = order[start : start + max(1, batch_tokens // longest)]
            mask_BT = (torch.arange(longest, device=DEVICE) < lengths_N[part, None]).long() if mask else None
            batches.append((subject.tokens_NT[part, :longest], mask_BT))
            start += len(part)
    return batches


def _padded(batches: Batches) -> int:
    return sum(tokens_BT.numel() for tokens_BT, _ in batches)


@contextlib.contextmanager
def _cudnn_attention(enabled: bool) -> Iterator[None]:
    torch.backends.cuda.enable_cudnn_sdp(enabled)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)


@torch.inference_mode()
def _pass_seconds(backbone: Any, batches: Batches) -> float:  # noqa: ANN401
    torch.cuda.synchronize()
    started = time.perf_counter()
    for tokens_BT, mask_BT in batches:
        backbone(input_ids=tokens_BT, attention_mask=mask_BT, use_cache=False)
    torch.cuda.synchronize()
    return time.perf_counter() - started
