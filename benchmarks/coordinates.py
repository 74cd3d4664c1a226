"""What coordinates lose for soft-capped heads: residuals, recall and weights against float64 rows, all pairs.

``python -m benchmarks.coordinates --prompts FILE --tokenizer FOLDER [--rows 2000]``

Models are real transformers classes with random weights, whose output layer is scaled until their logits are as large as
trained ones are, so that the cap bends them. Rows of a random model have nothing in common, which is the hardest case; rows
of a trained one share a direction, which a common vector added to the token embeddings brings about. Bases are compared: the
range finder that a build uses (also with twice its rank), and the span of the head's own weights, which is exact where there
is no cap. Results go to ``benchmarks/results/coordinates.json``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from benchmarks.acceptance import RESULTS, machine
from benchmarks.methods import PromptList
from embstore.core.config import EmbeddingConfig
from embstore.core.density import NOISE_FLOOR
from embstore.core.diagnostics import total_variation
from embstore.core.events import ignore
from embstore.core.prompts import Prompt, parse_line
from embstore.model.backbone import SplitModel
from embstore.model.basis import orthonormal_basis
from embstore.model.finish import spanning_columns
from embstore.model.locate import locate_model
from embstore.model.source import TorchSource
from embstore.search.audit import TIE_TOLERANCE

K = 10
WIDTH = 128
VOCABULARY = 50304
Figures = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A class, its cap (None: none), the standard deviation its logits shall have, and the length of the common vector.

    ``common`` is in units of a token embedding's length.
    """

    model: str
    cap: float | None
    logit_std: float
    common: float


CASES = (
    Case(model="NanoChat", cap=15.0, logit_std=5.0, common=0.0),
    Case(model="NanoChat", cap=15.0, logit_std=5.0, common=4.0),
    Case(model="NanoChat", cap=15.0, logit_std=8.0, common=4.0),
    Case(model="Gemma2", cap=30.0, logit_std=5.0, common=0.0),
    Case(model="Gemma2", cap=30.0, logit_std=10.0, common=4.0),
    Case(model="Llama", cap=None, logit_std=5.0, common=4.0),
)


