"""Documents out of text files, hub data sets or the Python standard library, and their split.

A source is opened once (which lists its files and fingerprints them) and can be read any number of times,
always in the same order. Text is strict UTF-8 and comes through unchanged: no newline is translated.
"""

import codecs
import collections
import dataclasses
import glob
import gzip
import hashlib
import heapq
import io
import itertools
import json
import logging
import lzma
import os
import platform
import random
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from data.config import DataConfig
from data.errors import DataError
from data.tokenizer import split_segments

COMPRESSIONS = (".gz", ".xz", ".zst")
TEXT_FORMATS = (".txt", ".jsonl", ".parquet")
SUFFIXES = tuple(f + c for f in TEXT_FORMATS for c in ("", *COMPRESSIONS))
OTHER_FORMATS = (".json", ".ndjson", ".csv", ".tsv")  # which nobody means as the text that they are
ARCHIVES = (".tar", ".tgz", ".txz", ".zip", ".bz2", ".7z", ".rar")  # which are not opened
MAX_LINE_BYTES = 32 * 2**20  # of a line of .jsonl, so that no archive fills the memory
MAX_EXPANSION = 32  # a compressed .txt of more than MAX_LINE_BYTES is at most so many times its file
UNREADABLE = (OSError, EOFError, lzma.LZMAError, zlib.error)  # what damaged files raise
SUFFIXES_SHOWN = 8  # of the kinds of files that are left out
MISSING = object()  # of a row without the field that holds the text
STDLIB_EXCLUDED = frozenset({"site-packages", "dist-packages", "__pycache__"})
STDLIB_TESTS = frozenset({"test", "tests", "idle_test"})
PEEKED_DOCUMENTS = 1_000
SAMPLED_PIECES = 16  # a document is cut so that at least so many make up a sample


class Document(NamedTuple):
    """One document; `name` says where it came from (file, and line where there are several)."""

    text: str
    name: str


@dataclasses.dataclass(frozen=True, slots=True)
class Source:
    """A readable collection of documents.

    `fingerprint` changes whenever the documents may have changed. What is read of a remote source is
    downloaded. `left_out` is a line for the user on the files that are not read.
    """

    read: Callable[[], Iterator[Document]]
    fingerprint: str
    is_remote: bool = False
    left_out: str = ""


def open_source(config: DataConfig) -> Source:
    """The source that `data` names: python_stdlib, text or hub."""
    if config.source == "python_stdlib":
        source = _open_stdlib(config.include_tests)
    elif config.source == "text":
        assert config.path is not None
        source = _open_training_text(config)
    else:
        source = _open_hub(config, config.hub_split)
    if config.max_documents is None:
        return source
    return dataclasses.replace(source, read=lambda: itertools.islice(source.read(), config.max_documents))


def open_valid_source(config: DataConfig) -> Source | None:
    """The source of the validation documents where `data.valid_path` gives one of their own."""
    return open_text(config.valid_path, config.text_field, "data.valid_path") if config.valid_path else None


def open_text(path: str, text_field: str, key: str) -> Source:
    """A text file, all text files below a folder, or those of a glob, in sorted order."""
    return _text_source(*list_text_files(path, key), text_field)


def _open_training_text(config: DataConfig) -> Source:
    """The files of `data.path` without those of `data.valid_path`, which may lie in the same folder."""
    assert config.path is not None
    files, left_out = list_text_files(config.path, "data.path")
    if config.valid_path:
        valid_files, _ = list_text_files(config.valid_path, "data.valid_path")
        held_out = {file.resolve() for file in valid_files}
        files = [file for file in files if file.resolve() not in held_out]
        if not files:
            raise DataError(
                f"data.valid_path={config.valid_path} takes every file of data.path={config.path}, none is "
                "left to train on: name fewer files, or leave it out and set data.valid_fraction"
            )
    return _text_source(files, left_out, config.text_field)


def _text_source(files: list[Path], left_out: str, text_field: str) -> Source:
    """The fingerprint covers names, sizes and modification times, not content."""
    return Source(
        read=lambda: itertools.chain.from_iterable(read_file(file, text_field) for file in files),
        fingerprint=_fingerprint(_listed(files)),
        left_out=left_out,
    )


