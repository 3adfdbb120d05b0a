"""The format of prepared data, its writer and its reader.

A folder holds, for each split S (train, valid):
  S-00000.tokens, S-00001.tokens …  little-endian uint16 or uint32 ids; each document is [bos] ids [eos]
  S.documents                       int64 (2, num_documents): where each document ends in the split's stream
                                    of tokens, and in that of its text's UTF-8 bytes
and the tokenizer's files, and `manifest.json`, written last, with the size and SHA-256 of every other file.
File names follow from the split and the shard's number; none is ever taken from a manifest.
"""

import contextlib
import hashlib
import json
import os
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from data.errors import DataError
from data.files import (
    TEMPORARY_SUFFIX,
    check_plain_name,
    map_array,
    open_regular,
    read_json_object,
    sha256_of,
    sync_folder,
    write_atomically,
    write_json,
)

MANIFEST_FILE = "manifest.json"
FORMAT = "token-shards"
VERSION = 1
SPLITS = ("train", "valid")
DTYPES: dict[str, np.dtype] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
INDEX_DTYPE: np.dtype = np.dtype("<i8")
MAX_MANIFEST_BYTES = 32 * 2**20
MAX_COUNT = 2**48


def tokens_file(split: str, shard: int) -> str:
    """Name of a shard of tokens."""
    return f"{split}-{shard:05d}.tokens"


def documents_file(split: str) -> str:
    """Name of the index of a split's documents."""
    return f"{split}.documents"


