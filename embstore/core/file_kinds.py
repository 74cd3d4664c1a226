"""What a file is, by its first bytes: one table of the formats that embstore reads, and of those it can only name.

Where bytes do not say it, the ending of a name does: which files of a folder are data, and what is CSV.

Pure: bytes in, values out. ``core.inputs`` opens files, ``storage.prompt_source`` and ``storage.array_file`` read them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePath

# what is looked at; a tar archive is known by its byte 257
HEAD_BYTES = 4096

# endings of names
PACKED = (".gz", ".bz2", ".xz", ".zst")
LINES = (".jsonl", ".ndjson", ".json")
TABLES = (".parquet", ".arrow", ".feather")
DELIMITERS = {".csv": ",", ".tsv": "\t", ".tab": "\t"}
DATA = (*LINES, *DELIMITERS, *TABLES)

_DEFAULT = "write its prompts as lines of JSON"
_UNPACK = "unpack it first"


@dataclass(frozen=True, kw_only=True, slots=True)
class FileKind:
    """A format. ``name`` completes "FILE is ..."; the others are next steps for who gave it, with ``{file}`` for its path.

    ``codec`` marks compression, ``table`` what pyarrow reads, ``is_text`` magic bytes that text follows.
    """

    name: str
    magic: tuple[bytes, ...] = ()
    offset: int = 0
    codec: bool = False
    table: bool = False
    is_text: bool = False
    prompts: str = _DEFAULT
    array: str = 'save its rows with numpy.save("rows.npy", rows)'

    def starts(self, head: bytes) -> bool:
        """Whether a file that begins with ``head`` has the magic bytes; a list of ids may begin with ORC or PAR1, too."""
        found = any(head.startswith(magic, self.offset) for magic in self.magic)
        return found and (self.is_text or len(head) < 8 or _CONTROL.search(head) is not None)


_CONTROL = re.compile(rb"[\0-\x08\x0e-\x1f]")

GZIP = FileKind(name="a gzip stream", magic=(b"\x1f\x8b",), codec=True, array="unpack it: gzip -d {file}")
BZIP2 = FileKind(
    name="a bzip2 stream",
    magic=tuple(b"BZh%d%s" % (level, block) for level in range(1, 10) for block in (b"1AY&SY", b"\x17rE8P\x90")),
    codec=True,
    array="unpack it: bzip2 -d {file}",
)
XZ = FileKind(name="an xz stream", magic=(b"\xfd7zXZ\0",), codec=True, array="unpack it: xz -d {file}")
ZSTD = FileKind(
    name="a Zstandard stream",
    magic=(b"\x28\xb5\x2f\xfd", *(bytes([number]) + b"\x2a\x4d\x18" for number in range(0x50, 0x60))),
    codec=True,
    array="unpack it: zstd -d {file}",
)
_TO_NPY = 'numpy.save("rows.npy", numpy.stack(pyarrow.{reader}.read_table("{{file}}")["COLUMN"].to_numpy()))'
PARQUET = FileKind(
    name="a Parquet file", magic=(b"PAR1",), table=True, array="save its vectors: " + _TO_NPY.format(reader="parquet")
)
ARROW_FILE = FileKind(
    name="an Arrow file (Feather)",
    magic=(b"ARROW1",),
    table=True,
    array="save its vectors: " + _TO_NPY.format(reader="feather"),
)
ARROW_STREAM = FileKind(name="an Arrow stream", table=True)
NPY = FileKind(name="a NumPy array", magic=(b"\x93NUMPY",), prompts="embstore import {file} makes a store from embeddings")
LFS_POINTER = FileKind(
    name="a pointer of Git LFS, not the file itself",
    magic=(b"version https://git-lfs.github.com/spec/",),
    is_text=True,
    prompts="fetch the file: git lfs pull, or hf download",
    array="fetch the file: git lfs pull, or hf download",
)
NPZ = FileKind(
    name="a NumPy archive (.npz)",
    prompts="embstore import makes a store from embeddings; prompts are lines of JSON",
    array='save one array of it: numpy.save("rows.npy", numpy.load("{file}")["NAME"])',
)
TORCH = FileKind(
    name="a PyTorch file, which embstore never unpickles",
    array='save it as an array: numpy.save("rows.npy", torch.load("{file}", weights_only=True).float().numpy())',
)
PICKLE = FileKind(name="a pickle, which embstore never loads: unpickling can run any code")
EXCEL = FileKind(name="an Excel workbook", prompts="save its sheet as CSV (UTF-8)")
ZIP = FileKind(
    name="a ZIP archive", prompts="unpack it: unzip -p {file} | embstore build - ...", array="unpack it: unzip {file}"
)
UTF_16 = FileKind(name="UTF-16 text", prompts="convert it: iconv -f UTF-16 -t UTF-8 {file} > prompts.jsonl")
UTF_16_LE = FileKind(name="UTF-16 text", prompts="convert it: iconv -f UTF-16LE -t UTF-8 {file} > prompts.jsonl")
UTF_16_BE = FileKind(name="UTF-16 text", prompts="convert it: iconv -f UTF-16BE -t UTF-8 {file} > prompts.jsonl")
UTF_32 = FileKind(name="UTF-32 text", prompts="convert it: iconv -f UTF-32 -t UTF-8 {file} > prompts.jsonl")
HTML = FileKind(
    name="an HTML page, often a login or error page in place of a download",
    prompts="look at it, then download the file again",
)
XML = FileKind(name="an XML document")
SAFETENSORS = FileKind(
    name="a safetensors file",
    prompts="embstore build reads prompts; give the folder of a model with --model",
    array='save one tensor of it: numpy.save("rows.npy", safetensors.numpy.load_file("{file}")["NAME"])',
)

# in this order; those without magic bytes are recognised below
_BY_MAGIC = (
    GZIP,
    BZIP2,
    XZ,
    ZSTD,
    PARQUET,
    ARROW_FILE,
    NPY,
    LFS_POINTER,
    FileKind(
        name="a Feather file of version 1", magic=(b"FEA1",), prompts="write it again with pyarrow.feather.write_feather"
    ),
    FileKind(
        name="an ORC file",
        magic=(b"ORC",),
        prompts='convert it: pyarrow.orc.read_table("{file}"), then write_table to Parquet',
    ),
    FileKind(name="an Avro file", magic=(b"Obj\x01",), prompts="convert it to Parquet or to lines of JSON"),
    FileKind(
        name="a SQLite database",
        magic=(b"SQLite format 3\0",),
        prompts="export it: sqlite3 -json {file} 'select * from TABLE' > prompts.json",
    ),
    FileKind(
        name="an HDF5 file",
        magic=(b"\x89HDF\r\n\x1a\n",),
        array='save one array of it: numpy.save("rows.npy", h5py.File("{file}")["NAME"][:])',
    ),
    FileKind(name="an lz4 stream", magic=(b"\x04\x22\x4d\x18",), prompts="unpack it: lz4 -dc {file} | embstore build - ..."),
    FileKind(name="a Snappy stream", magic=(b"\xff\x06\0\0sNaPpY",), prompts=_UNPACK),
    FileKind(
        name="a compress (.Z) stream", magic=(b"\x1f\x9d",), prompts="unpack it: gzip -dc {file} | embstore build - ..."
    ),
    FileKind(name="an lzip stream", magic=(b"LZIP",), prompts="unpack it: lzip -dc {file} | embstore build - ..."),
    FileKind(name="a 7z archive", magic=(b"7z\xbc\xaf\x27\x1c",), prompts=_UNPACK, array=_UNPACK),
    FileKind(name="a RAR archive", magic=(b"Rar!\x1a\x07",), prompts=_UNPACK, array=_UNPACK),
    FileKind(
        name="a tar archive", magic=(b"ustar",), offset=257, prompts="unpack it (tar -xf {file}), then give the folder"
    ),
    FileKind(
        name="a document of Microsoft Office",
        magic=(b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1",),
        prompts="save its sheet as CSV (UTF-8)",
    ),
    FileKind(name="a PDF document", magic=(b"%PDF-1.", b"%PDF-2."), is_text=True),
    FileKind(name="a GGUF model", magic=(b"GGUF",), prompts="give a model with --model"),
    FileKind(name="a picture (PNG)", magic=(b"\x89PNG\r\n\x1a\n",)),
    FileKind(name="a picture (JPEG)", magic=(b"\xff\xd8\xff",)),
)
_PICKLE = re.compile(rb"\x80[\x02-\x05]")
_TORCH_NUMBER = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # of torch.save before 1.6
_TAG = re.compile(rb"(?:\xef\xbb\xbf)?\s*<(?:!doctype html|html|head|body)\b", re.IGNORECASE)
_XML = re.compile(rb"(?:\xef\xbb\xbf)?\s*<\?xml\b", re.IGNORECASE)


def kind_of(head: bytes) -> FileKind | None:
    r"""What a file is that begins with ``head`` (its first ``HEAD_BYTES``); None for text, which may be of any kind.

    Examples
    --------
    >>> kind_of(b"PAR1\x15\x04").name
    'a Parquet file'
    >>> kind_of(b"\xff\xfe{\0").name
    'UTF-16 text'
    >>> kind_of(b'{"prompt": "2 + 2?"}') is None
    True
    """
    found = (recognise(head) for recognise in (_wide_text, _zip_kind, _binary_kind, _markup_kind))
    return next((kind for kind in found if kind is not None), None) or next(
        (kind for kind in _BY_MAGIC if kind.starts(head)), None
    )


def ending_of(name: str) -> str:
    """The ending of a name that says what a file is, in lower case and without that of a compression.

    Examples
    --------
    >>> ending_of("train.CSV.gz"), ending_of("prompts.gz")
    ('.csv', '')
    """
    path = PurePath(name.lower())
    return PurePath(path.stem).suffix if path.suffix in PACKED else path.suffix


def _zip_kind(head: bytes) -> FileKind | None:
    """What a ZIP archive is, by the name of its first member."""
    if not head.startswith(b"PK\x03\x04"):
        return None
    first = head[30 : 30 + int.from_bytes(head[26:28], "little")]
    if first.endswith(b".npy"):
        return NPZ
    if first.endswith((b"/data.pkl", b"/version", b"/.format_version", b"/byteorder")):
        return TORCH
    is_sheet = first in (b"[Content_Types].xml", b"_rels/.rels", b"docProps/app.xml") or first.startswith(b"xl/")
    return EXCEL if is_sheet else ZIP


def _binary_kind(head: bytes) -> FileKind | None:
    """Kinds whose first bytes are a number and then a mark."""
    if head[:4] == b"\xff\xff\xff\xff" and len(head) >= 12 and 0 < int.from_bytes(head[4:8], "little") < 1 << 28:
        return ARROW_STREAM
    if head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") <= 100 << 20:  # the longest header it allows
        return SAFETENSORS
    if _PICKLE.match(head):
        return TORCH if b"torch" in head[:200] or head[2:].startswith(_TORCH_NUMBER) else PICKLE
    return None


def _markup_kind(head: bytes) -> FileKind | None:
    return HTML if _TAG.match(head) else XML if _XML.match(head) else None


def _wide_text(head: bytes) -> FileKind | None:
    """UTF-16 and UTF-32, with a byte order mark or by their zeros."""
    if head.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")) or re.match(rb"(?:\0\0\0[^\0]){2}|(?:[^\0]\0\0\0){2}", head):
        return UTF_32
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return UTF_16
    if re.match(rb"(?:[\t\n\r -~]\0){4}", head):
        return UTF_16_LE
    if re.match(rb"(?:\0[\t\n\r -~]){4}", head):
        return UTF_16_BE
    return None