def list_text_files(path: str, key: str) -> tuple[list[Path], str]:
    """Files named by a file, folder or glob, and a line on those of other kinds, empty where there are none.

    DataError where there are none of a known kind, and where some of a folder could not be read.
    """
    kinds = ", ".join(SUFFIXES)
    if os.path.isfile(path):  # named by itself it is plain text unless its name says otherwise
        if _format_of(Path(path)) in ARCHIVES:
            raise DataError(
                f"{key}={path}: archives are not opened: unpack it and name the folder; allowed are {kinds}"
            )
        if _format_of(Path(path)) in OTHER_FORMATS:
            raise DataError(
                f"{key}={path}: allowed are {kinds}. Name it .jsonl if each line is a JSON object, or .txt "
                "to train on the file as it stands"
            )
        return [Path(path)], ""
    if os.path.isdir(path):
        found = _visible_files(path, key)
    else:
        found = [Path(name) for name in glob.glob(path, recursive=True) if not os.path.isdir(name)]
        if not found:
            raise DataError(f"{key}={path}: no such file or folder, and no file matches it")
    files = sorted(file for file in found if file.name.lower().endswith(SUFFIXES))
    if not files:
        raise DataError(f"{key}={path}: no file in it ends in one of {kinds}")
    for file in files:
        if not file.is_file():
            raise DataError(f"{key}={path}: {file} is no file, or a link to none: take it out of there")
        if os.path.isdir(path) and file.is_symlink():
            _check_stays_inside(file, path, key)
    return files, _describe_others(found, path, key)


def _visible_files(folder: str, key: str) -> list[Path]:
    """The files below a folder, without .git and others whose names begin with a dot."""

    def refuse(error: OSError) -> None:
        raise DataError(f"{key}={folder}: {error.filename} can't be read: {error.strerror}") from error

    files = []
    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for link in filter(os.path.islink, (os.path.join(parent, name) for name in folders)):
            raise DataError(
                f"{key}={folder}: {link} is a linked folder, which is not followed; "
                "replace it by what it leads to, or name its files by a glob"
            )
        files += [Path(parent, name) for name in names if not name.startswith(".")]
    return files


def _check_stays_inside(file: Path, folder: str, key: str) -> None:
    if not file.resolve().is_relative_to(Path(folder).resolve()):
        raise DataError(
            f"{key}={folder}: {file} is a link out of the folder, which is not followed; "
            "replace it by what it leads to, or name its files by a glob"
        )


def _describe_others(found: list[Path], path: str, key: str) -> str:
    names = [file.name.lower() for file in found if not file.name.startswith(".")]
    suffixes = sorted(Path(name).suffix or "no suffix" for name in names if not name.endswith(SUFFIXES))
    others = collections.Counter(suffixes)
    if not others:
        return ""
    most = ", ".join(f"{suffix} ({count:,})" for suffix, count in others.most_common(SUFFIXES_SHOWN))
    return f"{key}={path}: left out files of other kinds, {others.total():,} in all: {most}"


