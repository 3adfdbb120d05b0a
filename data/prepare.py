"""From settings to prepared data: train or load the tokenizer, tokenize, write shards, open them.

`prepare` may be called by every rank of a job at once: one of them works, the others wait. What is already
prepared is recognised by the hash of its settings, of its tokenizer and of the names, sizes and modification
times of its source files, and opened again. A preparation that was killed continues after its last
complete shard.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data import tokenizer
from data.config import DataConfig, TokenizerConfig
from data.errors import DataError
from data.files import exclusive_lock, explain_write_errors, sync_folder
from data.shards import (
    MANIFEST_FILE,
    SPLITS,
    VERSION,
    ShardWriter,
    TokenSplit,
    check_files,
    open_split,
    read_manifest,
    remove_notes,
    write_manifest,
)
from data.sources import Source, open_source, open_valid_source
from data.split import sample_documents, split_documents
from data.text_files import SUFFIXES, Document
from data.tokenizer import Tokenizer, load_tokenizer

Log = Callable[[str], None]
# The settings that decide what is prepared; hub settings are in the source's fingerprint.
CONTENT_FIELDS = (
    *("source", "path", "include_tests", "text_field", "max_documents"),
    *("valid_path", "valid_fraction", "shard_bytes"),
)
TRAINING_FIELDS = ("vocab_size", "model_type", "training_bytes")
BATCH_CHARACTERS = 4 * 2**20  # tokenized at a time
PROGRESS_SECONDS = 10


@dataclasses.dataclass(frozen=True, slots=True)
class PreparedData:
    """Tokenized documents, ready to train on and to evaluate.

    `name` labels results. `fingerprint` depends on the tokens and the tokenizer only, not on where or when
    they were prepared.
    """

    name: str
    folder: Path
    train: TokenSplit
    valid: TokenSplit
    tokenizer: Tokenizer
    fingerprint: str


def prepare(data: DataConfig, tokenizer_config: TokenizerConfig, *, log: Log = print) -> PreparedData:
    """Prepare what the settings name in `data.cache_dir`, unless it is there, and open it."""
    if data.source == "prepared":
        assert data.path is not None
        return open_prepared(Path(data.path), data, tokenizer_config)
    plan = _plan(data, tokenizer_config)
    return _prepare_into(_folder(plan), plan, log)


def find_prepared(data: DataConfig, tokenizer_config: TokenizerConfig) -> PreparedData | None:
    """Open what `prepare` would make, if it is there already; nothing is written."""
    if data.source == "prepared":
        return prepare(data, tokenizer_config)
    plan = _plan(data, tokenizer_config)
    folder = _folder(plan)
    return _open(folder, plan) if _is_prepared(folder, plan) else None


def prepare_folder(
    folder: Path, data: DataConfig, tokenizer_config: TokenizerConfig, *, log: Log = print
) -> PreparedData:
    """Prepare into a folder of the caller's choice; never over anything else that is in it."""
    if data.source == "prepared":
        raise DataError("data=prepared is prepared already: choose python_stdlib, text or hub")
    return _prepare_into(Path(os.path.realpath(folder)), _plan(data, tokenizer_config), log)


