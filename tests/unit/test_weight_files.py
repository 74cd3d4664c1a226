"""Weight files that are not what their name says, and quantised tensors: right in bfloat16, or refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from embstore.core.config import EmbeddingConfig
from embstore.core.errors import ModelError, StorageError
from embstore.model import digests
from embstore.model.locate import locate_model
from embstore.model.quantised import method_of, plain_tensors
from embstore.model.spilled import spilled
from tests.support.kinds import OTHER_METHODS
from tests.support.models import make_model, make_tokenizer, save_model

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "a" * 64 + "\nsize 16060522984\n"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "llama", make_model("llama"), make_tokenizer())


@pytest.fixture
def folder(llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "own"))


def refused(folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        locate_model(EmbeddingConfig(model=str(folder)))
    assert caught.value.hint
    assert "\n" not in caught.value.message
    return caught.value.message


def test_a_git_lfs_pointer_is_named_with_its_size(folder: Path) -> None:
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        content = (folder / name).read_bytes()
        (folder / name).write_text(POINTER)
        message = refused(folder)
        assert f"{folder / name} is a Git LFS pointer of {len(POINTER)} bytes" in message
        (folder / name).write_bytes(content)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda content: b"", "is empty"),
        (lambda content: content[:5], "is not a safetensors file (5 bytes)"),
        (lambda content: content[:200], "is cut off: it has 200 bytes, its header describes"),
        (lambda content: content[:-1], "is cut off: it has"),
        (lambda content: content + b"x", "is too long: it has"),
        (lambda content: content[:8] + b"}" * 64 + content[72:], "its header cannot be read"),
        (lambda content: b"<html>404 not found</html>", "is not a safetensors file"),
    ],
)
def test_a_cut_off_file_is_named_with_both_sizes(folder: Path, change: Callable[[bytes], bytes], said: str) -> None:
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(change(content))
    message = refused(folder)
    assert str(weights) in message
    assert said in message
    if "cut off: it has " in said and "200" not in said:
        assert f"{len(content) - 1:,} bytes, its header describes {len(content):,}" in message


def test_a_shard_of_the_index_that_is_not_there_is_named(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    assert "lacks 1 of 2 weight files, such as model-00002-of-00002.safetensors" in refused(folder)


def test_weights_in_another_format_beside_them_are_not_read(folder: Path) -> None:
    """Mistral's repositories have the same weights twice: under other names as well."""
    before = locate_model(EmbeddingConfig(model=str(folder))).identity()
    shutil.copy(folder / "model.safetensors", folder / "consolidated.safetensors")
    assert locate_model(EmbeddingConfig(model=str(folder))).identity() == before


