"""Documents out of text files: .txt, .jsonl and .parquet, compressed or not.

`list_text_files` finds the files, `read_file` decodes one. Text is strict UTF-8 and comes through unchanged:
no newline is translated. A damaged or oversized file is an error.
"""

import codecs
import collections
import glob
import gzip
import io
import itertools
import json
import lzma
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from data.errors import DataError

COMPRESSIONS = (".gz", ".xz", ".zst")
TEXT_FORMATS = (".txt", ".jsonl", ".parquet")
SUFFIXES = tuple(f + c for f in TEXT_FORMATS for c in ("", *COMPRESSIONS))
OTHER_FORMATS = (".json", ".ndjson", ".csv", ".tsv")  # structured: refused rather than read as plain text
ARCHIVES = (".tar", ".tgz", ".txz", ".zip", ".bz2", ".7z", ".rar")  # refused: they are not unpacked
MAX_LINE_BYTES = 32 * 2**20  # of a line of .jsonl, so that a small file can't fill the memory
MAX_EXPANSION = 32  # how many times its size a compressed file may unpack to, if above MAX_LINE_BYTES
UNREADABLE = (OSError, EOFError, lzma.LZMAError, zlib.error)  # raised for damaged files
RUN_LOCK = "run.lock"  # in the folder of a training run, whose metrics and samples are no text to train on
SUFFIXES_SHOWN = 8  # in the line on files that are left out
MISSING = object()  # the text of a row that lacks the field


class Document(NamedTuple):
    """One document; `name` says where it came from (the file, and the line if there are several)."""

    text: str
    name: str


def list_text_files(path: str, key: str) -> tuple[list[Path], str]:
    """Files named by a file, folder or glob, and a line on those of other kinds, empty if there are none.

    DataError if there are none of a known kind, or if part of a folder can't be read.
    """
    kinds = ", ".join(SUFFIXES)
    if os.path.isfile(path):  # named directly: plain text unless its name says otherwise
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
            raise DataError(f"{key}={path}: {file} is not a regular file, or is a broken link: remove it")
        if os.path.isdir(path) and file.is_symlink():
            _check_stays_inside(file, path, key)
    return files, _describe_others(found, path, key)


def _visible_files(folder: str, key: str) -> list[Path]:
    """The files below a folder, without .git and others whose names begin with a dot, and without runs."""

    def refuse(error: OSError) -> None:
        raise DataError(f"{key}={folder}: {error.filename} can't be read: {error.strerror}") from error

    files = []
    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [
            name
            for name in folders
            if not name.startswith(".") and not os.path.exists(os.path.join(parent, name, RUN_LOCK))
        ]
        for link in filter(os.path.islink, (os.path.join(parent, name) for name in folders)):
            raise DataError(
                f"{key}={folder}: {link} is a linked folder, which is not followed; "
                "replace it with what it leads to, or name its files by a glob"
            )
        files += [Path(parent, name) for name in names if not name.startswith(".")]
    return files


def _check_stays_inside(file: Path, folder: str, key: str) -> None:
    if not file.resolve().is_relative_to(Path(folder).resolve()):
        raise DataError(
            f"{key}={folder}: {file} is a link out of the folder, which is not followed; "
            "replace it with what it leads to, or name its files by a glob"
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
    """The suffix in lower case, not counting that of a compression."""
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
        import pyarrow  # zstandard's own reader accepts a truncated file as a shorter one

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
    return check_text(fields.get(text_field, MISSING), f"{path}:{number}", text_field, fields)


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
                        check_text(value.as_py(), f"{path} row {number}", text_field), f"{path}:{number}"
                    )
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} is not a valid .parquet file: {str(error)[:120]}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} row {number} is not UTF-8: {error}") from None


def check_text(text: object, where: str, text_field: str, fields: Iterable[str] = ()) -> str:
    if text is None:
        raise DataError(
            f"{where} is null in the field {text_field!r}: leave such rows out, or make them empty"
        )
    if not isinstance(text, str):
        there = f" of {', '.join(fields)[:200]}" if fields else ""
        raise DataError(
            f"{where} has no text in the field {text_field!r}: set data.text_field to the right one{there}"
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where} holds half a surrogate pair at character {error.start}: it is not valid UTF-8"
        ) from None
    return text


def _check_length(content: bytes, path: Path, limit_bytes: int) -> None:
    if len(content) > limit_bytes:
        raise DataError(f"{path} holds a line or compressed text of over {limit_bytes} bytes: split it")


def _decode(content: bytes, path: Path, offset: int) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        position = offset + error.start
        raise DataError(
            f"{path} is not UTF-8 at byte {position} ({error.reason}): convert it to UTF-8"
        ) from None
