"""The original guide, first command to last, on the demo's model; every fall from one kind of weights to another."""

from __future__ import annotations

import argparse
import json
import resource
import shlex
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import PartialState
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import embstore
from embstore.core.diagnostics import total_variation
from embstore.core.errors import (
    ConfigError,
    EmbstoreError,
    KeyMismatchError,
    ModelError,
    PromptError,
    StorageError,
    StoreExistsError,
    WeightsError,
)
from embstore.storage.reader import open_store
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

pytestmark = pytest.mark.usefixtures("one_thread")

K = 5
SMALL = ["--max_completion_tokens", "8", "--max_prompt_tokens", "128", "--num_generations", "4"]
FEW_STEPS = ["--max_steps", "3", "--log_interval", "1", "--device_batch_size", "8", "--reward", "format", "--lr", "1e-3"]
FEW_STEPS += SMALL


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
        kat_compute_embeddings_offline.main(["--model", str(demo_output / "model"), "--k", str(K)])
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


def test_the_same_command_again_computes_nothing(guide: Path, demo_output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = guide / "embeddings_offline"
    before = (folder / "embeddings.npy").stat()
    stored = open_store(folder).spec.embedding.batch_tokens
    again = ["--model", str(demo_output / "model"), "--k", str(K)]
    report = kat_compute_embeddings_offline.main([*again, "--batch_size", "3"])
    assert report.embedded_rows == 0
    after = (folder / "embeddings.npy").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    said = capsys.readouterr().out
    assert f"note: --batch_size 3 (1536 tokens) is not used: {folder} was begun with batches of {stored} tokens" in said
    kat_compute_embeddings_offline.main(["--k", str(K)])  # the store knows its model
    assert "--batch_size" not in capsys.readouterr().out


def test_the_originals_check_list(
    guide: Path, demo_output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """OFFLINE_PIPELINE_SUMMARY.md of the original, line by line, after its quick test."""
    folder = guide / "embeddings_offline"
    prompts = [json.loads(line)["prompt"] for line in (guide / "prompts_all.jsonl").read_text().splitlines()]

    # embeddings.npy exists and is 5.25 GB: 4 bytes x columns per prompt, and a header
    vocabulary = json.loads((demo_output / "model" / "config.json").read_text())["vocab_size"]
    assert (folder / "embeddings.npy").stat().st_size == 128 + 4 * vocabulary * len(prompts)
    assert np.load(folder / "embeddings.npy", mmap_mode="r").shape == (len(prompts), vocabulary)
    assert json.loads((folder / "prompts_list.json").read_text()) == prompts
    report = embstore.verify(folder)
    assert (report.findings, report.notes) == ([], [])

    # density_weights.npy exists and sums to ~1.0
    weights_N = np.load(folder / "density_weights.npy")
    assert (weights_N.dtype, weights_N.shape) == (np.float32, (len(prompts),))
    assert weights_N.sum(dtype=np.float64) == pytest.approx(1, abs=1e-6)

    # embeddings_metadata.json is readable
    metadata = json.loads((folder / "embeddings_metadata.json").read_text())
    expected: dict[str, object] = {
        "n_prompts": len(prompts),
        "embedding_dim": vocabulary,
        "embedding_dtype": "float32",
        "weights_dtype": "float32",
        "normalization": "L2 unit vectors",
    }
    assert {name: metadata[name] for name in expected} == expected
    for name in ("min", "max", "mean", "std"):
        assert metadata[f"weights_{name}"] == pytest.approx(float(getattr(weights_N.astype(np.float64), name)()), rel=1e-5)
    published = load_weights(folder).metadata
    assert (published["embedding_dtype"], published["normalization"]) == ("float16", "l2")

    # kat_train_grpo.py loads weights successfully, as documented: --use_precomputed_embeddings --max_steps 10
    capsys.readouterr()
    documented = ["--use_precomputed_embeddings", "--max_steps", "10"]
    training = kat_train_grpo.main(
        ["--model", str(demo_output / "model"), *documented, *SMALL, "--lr", "1e-3", "--out_dir", str(tmp_path)]
    )
    said = capsys.readouterr()
    assert training.origin == "precomputed"
    assert "no reward was given" in said.err
    assert "The reward is therefore format" in said.err
    assert [step.number for step in training.steps] == [1, 10]

    # training starts within 1 second: what density adds to the start
    assert training.start_seconds["weights"] < 1

    # loss decreases normally: a step lowers the loss of its own completions
    assert all(np.isfinite([step.loss, step.reward]).all() for step in training.steps)
    BATCHES.clear()
    one_step = ["--max_steps", "1", "--reward", f"{__name__}:recorded", "--lr", "1e-4", "--beta", "0"]
    one_step += ["--device_batch_size", "16"]
    step = train(demo_output, tmp_path / "one", "--use_precomputed_embeddings", *one_step).steps[0]
    (batch,) = BATCHES
    start, after = (log_probabilities(folder, batch) for folder in (demo_output / "model", tmp_path / "one"))
    assert policy_loss(start, start, batch) == pytest.approx(step.loss, abs=1e-3)
    assert policy_loss(after, start, batch) < policy_loss(start, start, batch)


BATCHES: list[tuple[list[str], list[list[int]], list[float]]] = []


def recorded(prompts: list[str], completion_ids: list[list[int]], **_: object) -> list[float]:
    """A reward for small token ids, which differ in every completion; its batches are kept."""
    rewards = [float(np.mean(ids)) / -1000 for ids in completion_ids]
    BATCHES.append((prompts, completion_ids, rewards))
    return rewards


def log_probabilities(folder: Path, batch: tuple[list[str], list[list[int]], list[float]]) -> list[torch.Tensor]:
    """Of the tokens of each completion."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    for prompt, ids in zip(*batch[:2], strict=True):
        given = tokenizer(prompt)["input_ids"]
        with torch.no_grad():
            logits_TV = model(torch.tensor([given + ids])).logits[0, len(given) - 1 : -1]
        found.append(torch.log_softmax(logits_TV, -1)[range(len(ids)), ids])
    return found


def policy_loss(now: list[torch.Tensor], start: list[torch.Tensor], batch: tuple[Any, Any, list[float]]) -> float:
    """GRPO's loss without clipping: every token's ratio, by the advantage of its completion in a group of four."""
    reward_GC = np.array(batch[2]).reshape(-1, 4)
    spread_G1 = reward_GC.std(axis=1, ddof=1, keepdims=True)
    assert spread_G1.any()
    advantages = ((reward_GC - reward_GC.mean(axis=1, keepdims=True)) / (spread_G1 + 1e-4)).ravel()
    ratios = [float(torch.exp(new - old).sum()) for new, old in zip(now, start, strict=True)]
    return -float(advantages @ ratios) / sum(map(len, start))


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


def conversation(last: str) -> dict[str, Any]:
    turns = [("user", "Hello"), ("assistant", "Hi"), ("user", last)]
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


def as_pair(record: dict[str, Any], **more: str) -> dict[str, Any]:
    return {"prefix": record, "chosen": "yes", "rejected": "no", **more}


@pytest.fixture
def hellos(tmp_path: Path) -> Path:
    """A store of 30 chats that begin alike, and of one text with an id."""
    lines = [conversation(f"What is {number} times {number}?") for number in range(30)]
    lines.append({"id": "task-1", "prompt": "Prove that 2 is even."})
    build_small(write_lines(tmp_path / "prompts.jsonl", lines), tmp_path / "store")
    return tmp_path / "store"


def test_a_line_that_is_joined_by_its_id_leaves_the_others_joined_by_content(
    hellos: Path, policy: Policy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shared = lines_of(write_lines(tmp_path / "one.jsonl", [conversation("a")]))[0].prompt_id
    records = [as_pair(conversation(f"What is {number} times {number}?"), prefix_id=shared) for number in range(30)]
    records.append({"id": "task-1", "prompt": "Show that two is even."})
    lines = lines_of(write_lines(tmp_path / "lines.jsonl", records[::-1]))
    weights_N, origin = kat_weights.find_weights(
        options_for("--embeddings_dir", str(hellos), "--require_density"), lines, policy
    )
    assert origin == "precomputed"
    np.testing.assert_allclose(weights_N, load_weights(hellos).array[::-1], rtol=1e-5)
    assert "note: 1 of 31 lines are joined by the ids of their prompts" in capsys.readouterr().err


def test_an_id_that_several_prompts_were_derived_from_joins_nothing(hellos: Path, policy: Policy, tmp_path: Path) -> None:
    shared = lines_of(write_lines(tmp_path / "one.jsonl", [conversation("a")]))[0].prompt_id
    assert shared in json.loads((hellos / "aliases.json").read_text())
    records = [as_pair(conversation(last), prefix_id=shared) for last in ("What is 2 times 2?", "What is truth?")]
    lines = lines_of(write_lines(tmp_path / "lines.jsonl", records))
    with pytest.raises(WeightsError, match=r"1 of 2 items have no row .* the first is item 1, .*What is truth\?") as caught:
        kat_weights.find_weights(options_for("--embeddings_dir", str(hellos), "--require_density"), lines, policy)
    assert "kat_make_prefixes" in str(caught.value.hint)
    assert "key_column" not in str(caught.value.hint)


def test_the_online_pass_does_not_join_by_an_id_of_several_prompts(
    policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub_online(monkeypatch, None)
    shared = lines_of(write_lines(tmp_path / "one.jsonl", [conversation("a")]))[0].prompt_id
    prompts = [{"id": shared, **conversation(f"What is {number}?")} for number in range(3)]
    prompts += [{"id": "task-1", "prompt": "Prove that 2 is even."}, {"prompt": "The answer?"}]
    pairs = [as_pair(conversation(f"What is {number}?"), prefix_id=shared) for number in (2, 0, 2)]
    pairs += [{"prompt": "Show it.", "prefix_id": "task-1", "chosen": "a", "rejected": "b"}]
    pairs += [as_pair({"messages": [{"role": "user", "content": "The answer?"}]})]
    paths = ["--prompts_path", str(write_lines(tmp_path / "prompts.jsonl", prompts))]
    paths += ["--pairs_path", str(write_lines(tmp_path / "pairs.jsonl", pairs)), "--require_density"]
    lines = lines_of(tmp_path / "pairs.jsonl")
    weights_N, _ = kat_weights.find_weights(kat_train_grpo.parse(paths), lines, policy)
    np.testing.assert_allclose(weights_N * 15, [3 / 2, 1, 3 / 2, 4, 5])  # the stub's weights are 1 to 5
    pairs.append(as_pair(conversation("What is truth?"), prefix_id=shared))
    lines = lines_of(write_lines(tmp_path / "pairs.jsonl", pairs))
    with pytest.raises(WeightsError, match=r"the prompts of 1 of 6 lines were not embedded; the first is line 6, .* truth"):
        kat_weights.find_weights(kat_train_grpo.parse(paths), lines, policy)


def test_the_log_shows_the_drawn_chat_and_not_another_of_its_id(
    demo_output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chats = [conversation(last) for last in ("one", "two", "three")]
    source = write_lines(tmp_path / "prompts.jsonl", chats)
    training = train(
        demo_output, tmp_path / "out", "--prompts_path", str(source), "--density_aware=False", "--max_steps", "2"
    )
    plan = DensitySampler(training.weights_N, seed=0).plan(0)
    shown = [f"user: Hello assistant: Hi user: {('one', 'two', 'three')[place]}" for place in plan[:2]]
    said = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("step 1/"))
    assert said.endswith("drew " + ", ".join(map(repr, dict.fromkeys(shown))))
    assert set(training.steps[0].drawn) == set(training.prompt_ids)


# --- a folder of the original script -----------------------------------------------------------------------------------


def original_folder(
    folder: Path, weights: list[float], *, texts: list[str] | None = None, ids: list[str] | None = None
) -> Path:
    """What the original's save_embeddings wrote: with the texts of prompts, later with ids of conversations."""
    folder.mkdir()
    weights_N = np.array(weights) / np.sum(weights)
    np.save(folder / "density_weights.npy", weights_N.astype(np.float32))
    np.save(folder / "embeddings.npy", np.eye(len(weights), 8, dtype=np.float32))
    if texts is not None:
        (folder / "prompts_list.json").write_text(json.dumps(texts))
    if ids is not None:
        (folder / "ids.json").write_text(json.dumps(ids))
    metadata = {
        "n_prompts" if texts is not None else "n_items": len(weights),
        "embedding_dim": 8,
        "embedding_dtype": "float32",
        "weights_dtype": "float32",
        "model_vocab_size": 50304,
        "model_n_embd": 768,
        "normalization": "L2 unit vectors",
        "weights_min": float(weights_N.min()),
    }
    (folder / "embeddings_metadata.json").write_text(json.dumps(metadata, indent=2))
    return folder


PAIRS = [
    {"prompt": "Why?", "chosen": "a", "rejected": "b"},
    as_pair({"messages": [{"role": "user", "content": "What  is\nseven?"}]}),
    {"prompt": "Why?", "chosen": "c", "rejected": "d"},
    as_pair(conversation("And you?")),
]


def test_a_folder_of_the_original_is_joined_by_its_texts(
    policy: Policy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = ["Hello", "Not in the pairs", "What is seven?", "Why?", "Why?"]
    folder = original_folder(tmp_path / "original", [5, 7, 3, 1, 1], texts=texts)
    lines = lines_of(write_lines(tmp_path / "pairs.jsonl", PAIRS))
    weights_N, origin = kat_weights.find_weights(options_for("--embeddings_dir", str(folder)), lines, policy)
    assert origin == "precomputed"
    np.testing.assert_allclose(weights_N * 17, [1, 3, 1, 5], rtol=1e-6)
    said = capsys.readouterr().err
    assert "1 / mean distance, so prompts in crowds are drawn more" in said
    assert "joined by the texts of prompts_list.json" in said
    assert "FALLING BACK" not in said


def test_a_later_folder_of_the_original_is_joined_by_its_ids(
    policy: Policy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = lines_of(write_lines(tmp_path / "pairs.jsonl", PAIRS))
    ids = [lines[3].prompt_id, "idx_1", lines[1].prompt_id, lines[0].prompt_id]
    folder = original_folder(tmp_path / "original", [5, 7, 3, 2], ids=ids)
    weights_N, _ = kat_weights.find_weights(options_for("--embeddings_dir", str(folder), "--require_density"), lines, policy)
    np.testing.assert_allclose(weights_N * 17, [1, 3, 1, 5], rtol=1e-6)
    assert "joined by the ids of ids.json" in capsys.readouterr().err
    # prompts that are no pairs: one that begins like a pair is another prompt
    prompts = [{"prompt": "Why?"}, conversation("And you?")]
    lines = lines_of(write_lines(tmp_path / "prompts.jsonl", prompts))
    with pytest.raises(WeightsError, match="the prompts of 1 of 2 lines were not embedded; the first is line 2"):
        kat_weights.find_weights(options_for("--embeddings_dir", str(folder), "--require_density"), lines, policy)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (
            lambda folder: np.save(folder / "density_weights.npy", np.full(3, 1 / 3, np.float32)),
            "has 3 weights and 5 prompts",
        ),
        (lambda folder: np.save(folder / "density_weights.npy", np.full(5, 0.3, np.float32)), "sums to 1.5"),
        (lambda folder: np.save(folder / "density_weights.npy", np.array([{}])), "density_weights.npy"),
        (lambda folder: (folder / "prompts_list.json").write_text('{"a": 1}'), "prompts_list.json is not a list of texts"),
        (lambda folder: (folder / "prompts_list.json").write_text('["Why?'), "prompts_list.json is not JSON"),
        (lambda folder: (folder / "prompts_list.json").unlink(), "ids.json"),
    ],
    ids=["a failed batch", "sum", "pickle", "no list", "cut", "no names"],
)
def test_a_spoiled_folder_of_the_original_falls_back_loudly(
    spoil: Any,
    said: str,
    policy: Policy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stub_online(monkeypatch, None)
    folder = original_folder(tmp_path / "original", [1] * 5, texts=["Hello", "Why?", "What is seven?", "a", "b"])
    spoil(folder)
    lines = lines_of(write_lines(tmp_path / "pairs.jsonl", PAIRS))
    _, origin = kat_weights.find_weights(options_for("--embeddings_dir", str(folder)), lines, policy)
    assert origin == "online"
    error = capsys.readouterr().err
    assert "precomputed weights are not available" in error
    assert said in error


def test_files_for_the_original_are_read_back_with_their_direction(
    guide: Path, policy: Policy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """``embstore export --format kat`` writes a folder of that kind: by line, with the direction in its metadata."""
    embstore.export_store(guide / "embeddings_offline", tmp_path / "exported", format="kat")
    lines = lines_of(guide / "pairs_all.jsonl")
    found = {}
    for folder in (guide / "embeddings_offline", tmp_path / "exported"):
        options = options_for("--embeddings_dir", str(folder), "--require_density")
        found[folder.name], _ = kat_weights.find_weights(options, lines, policy)
    np.testing.assert_allclose(found["exported"], found["embeddings_offline"], rtol=1e-5)
    said = capsys.readouterr().err
    assert "distance up, density down, weight up" in said
    assert "crowds" not in said


# --- the original's functions ------------------------------------------------------------------------------------------


def test_the_originals_functions_make_a_folder_that_training_reads(
    guide: Path, demo_output: Path, policy: Policy, tmp_path: Path
) -> None:
    prompts = kat_compute_embeddings_offline.load_prompts(guide / "prompts_all.jsonl")[:30]
    assert prompts == json.loads((guide / "embeddings_offline" / "prompts_list.json").read_text())[:30]
    model = AutoModelForCausalLM.from_pretrained(demo_output / "model")
    tokenizer = AutoTokenizer.from_pretrained(demo_output / "model")
    prompts.append(prompts[0])  # the original kept repeats
    emb_NV = kat_compute_embeddings_offline.compute_embeddings(prompts, model, tokenizer, "cpu", batch_size=16)
    stored_NV = np.load(guide / "embeddings_offline" / "embeddings.npy")
    assert emb_NV.dtype == np.float32
    np.testing.assert_allclose(emb_NV[:30], stored_NV[:30], atol=2e-4)
    np.testing.assert_array_equal(emb_NV[30], emb_NV[0])

    weights_N = kat_compute_embeddings_offline.compute_density_weights(emb_NV[:30], k=K)
    distance_NN = np.linalg.norm(emb_NV[:30, None].astype(np.float64) - emb_NV[None, :30], axis=2)
    mean_N = np.sort(distance_NN, axis=1)[:, 1 : K + 1].mean(axis=1)
    for _ in range(100):
        mean_N = np.minimum(mean_N, 10 * mean_N.mean())
    assert total_variation(weights_N, mean_N) < 5e-3

    with pytest.raises(ConfigError, match="31 rows, 30 weights and 30 prompts do not belong together"):
        kat_compute_embeddings_offline.save_embeddings(emb_NV, weights_N, prompts[:30], tmp_path / "saved", {})
    with pytest.raises(StoreExistsError, match="contains a store"):
        kat_compute_embeddings_offline.save_embeddings(
            emb_NV[:30], weights_N, prompts[:30], guide / "embeddings_offline", {}
        )
    kat_compute_embeddings_offline.save_embeddings(
        emb_NV[:30], weights_N, prompts[:30], tmp_path / "saved", model.config.to_dict()
    )
    metadata = json.loads((tmp_path / "saved" / "embeddings_metadata.json").read_text())
    assert " ".join(list(metadata)[:7]) == (
        "n_prompts embedding_dim embedding_dtype weights_dtype model_vocab_size model_n_embd normalization"
    )
    np.testing.assert_array_equal(np.load(tmp_path / "saved" / "embeddings.npy"), emb_NV[:30])
    lines = lines_of(write_lines(tmp_path / "lines.jsonl", [{"prompt": text} for text in prompts[29::-1]]))
    options = options_for("--embeddings_dir", str(tmp_path / "saved"), "--require_density")
    joined_N, _ = kat_weights.find_weights(options, lines, policy)
    np.testing.assert_allclose(joined_N, weights_N[::-1], rtol=1e-6)


# --- the offline pass --------------------------------------------------------------------------------------------------


@pytest.fixture
def offline(demo_output: Path, tmp_path: Path) -> list[str]:
    """A command for 24 prompts."""
    lines = (demo_output / "prompts.jsonl").read_text().splitlines()[:24]
    (tmp_path / "prompts.jsonl").write_text("".join(f"{line}\n" for line in lines))
    paths = ["--prompts_path", str(tmp_path / "prompts.jsonl"), "--output_dir", str(tmp_path / "out")]
    return ["--model", str(demo_output / "model"), *paths]


def test_a_full_disk_costs_only_the_copy_of_the_rows(
    offline: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    kat_compute_embeddings_offline.main([*offline, "--no_embeddings_npy"])
    assert not (out / "embeddings.npy").exists()
    assert (out / "embeddings_metadata.json").is_symlink()
    assert json.loads((out / "embeddings_metadata.json").read_text())["embedding_dtype"] == "float16"
    capsys.readouterr()

    usage = shutil.disk_usage(out)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=(256 << 20) + 1000))
    kat_compute_embeddings_offline.main(offline)
    assert "is not written: the disk has 256.0 MiB free" in capsys.readouterr().out
    assert not (out / "embeddings.npy").exists()
    assert embstore.verify(out).notes == []

    monkeypatch.undo()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))  # as of a file system with small files
    try:
        kat_compute_embeddings_offline.main(offline)
        with pytest.raises(StorageError, match=r"writing .*embeddings\.npy failed: File too large"):
            kat_compute_embeddings_offline.main([*offline, "--write_embeddings_npy"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "is not written: writing" in capsys.readouterr().out
    assert embstore.verify(out).notes == []

    kat_compute_embeddings_offline.main(offline)
    assert "embeddings.npy: float32 24 x" in capsys.readouterr().out
    assert json.loads((out / "embeddings_metadata.json").read_text())["embedding_dtype"] == "float32"
    # one that is not right is made again
    rows_NV = np.load(out / "embeddings.npy", mmap_mode="r+")
    right_V = rows_NV[7].copy()
    rows_NV[7] = 0
    rows_NV.flush()
    kat_compute_embeddings_offline.main(offline)
    np.testing.assert_array_equal(np.load(out / "embeddings.npy")[7], right_V)
    assert embstore.verify(out).notes == []


def test_the_offline_pass_takes_the_options_of_a_build(offline: list[str], tmp_path: Path) -> None:
    more = ["--weighting", "legacy-inverse", "--max-ratio=inf", "--memory_budget", "1GiB", "--no_embeddings_npy"]
    report = kat_compute_embeddings_offline.main([*offline, *more])
    weighting = report.metadata["weighting"]
    assert isinstance(weighting, dict)
    assert (weighting["weighting"], weighting["max_ratio"], weighting["k"]) == ("legacy-inverse", None, 10)
    with pytest.raises(SystemExit) as ended:
        kat_compute_embeddings_offline.main([*offline, "--memory_budgets", "1GiB"])
    assert ended.value.code == 2


def test_hints_name_the_flags_of_the_offline_pass(offline: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "density_weights.npy").write_bytes(b"of the original")
    with pytest.raises(EmbstoreError, match="is not a store") as taken:
        kat_compute_embeddings_offline.main(offline)
    assert taken.value.hint == "choose another --output_dir"
    (out / "density_weights.npy").unlink()

    kat_compute_embeddings_offline.main([*offline, "--no_embeddings_npy"])
    write_lines(tmp_path / "prompts.jsonl", [{"prompt": f"Another prompt {number}"} for number in range(24)])
    with pytest.raises(EmbstoreError, match="made from a different input") as other:
        kat_compute_embeddings_offline.main(offline)
    model = offline[1]
    assert other.value.hint == (
        "to embed only the prompts that are new: python -m scripts.kat_compute_embeddings_offline "
        f"--prompts_path {tmp_path / 'prompts.jsonl'} --model {model} --output_dir {out}-new --reuse {out}"
    )
    # the command does what the hint says
    command = shlex.split(str(other.value.hint).partition("offline ")[2])
    assert kat_compute_embeddings_offline.main([*command, "--no_embeddings_npy"]).num_rows == 24


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


def test_a_reward_model_that_is_not_there_is_refused_where_it_was_named(guide: Path) -> None:
    with pytest.raises(ConfigError, match="there is no Hugging Face reward model in rm_density or") as caught:
        kat_train_grpo.main(["--density_aware", "False", "--rm_source", "rm_density"])
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
