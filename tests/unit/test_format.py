"""The on-disk contract: journal lines, strict records, manifests. A cut or a flip is noticed, never guessed at."""

from __future__ import annotations

import dataclasses
import json
import zlib
from typing import Any

import pytest

from embstore.core.errors import CorruptStoreError, ExitCode, IdentityMismatchError
from embstore.core.format import (
    STAGE0_FILES,
    FileDigest,
    Manifest,
    canonical_json,
    chunk_name,
    decode_manifest,
    document,
    from_json,
    neighbors_paths,
    parse_document,
    weights_paths,
)
from embstore.core.records import (
    ChunkRecord,
    DemotedRecord,
    DriftRecord,
    FailedRow,
    JournalRecord,
    ReusedStore,
    ReuseRecord,
    ReusingWindowRecord,
    WindowRecord,
    chunk_table,
    decode_chunk_table,
    decode_journal,
    encode_journal_header,
    encode_journal_record,
    replay,
)
from embstore.core.rows import RowRange
from embstore.core.spec import StoreSpec, Versions, decode_spec, diff_fields
from tests.support.records import DIGEST, EMBEDDING, PROMPTS, SPEC, manifest, spec, window_record

REUSE = ReuseRecord(stores=[ReusedStore(digest="d" * 64, rows=50, found=40, reused=39)])


def reusing_window(window: int, start: int, stop: int, reused: list[list[int]]) -> ReusingWindowRecord:
    return ReusingWindowRecord(**vars_of(window_record(window, start, stop)), reused=reused)


RECORDS: list[JournalRecord] = [
    PROMPTS,
    SPEC,
    window_record(0, 0, 32),
    window_record(1, 32, 64, failed=[FailedRow(row=40, reason='says "no" \u2028')], splits=1),
    DemotedRecord(window=0, reason="bit rot\nin two lines"),
    DriftRecord(fields=["threads"]),
    window_record(0, 0, 32, tokens=100),
]
LINES = [encode_journal_header(), *(encode_journal_record(seq, record) for seq, record in enumerate(RECORDS, start=1))]
JOURNAL = b"".join(LINES)
LISTED = {
    **dict.fromkeys((*STAGE0_FILES, "spec.json", "basis.npy", "embeddings.zarr/zarr.json"), DIGEST),
    **dict.fromkeys(("coordinates.npy", "residuals.npy", "chunks.json"), DIGEST),
    **dict.fromkeys(weights_paths("1111111111111111"), DIGEST),
    **dict.fromkeys(dataclasses.asdict(neighbors_paths("2222222222222222")).values(), DIGEST),
}


def decode(content: bytes) -> tuple[list[JournalRecord], int]:
    return decode_journal(content, name="journal.jsonl")


def resealed(line: bytes, **changes: object) -> bytes:
    """A journal line with other fields and a checksum that fits."""
    body = canonical_json({**json.loads(line.rpartition(b"\t")[0]), **changes}).encode()
    return body + b"\t%08x\n" % zlib.crc32(body)


def test_a_whole_journal_gives_every_record_back() -> None:
    assert decode(JOURNAL) == (RECORDS, len(JOURNAL))
    assert decode(b"") == ([], 0)


def test_a_journal_cut_at_any_byte_gives_the_lines_before_the_cut() -> None:
    ends = [sum(map(len, LINES[:count])) for count in range(len(LINES) + 1)]
    for cut in range(len(JOURNAL) + 1):
        records, valid = decode(JOURNAL[:cut])
        whole = max(count for count, end in enumerate(ends) if end <= cut)
        assert valid == ends[whole]
        assert records == RECORDS[: max(0, whole - 1)]


def test_a_tail_that_a_power_cut_filled_with_zeros_is_torn() -> None:
    for start in (0, 10, len(LINES[0]), len(LINES[0]) + 30):
        records, valid = decode(JOURNAL[:start] + bytes(100))
        assert records == []
        assert valid == (len(LINES[0]) if start >= len(LINES[0]) else 0)


def test_any_flipped_bit_is_noticed() -> None:
    """Before the last line it is damage; in the last it is a torn tail, which loses that line and no other."""
    last = len(JOURNAL) - len(LINES[-1])
    for position in range(len(JOURNAL)):
        for bit in (0, 3, 6):
            flipped = bytearray(JOURNAL)
            flipped[position] ^= 1 << bit
            try:
                found = decode(bytes(flipped))
            except CorruptStoreError:
                found = None
            if position < last - 1:
                assert found is None
            elif position == last - 1:  # the line end before the last line: two lines become one torn tail
                assert found == (RECORDS[:-2], last - len(LINES[-2]))
            else:
                assert found == (RECORDS[:-1], last)


