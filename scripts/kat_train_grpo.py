"""GRPO on prompts drawn by density: ``python -m scripts.kat_train_grpo --model MODEL --reward REWARD``.

TRL trains, on one process or under ``torchrun --nproc_per_node=N -m scripts.kat_train_grpo``. Prompts come from a file of
pairs or of prompts. Their weights come from a store or from a folder of the original script
(``--use_precomputed_embeddings``), else from an online pass, else they are equal; each fallback prints a warning, and
``--require_density`` forbids it. Weights are joined by what the prompts contain, and pairs with one prompt share its weight.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from embstore.core.errors import ConfigError, PromptError
from scripts.kat_files import (
    PAIRS,
    PREFIXES,
    PROMPTS,
    STORE,
    PromptLine,
    base_folder,
    data_folder,
    read_lines,
    require,
    run,
)
from scripts.kat_hints import COMPUTE, own_hints
from scripts.kat_rewards import EXACT_ANSWER, FORMAT, FORMAT_IN_WORDS, Reward, find_reward, format_reward

if TYPE_CHECKING:
    from scripts.kat_trainer import Training

_RM = "rm"


def main(arguments: Sequence[str] | None = None) -> Training:
    """Train, print loss, reward and prompts during training, and save the model."""
    with own_hints(_parser()):
        return _train(parse(arguments))


def _train(options: argparse.Namespace) -> Training:
    seconds: dict[str, float] = {}
    with _timed(seconds, "data"):
        lines = list(read_lines(_training_data(options), report=_warn))
        reward = _find_reward(options, lines)
    with _timed(seconds, "imports"):
        # torch, transformers and trl: imported here to be timed, and not for --help or a missing path
        from scripts import kat_trainer, kat_weights  # noqa: PLC0415
    with _timed(seconds, "model"):
        policy = kat_trainer.load_policy(options)
        lines = policy.fitting(lines, options.max_prompt_tokens)
    with _timed(seconds, "weights"):
        weights_N, origin = kat_weights.find_weights(options, lines, policy)
    ids = [line.prompt_id for line in lines]
    training = kat_trainer.Training(prompt_ids=ids, weights_N=weights_N, origin=origin, start_seconds=seconds)
    with _timed(seconds, "trainer"):
        trainer = kat_trainer.make_trainer(options, policy, lines, reward, training)
    if policy.is_first_process:
        print(f"{len(lines):,} lines, weights {origin}, {options.max_steps:,} steps")
        print("start-up: " + ", ".join(f"{part} {spent:.3g} s" for part, spent in seconds.items()), flush=True)
    trainer.train(resume_from_checkpoint=kat_trainer.checkpoint_of(options))
    trainer.save_model(str(options.out_dir))
    trainer.accelerator.wait_for_everyone()  # a process that ends while another one still speaks to it is aborted
    trainer.accelerator.end_training()
    if policy.is_first_process:
        print(f"written: {options.out_dir}")
    return training


@contextlib.contextmanager
def _timed(seconds: dict[str, float], part: str) -> Iterator[None]:
    """Record the seconds spent inside the context as ``part``."""
    started = time.perf_counter()
    yield
    seconds[part] = time.perf_counter() - started


def _parser() -> argparse.ArgumentParser:
    data = data_folder()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--model", help="the policy: a Hugging Face folder or hub id")
    add("--sft_source", default="sft", help="without --model, nanochat's checkpoint: sft, mid, base or rl")
    add("--pairs_path", type=Path, help=f"default: {data / PAIRS}")
    add("--prompts_path", type=Path, help="prompts instead of pairs; with --pairs_path, the prompts of the online pass")
    add("--out_dir", type=Path, default=base_folder() / "grpo_checkpoints" / "d20", help="default: %(default)s")
    add("--reward", help=f"{EXACT_ANSWER}, {FORMAT}, module:function, or a reward model's folder")
    add(
        "--rm_source",
        help=f"without --reward, a reward model: its folder, or NAME for NAME_checkpoints; default: {_RM}, or the reward "
        f"{FORMAT} if there is none",
    )
    add("--density_aware", type=_boolean, default=True, nargs="?", const=True, help="False: all lines are equally likely")
    add("--density_k", type=int, default=10, help="nearest neighbours of the online pass")
    add("--use_precomputed_embeddings", action="store_true", help="use weights that were computed before")
    add(
        "--embeddings_dir",
        type=Path,
        default=data / STORE,
        help="their store, or a folder of the original script; default: %(default)s",
    )
    add("--require_density", action="store_true", help="fail instead of falling back to other weights")
    add("--max_steps", type=int, default=5000, help="optimizer steps")
    add("--learning_rate", "--lr", type=float, default=1e-5)
    add("--beta", type=float, default=0.1, help="weight of the KL penalty")
    add("--device_batch_size", type=int, default=8, help="completions per batch and process")
    add("--gradient_accumulation_steps", type=int, default=1)
    add("--num_generations", type=int, help="completions per prompt; default: the largest divisor of the batch up to 8")
    add("--max_prompt_tokens", type=int, default=512, help="longer prompts are left out")
    add("--max_completion_tokens", type=int, default=256)
    add("--log_interval", type=int, default=100, help="steps")
    add("--save_steps", type=int, help="steps between checkpoints; default: save only the final model")
    add("--resume", action="store_true", help="continue from the last checkpoint in --out_dir, if there is one")
    add("--seed", type=int, default=0, help="seed of the order of prompts and of generation")
    add("--trust_tokenizer_pickle", action="store_true", help="open nanochat's tokenizer.pkl: it can run code")
    return parser


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options; raises if the folder of precomputed weights is missing."""
    options = _parser().parse_args(arguments)
    if options.use_precomputed_embeddings and options.density_aware:
        require(options.embeddings_dir, command=f"{COMPUTE} --output_dir {options.embeddings_dir}")
    if options.require_density and not options.density_aware:
        raise ConfigError("--require_density contradicts --density_aware False", hint="drop one of them")
    return options


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "1", "yes", "false", "0", "no"):
        raise argparse.ArgumentTypeError(f"must be True or False, got {text!r}")
    return text.lower() in ("true", "1", "yes")


