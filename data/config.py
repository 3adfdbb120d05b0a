"""Settings of the groups `data` and `tokenizer`, checked when they are built."""

import os
from dataclasses import dataclass, field

from data.errors import DataError

SOURCES = ("python_stdlib", "text", "hub", "prepared")
TOKENIZER_KINDS = ("sentencepiece", "bytes", "characters", "file")
MODEL_TYPES = ("bpe", "unigram")
VERIFY_MODES = ("full", "quick")


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Where documents come from and how they are kept."""

    source: str = "python_stdlib"  # or text, hub, prepared
    name: str | None = None  # of the hub data set, or a label for results; by default taken from the source
    path: str | None = None  # text: file, folder or glob; prepared: folder of shards
    valid_path: str | None = None  # text: validation documents of their own, instead of valid_fraction
    valid_fraction: float = 0.02  # share of the documents, chosen by hash, kept for validation
    isolate_documents: bool = True  # attention and positions restart at each document
    include_tests: bool = False  # python_stdlib: also the folders of tests
    text_field: str = "text"  # field of .jsonl and .parquet rows that holds the text
    max_documents: int | None = None  # stop reading after this many documents
    hub_config: str | None = None  # hub: name of the data set's configuration
    hub_split: str = "train"
    hub_revision: str | None = None  # hub: commit or tag; pin it: the cache misses changes on the hub
    hub_streaming: bool = True  # hub: read without downloading the whole set first
    cache_dir: str = ".cache/data"
    workers: int = 0  # threads that tokenize; 0: one per core
    shard_bytes: int = 64 * 2**20  # bytes of text in a shard; a killed preparation repeats at most one
    verify: str = "full"  # on opening: full compares every SHA-256, quick the sizes only

    def __post_init__(self):
        _expand_home(self, "path", "valid_path", "cache_dir")
        _check_choice("data.source", self.source, SOURCES)
        _check_choice("data.verify", self.verify, VERIFY_MODES)
        if self.source in ("text", "prepared") and not self.path:
            raise DataError(f"data.path is not set: data={self.source} needs a path, give data.path=PATH")
        if self.source == "hub" and not self.name:
            raise DataError("data.name is not set: data=hub needs a data set, give data.name=OWNER/NAME")
        if self.source not in ("text", "prepared") and self.path:
            raise DataError(
                f"data.path={self.path} is not used by data={self.source}: add data=text to train on it, "
                "or leave it out"
            )
        if self.source != "text" and self.valid_path:
            raise DataError(f"data.valid_path={self.valid_path} works with data=text only: leave it out")
        if not 0.0 <= self.valid_fraction <= 1.0:
            raise DataError(f"data.valid_fraction={self.valid_fraction}: must be between 0 and 1")
        _check_minimum("data.workers", self.workers, 0)
        _check_minimum("data.shard_bytes", self.shard_bytes, 1)
        if self.max_documents is not None:
            _check_minimum("data.max_documents", self.max_documents, 1)


@dataclass(kw_only=True, slots=True)
class TokenizerConfig:
    """Which tokenizer: trained on the data, fixed by its kind, or read from a file."""

    kind: str = "sentencepiece"  # or bytes, characters, file
    vocab_size: int = 8192  # sentencepiece: number of pieces, special and byte pieces included
    model_type: str = "bpe"  # sentencepiece: bpe or unigram
    training_bytes: int = 16 * 2**20  # sentencepiece: bytes of training documents it is trained on
    path: str | None = None  # file: a SentencePiece model, a saved tokenizer or a Hugging Face folder

    def __post_init__(self):
        _expand_home(self, "path")
        _check_choice("tokenizer.kind", self.kind, TOKENIZER_KINDS)
        _check_choice("tokenizer.model_type", self.model_type, MODEL_TYPES)
        # 256 byte pieces, 4 special pieces and at least one piece of text
        _check_minimum("tokenizer.vocab_size", self.vocab_size, 261)
        _check_minimum("tokenizer.training_bytes", self.training_bytes, 1)
        if self.kind == "file" and not self.path:
            raise DataError("tokenizer.path is not set: tokenizer=file needs one, give tokenizer.path=PATH")
        if self.kind != "file" and self.path:
            raise DataError(f"tokenizer.path={self.path} needs tokenizer=file, not tokenizer={self.kind}")


@dataclass(kw_only=True, slots=True)
class PrepareConfig:
    """What to prepare or to train a tokenizer on, and the folder to write; None: data.cache_dir."""

    output: str | None = None
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)


def _expand_home(config: object, *names: str) -> None:
    """A leading ~/ is the home folder, as to a shell, which leaves it alone after a dotted key."""
    for name in names:
        value = getattr(config, name)
        if value and value[:2] == "~/":
            setattr(config, name, os.path.expanduser(value))


def _check_choice(key: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise DataError(f"{key}={value}: must be one of {', '.join(allowed)}")


def _check_minimum(key: str, value: int, minimum: int) -> None:
    if value < minimum:
        raise DataError(f"{key}={value}: must be {minimum} or more")