def _format_of(path: Path) -> str:
    """The suffix in lower case, that of a compression taken off."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return next((suffix for suffix in reversed(suffixes) if suffix not in COMPRESSIONS), "")


def read_file(path: Path, text_field: str) -> Iterator[Document]:
    """Documents of one file: a .txt is one, a .jsonl one per line, a .parquet one per row."""
    try:
        if _format_of(path) == ".parquet":
            yield from _read_parquet(path, text_field)
        elif _format_of(path) == ".jsonl":
            yield from _read_jsonl(path, text_field)
        else:
            yield from _read_text(path)
    except UNREADABLE as error:
        raise DataError(f"{path} can't be read: {error}") from error


def _open_binary(path: Path) -> io.BufferedIOBase:
    compression = path.suffix.lower()
    if compression == ".gz":
        return gzip.open(path, "rb")
    if compression == ".xz":
        return lzma.open(path, "rb")
    if compression == ".zst":
        import pyarrow  # zstandard's own reader takes a file that is cut off for a shorter one

        return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.OSFile(str(path), "rb"), "zstd"))
    return open(path, "rb")


def _read_whole(path: Path) -> bytes:
    limit_bytes = path.stat().st_size
    if path.suffix.lower() in COMPRESSIONS:
        limit_bytes = max(MAX_LINE_BYTES, MAX_EXPANSION * limit_bytes)
    with _open_binary(path) as file:
        content = file.read(limit_bytes + 1)
    _check_length(content, path, limit_bytes)
    return content


def _read_text(path: Path) -> Iterator[Document]:
    yield Document(_decode(_read_whole(path), path, 0), str(path))


def _read_jsonl(path: Path, text_field: str) -> Iterator[Document]:
    offset = 0
    with _open_binary(path) as file:
        for number in itertools.count(1):
            line = file.readline(MAX_LINE_BYTES + 1)
            if not line:
                return
            _check_length(line, path, MAX_LINE_BYTES)
            row = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if row.strip():
                yield Document(_text_of_line(row, path, number, offset, text_field), f"{path}:{number}")
            offset += len(line)


def _text_of_line(line: bytes, path: Path, number: int, offset: int, text_field: str) -> str:
    decoded = _decode(line, path, offset)
    try:
        row = json.loads(decoded)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}:{number} is not valid JSON: {str(error)[:80]}") from None
    fields = row if isinstance(row, dict) else {}
    return _check_text(fields.get(text_field, MISSING), f"{path}:{number}", text_field, fields)


def _read_parquet(path: Path, text_field: str) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    try:
        is_packed = path.suffix.lower() in COMPRESSIONS
        with pyarrow.parquet.ParquetFile(io.BytesIO(_read_whole(path)) if is_packed else path) as file:
            if text_field not in file.schema_arrow.names:
                names = ", ".join(file.schema_arrow.names)
                raise DataError(f"{path} has no column {text_field!r}: set data.text_field to one of {names}")
            number = 0
            for batch in file.iter_batches(batch_size=256, columns=[text_field]):
                for value in batch.column(0):
                    number += 1
                    yield Document(
                        _check_text(value.as_py(), f"{path} row {number}", text_field), f"{path}:{number}"
                    )
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} is no valid .parquet file: {str(error)[:120]}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} row {number} is not UTF-8: {error}") from None


def _check_text(text: object, where: str, text_field: str, fields: Iterable[str] = ()) -> str:
    if text is None:
        raise DataError(f"{where} is null in the field {text_field!r}: leave such rows out, or empty")
    if not isinstance(text, str):
        there = f" of {', '.join(fields)[:200]}" if fields else ""
        raise DataError(
            f"{where} has no text in the field {text_field!r}: set data.text_field to the right one{there}"
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where} holds half a surrogate pair at character {error.start}, no UTF-8 text"
        ) from None
    return text


def _check_length(content: bytes, path: Path, limit_bytes: int) -> None:
    if len(content) > limit_bytes:
        raise DataError(f"{path} holds a line or compressed text of over {limit_bytes} bytes: cut it up")


def _decode(content: bytes, path: Path, offset: int) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        position = offset + error.start
        raise DataError(
            f"{path} is not UTF-8 at byte {position} ({error.reason}): convert it to UTF-8"
        ) from None


def _open_stdlib(include_tests: bool) -> Source:
    """Source files of the running interpreter's standard library, sorted, each content once.

    The few files in other encodings are left out.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    excluded = STDLIB_EXCLUDED if include_tests else STDLIB_EXCLUDED | STDLIB_TESTS
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in excluded]
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    files.sort()

    def read() -> Iterator[Document]:
        seen = set()
        for file in files:
            content = file.read_bytes()
            digest = hashlib.sha256(content).digest()
            try:
                text = content.decode("utf-8")
            except UnicodeDecodeError:
                continue
            if digest not in seen:
                seen.add(digest)
                yield Document(text, file.relative_to(root).as_posix())

    listed = [[str(file.relative_to(root)), file.stat().st_size] for file in files]
    return Source(read=read, fingerprint=_fingerprint([platform.python_version(), listed]))


def _open_hub(config: DataConfig, split: str) -> Source:
    """A data set of the Hugging Face hub, by name; nothing of it is executed.

    The fingerprint covers the settings only: pin `data.hub_revision` for data that may change. Where the name
    is that of a folder here, it covers its files too.
    """
    assert config.name is not None
    settings: list = [config.name, config.hub_config, split, config.hub_revision]
    is_local = os.path.isdir(config.name)
    if is_local:
        names = glob.glob(os.path.join(glob.escape(config.name), "**"), recursive=True)
        settings.append(_listed(sorted(Path(name) for name in names if os.path.isfile(name))))

    def read() -> Iterator[Document]:
        import datasets
        from datasets.exceptions import DatasetsError

        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it warns of every retry
        try:
            rows = datasets.load_dataset(
                config.name,
                config.hub_config,
                split=split,
                revision=config.hub_revision,
                streaming=config.hub_streaming,
            )
            for number, row in enumerate(rows, 1):
                where = f"{config.name}:{number}"
                text = row.get(config.text_field, MISSING)
                yield Document(_check_text(text, where, config.text_field, row), where)
        except (*UNREADABLE, ValueError, RuntimeError, DatasetsError) as error:
            if isinstance(error, DataError):
                raise
            # a DatasetGenerationError says only that there was one
            cause = error.__cause__ if isinstance(error, DatasetsError) and error.__cause__ else error
            reason = str(cause).splitlines()[0][:160] if str(cause) else type(cause).__name__
            raise DataError(f"data.name={config.name} can't be read from the hub: {reason}") from error

    return Source(
        read=read, fingerprint=_fingerprint(settings), is_remote=config.hub_streaming and not is_local
    )