def main() -> int:
    """Measure every case and write the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--prompts", type=Path, required=True, help="JSONL, one prompt per line")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of a tokenizer of at most 50,304 tokens")
    parser.add_argument("--rows", type=int, default=2000, help="distinct prompts")
    parser.add_argument("--max-tokens", type=int, default=64)
    options = parser.parse_args()
    prompts = first_prompts(options.prompts, options.rows)
    results: Figures = {
        "command": f"python -m benchmarks.coordinates --prompts {options.prompts.name} --tokenizer {options.tokenizer.name} "
        f"--rows {options.rows} --max-tokens {options.max_tokens}",
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(("torch", "transformers", "numpy")),
        "k": K,
        "width": WIDTH,
        "vocabulary": VOCABULARY,
        "cases": [],
    }
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.tokenizer)
    for case in CASES:
        with tempfile.TemporaryDirectory() as work:
            figures = measure(case, prompts, tokenizer, Path(work), options.max_tokens)
        print(json.dumps(figures), flush=True)
        results["cases"].append(figures)
    (RESULTS / "coordinates.json").write_text(json.dumps(results, indent=2) + "\n")
    return 0


def first_prompts(path: Path, count: int) -> list[Prompt]:
    """The first distinct prompts of a file."""
    found: dict[bytes, Prompt] = {}
    with path.open("rb") as lines:
        for line in lines:
            prompt = parse_line(line)
            if isinstance(prompt, Prompt):
                found.setdefault(prompt.digest, prompt)
            if len(found) == count:
                break
    return list(found.values())


def make_model(case: Case, tokens_BT: torch.Tensor) -> Any:  # noqa: ANN401 - transformers is untyped
    """A random model of the case's class, its output layer scaled until logits of these tokens are as large as wanted."""
    changes = {} if case.cap is None else {"final_logit_softcapping": case.cap}
    config = getattr(transformers, f"{case.model}Config")(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=WIDTH // 4,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        **changes,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    table = model.get_input_embeddings().weight
    common_D = torch.randn(WIDTH)
    table.add_(common_D * (case.common * table.norm(dim=1).mean() / common_D.norm()))
    head = model.get_output_embeddings()
    while (found := float(model(input_ids=tokens_BT).logits.std())) < case.logit_std:
        head.weight.mul_(min(2.0, 1.02 * case.logit_std / found))
    return model


def measure(case: Case, prompts: list[Prompt], tokenizer: Any, work: Path, max_tokens: int) -> Figures:  # noqa: ANN401
    """Residuals, recall and TV of one case."""
    texts = [tokenizer(prompt.rendered).input_ids[:16] for prompt in prompts[:64]]
    tokens_BT = torch.tensor([ids for ids in texts if len(ids) == 16][:16])
    model = make_model(case, tokens_BT)
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(work / "model")
    tokenizer.save_pretrained(work / "model")
    config = EmbeddingConfig(model=str(work / "model"), dtype="float32", device="cpu", max_tokens=max_tokens)
    source = TorchSource(locate_model(config))
    embedder = source.create(PromptList(prompts), config, memory_bytes=4 << 30, work=work, observer=ignore)
    rows = embedder.tokens(prompts)
    with torch.inference_mode():
        found_std = float(model(input_ids=tokens_BT).logits.std())
        window = embedder.pool(rows, lambda: None)
        unit_NV = embedder.unit_rows(window, 0, len(rows))[0].numpy()
    blocks = [
        (block.emb_BV.copy(), block.coord_BR.copy(), block.residual_B.copy())
        for block in embedder.blocks(window, first_row=0, chunk_rows=256, check=lambda: None)
    ]
    coord_NR = np.concatenate([block[1] for block in blocks])
    residual_N = np.concatenate([block[2] for block in blocks])
    exact_NN = all_distances(unit_NV)
    basis_VR = embedder.basis_VR
    if embedder.spec.basis == "gram":  # the store has a map in its place
        layer = SplitModel(model, torch.device("cpu")).output_layer()
        assert layer is not None
        read_layer, width = spanning_columns(layer, VOCABULARY)
        basis_VR = orthonormal_basis(read_layer, VOCABULARY, width, max_rank=embedder.spec.rank)
    figures: Figures = {
        "class": type(model).__name__,
        "cap": case.cap,
        "logit_std": round(found_std, 2),
        "head": embedder.spec.head.kind,
        "rows": len(rows),
        "rank": embedder.spec.rank,
        "common": case.common,
        "shared_norm": float(np.linalg.norm(unit_NV.mean(axis=0, dtype=np.float64))),
        "median_distance": float(np.median(np.sort(exact_NN, axis=1)[:, :K].mean(axis=1))),
        "stored_residual": {"median": float(np.median(residual_N)), "max": float(residual_N.max())},
        "range_finder": judged(coord_NR, exact_NN) | lost(unit_NV, basis_VR),
        "range_finder_and_residuals": judged(coord_NR, exact_NN, residual_N),
    }
    if embedder._capped is not None:
        read_block, width = spanning_columns(embedder._capped.linear, VOCABULARY)
        head_VR = orthonormal_basis(read_block, VOCABULARY, width, max_rank=embedder.spec.rank)
        figures["head_basis"] = judged(unit_NV @ head_VR, exact_NN) | lost(unit_NV, head_VR) | {"rank": head_VR.shape[1]}
        sample_MV = unit_NV[np.sort(np.random.default_rng(0).permutation(len(unit_NV))[: 8 * embedder.spec.rank])]

        def read_sample(start: int, stop: int) -> torch.Tensor:
            return torch.from_numpy(np.ascontiguousarray(sample_MV[:, start:stop].T))

        wide_VR = orthonormal_basis(read_sample, VOCABULARY, len(sample_MV), max_rank=2 * embedder.spec.rank)
        figures["double_rank"] = judged(unit_NV @ wide_VR, exact_NN) | lost(unit_NV, wide_VR) | {"rank": wide_VR.shape[1]}
    return figures


def all_distances(rows_NX: NDArray[np.float32]) -> NDArray[np.float64]:
    """Distances of all pairs in float64 [N, N], +inf on the diagonal."""
    centred_NX = rows_NX.astype(np.float64)
    centred_NX -= centred_NX.mean(axis=0)
    square_N = np.square(centred_NX).sum(axis=1)
    square_NN = np.maximum(square_N[:, None] + square_N - 2 * centred_NX @ centred_NX.T, 0)
    np.fill_diagonal(square_NN, np.inf)
    distances_NN: NDArray[np.float64] = np.sqrt(square_NN)
    return distances_NN


def judged(
    coord_NR: NDArray[np.float32], exact_NN: NDArray[np.float64], residual_N: NDArray[np.float32] | None = None
) -> Figures:
    """Recall@K of neighbours by coordinates, judged by distances between rows, and TV of the weights.

    With residuals: by d^2 + ra^2 + rb^2, what two rows are apart if what they lose has nothing in common.
    """
    distances_NN = all_distances(coord_NR)
    if residual_N is not None:
        square_N = np.square(residual_N, dtype=np.float64)
        distances_NN = np.sqrt(np.square(distances_NN) + square_N[:, None] + square_N)
    nearest_NK = np.argsort(distances_NN, axis=1, kind="stable")[:, :K]
    exact_NK = np.sort(exact_NN, axis=1)[:, :K]
    hits = np.take_along_axis(exact_NN, nearest_NK, axis=1) <= exact_NK[:, -1:] * (1 + TIE_TOLERANCE)
    by_coordinates = np.sort(distances_NN, axis=1)[:, :K].mean(axis=1)
    weights = [np.maximum(mean, NOISE_FLOOR) for mean in (by_coordinates, exact_NK.mean(axis=1))]
    return {"recall": float(hits.mean()), "tv": total_variation(*weights)}


def lost(unit_NV: NDArray[np.float32], basis_VR: NDArray[np.float32]) -> Figures:
    """What a basis misses of rows before they are rounded: the distance from a row to its image."""
    square_N = np.zeros(len(unit_NV))
    coord_NR = unit_NV @ basis_VR
    for start in range(0, unit_NV.shape[1], 4096):
        columns = slice(start, start + 4096)
        square_N += np.square(unit_NV[:, columns] - coord_NR @ basis_VR[columns].T).sum(axis=1, dtype=np.float64)
    lost_N = np.sqrt(square_N)
    return {"missed_median": float(np.median(lost_N)), "missed_max": float(lost_N.max())}


if __name__ == "__main__":
    raise SystemExit(main())