def open_prepared(folder: Path, data: DataConfig, tokenizer_config: TokenizerConfig) -> PreparedData:
    """Open a folder of prepared data after checking every file as `data.verify` says.

    Its tokenizer is the one in it. DataError if `tokenizer` names another one: a file with another
    fingerprint, or the kinds bytes and characters on data of another kind.
    """
    manifest = read_manifest(folder)
    check_files(folder, manifest, data.verify)
    loaded = load_tokenizer(folder)
    if (loaded.fingerprint, loaded.vocab_size) != (manifest.tokenizer_fingerprint, manifest.vocab_size):
        raise DataError(f"{folder}: its tokenizer does not match its {MANIFEST_FILE}, prepare the data again")
    if tokenizer_config.kind == "file":
        assert tokenizer_config.path is not None
        asked = _given_tokenizer(tokenizer_config.path)
        if asked.fingerprint != loaded.fingerprint:
            raise DataError(
                f"tokenizer.path={tokenizer_config.path} does not match the shards in {folder}, made with"
                f" another tokenizer: use the one in that folder or prepare the data again"
            )
    elif tokenizer_config.kind != "sentencepiece" and tokenizer_config.kind != loaded.kind:
        raise DataError(
            f"tokenizer={tokenizer_config.kind} does not match the shards in {folder}, made with"
            f" tokenizer={loaded.kind}: leave the setting out or prepare the data again"
        )
    train, valid = (open_split(folder, manifest, split) for split in SPLITS)
    name = _label(data) if data.name else manifest.name
    return PreparedData(name, folder, train, valid, loaded, manifest.fingerprint)


@dataclasses.dataclass(frozen=True, slots=True)
class _Plan:
    """What a preparation will do; `key` is the hash of `settings`."""

    name: str
    data: DataConfig
    tokenizer_config: TokenizerConfig
    source: Source
    valid_source: Source | None
    fixed_tokenizer: Tokenizer | None  # of the kinds file and bytes; the others are trained
    settings: dict
    key: str


def _given_tokenizer(path: str) -> Tokenizer:
    try:
        return load_tokenizer(path)
    except DataError as error:
        raise DataError(f"tokenizer.path={path}: {error}") from None


def _plan(data: DataConfig, tokenizer_config: TokenizerConfig) -> _Plan:
    source, valid_source = open_source(data), open_valid_source(data)
    fixed_tokenizer: Tokenizer | None = None
    tokenizer_settings: dict = {"kind": tokenizer_config.kind}
    if tokenizer_config.kind == "file":
        assert tokenizer_config.path is not None
        fixed_tokenizer = _given_tokenizer(tokenizer_config.path)
        tokenizer_settings["fingerprint"] = fixed_tokenizer.fingerprint
    elif tokenizer_config.kind == "bytes":
        fixed_tokenizer = tokenizer.ByteTokenizer()
    elif tokenizer_config.kind == "sentencepiece":
        tokenizer_settings |= {field: getattr(tokenizer_config, field) for field in TRAINING_FIELDS}
    settings = {
        "version": VERSION,
        "data": {field: getattr(data, field) for field in CONTENT_FIELDS},
        "tokenizer": tokenizer_settings,
        "source_fingerprint": source.fingerprint,
        "valid_source_fingerprint": valid_source.fingerprint if valid_source else None,
    }
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    return _Plan(_label(data), data, tokenizer_config, source, valid_source, fixed_tokenizer, settings, key)


def _folder(plan: _Plan) -> Path:
    return Path(plan.data.cache_dir) / f"{plan.name}-{plan.key[:16]}"


def _label(data: DataConfig) -> str:
    """A short plain name for results: `data.name`, or the source's, or the file's."""
    label = data.name or (Path(data.path).name if data.path else data.source)
    for suffix in sorted(SUFFIXES, key=len, reverse=True):
        label = label.removesuffix(suffix)
    return re.sub(r"[^A-Za-z0-9]+", "_", label).strip("_")[:60] or data.source


def _prepare_into(folder: Path, plan: _Plan, log: Log) -> PreparedData:
    if not _is_prepared(folder, plan):
        if os.path.ismount(folder):  # a folder can't be renamed over a mount point
            raise DataError(f"{folder} is a mount point, which can't be replaced: give a folder inside it")
        lock_path = folder.with_name(f"{folder.name}.lock")
        with explain_write_errors(folder), exclusive_lock(lock_path, log):
            if not _is_prepared(folder, plan):
                _build(folder, plan, log)
    return _open(folder, plan)


def _open(folder: Path, plan: _Plan) -> PreparedData:
    with _advise_on_cache(folder, plan):
        return open_prepared(folder, plan.data, TokenizerConfig())