def _training_data(options: argparse.Namespace) -> Path:
    """The given file, else pairs or prompts in their usual places."""
    data = data_folder()
    usual = [data / name for name in (PAIRS, PREFIXES, PROMPTS)]
    given = options.pairs_path or options.prompts_path
    path: Path = given or next((path for path in usual if path.exists()), usual[0])
    return require(path, command="python -m scripts.kat_download_pairs")


def _find_reward(options: argparse.Namespace, lines: Sequence[PromptLine]) -> Reward | str:
    """The requested reward; the data must not be empty."""
    if not lines:
        raise PromptError("no line of the data contains a prompt", hint="run python -m scripts.kat_make_prefixes")
    if options.reward:
        return find_reward(options.reward, list(lines[0].prompt.fields))
    source = options.rm_source or _RM
    folders = [Path(source), base_folder() / f"{source}_checkpoints"]
    found = next((folder for folder in folders if (folder / "config.json").is_file()), None)
    if found is not None:
        return str(found)
    missing = f"no reward was given, and there is no Hugging Face reward model in {folders[0]} or {folders[1]}"
    missing += " (nanochat's own cannot be read)" if folders[1].exists() else ""
    if options.rm_source:
        raise ConfigError(missing, hint=f"add --reward with {EXACT_ANSWER}, {FORMAT}, module:function or a folder")
    _warn(f"note: {missing}. The reward is therefore {FORMAT}: {FORMAT_IN_WORDS}, for a first test. --reward names another")
    return format_reward


def _warn(message: str) -> None:
    if os.environ.get("RANK", "0") == "0":  # of torchrun: torch is not imported yet
        print(message, file=sys.stderr)


if __name__ == "__main__":
    run(main)
