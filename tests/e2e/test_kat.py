"""The original guide, first command to last, on the demo's model; every fall from one kind of weights to another."""

from __future__ import annotations

import argparse
import json
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import PartialState
from safetensors.numpy import load_file
from transformers import AutoTokenizer

import embstore
from embstore.core.density import total_variation
from embstore.core.errors import ConfigError, KeyMismatchError, ModelError, PromptError, WeightsError
from embstore.training import DensitySampler, load_weights
from scripts import (
    kat_compute_embeddings_offline,
    kat_download_pairs,
    kat_make_prompts,
    kat_train_grpo,
    kat_weights,
)
from scripts.kat_files import PromptLine, read_lines, run
from scripts.kat_trainer import Policy, Training, num_generations
from tests.oracle.test_nanochat import CONFIG, make_state
from tests.support.checkpoints import make_base
from tests.support.models import make_model, make_tokenizer, save_model
from tests.support.stores import build_small, write_lines

K = 5
FEW_STEPS = ["--max_steps", "3", "--log_interval", "1", "--max_completion_tokens", "8", "--max_prompt_tokens", "128"]
FEW_STEPS += ["--device_batch_size", "8", "--num_generations", "4", "--reward", "format", "--lr", "1e-3"]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Steps of this size gain nothing from more, and lose much where other processes want the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def base(demo_output: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base folder after the guide's first three commands; some prompts have several pairs."""
    base = tmp_path_factory.mktemp("kat")
    transcripts = base / "transcripts.jsonl"
    texts = [json.loads(line)["prompt"] for line in (demo_output / "prompts.jsonl").read_text().splitlines()]
    texts = [" ".join(text.split()) for text in texts]
    with transcripts.open("w") as file:
        for position, text in enumerate([*texts, *texts[:40], *texts[:20]]):
            question = f"\n\nHuman: {text}\n\nAssistant:"
            file.write(json.dumps({"chosen": f"{question} yes {position}", "rejected": f"{question} no"}) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(base))
        kat_download_pairs.main(["--from-files", str(transcripts)])
        kat_make_prompts.main([])
        kat_compute_embeddings_offline.main(["--model", str(demo_output / "model"), "--k", str(K), "--write_embeddings_npy"])
    return base


@pytest.fixture
def guide(base: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
    return base / "data"


def lines_of(path: Path) -> list[PromptLine]:
    return list(read_lines(path, report=print))


def test_the_offline_pass_leaves_the_originals_files(guide: Path) -> None:
    folder = guide / "embeddings_offline"
    prompts = [json.loads(line) for line in (guide / "prompts_all.jsonl").read_text().splitlines()]
    ids = json.loads((folder / "ids.json").read_text())
    weights = np.load(folder / "density_weights.npy")
    emb_NV = np.load(folder / "embeddings.npy", mmap_mode="r")
    metadata = json.loads((folder / "embeddings_metadata.json").read_text())
    assert ids == [prompt["id"] for prompt in prompts]
    assert weights.dtype == np.float32
    assert weights.shape == (len(ids),)
    assert weights.sum(dtype=np.float64) == pytest.approx(1, abs=1e-6)
    assert emb_NV.dtype == np.float32
    assert emb_NV.shape == (len(ids), metadata["embedding_dim"])
    np.testing.assert_allclose(np.linalg.norm(emb_NV, axis=1), 1, atol=1e-3)
    # the original's recipe, in the direction its text promises: exact neighbours, rare rows up; at most 10 times the mean,
    # which this model, a little different on each processor, may reach
    row_NV = emb_NV.astype(np.float64)
    square_N = (row_NV**2).sum(axis=1)
    distance_NN = np.sqrt(np.maximum(square_N[:, None] + square_N - 2 * row_NV @ row_NV.T, 0))
    mean_N = np.sort(distance_NN, axis=1)[:, 1 : K + 1].mean(axis=1)
    for _ in range(100):
        mean_N = np.minimum(mean_N, 10 * mean_N.mean())
    assert np.abs(mean_N / mean_N.sum() - weights).sum() / 2 < 5e-3


def test_the_same_command_again_computes_nothing(guide: Path, demo_output: Path) -> None:
    report = kat_compute_embeddings_offline.main(["--model", str(demo_output / "model"), "--k", str(K)])
    assert report.embedded_rows == 0


def train(demo_output: Path, out: Path, *more: str) -> Training:
    return kat_train_grpo.main(["--model", str(demo_output / "model"), "--out_dir", str(out), *FEW_STEPS, *more])


def check_steps(training: Training, start: Path, out: Path) -> None:
    """Three steps on the prompts that the plan over these weights names, and a model that moved."""
    plan = DensitySampler(training.weights_N, seed=0).plan(0)
    assert [step.number for step in training.steps] == [1, 2, 3]
    drawn = [prompt_id for step in training.steps for prompt_id in step.drawn]
    expected = [training.prompt_ids[place] for place in plan[:6]]  # two prompts a step, four completions each
    assert drawn == [
        prompt_id for pair in zip(expected[::2], expected[1::2], strict=True) for prompt_id in dict.fromkeys(pair)
    ]
    assert all(np.isfinite([step.loss, step.reward]).all() for step in training.steps)
    before, after = (load_file(folder / "model.safetensors") for folder in (start, out))
    assert before.keys() == after.keys()
    assert any((before[name] != after[name]).any() for name in before)


def test_training_on_precomputed_weights_and_then_without(
    guide: Path, demo_output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    offline = train(demo_output, tmp_path / "offline", "--use_precomputed_embeddings", "--require_density")
    assert offline.origin == "precomputed"
    check_steps(offline, demo_output / "model", tmp_path / "offline")
    said = capsys.readouterr().out
    assert "start-up: data" in said
    assert all(f"{part} " in said for part in ("imports", "model", "weights"))
    assert said.count("drew ") == 3

    # joined by hand: by id, and shared by the pairs of one prompt
    ids = json.loads((guide / "embeddings_offline" / "ids.json").read_text())
    by_id = dict(zip(ids, np.load(guide / "embeddings_offline" / "density_weights.npy").tolist(), strict=True))
    tokenizer = AutoTokenizer.from_pretrained(demo_output / "model")
    pairs = [json.loads(line) for line in (guide / "pairs_all.jsonl").read_text().splitlines()]
    texts = [f"user: {pair['prefix']['messages'][0]['content']}\nassistant:" for pair in pairs]
    kept = [pair["prefix_id"] for pair, text in zip(pairs, texts, strict=True) if len(tokenizer(text)["input_ids"]) <= 128]
    counts = Counter(kept)
    assert max(counts.values()) == 3
    assert 200 < len(kept) < len(pairs)
    assert list(offline.prompt_ids) == kept
    by_hand_N = np.array([by_id[prompt_id] / counts[prompt_id] for prompt_id in kept])
    np.testing.assert_allclose(offline.weights_N, by_hand_N / by_hand_N.sum(), rtol=1e-6)

    embedded = ["--pairs_path", str(guide / "pairs_all.jsonl"), "--prompts_path", str(guide / "prompts_all.jsonl")]
    online = train(demo_output, tmp_path / "online", "--density_k", str(K), *embedded)
    assert online.origin == "online"
    check_steps(online, demo_output / "model", tmp_path / "online")
    assert list(online.prompt_ids) == kept
    assert total_variation(online.weights_N, offline.weights_N) < 1e-4


def test_without_density_every_line_is_as_likely(guide: Path, demo_output: Path, tmp_path: Path) -> None:
    """``--density_aware=False`` as the original had it, and prompts in place of pairs; the reward is a model's folder."""
    model, tokenizer = make_model("llama"), make_tokenizer()
    import transformers

    head = transformers.LlamaForSequenceClassification(
        transformers.LlamaConfig(**(model.config.to_dict() | {"num_labels": 1, "architectures": None}))
    )
    save_model(tmp_path / "judge", head, tokenizer)
    training = train(
        demo_output,
        tmp_path / "out",
        "--density_aware=False",
        "--use_precomputed_embeddings",
        "--prompts_path",
        str(guide / "prompts_all.jsonl"),
        "--reward",
        str(tmp_path / "judge"),
    )
    assert training.origin == "uniform"
    assert set(training.weights_N) == {1.0}
    check_steps(training, demo_output / "model", tmp_path / "out")
    assert len({step.reward for step in training.steps}) == 3


def test_a_run_goes_on_from_its_last_checkpoint(guide: Path, demo_output: Path, tmp_path: Path) -> None:
    common = ["--use_precomputed_embeddings", "--save_steps", "2"]
    whole = train(demo_output, tmp_path / "out", *common)
    shutil.rmtree(tmp_path / "out" / "checkpoint-3")
    again = train(demo_output, tmp_path / "out", *common, "--resume")
    assert again.steps == whole.steps[2:]


# --- which weights, and what happens when there are none -------------------------------------------------------------


@pytest.fixture
def policy() -> Policy:
    return Policy(model=None, tokenizer=None, processes=PartialState(cpu=True))


def options_for(*arguments: str) -> argparse.Namespace:
    return kat_train_grpo.parse(["--use_precomputed_embeddings", *arguments])


@pytest.fixture
def damaged(guide: Path, tmp_path: Path) -> Path:
    store = shutil.copytree(guide / "embeddings_offline", tmp_path / "store", symlinks=True)
    file = store / (store / "density_weights.npy").readlink()
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    return store


def stub_online(monkeypatch: pytest.MonkeyPatch, result: object) -> list[list[str]]:
    """The online pass gives or raises ``result``; what it was asked to embed is returned."""
    asked: list[list[str]] = []

    def sampler(prompts: list[str], *_: object, k: int) -> Any:
        asked.append(prompts)
        assert k == 10
        if isinstance(result, Exception):
            raise result
        return argparse.Namespace(density_weights=np.arange(1, len(prompts) + 1) / sum(range(len(prompts) + 1)))

    monkeypatch.setattr(embstore, "DensityAwareSampler", sampler, raising=False)
    return asked


def test_damaged_weights_fall_back_to_the_online_pass_loudly(
    guide: Path, damaged: Path, policy: Policy, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = stub_online(monkeypatch, None)
    lines = lines_of(guide / "pairs_all.jsonl")
    weights_N, origin = kat_weights.find_weights(options_for("--embeddings_dir", str(damaged)), lines, policy)
    assert origin == "online"
    distinct = list(dict.fromkeys(line.prompt_id for line in lines))
    assert len(asked[0]) == len(distinct)
    assert weights_N.sum() == pytest.approx(1)
    by_id = Counter[str]()
    for line, weight in zip(lines, weights_N, strict=True):
        by_id[line.prompt_id] += weight
    np.testing.assert_allclose(
        [by_id[prompt_id] for prompt_id in distinct], np.arange(1, len(distinct) + 1) / sum(range(len(distinct) + 1))
    )
    said = capsys.readouterr().err
    assert "precomputed weights are not available" in said
    assert "sha256" in said
    assert "FALLING BACK to the online pass" in said


def test_without_any_weights_sampling_is_uniform_loudly(
    guide: Path, damaged: Path, policy: Policy, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stub_online(monkeypatch, ModelError("no such model"))
    lines = lines_of(guide / "pairs_all.jsonl")
    weights_N, origin = kat_weights.find_weights(options_for("--embeddings_dir", str(damaged)), lines, policy)
    assert origin == "uniform"
    assert set(weights_N) == {1.0}
    said = capsys.readouterr().err
    assert "online weights are not available: no such model" in said
    assert said.count("FALLING BACK") == 2


def test_require_density_forbids_every_fall(
    guide: Path, damaged: Path, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = stub_online(monkeypatch, ModelError("no such model"))
    lines = lines_of(guide / "pairs_all.jsonl")
    strict = options_for("--embeddings_dir", str(damaged), "--require_density")
    with pytest.raises(WeightsError, match=r"precomputed weights are not available: .*sha256"):
        kat_weights.find_weights(strict, lines, policy)
    assert asked == []
    with pytest.raises(WeightsError, match="online weights are not available: no such model"):
        kat_weights.find_weights(kat_train_grpo.parse(["--require_density"]), lines, policy)
    with pytest.raises(ConfigError, match="contradicts"):
        kat_train_grpo.parse(["--require_density", "--density_aware", "False"])


def test_chats_that_share_their_first_message_keep_their_own_weights(policy: Policy, tmp_path: Path) -> None:
    """The id that is derived from it is the same for all of them."""
    chats = [
        {
            "messages": [
                {"role": role, "content": text} for role, text in (("user", "Hello"), ("assistant", "Hi"), ("user", last))
            ]
        }
        for last in (f"What is {number} times {number}?" for number in range(30))
    ]
    source = write_lines(tmp_path / "prompts.jsonl", chats)
    build_small(source, tmp_path / "store")
    lines = lines_of(source)[::-1]
    assert len({line.prompt_id for line in lines}) == 1
    weights_N, origin = kat_weights.find_weights(
        options_for("--embeddings_dir", str(tmp_path / "store"), "--require_density"), lines, policy
    )
    assert origin == "precomputed"
    np.testing.assert_allclose(weights_N, load_weights(tmp_path / "store").array[::-1], rtol=1e-5)
    weight_of = {line.content_id: float(number) for number, line in enumerate(lines)}
    assert kat_weights.join(lines, weight_of, {}).tolist() == list(range(30))


def test_a_prompt_without_a_weight_is_named(guide: Path, policy: Policy, tmp_path: Path) -> None:
    path = tmp_path / "more.jsonl"
    path.write_text((guide / "pairs_all.jsonl").read_text() + json.dumps({"prompt": "new", "chosen": "a", "rejected": "b"}))
    lines = lines_of(path)
    with pytest.raises(
        WeightsError,
        match=rf"1 of {len(lines)} items have no row in .*: 1 not in the store, the first is item {len(lines) - 1}, 'new'",
    ):
        kat_weights.find_weights(options_for("--require_density"), lines, policy)
    with pytest.raises(KeyMismatchError, match=f"the prompts of {len(lines)} of {len(lines)} lines were not embedded"):
        kat_weights.join(lines, {}, {})


def test_a_folder_that_is_not_there_names_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    with pytest.raises(PromptError, match=r"embeddings_offline does not exist") as store:
        kat_train_grpo.main(["--use_precomputed_embeddings"])
    assert "python -m scripts.kat_compute_embeddings_offline" in str(store.value.hint)
    with pytest.raises(SystemExit) as ended:
        run(lambda: kat_train_grpo.main([]))
    assert ended.value.code == 1
    assert capsys.readouterr().err.splitlines() == [
        f"error: {tmp_path / 'data' / 'pairs_all.jsonl'} does not exist",
        "hint: run python -m scripts.kat_download_pairs",
    ]


def test_without_a_reward_the_ways_to_give_one_are_named(guide: Path) -> None:
    with pytest.raises(ConfigError, match="no reward was given, and there is no") as caught:
        kat_train_grpo.main(["--density_aware", "False"])
    assert "exact-answer, format, module:function or a folder" in str(caught.value.hint)


@pytest.mark.parametrize(("batch", "generations"), [(8, 8), (16, 8), (6, 6), (9, 3), (14, 7)])
def test_groups_fit_the_batch(batch: int, generations: int) -> None:
    assert num_generations(batch) == generations


@pytest.mark.parametrize("batch", [1, 11])
def test_a_batch_that_no_group_fits_is_refused(batch: int) -> None:
    with pytest.raises(ConfigError, match=f"a batch of {batch} cannot be divided"):
        num_generations(batch)


def test_a_nanochat_checkpoint_is_trained_by_its_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    make_base(tmp_path, CONFIG, make_state(), source="chatsft_checkpoints")
    (tmp_path / "data").mkdir()
    lines = [{"prompt": f"the {word}"} for word in ("sum", "proof", "light", "matrix")]
    (tmp_path / "data" / "prompts_all.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    kat_train_grpo.main(["--density_aware=False", "--trust_tokenizer_pickle", *FEW_STEPS])
    out = tmp_path / "grpo_checkpoints" / "d20"
    before, after = (load_file(folder / "model.safetensors") for folder in (out / "start", out))
    assert any((before[name] != after[name]).any() for name in before)
    tokenizer = AutoTokenizer.from_pretrained(out)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "the"}], add_generation_prompt=True, tokenize=False)
    assert chat == "<|bos|><|user_start|>the<|user_end|><|assistant_start|>"
    assert tokenizer.eos_token == "<|assistant_end|>"
    assert "4 lines, weights uniform, 3 steps" in capsys.readouterr().out