@pytest.mark.parametrize("method", [*OTHER_METHODS, "compressed-tensors", "made-up"])
def test_a_quantisation_that_is_not_computed_is_refused_by_name(folder: Path, method: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    settings = {"quant_method": method, "format": "pack-quantized"}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    assert f"own is quantised with {method}" in refused(folder)


def test_the_quantisation_of_a_text_part_is_found() -> None:
    assert method_of({"text_config": {"quantization_config": {"quant_method": "gptq"}}}) == "gptq"
    assert method_of({"quantization_config": {"load_in_4bit": True}}) == "bitsandbytes"
    assert method_of({"quantization_config": None, "text_config": {}}) is None


def eight_bits(rows: int, columns: int, high: int, wide: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A random matrix in 8 bits, its scales, and their product in float64."""
    torch.manual_seed(0)
    weight = torch.randn(rows, columns).to(torch.float8_e4m3fn)
    scales = torch.rand(-(-rows // high), -(-columns // wide)) + 0.5
    expected = weight.double()
    for row in range(rows):
        for column in range(columns):
            expected[row, column] *= scales[row // high, column // wide].double()
    return weight, scales, expected


@pytest.mark.parametrize(("rows", "columns"), [(8, 16), (9, 16), (10, 19)])
def test_blocks_of_8_bits_become_their_products(rows: int, columns: int) -> None:
    """Also where the last block is smaller, as in DeepSeek-V3, which transformers 5.24 refuses."""
    weight, scales, expected = eight_bits(rows, columns, 4, 8)
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [4, 8]}}
    tensors = {"a.weight": weight, "a.weight_scale_inv": scales, "a.input_scale": torch.ones(1), "b.weight": torch.ones(2)}
    found = plain_tensors(tensors, config, "model")
    assert found.keys() == {"a.weight", "b.weight"}
    assert found["a.weight"].dtype == torch.bfloat16
    assert torch.equal(found["a.weight"], expected.float().to(torch.bfloat16))


def test_one_scale_for_a_matrix_and_one_for_each_row() -> None:
    weight, _, _ = eight_bits(6, 8, 6, 8)
    config = {"quantization_config": {"quant_method": "compressed-tensors", "format": "float-quantized"}}
    one = plain_tensors({"a.weight": weight, "a.weight_scale": torch.tensor(0.25)}, config, "model")["a.weight"]
    assert torch.equal(one.float(), weight.float() * 0.25)
    scales = 2.0 ** torch.arange(6)[:, None]
    rows = plain_tensors({"a.weight": weight, "a.weight_scale": scales}, config, "model")["a.weight"]
    assert torch.equal(rows.float(), weight.float() * scales)


@pytest.mark.parametrize(
    ("scales", "said"),
    [
        (None, "has no a.weight_scale_inv"),
        (torch.ones(3, 3), r"scales \(3, 3\)"),
        (torch.ones(2, 2).to(torch.uint8), "uint8"),
    ],
)
def test_scales_that_do_not_fit_are_refused(scales: torch.Tensor | None, said: str) -> None:
    weight, _, _ = eight_bits(8, 16, 4, 8)
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [4, 8]}}
    tensors = {"a.weight": weight} | ({} if scales is None else {"a.weight_scale_inv": scales})
    with pytest.raises(ModelError, match=said):
        plain_tensors(tensors, config, "model")


def test_8_bits_without_a_quantisation_in_the_configuration_are_refused() -> None:
    with pytest.raises(ModelError, match=r"a\.weight is stored as torch\.float8_e4m3fn, and config\.json names no"):
        plain_tensors({"a.weight": torch.ones(2, 2).to(torch.float8_e4m3fn)}, {}, "model")


def test_spilled_tensors_are_equal_and_leave_no_file(tmp_path: Path) -> None:
    tensor = torch.randn(1024, 1024).to(torch.bfloat16).T
    found = spilled(tensor, tmp_path)
    assert torch.equal(found, tensor)
    assert found.data_ptr() != tensor.data_ptr()
    assert list(tmp_path.iterdir()) == []
    small = torch.ones(3)
    assert spilled(small, tmp_path) is small


def test_a_folder_that_cannot_be_written_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"writing .* of converted weights to .*absent failed"):
        spilled(torch.ones(1 << 20), tmp_path / "absent")


def test_a_file_is_read_once_and_again_when_it_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"one")
    first = digests.files_sha256([path])
    monkeypatch.setattr(digests, "_READ_BYTES", 0)  # whoever reads it now finds it empty
    assert digests.files_sha256([path]) == first
    monkeypatch.undo()
    path.write_bytes(b"other")
    assert digests.files_sha256([path]) != first


def test_a_blob_of_the_hub_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its name is its digest, so it counts as the same file in a folder."""
    plain = tmp_path / "weights.safetensors"
    plain.write_bytes(b"one")
    expected = digests.files_sha256([plain])
    blob = tmp_path / "blobs" / "7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed"  # sha256 of "one"
    (tmp_path / "snapshot").mkdir()
    blob.parent.mkdir()
    blob.write_bytes(b"one")
    link = tmp_path / "snapshot" / "weights.safetensors"
    link.symlink_to(blob)
    monkeypatch.setattr(Path, "open", lambda *_: pytest.fail("read"))
    assert digests.files_sha256([link]) == expected
