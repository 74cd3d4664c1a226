"""Tiny causal LMs of real transformers classes, saved as users have them: a folder with config, weights and tokenizer.

Nothing is downloaded: weights are random and seeded, the tokenizer is a byte-level BPE trained on a few words. The head
is scaled until logits have a standard deviation of at least 5, because small logits make every soft cap look linear.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers
from numpy.typing import NDArray

from embstore.core.config import EmbeddingConfig
from embstore.core.events import Event, ignore
from embstore.core.interfaces import RowBlock
from embstore.core.prompts import Prompt
from embstore.model.embed import LogitEmbedder
from embstore.model.locate import locate_model
from embstore.model.source import TorchSource

VOCABULARY = 320  # columns of the logits; the tokenizer has fewer
TEMPLATE = "{{ bos_token }}{% for m in messages %}<|turn|>{{ m['role'] }}: {{ m['content'] }}{% endfor %}"

_TEXT = "the of a sum proof why does matrix light seven write code for prime numbers in rust and explain ünïcode"
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
_GROUPED = _COMMON | {"num_key_value_heads": 2}

CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**_GROUPED, tie_word_embeddings=False),
    "llama-tied": lambda: transformers.LlamaConfig(**_GROUPED, tie_word_embeddings=True),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=128, bos_token_id=0, eos_token_id=1
    ),
    "phi": lambda: transformers.PhiConfig(**_COMMON),
    "granite": lambda: transformers.GraniteConfig(**_GROUPED, logits_scaling=3.0, embedding_multiplier=4.0),
    "cohere": lambda: transformers.CohereConfig(**_GROUPED, logit_scale=0.25),
    "qwen3": lambda: transformers.Qwen3Config(**_GROUPED, head_dim=8),
    "mistral": lambda: transformers.MistralConfig(**_GROUPED, sliding_window=16),
    "phi3": lambda: transformers.Phi3Config(**_GROUPED),
    "gpt-neox": lambda: transformers.GPTNeoXConfig(**_COMMON, tie_word_embeddings=False),
    "gptj": lambda: transformers.GPTJConfig(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=128, rotary_dim=4, bos_token_id=0, eos_token_id=1
    ),
    "opt": lambda: transformers.OPTConfig(**_COMMON, ffn_dim=64, word_embed_proj_dim=32),
    "opt-projected": lambda: transformers.OPTConfig(**_COMMON, ffn_dim=64, word_embed_proj_dim=16),
    "bloom": lambda: transformers.BloomConfig(
        vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=1
    ),
    "cohere2": lambda: transformers.Cohere2Config(**_GROUPED, logit_scale=0.25, sliding_window=16),
    "falcon-h1": lambda: transformers.FalconH1Config(
        **_GROUPED,
        mamba_d_ssm=64,
        mamba_n_heads=4,
        mamba_d_head=16,
        mamba_d_state=16,
        mamba_chunk_size=16,
        lm_head_multiplier=0.5,
    ),
    "mamba": lambda: transformers.MambaConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=8, bos_token_id=0, eos_token_id=1
    ),
    "mixtral": lambda: transformers.MixtralConfig(**_GROUPED, num_local_experts=4),
    "olmoe": lambda: transformers.OlmoeConfig(**_GROUPED, num_experts=4, num_experts_per_tok=2),
    "deepseek-v3": lambda: transformers.DeepseekV3Config(
        **_COMMON,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=4,
        qk_nope_head_dim=8,
        v_head_dim=8,
        num_key_value_heads=4,
    ),
    "granite-moe": lambda: transformers.GraniteMoeConfig(**_GROUPED, logits_scaling=3.0, num_local_experts=4),
    "gemma3n": lambda: transformers.Gemma3nTextConfig(
        **(_GROUPED | {"num_hidden_layers": 4, "intermediate_size": [64] * 4}),
        head_dim=8,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=VOCABULARY,
        laurel_rank=4,
        num_kv_shared_layers=0,
        final_logit_softcapping=30.0,
        layer_types=["full_attention"] * 4,
        activation_sparsity_pattern=[0.0] * 4,
    ),
    "gemma2": lambda: transformers.Gemma2Config(**_GROUPED, head_dim=8, final_logit_softcapping=30.0),
    "nanochat": lambda: transformers.NanoChatConfig(**_GROUPED, final_logit_softcapping=15.0),
    "modernbert-decoder": lambda: transformers.ModernBertDecoderConfig(
        **_COMMON, local_attention=8, cls_token_id=0, sep_token_id=1
    ),
}


def make_tokenizer(
    *, bos: bool = False, template: bool = False, left: bool = False, pad: str | None = "</s>", eos: str | None = "</s>"
) -> Any:
    """A byte-level BPE of fewer than VOCABULARY tokens: ids 0 to 2 are <s>, </s> and <|turn|>, special all three."""
    core = tokenizers.Tokenizer.from_str(_trained())
    if bos:
        core.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token=eos,
        pad_token=pad,
        padding_side="left" if left else "right",
    )
    tokenizer.chat_template = TEMPLATE if template else None
    return tokenizer


def make_model(name: str, *, seed: int = 0, logit_std: float = 6.0, layers: int | None = None, **changes: object) -> Any:
    """A random model of one of CONFIGS, in float32 eval mode, its output layer scaled to the wanted logits."""
    config = CONFIGS[name]()
    if layers is not None:
        values = config.to_dict()
        values.pop("layer_types", None)  # one for each layer
        values["n_layer" if "n_layer" in values else "num_hidden_layers"] = layers
        config = type(config)(**values)
    config.update(changes)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    head = model.get_output_embeddings()
    if head.bias is not None:
        head.bias.normal_()
    tokens = torch.randint(3, min(256, config.vocab_size), (4, 48))
    while (found := float(model(input_ids=tokens).logits.std())) < logit_std:
        factor = min(2.0, 1.05 * logit_std / found)
        head.weight.mul_(factor)
        if head.bias is not None:
            head.bias.mul_(factor)
    return model


def save_model(folder: Path, model: Any, tokenizer: Any) -> Path:
    """A model folder as ``save_pretrained`` leaves it."""
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if bars:
        transformers.utils.logging.enable_progress_bar()
    return folder


@dataclasses.dataclass(frozen=True)
class PromptList:
    """Prompts in memory; a ``core.interfaces.PromptReader``."""

    prompts: list[Prompt]

    def __len__(self) -> int:
        return len(self.prompts)

    def sample(self, rows: Sequence[int]) -> list[Prompt]:
        return [self.prompts[row] for row in rows]


def make_prompts(count: int, *, seed: int = 0, longest: int = 24) -> list[Prompt]:
    """Texts of 1 to ``longest`` words, short ones more often."""
    random = np.random.default_rng(seed)
    lengths = 1 + (random.random(count) ** 2 * longest).astype(int)
    texts = [" ".join(random.choice(_TEXT.split(), size=length)) for length in lengths]
    return [Prompt(id=None, text=f"{text} {row}") for row, text in enumerate(texts)]


def open_embedder(
    folder: Path,
    prompts: Sequence[Prompt],
    work: Path,
    *,
    observer: Callable[[Event], None] = ignore,
    memory_bytes: int = 1 << 30,
    model_memory: int | None = None,
    **settings: Any,
) -> LogitEmbedder:
    """A new embedder as ``build`` makes it; float32 unless told otherwise."""
    config = EmbeddingConfig(model=str(folder), **({"dtype": "float32", "device": "cpu", "threads": 1} | settings))
    source = TorchSource(locate_model(config), model_memory_bytes=model_memory)
    work.mkdir(exist_ok=True)
    return source.create(PromptList(list(prompts)), config, memory_bytes=memory_bytes, work=work, observer=observer)


def rows_before_rounding(embedder: LogitEmbedder, prompts: Sequence[Prompt]) -> NDArray[np.float64]:
    """Unit rows float64 [N, V] as the embedder has them before they become float16."""
    with torch.inference_mode():
        window = embedder.pool(embedder._tokenizer.encode(prompts), lambda: None)
        return embedder.unit_rows(window, 0, len(prompts))[0].double().cpu().numpy()


def oracle_logits(model: Any, tokens: Sequence[Sequence[int]]) -> list[NDArray[np.float64]]:
    """Logits float64 [T, V] of each prompt by the unmodified class, one unpadded prompt at a time."""
    double = copy.deepcopy(model).double()
    if hasattr(double, "set_experts_implementation"):
        double.set_experts_implementation("eager")  # grouped products of experts have no float64
    with torch.inference_mode():
        return [double(input_ids=torch.tensor([list(ids)])).logits[0].numpy() for ids in tokens]


def unit_mean(logits_TV: NDArray[np.float64], own_T: NDArray[np.bool_] | None = None) -> NDArray[np.float64]:
    """The row these logits make: mean over own tokens (all of them by default), L2 norm 1."""
    mean_V = (logits_TV if own_T is None else logits_TV[own_T]).mean(axis=0)
    return mean_V / np.linalg.norm(mean_V)


PROMPTS = make_prompts(24)


@dataclasses.dataclass(frozen=True)
class Case:
    """One model class, embedded and computed by the oracle."""

    folder: Path
    model: Any
    embedder: LogitEmbedder
    logits: list[NDArray[np.float64]]  # [T, V] of each prompt
    rows_NV: NDArray[np.float64]  # before rounding
    blocks: list[RowBlock]  # as stored

    @functools.cached_property
    def stored_NV(self) -> NDArray[np.float64]:
        return np.concatenate([block.emb_BV for block in self.blocks]).astype(np.float64)

    @functools.cached_property
    def coord_NR(self) -> NDArray[np.float64]:
        return np.concatenate([block.coord_BR for block in self.blocks]).astype(np.float64)

    @functools.cached_property
    def residual_N(self) -> NDArray[np.float64]:
        return np.concatenate([block.residual_B for block in self.blocks]).astype(np.float64)


def make_case(name: str, root: Path) -> Case:
    """One of CONFIGS, saved under ``root``, with PROMPTS embedded."""
    tokenizer, model = make_tokenizer(), make_model(name)
    folder = save_model(root / name, model, tokenizer)
    embedder = open_embedder(folder, PROMPTS, root / f"{name} work")
    return Case(
        folder=folder,
        model=model,
        embedder=embedder,
        logits=oracle_logits(model, [tokenizer(prompt.text).input_ids for prompt in PROMPTS]),
        rows_NV=rows_before_rounding(embedder, PROMPTS),
        blocks=embed(embedder, PROMPTS),
    )


def embed(embedder: LogitEmbedder, prompts: list[Prompt]) -> list[RowBlock]:
    """All prompts in one window, ten rows a block."""
    return list(embedder.embed(prompts, first_row=0, chunk_rows=10, check=lambda: None))


def reopened(
    folder: Path, like: LogitEmbedder, *, model_memory: int | None = None, memory_bytes: int = 0, **changes: Any
) -> LogitEmbedder:
    """An embedder of another model under the spec, with ``changes``, and basis of ``like``, as a resume makes it."""
    spec = dataclasses.replace(like.spec, **changes)
    source = TorchSource(locate_model(EmbeddingConfig(model=str(folder))), model_memory_bytes=model_memory)
    return source.reopen(spec, like.basis_VR, memory_bytes=memory_bytes)


def least_model_memory(embedder: LogitEmbedder) -> int:
    """Memory of the two largest units of a model, and of what always stays, in the embedder's dtype."""
    weights = embedder.model.weights
    sizes = sorted(weights.bytes_of(unit) for unit in weights.parts.units)
    return sum(sizes[-2:]) + weights.base_bytes(weights.dtype)


def distances(first_NV: NDArray[np.float64], second_NV: NDArray[np.float64]) -> NDArray[np.float64]:
    """L2 distance of each pair of rows."""
    return np.linalg.norm(first_NV - second_NV, axis=-1)


@functools.cache
def _trained() -> str:
    core = tokenizers.Tokenizer(tokenizers.models.BPE())
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>", "<|turn|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([_TEXT] * 8, trainer)
    return str(core.to_str())
