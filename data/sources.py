"""Sources of documents: text files, data sets of the Hugging Face hub, the Python standard library.

A source is opened once (which lists its files and fingerprints them) and can be read any number of times,
always in the same order.
"""

import dataclasses
import glob
import hashlib
import itertools
import json
import logging
import os
import platform
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

from data.config import DataConfig
from data.errors import DataError
from data.text_files import MISSING, UNREADABLE, Document, check_text, list_text_files, read_file

STDLIB_EXCLUDED = frozenset({"site-packages", "dist-packages", "__pycache__"})
STDLIB_TESTS = frozenset({"test", "tests", "idle_test"})


@dataclasses.dataclass(frozen=True, slots=True)
class Source:
    """A readable collection of documents.

    `fingerprint` changes whenever the documents may have changed. Reading a remote source
    downloads it. `left_out` is a line for the user on the files that are not read.
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
    """The source of the validation documents if `data.valid_path` gives one."""
    if not config.valid_path:
        return None
    return text_source(*list_text_files(config.valid_path, "data.valid_path"), config.text_field)


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
    return text_source(files, left_out, config.text_field)


def text_source(files: list[Path], left_out: str, text_field: str) -> Source:
    """Text files in this order; the fingerprint covers names, sizes and modification times, not content."""
    return Source(
        read=lambda: itertools.chain.from_iterable(read_file(file, text_field) for file in files),
        fingerprint=_fingerprint(_listed(files)),
        left_out=left_out,
    )


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
    """A data set of the Hugging Face hub, by name; none of its code is executed.

    The fingerprint covers the settings only: pin `data.hub_revision` for data that may change. If the name
    is that of a local folder, it covers its files too.
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
                yield Document(check_text(text, where, config.text_field, row), where)
        except (*UNREADABLE, ValueError, RuntimeError, DatasetsError) as error:
            if isinstance(error, DataError):
                raise
            # a DatasetGenerationError only says that there was an error
            cause = error.__cause__ if isinstance(error, DatasetsError) and error.__cause__ else error
            reason = str(cause).splitlines()[0][:160] if str(cause) else type(cause).__name__
            raise DataError(f"data.name={config.name} can't be read from the hub: {reason}") from error

    return Source(
        read=read, fingerprint=_fingerprint(settings), is_remote=config.hub_streaming and not is_local
    )


def _listed(files: list[Path]) -> list[list]:
    return [[str(file), status.st_size, status.st_mtime_ns] for file in files for status in [file.stat()]]


def _fingerprint(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