@pytest.mark.parametrize("line", range(1, len(LINES) - 1))
def test_a_damaged_line_in_the_middle_is_refused_and_named(line: int) -> None:
    damaged = [*LINES]
    damaged[line] = b"#" + damaged[line][1:]
    with pytest.raises(CorruptStoreError, match=rf"journal\.jsonl: line {line + 1} \(byte {sum(map(len, LINES[:line]))}\)"):
        decode(b"".join(damaged))


@pytest.mark.parametrize(
    "lines",
    [
        [*LINES[:3], LINES[2], *LINES[3:]],
        [*LINES[:2], *LINES[3:]],
        [LINES[0], LINES[2], LINES[1]],
        LINES[1:],
        [*LINES, LINES[0]],
    ],
    ids=["doubled", "missing", "swapped", "no header", "two headers"],
)
def test_a_line_doubled_missing_or_out_of_order_is_refused(lines: list[bytes]) -> None:
    with pytest.raises(CorruptStoreError, match=r"sequence number|header"):
        decode(b"".join(lines))


def test_a_file_that_is_no_journal_is_never_taken_for_a_torn_one() -> None:
    for content in (b"x", b"hello\n", b"{}", b'{"record": "header"}\n', b"\n", b"a\nb\n"):
        with pytest.raises(CorruptStoreError, match=r"journal\.jsonl"):
            decode(content)


def test_another_format_version_is_refused_with_both_versions() -> None:
    journal = resealed(LINES[0], format_version=2) + b"".join(LINES[1:])
    contents = [(decode, journal), (decode_spec, document({**dataclasses.asdict(spec()), "format_version": 2}))]
    contents.append((decode_manifest, manifest(LISTED, format_version=2).encode()))
    contents.append((decode_chunk_table, chunk_table([]).replace(b'"format_version":1', b'"format_version":2')))
    for reader, content in contents:
        with pytest.raises(IdentityMismatchError, match=r"format_version.*the store has 2, given 1") as caught:
            reader(content)  # type: ignore[operator]
        assert caught.value.exit_code == ExitCode.IDENTITY
        assert "release" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"record": "gossip"}, "unknown kind 'gossip'"),
        ({"tokens": "99"}, "tokens"),
        ({"extra": 1}, "extra"),
        ({"chunks": [{"index": 0}]}, "bytes"),
        ({"chunks": {}}, "chunks"),
    ],
)
def test_a_sealed_line_of_another_shape_is_refused(changes: dict[str, object], named: str) -> None:
    with pytest.raises(CorruptStoreError, match=named):
        decode(b"".join(LINES[:3]) + resealed(LINES[3], **changes))


def test_replay_takes_the_last_word_on_each_window() -> None:
    state = replay(RECORDS)
    assert (state.prompts, state.spec) == (PROMPTS, SPEC)
    assert list(state.windows) == [0, 1]
    assert state.windows[0].tokens == 100, "computed again after it was demoted"
    assert replay(RECORDS[:5]).windows.keys() == {1}
    assert state.committed_rows == 64
    assert [failed.row for failed in state.failed] == [40]
    assert state.drifts == (DriftRecord(fields=["threads"]),)


def test_windows_say_which_rows_were_copied() -> None:
    records: list[JournalRecord] = [
        PROMPTS,
        REUSE,
        SPEC,
        reusing_window(0, 0, 32, [[1, 4], [20, 32]]),
        reusing_window(1, 32, 64, [[32, 40], [50, 51]]),
        window_record(2, 64, 70),
    ]
    lines = [encode_journal_header(), *(encode_journal_record(seq, record) for seq, record in enumerate(records, start=1))]
    assert decode(b"".join(lines))[0] == records
    state = replay(records)
    assert state.reuse == REUSE
    assert state.reused == [RowRange(1, 4), RowRange(20, 40), RowRange(50, 51)]
    assert state.committed_rows == 70
    assert replay([*records, window_record(0, 0, 32)]).reused == [RowRange(32, 40), RowRange(50, 51)]
    assert not state.voids_identity


@pytest.mark.parametrize(
    "reused", [[[30, 40]], [[31, 33]], [[40, 40]], [[45, 50], [40, 45]], [[40, 45], [44, 46]], [[60, 65]], [[40]]]
)
def test_copied_rows_outside_their_window_or_out_of_order_are_refused(reused: list[list[int]]) -> None:
    line = encode_journal_record(3, reusing_window(1, 32, 64, reused))
    with pytest.raises(CorruptStoreError, match="are outside the window or out of order"):
        decode(b"".join(LINES[:3]) + line)