def split_documents(documents: Iterable[Document], valid_fraction: float) -> Iterator[tuple[str, Document]]:
    """Pair each document with "train" or "valid".

    A document goes where its content's hash sends it, so the split is stable and equal texts stay together.
    A small source in which chance leaves one side empty gives it the document nearest to the limit; a lone
    document is cut: the end is for validation. Empty documents are left out.
    """
    documents = (document for document in documents if document.text and not document.text.isspace())
    peeked = list(itertools.islice(documents, PEEKED_DOCUMENTS))
    if not 0.0 < valid_fraction < 1.0:
        split = "valid" if valid_fraction else "train"
        yield from ((split, document) for document in itertools.chain(peeked, documents))
    elif len(peeked) == 1:
        yield from _cut_document(peeked[0], valid_fraction)
    else:
        places = [unit_hash(document.text, "split") for document in peeked]
        limit = valid_fraction
        if len(peeked) < PEEKED_DOCUMENTS and peeked:
            # at least the smallest hash is below the limit, and the largest is not
            limit = min(max(limit, _above(min(places))), max(places))
        for document, place in zip(peeked, places, strict=True):
            yield ("valid" if place < limit else "train"), document
        for document in documents:
            yield ("valid" if unit_hash(document.text, "split") < limit else "train"), document


def _above(value: float) -> float:
    return value + 2.0**-53


def _cut_document(document: Document, valid_fraction: float) -> Iterator[tuple[str, Document]]:
    text, name = document
    position = int(len(text) * (1.0 - valid_fraction))
    for split, part in (("train", text[:position]), ("valid", text[position:])):
        if part:
            yield split, Document(part, f"{name} ({split} part)")


def unit_hash(text: str, purpose: str) -> float:
    """A number in [0, 1) that depends only on the text and the purpose."""
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8, person=purpose.encode()).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def sample_documents(source: Source, config: DataConfig, budget_bytes: int) -> Iterator[str]:
    """Training text for a tokenizer: about `budget_bytes` of it, or all where there is less.

    The whole source is read once, as preparing it does anyway: a file's size tells too little of the text
    that is compressed or among other fields in it. Of a remote source only what comes first is read. Long
    documents are cut; each piece draws a number, and those with the smallest fill the budget.
    """
    valid_fraction = 0.0 if config.valid_path else config.valid_fraction
    documents = split_documents(source.read(), valid_fraction)
    length = max(budget_bytes // SAMPLED_PIECES, 1)
    pieces: Iterator[str] = itertools.chain.from_iterable(
        split_segments(document.text, length) for split, document in documents if split == "train"
    )
    if source.is_remote:
        pieces = _first_bytes(pieces, budget_bytes)
    draw = random.Random(0)
    kept: list[tuple[float, int, str]] = []  # a heap, the largest number first: minus it, position, piece
    kept_bytes = 0
    for position, piece in enumerate(pieces):
        key = -draw.random()
        if kept_bytes >= budget_bytes and key < kept[0][0]:
            continue
        heapq.heappush(kept, (key, position, piece))
        kept_bytes += _num_bytes(piece)
        while kept_bytes - _num_bytes(kept[0][2]) >= budget_bytes:
            kept_bytes -= _num_bytes(heapq.heappop(kept)[2])
    if kept_bytes > budget_bytes:
        key, position, piece = kept[0]
        kept[0] = (key, position, piece[: budget_bytes - kept_bytes + _num_bytes(piece)])
    yield from (piece for _, _, piece in sorted(kept, key=lambda item: item[1]))


def _first_bytes(pieces: Iterable[str], num_bytes: int) -> Iterator[str]:
    for piece in pieces:
        yield piece
        num_bytes -= _num_bytes(piece)
        if num_bytes <= 0:
            return


def _num_bytes(text: str) -> int:
    return len(text.encode("utf-8"))


def _listed(files: list[Path]) -> list[list]:
    return [[str(file), status.st_size, status.st_mtime_ns] for file in files for status in [file.stat()]]


def _fingerprint(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