@contextlib.contextmanager
def _advise_on_cache(folder: Path, plan: _Plan) -> Iterator[None]:
    """Add to an error about a damaged cache how to remove it."""
    try:
        yield
    except DataError as error:
        if folder != _folder(plan):
            raise
        raise DataError(
            f"{error}. It is in data.cache_dir: delete {folder} and run the same command again"
        ) from None


def _is_prepared(folder: Path, plan: _Plan) -> bool:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    if not (folder / MANIFEST_FILE).exists():
        is_cache = folder == _folder(plan)
        advice = "delete it and run the same command again" if is_cache else "choose another folder"
        raise DataError(f"{folder} exists and holds no prepared data: nothing is overwritten, {advice}")
    with _advise_on_cache(folder, plan):
        key = read_manifest(folder).key
    if key != plan.key:
        raise DataError(
            f"{folder} was prepared with other settings or from a source that has changed since:"
            f" choose another folder or delete it"
        )
    return True


def _build(folder: Path, plan: _Plan, log: Log) -> None:
    """Prepare in a sibling folder, which a later call can continue, and rename it when it is complete."""
    work = folder.with_name(f"{folder.name}.{plan.key[:16]}.partial")
    if (work / MANIFEST_FILE).exists():  # a kill came between the manifest and the rename
        _publish(work, folder)
        return
    work.mkdir(parents=True, exist_ok=True)
    for source in (plan.source, plan.valid_source):
        if source and source.left_out:
            log(source.left_out)
    writers: dict[str, ShardWriter] = {}
    started = time.monotonic()
    try:
        chosen = _make_tokenizer(work, plan, log)
        dtype_name = "uint16" if chosen.vocab_size <= 2**16 else "uint32"
        for split in SPLITS:
            writers[split] = ShardWriter(work, split, dtype_name, plan.data.shard_bytes)
        _write_documents(plan, chosen, writers, log)
        _check_counts(writers, plan)
        splits = {split: writer.finish() for split, writer in writers.items()}
        values = {
            "name": plan.name,
            "key": plan.key,
            "settings": plan.settings,
            "dtype": dtype_name,
            "tokenizer_fingerprint": chosen.fingerprint,
            "vocab_size": chosen.vocab_size,
            "splits": splits,
        }
        write_manifest(work, values, {split: writer.notes for split, writer in writers.items()})
    except BaseException:
        for writer in writers.values():
            writer.close()
        if num_shards := sum(len(writer.notes) for writer in writers.values()):
            log(f"{num_shards} finished shards stay in {work}: the same command continues after them")
        else:
            shutil.rmtree(work, ignore_errors=True)
        raise
    _publish(work, folder)
    counts = ", ".join(f"{split} {entry['tokens']:,} tokens" for split, entry in splits.items())
    log(f"prepared {plan.name} in {time.monotonic() - started:.1f} s: {counts}, in {folder}")


def _publish(work: Path, folder: Path) -> None:
    remove_notes(work)
    os.replace(work, folder)
    sync_folder(folder.parent)


def _check_counts(writers: dict[str, ShardWriter], plan: _Plan) -> None:
    has_train, has_valid = (writers[split].documents > 0 for split in SPLITS)
    if not has_train and (plan.valid_source or not has_valid):
        raise DataError(
            f"data={plan.data.source}: no document with any text in {plan.data.path or plan.name}"
        )
    if has_valid:
        return
    if plan.valid_source:
        raise DataError(f"data.valid_path={plan.data.valid_path}: no document with any text in it")
    if plan.data.valid_fraction > 0.0:
        raise DataError(
            f"data.valid_fraction={plan.data.valid_fraction} leaves no validation document: raise it, or,"
            f" where all documents are equal and stay together, give data.valid_path=FILE or set it to 0"
        )