class TokenSplit:
    """The documents of one split as one memory-mapped stream of tokens.

    `documents`, `tokens` (bos and eos included) and `bytes` (of UTF-8 text) are counts. `ends` is int64
    (documents,): where each document ends in the stream.
    """

    def __init__(self, name: str, shards: list[np.ndarray], index: np.ndarray, vocab_size: int):
        self.name = name
        self.vocab_size = vocab_size
        self._shards = shards
        self._shard_starts = [0]
        for shard in shards:
            self._shard_starts.append(self._shard_starts[-1] + len(shard))
        self.ends, self._byte_ends = index
        self.documents = len(self.ends)
        self.tokens = self._shard_starts[-1]
        self.bytes = int(self._byte_ends[-1]) if self.documents else 0

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of the stream, int64 (stop - start,).

        DataError if an id is outside the vocabulary.
        """
        if not 0 <= start <= stop <= self.tokens:
            raise IndexError(f"tokens [{start}, {stop}) of {self.tokens}")
        out = np.empty(stop - start, np.int64)
        position = start
        while position < stop:
            shard = bisect_right(self._shard_starts, position) - 1
            shard_start = self._shard_starts[shard]
            shard_stop = min(stop, self._shard_starts[shard + 1])
            out[position - start : shard_stop - start] = self._shards[shard][
                position - shard_start : shard_stop - shard_start
            ]
            position = shard_stop
        if len(out) and out.max() >= self.vocab_size:
            raise DataError(
                f"the {self.name} split holds the token {out.max()}, its tokenizer has {self.vocab_size}:"
                f" the shards are damaged, prepare the data again"
            )
        return out

    def document(self, index: int) -> tuple[np.ndarray, int]:
        """Ids of a document, int64 (num_tokens,) with bos and eos, and the number of bytes of its text."""
        start, byte_start = (self.ends[index - 1], self._byte_ends[index - 1]) if index else (0, 0)
        return self.read(int(start), int(self.ends[index])), int(self._byte_ends[index] - byte_start)

    def __len__(self) -> int:
        return self.documents

    def __iter__(self) -> Iterator[tuple[np.ndarray, int]]:
        return map(self.document, range(self.documents))


class ShardWriter:
    """Writes the documents of one split into shards, and continues after those that are already complete.

    A shard is complete when its `.json` note exists, which holds its counts, its hash and, in the companion
    `.lengths` file (int64, (num_documents, 2): tokens and bytes of each), its documents. `finish` joins them
    into the split's index.
    """

    def __init__(self, folder: Path, split: str, dtype_name: str, shard_bytes: int):
        self.folder, self.split = folder, split
        self._dtype = DTYPES[dtype_name]
        self._shard_bytes = shard_bytes
        self._file: BinaryIO | None = None
        self.notes: list[dict] = []  # of the complete shards: {"documents", "tokens", "size", "sha256"}
        self.close()
        while (note := self._read_note()) is not None:
            self.notes.append(note)
        self.documents = sum(note["documents"] for note in self.notes)

    def _name(self, suffix: str) -> str:
        return tokens_file(self.split, len(self.notes)) + suffix

    def _read_note(self) -> dict | None:
        note_path, tokens_path = self.folder / self._name(".json"), self.folder / self._name("")
        if not note_path.exists():
            return None
        note = read_json_object(note_path, MAX_MANIFEST_BYTES)
        is_whole = tokens_path.exists() and tokens_path.stat().st_size == note["size"]
        return note if is_whole else None

    def add(self, ids: np.ndarray, num_bytes: int) -> None:
        """Append one document: ids with bos and eos, and the bytes of its text."""
        if self._file is None:
            self._file = open(self.folder / self._name(TEMPORARY_SUFFIX), "wb")  # noqa: SIM115
            self._hash, self._lengths, self._written_bytes = hashlib.sha256(), [], 0
        content = ids.astype(self._dtype).tobytes()
        self._file.write(content)
        self._hash.update(content)
        self._lengths.append((len(ids), num_bytes))
        self._written_bytes += num_bytes
        self.documents += 1
        if self._written_bytes >= self._shard_bytes:
            self._complete_shard()

    def _complete_shard(self) -> None:
        assert self._file is not None
        lengths = np.array(self._lengths, INDEX_DTYPE)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None
        write_atomically(self.folder / self._name(".lengths"), lengths.tobytes())
        os.replace(self.folder / self._name(TEMPORARY_SUFFIX), self.folder / self._name(""))
        tokens = int(lengths[:, 0].sum())
        note = {
            "documents": len(lengths),
            "tokens": tokens,
            "size": tokens * self._dtype.itemsize,
            "sha256": self._hash.hexdigest(),
        }
        write_json(self.folder / self._name(".json"), note)
        self.notes.append(note)

    def finish(self) -> dict:
        """Complete the last shard, write the index, and return the split's entry of the manifest."""
        if self._file is not None:
            self._complete_shard()
        lengths_of_shards = [
            np.fromfile(self.folder / f"{tokens_file(self.split, shard)}.lengths", INDEX_DTYPE)
            for shard in range(len(self.notes))
        ]
        lengths = np.concatenate([np.empty(0, INDEX_DTYPE), *lengths_of_shards]).reshape(-1, 2)
        ends = np.cumsum(lengths, axis=0).T  # (2, documents)
        write_atomically(self.folder / documents_file(self.split), ends.astype(INDEX_DTYPE).tobytes())
        return {
            "documents": ends.shape[1],
            "tokens": int(ends[0, -1]) if ends.size else 0,
            "bytes": int(ends[1, -1]) if ends.size else 0,
            "shard_tokens": [note["tokens"] for note in self.notes],
        }

    def close(self) -> None:
        """Leave only complete shards behind."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # on a full disk; the incomplete shard is deleted anyway
                self._file.close()
            self._file = None
        for path in self.folder.glob(f"{self.split}*{TEMPORARY_SUFFIX}"):
            path.unlink()


def remove_notes(folder: Path) -> None:
    """Remove what only an unfinished preparation needs."""
    for path in folder.glob("*.tokens.*"):
        path.unlink()


@dataclass(frozen=True, slots=True)
class Manifest:
    """The checked content of manifest.json."""

    name: str
    key: str  # hash of the settings and sources that the folder was prepared from
    settings: dict  # the same in readable form
    dtype_name: str
    tokenizer_fingerprint: str
    vocab_size: int
    splits: dict[str, dict]  # per split: documents, tokens, bytes, shard_tokens
    files: dict[str, dict]  # per file: size, sha256
    fingerprint: str  # hash of the content alone: equal for equal tokens


def fingerprint_of(tokenizer_fingerprint: str, files: dict[str, dict]) -> str:
    """Fingerprint of prepared data: tokenizer and the hashes of all shards and indexes."""
    hashes = [
        [name, files[name]["sha256"]] for name in sorted(files) if name.endswith((".tokens", ".documents"))
    ]
    return hashlib.sha256(json.dumps([VERSION, tokenizer_fingerprint, hashes]).encode()).hexdigest()


def write_manifest(folder: Path, values: dict, notes: dict[str, list[dict]]) -> None:
    """Hash every file of the folder except the shards' notes, and write manifest.json over them.

    The hashes of shards come from `notes` (per split), taken while they were written.
    """
    files = {
        tokens_file(split, shard): {"size": note["size"], "sha256": note["sha256"]}
        for split, split_notes in notes.items()
        for shard, note in enumerate(split_notes)
    }
    for path in folder.glob(f"*{TEMPORARY_SUFFIX}"):  # left by a killed process
        path.unlink()
    for path in sorted(folder.iterdir()):
        if path.name not in files and path.name != MANIFEST_FILE and ".tokens." not in path.name:
            files[path.name] = {"size": path.stat().st_size, "sha256": sha256_of(path)}
    fingerprint = fingerprint_of(values["tokenizer_fingerprint"], files)
    manifest = {"format": FORMAT, "version": VERSION, "files": files, "fingerprint": fingerprint, **values}
    sync_folder(folder)
    write_json(folder / MANIFEST_FILE, manifest)


def read_manifest(folder: Path) -> Manifest:
    """Read and check manifest.json; DataError names what is wrong in it."""
    path = folder / MANIFEST_FILE
    if not folder.is_dir():
        raise DataError(f"data.path={folder}: no such folder of prepared data")
    if not path.exists():
        raise DataError(
            f"{path} is missing: {folder} holds no prepared data, make it with scripts.prepare_data"
        )
    values = read_json_object(path, MAX_MANIFEST_BYTES)
    check = _Checker(path)
    if values.get("format") != FORMAT or values.get("version") != VERSION:
        raise DataError(f"{path} is not of the format {FORMAT} {VERSION}: prepare the data again")
    splits = check.dictionary("splits", values)
    manifest = Manifest(
        name=check.plain_name("name", values),
        key=check.text("key", values),
        settings=check.dictionary("settings", values),
        dtype_name=check.text("dtype", values),
        tokenizer_fingerprint=check.text("tokenizer_fingerprint", values),
        vocab_size=check.count("vocab_size", values),
        splits={name: check.split(check.dictionary(name, splits)) for name in SPLITS},
        files={name: check.file(name, entry) for name, entry in check.dictionary("files", values).items()},
        fingerprint=check.text("fingerprint", values),
    )
    if manifest.dtype_name not in DTYPES:
        raise DataError(f"{path}: dtype must be one of {', '.join(DTYPES)}")
    expected = [documents_file(split) for split in SPLITS]
    for split, entry in manifest.splits.items():
        expected += [tokens_file(split, shard) for shard in range(len(entry["shard_tokens"]))]
    if missing := sorted(set(expected) - set(manifest.files)):
        raise DataError(f"{path} lists no file {missing[0]}: it is damaged")
    if manifest.fingerprint != fingerprint_of(manifest.tokenizer_fingerprint, manifest.files):
        raise DataError(f"{path}: its fingerprint does not match its files, it is damaged")
    return manifest


class _Checker:
    """Typed access to the values of a manifest, which may be hostile."""

    def __init__(self, path: Path):
        self.path = path

    def _get(self, key: str, values: dict, kind: type):
        value = values.get(key)
        if type(value) is not kind:
            raise DataError(
                f"{self.path}: {key[:40]!r} must be of type {kind.__name__}, not {type(value).__name__}"
            )
        return value

    def dictionary(self, key: str, values: dict) -> dict:
        return self._get(key, values, dict)

    def text(self, key: str, values: dict) -> str:
        return self._get(key, values, str)

    def plain_name(self, key: str, values: dict) -> str:
        return check_plain_name(values.get(key), str(self.path))

    def count(self, key: str, values: dict) -> int:
        value = self._get(key, values, int)
        if not 0 <= value <= MAX_COUNT:
            raise DataError(f"{self.path}: {key} must be between 0 and {MAX_COUNT}")
        return value

    def split(self, entry: dict) -> dict:
        values = self._get("shard_tokens", entry, list)
        shard_tokens = [self.count("shard_tokens", {"shard_tokens": value}) for value in values]
        counts = {key: self.count(key, entry) for key in ("documents", "tokens", "bytes")}
        if sum(shard_tokens) != counts["tokens"]:
            raise DataError(f"{self.path}: the tokens of the shards don't add up to those of their split")
        return {**counts, "shard_tokens": shard_tokens}

    def file(self, name: str, entry: object) -> dict:
        check_plain_name(name, str(self.path))
        values = self.dictionary(name, {name: entry})
        return {"size": self.count("size", values), "sha256": self.text("sha256", values)}


def check_files(folder: Path, manifest: Manifest, verify: str) -> None:
    """Compare every file with the manifest: sizes ("quick") or sizes and SHA-256 ("full").

    DataError names the first that is missing, cut, longer, changed, a link, or not in the manifest.
    """
    for name, entry in sorted(manifest.files.items()):
        path = folder / name
        descriptor = open_regular(path)
        size = os.fstat(descriptor).st_size
        os.close(descriptor)
        if size != entry["size"]:
            raise DataError(
                f"{path} holds {size} bytes instead of {entry['size']}: it is damaged, prepare it again"
            )
    for path in sorted(folder.iterdir()):
        if path.name.endswith((".tokens", ".documents")) and path.name not in manifest.files:
            raise DataError(f"{path} is not in {folder / MANIFEST_FILE}: remove it")
    if verify == "quick":
        return
    for name, entry in sorted(manifest.files.items()):
        if sha256_of(folder / name) != entry["sha256"]:
            raise DataError(
                f"{folder / name} does not have the SHA-256 of the manifest: it is damaged or was replaced"
            )


def open_split(folder: Path, manifest: Manifest, split: str) -> TokenSplit:
    """Map the shards and the index of a split, and check that the index fits the tokens."""
    entry = manifest.splits[split]
    dtype = DTYPES[manifest.dtype_name]
    shards = [
        map_array(folder / tokens_file(split, shard), dtype, tokens)
        for shard, tokens in enumerate(entry["shard_tokens"])
    ]
    path = folder / documents_file(split)
    index = map_array(path, INDEX_DTYPE, 2 * entry["documents"]).reshape(2, -1)
    last = index[:, -1].tolist() if entry["documents"] else [0, 0]
    ends, byte_ends = index
    ordered = bool(np.all(ends[1:] > ends[:-1])) and bool(np.all(byte_ends[1:] >= byte_ends[:-1]))
    starts_right = not entry["documents"] or (ends[0] > 0 and byte_ends[0] >= 0)
    if not (ordered and starts_right and last == [entry["tokens"], entry["bytes"]]):
        raise DataError(f"{path} does not fit the tokens of its split: it is damaged, prepare the data again")
    return TokenSplit(split, shards, index, manifest.vocab_size)