@pytest.mark.parametrize("counts", [(50, 51, 1), (50, 40, 41), (1 << 40, 1, 1)])
def test_more_rows_reused_than_there_are_is_refused(counts: tuple[int, int, int]) -> None:
    rows, found, reused = counts
    record = ReuseRecord(stores=[ReusedStore(digest="d" * 64, rows=rows, found=found, reused=reused)])
    with pytest.raises(CorruptStoreError, match=f"{reused} of {rows} rows reused"):
        decode(b"".join(LINES[:2]) + encode_journal_record(2, record))


def test_drift_or_a_split_batch_voids_byte_identity_and_nothing_else_does() -> None:
    plain = [PROMPTS, SPEC, window_record(0, 0, 32), DemotedRecord(window=0, reason="x"), window_record(0, 0, 32)]
    assert not replay(plain).voids_identity
    assert replay([*plain, DriftRecord(fields=["device"])]).voids_identity
    assert replay([*plain, window_record(1, 32, 64, splits=1)]).voids_identity


def test_records_read_back_exactly() -> None:
    for record in (spec(), window_record(1, 32, 64), manifest(LISTED)):
        value = json.loads(document(dataclasses.asdict(record)))
        assert from_json(type(record), value, name="x") == record


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("rows",), "70"),
        (("rows",), 70.0),
        (("rows",), True),
        (("rows",), None),
        (("compressor",), 4),
        (("compressor",), None),
        (("model",), "tiny"),
        (("model", "revision"), 7),
        (("model", "trust_remote_code"), 0),
        (("embedding", "head", "scale"), "1"),
        (("embedding", "threads"), [2]),
    ],
)
def test_a_field_of_another_type_is_refused_by_its_dotted_name(path: tuple[str, ...], value: object) -> None:
    whole = json.loads(document(dataclasses.asdict(spec())))
    inner = whole
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = value
    with pytest.raises(CorruptStoreError, match=r"spec\.json\." + r"\.".join(path)):
        decode_spec(document(whole))


def test_a_field_missing_or_unknown_is_refused_by_name() -> None:
    whole = dataclasses.asdict(spec())
    for changed, named in (({**whole, "colour": 1}, "colour"), ({k: v for k, v in whole.items() if k != "rows"}, "rows")):
        with pytest.raises(CorruptStoreError, match=f"missing or unknown: {named}"):
            from_json(StoreSpec, changed, name="spec.json")
    with pytest.raises(CorruptStoreError, match="expected an object, found list"):
        from_json(WindowRecord, [], name="x")


def test_an_integer_is_a_valid_float_and_null_a_valid_optional() -> None:
    whole = json.loads(document(dataclasses.asdict(spec())))
    whole["embedding"]["head"]["scale"] = 2
    whole["model"]["revision"] = "main"
    found = decode_spec(document(whole))
    assert found.embedding.head.scale == 2
    assert found.model.revision == "main"


def test_differences_are_named_with_dots_and_both_values() -> None:
    other = spec(rows=71, embedding=dataclasses.replace(EMBEDDING, dtype="bfloat16", threads=4))
    found = {(item.field, item.stored, item.given) for item in diff_fields(spec(), other)}
    assert found == {("rows", 70, 71), ("embedding.dtype", "float32", "bfloat16"), ("embedding.threads", 2, 4)}
    assert diff_fields(spec(), spec()) == []


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'"x"'])
def test_a_damaged_document_is_named(content: bytes) -> None:
    with pytest.raises(CorruptStoreError, match=r"spec\.json"):
        parse_document(content, name="spec.json")


def test_a_manifest_is_the_same_bytes_whatever_the_order_it_was_made_in() -> None:
    names = {"default": "1111111111111111", "heavy": "1111111111111111"}
    first = manifest(LISTED, names=names)
    second = manifest(dict(reversed(LISTED.items())), names=dict(reversed(names.items())))
    assert first.encode() == second.encode()
    assert decode_manifest(first.encode()) == first


@pytest.mark.parametrize("name", sorted(LISTED))
def test_a_manifest_must_list_everything_it_publishes(name: str) -> None:
    shorter = {path: digest for path, digest in LISTED.items() if path != name}
    with pytest.raises(CorruptStoreError, match=f"does not list {name}"):
        decode_manifest(manifest(shorter).encode())