def _make_tokenizer(work: Path, plan: _Plan, log: Log) -> Tokenizer:
    """The tokenizer of the plan, saved in the work folder; one that is already there is used."""
    if (work / tokenizer.INFO_FILE).exists():
        return load_tokenizer(work)
    chosen = plan.fixed_tokenizer or train_tokenizer(plan.source, plan.data, plan.tokenizer_config, log)
    chosen.save(work)
    return chosen


def train_tokenizer(source: Source, data: DataConfig, config: TokenizerConfig, log: Log) -> Tokenizer:
    """Train a sentencepiece or characters tokenizer on the training documents of a source."""
    if config.kind == "characters":
        documents = _documents(source, None, data)
        return tokenizer.train_characters(document.text for split, document in documents if split == "train")
    started = time.monotonic()
    texts = sample_documents(source, data, config.training_bytes)
    first = next(texts, None)
    if first is None:
        raise DataError(
            "tokenizer=sentencepiece is trained on training documents, and there are none: check data"
        )
    trained = tokenizer.train_sentencepiece(itertools.chain([first], texts), config)
    seconds = time.monotonic() - started
    log(f"trained a {config.model_type} tokenizer of {trained.vocab_size} in {seconds:.1f} s")
    return trained


def _documents(
    source: Source, valid_source: Source | None, data: DataConfig
) -> Iterator[tuple[str, Document]]:
    """All documents with their split, in the order in which they are stored."""
    if valid_source is None:
        yield from split_documents(source.read(), 0.0 if data.valid_path else data.valid_fraction)
    else:
        yield from split_documents(source.read(), 0.0)
        yield from split_documents(valid_source.read(), 1.0)


def _write_documents(plan: _Plan, chosen: Tokenizer, writers: dict[str, ShardWriter], log: Log) -> None:
    """Tokenize all documents that the writers don't hold yet, batch by batch on several threads."""
    num_threads = plan.data.workers or len(os.sched_getaffinity(0))
    to_skip = {split: writer.documents for split, writer in writers.items()}
    if any(to_skip.values()):
        log(f"continuing after {sum(to_skip.values()):,} documents that are already prepared")
    with _Progress(plan, log) as progress:
        for batch in _batches(_documents(plan.source, plan.valid_source, plan.data)):
            todo = []
            for split, document in batch:
                if to_skip[split]:
                    to_skip[split] -= 1
                else:
                    todo.append((split, document.text))
            encoded = chosen.encode_batch([text for _, text in todo], num_threads)
            for (split, text), ids in zip(todo, encoded, strict=True):
                stored = np.concatenate([[chosen.bos_id], ids, [chosen.eos_id]])
                writers[split].add(stored, len(text.encode("utf-8")))
            progress.add(batch)


def _batches(documents: Iterator[tuple[str, Document]]) -> Iterator[list[tuple[str, Document]]]:
    batch, num_characters = [], 0
    for pair in documents:
        batch.append(pair)
        num_characters += len(pair[1].text)
        if num_characters >= BATCH_CHARACTERS:
            yield batch
            batch, num_characters = [], 0
    if batch:
        yield batch


class _Progress:
    """A bar on a terminal, else a line now and then. Counts characters."""

    def __init__(self, plan: _Plan, log: Log):
        self._log = log
        self._bar = tqdm(
            desc=f"tokenizing {plan.name}", unit="char", unit_scale=True, disable=not sys.stderr.isatty()
        )
        self._started = self._shown = time.monotonic()
        self._characters = self._documents = 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._bar.close()

    def add(self, batch: list[tuple[str, Document]]) -> None:
        characters = sum(len(document.text) for _, document in batch)
        self._bar.update(characters)
        self._characters += characters
        self._documents += len(batch)
        now = time.monotonic()
        if self._bar.disable and now - self._shown >= PROGRESS_SECONDS:
            self._shown = now
            speed = self._characters / (now - self._started) / 1e6
            self._log(f"tokenized {self._documents:,} documents, {speed:.1f} million characters/s")