def test_stores_from_before_sequences_say_nothing_of_them() -> None:
    whole = manifest({**LISTED, "sequences.npy": DIGEST})
    assert decode_manifest(whole.encode()) == whole
    old_spec = {name: value for name, value in dataclasses.asdict(spec()).items() if name != "sequences"}
    assert decode_spec(document(old_spec)) == spec(sequences=False)
    body = {**json.loads(LINES[3].rpartition(b"\t")[0]), "seq": 1}
    assert body.pop("sequences_crc32c") == "00000003"
    line = canonical_json(body).encode()
    records, _ = decode(LINES[0] + line + b"\t%08x\n" % zlib.crc32(line))
    assert records == [window_record(0, 0, 32, sequences_crc32c=None)]


@pytest.mark.parametrize("version", [3, 0])
def test_prompts_by_a_rule_that_this_release_does_not_know_are_refused(version: int) -> None:
    """The same prompts would get other keys. A newer release has written such a store; rule 0 there never was."""
    error, said = (IdentityMismatchError, "the store has 3, given 2") if version == 3 else (CorruptStoreError, "rule")
    for rule in ({"version": version, "turns": "all"}, {"version": version, "turns": "new", "also": "new"}):
        published = json.loads(manifest(LISTED).encode())
        contents: list[tuple[Any, bytes]] = [
            (decode_manifest, document({**published, "rule": rule})),
            (decode, LINES[0] + resealed(LINES[1], rule=rule)),
        ]
        for reader, content in contents:
            with pytest.raises(error, match=said) as caught:
                reader(content)
            assert ("embstore release that wrote this store" in str(caught.value.hint)) == (version == 3)


def test_a_manifest_must_name_its_default_weights() -> None:
    with pytest.raises(CorruptStoreError, match="default weights"):
        decode_manifest(Manifest(**{**vars_of(manifest(LISTED)), "names": {"heavy": "1111111111111111"}}).encode())


def vars_of(record: Manifest | WindowRecord) -> dict[str, Any]:
    return {entry.name: getattr(record, entry.name) for entry in dataclasses.fields(record)}


def test_a_chunk_table_gives_every_chunk_back() -> None:
    chunks = [ChunkRecord(index=index, bytes=100 + index, crc32c=f"{index:08x}") for index in range(3)]
    assert decode_chunk_table(chunk_table(chunks)) == chunks
    assert len(chunk_table(chunks).splitlines()) == 3 + 2, "a line a chunk"
    for table in ({"chunks": [[1, 2]]}, {"chunks": None}, {}, {"chunks": [1]}):
        with pytest.raises(CorruptStoreError, match=r"chunks\.json"):
            decode_chunk_table(document(table))


def test_names_on_disk_are_those_of_the_format() -> None:
    assert chunk_name(12) == "embeddings.zarr/c.12.0"
    assert weights_paths("d") == ("weights/d.npy", "weights/d.json")
    assert neighbors_paths("d").ids == "neighbors/d/ids.npy"


def test_canonical_json_has_one_spelling_and_no_number_that_json_lacks() -> None:
    assert canonical_json({"b": 1, "a": "é"}) == canonical_json({"a": "é", "b": 1}) == '{"a":"\\u00e9","b":1}'
    for writer in (canonical_json, document):
        with pytest.raises(ValueError, match=r"Out of range|not JSON compliant"):
            writer({"a": float("nan")})


def test_a_digest_is_compared_by_value() -> None:
    assert FileDigest(bytes=3, sha256="ab" * 32) == DIGEST


def test_a_spec_from_before_versions_were_recorded_has_none() -> None:
    whole = json.loads(document(dataclasses.asdict(spec())))
    for name in ("versions", "token_limit"):
        del whole["embedding"][name]
    found = decode_spec(document(whole))
    assert found == spec()
    assert (found.embedding.versions, found.embedding.token_limit) == (None, None)


@pytest.mark.parametrize("name", ["versions", "token_limit"])
def test_one_of_the_two_is_not_from_before(name: str) -> None:
    whole = json.loads(document(dataclasses.asdict(spec())))
    del whole["embedding"][name]
    with pytest.raises(CorruptStoreError, match=f"missing or unknown: {name}"):
        decode_spec(document(whole))


def test_versions_are_decoded_and_checked_as_any_record() -> None:
    versions = Versions(embstore="0.1.0", torch="2.13.0+cpu", transformers="5.24.0")
    recorded = spec(embedding=dataclasses.replace(EMBEDDING, versions=versions, token_limit=128))
    whole = json.loads(document(dataclasses.asdict(recorded)))
    assert decode_spec(document(whole)) == recorded
    whole["embedding"]["versions"]["torch"] = 2
    with pytest.raises(CorruptStoreError, match=r"spec\.json\.embedding\.versions\.torch: expected str"):
        decode_spec(document(whole))
