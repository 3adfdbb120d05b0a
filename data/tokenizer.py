"""Tokenizers: text to ids and back, exactly.

Four kinds share one interface (`Tokenizer`): SentencePiece, bytes, characters and Hugging Face's
`tokenizer.json`. `encode` adds no special ids and never reads any from the text: "<s>" in it stays text.
Our own tokenizers have the ids pad 0, bos 1, eos 2, unk 3. Nothing in a tokenizer's files is executed.
"""

import codecs
import hashlib
import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import sentencepiece
import tokenizers
from tokenizers.decoders import DecodeStream

from data.config import TokenizerConfig
from data.errors import DataError
from data.files import read_json_object, read_limited, write_atomically, write_json

PAD_ID, BOS_ID, EOS_ID, UNK_ID = 0, 1, 2, 3
NUM_SPECIALS = 4
INFO_FILE = "tokenizer_info.json"
INFO_VERSION = 1
MAX_FILE_BYTES = 64 * 2**20
MAX_VOCAB_SIZE = 2**22
# SentencePiece writes a space as U+2581: a literal U+2581 is escaped by a noncharacter of Unicode.
SPACE_MARK, ESCAPE = "\u2581", "\ufdd0"
ESCAPED_ESCAPE, ESCAPED_SPACE_MARK = ESCAPE + "0", ESCAPE + "1"
SEGMENT_CHARACTERS = 32_768  # long texts are encoded in parts, cut after a newline if there is one
TRAINING_CHUNK_CHARACTERS = 1_000
TRAINING_THREADS = 8  # fixed, since unigram training sums in an order that depends on it


class Decoder(Protocol):
    """Turns ids into text one at a time; holds back the bytes of an incomplete character."""

    def push(self, token_id: int) -> str: ...

    def flush(self) -> str: ...


class Tokenizer(Protocol):
    """What every tokenizer offers."""

    kind: str
    vocab_size: int  # ids are in [0, vocab_size)
    bos_id: int
    eos_id: int
    pad_id: int
    unk_id: int  # of what it can't express; -1 if it can express all text
    fingerprint: str  # SHA-256 of the model's bytes

    def encode(self, text: str) -> np.ndarray:
        """Ids of a text, int64 (num_tokens,)."""

    def encode_batch(self, texts: list[str], num_threads: int) -> list[np.ndarray]:
        """Ids of each text, on several threads outside Python."""

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; special ids give nothing, bytes that are not UTF-8 give U+FFFD."""

    def decoder(self) -> Decoder:
        """A fresh incremental decoder."""

    def save(self, folder: Path) -> None:
        """Write the files that `load_tokenizer` reads; the folder must exist."""


class BytesDecoder:
    """Incremental decoding for tokenizers whose ids stand for bytes (b"" for special ids)."""

    def __init__(self, token_bytes: Sequence[bytes], escaped: bool = False):
        self._token_bytes = token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._escaped = escaped
        self._held = ""

    def push(self, token_id: int) -> str:
        return self._unescape(self._utf8.decode(self._token_bytes[token_id]))

    def flush(self) -> str:
        text = self._unescape(self._utf8.decode(b"", final=True))
        text, self._held = text + self._held, ""
        return text

    def _unescape(self, text: str) -> str:
        if not self._escaped:
            return text
        text = self._held + text
        # an escape at the end waits for the digit that follows it
        self._held = ESCAPE if text.endswith(ESCAPE) else ""
        return unescape_text(text.removesuffix(ESCAPE))


def decode_with(decoder: Decoder, ids: Iterable[int]) -> str:
    """Text of all ids through an incremental decoder."""
    return "".join([*(decoder.push(int(i)) for i in ids), decoder.flush()])


def escape_text(text: str) -> str:
    """Free a text of U+2581, reversibly."""
    if ESCAPE in text:
        text = text.replace(ESCAPE, ESCAPED_ESCAPE)
    return text.replace(SPACE_MARK, ESCAPED_SPACE_MARK)


def unescape_text(text: str) -> str:
    """The inverse of `escape_text`."""
    return text.replace(ESCAPED_SPACE_MARK, SPACE_MARK).replace(ESCAPED_ESCAPE, ESCAPE)


class ByteTokenizer:
    """Id 4 + b for the byte b of the text's UTF-8."""

    kind = "bytes"
    vocab_size = NUM_SPECIALS + 256
    bos_id, eos_id, pad_id, unk_id = BOS_ID, EOS_ID, PAD_ID, -1
    fingerprint = hashlib.sha256(b"bytes").hexdigest()
    _token_bytes = [b""] * NUM_SPECIALS + [bytes([b]) for b in range(256)]

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int64) + NUM_SPECIALS

    def encode_batch(self, texts: list[str], num_threads: int) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return decode_with(self.decoder(), ids)

    def decoder(self) -> Decoder:
        return BytesDecoder(self._token_bytes)

    def save(self, folder: Path) -> None:
        _write_info(folder, self)


class CharacterTokenizer:
    """Id 4 + i for the i-th of the sorted characters of the training text; any other character is unk."""

    kind = "characters"
    bos_id, eos_id, pad_id, unk_id = BOS_ID, EOS_ID, PAD_ID, UNK_ID

    def __init__(self, characters: str):
        self.characters = characters
        self.vocab_size = NUM_SPECIALS + len(characters)
        self.fingerprint = hashlib.sha256(characters.encode("utf-8")).hexdigest()
        self._code_points = np.array([ord(c) for c in characters], np.uint32)
        self._token_bytes = [b"", b"", b"", "\ufffd".encode(), *(c.encode("utf-8") for c in characters)]

    def encode(self, text: str) -> np.ndarray:
        code_points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        index = np.searchsorted(self._code_points, code_points)
        known = np.append(self._code_points, np.uint32(0))[index] == code_points
        known &= index < len(self._code_points)
        return np.where(known, index + NUM_SPECIALS, UNK_ID)

    def encode_batch(self, texts: list[str], num_threads: int) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return decode_with(self.decoder(), ids)

    def decoder(self) -> Decoder:
        return BytesDecoder(self._token_bytes)

    def save(self, folder: Path) -> None:
        _write_info(folder, self, characters=self.characters)


class SentencePieceTokenizer:
    """A SentencePiece model, ours or a published one.

    A model without a dummy prefix gives every text back exactly. One with a dummy prefix (Llama's) has its
    leading space removed again when decoding.
    """

    kind = "sentencepiece"
    file_name = "tokenizer.model"

    def __init__(self, model: bytes):
        self.model = model
        self.processor = processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.vocab_size = processor.vocab_size()
        specials = [i for i in (processor.eos_id(), processor.bos_id()) if i >= 0]
        if not specials:
            raise ValueError("the model has neither a begin nor an end of sequence piece")
        self.eos_id = specials[0]
        self.bos_id = specials[-1]
        self.pad_id = processor.pad_id() if processor.pad_id() >= 0 else self.eos_id
        has_bytes = any(map(processor.is_byte, range(self.vocab_size)))  # for what is in no piece
        self.unk_id = -1 if has_bytes else processor.unk_id()
        self.fingerprint = hashlib.sha256(model).hexdigest()
        self._token_bytes = [self._bytes_of(i) for i in range(self.vocab_size)]
        first = processor.encode("a", out_type=str)[0]  # no normalizer removes it, as many do "\n"
        self.has_dummy_prefix = first.startswith(SPACE_MARK)

    def _bytes_of(self, token_id: int) -> bytes:
        processor = self.processor
        if processor.is_control(token_id):
            return b""
        if processor.is_unknown(token_id):
            return "\ufffd".encode()
        piece = processor.id_to_piece(token_id)
        if processor.is_byte(token_id):
            return bytes([int(piece[3:5], 16)])  # <0x0A>
        return piece.replace(SPACE_MARK, " ").encode("utf-8")

    def encode(self, text: str) -> np.ndarray:
        return self.encode_batch([text], num_threads=1)[0]

    def encode_batch(self, texts: list[str], num_threads: int) -> list[np.ndarray]:
        segments, counts = [], []
        for text in texts:
            parts = [escape_text(text)] if self.has_dummy_prefix else list(split_segments(escape_text(text)))
            segments += parts
            counts.append(len(parts))
        encoded = iter(self.processor.encode(segments, num_threads=num_threads))
        return [np.concatenate([np.array(next(encoded), np.int64) for _ in range(n)]) for n in counts]

    def decode(self, ids: Iterable[int]) -> str:
        text = decode_with(self.decoder(), ids)
        return text.removeprefix(" ") if self.has_dummy_prefix else text

    def decoder(self) -> Decoder:
        return BytesDecoder(self._token_bytes, escaped=True)

    def save(self, folder: Path) -> None:
        write_atomically(folder / self.file_name, self.model)
        _write_info(folder, self)


class HuggingFaceTokenizer:
    """A `tokenizer.json` of the tokenizers library with the begin and end tokens of its configuration.

    The padding token (EOS if tokenizer.json knows none) and the chat template are kept for exports: they
    change no ids.
    """

    kind = "huggingface"
    file_name = "tokenizer.json"
    given_file_name = "tokenizer_given.json"  # in an export whose tokenizer.json had to differ

    def __init__(
        self,
        model: bytes,
        bos_token: str | None,
        eos_token: str | None,
        pad_token: str | None = None,
        chat_template: Any = None,
    ):
        self.model = model
        self.chat_template = chat_template
        self.special_tokens = {"bos_token": bos_token or eos_token, "eos_token": eos_token or bos_token}
        self._tokenizer = tokenizer = tokenizers.Tokenizer.from_buffer(model)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True  # special tokens spelled out in a text stay text
        self.vocab_size = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values(), default=0)
        if self.vocab_size > MAX_VOCAB_SIZE:
            raise ValueError(f"its largest id is {self.vocab_size - 1}, above {MAX_VOCAB_SIZE}")
        self.bos_id = self._id_of("bos_token")
        self.eos_id = self._id_of("eos_token")
        pad_id = None if pad_token is None else tokenizer.token_to_id(pad_token)
        self.pad_id = self.eos_id if pad_id is None else pad_id
        self.pad_token = self.special_tokens["eos_token"] if pad_id is None else pad_token
        unk_token = getattr(tokenizer.model, "unk_token", None)
        unk_id = None if unk_token is None else tokenizer.token_to_id(unk_token)
        self.unk_id = -1 if unk_id is None else unk_id
        self.fingerprint = hashlib.sha256(model + json.dumps(self.special_tokens).encode()).hexdigest()

    def _id_of(self, role: str) -> int:
        token = self.special_tokens[role]
        token_id = None if token is None else self._tokenizer.token_to_id(token)
        if token_id is None:
            raise ValueError(
                f"tokenizer_config.json must name a {role} that tokenizer.json knows, not {token!r}"
            )
        return token_id

    def encode(self, text: str) -> np.ndarray:
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int64)

    def encode_batch(self, texts: list[str], num_threads: int) -> list[np.ndarray]:
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, np.int64) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def decoder(self) -> Decoder:
        return _HuggingFaceDecoder(self._tokenizer)

    def roles(self) -> dict[str, Any]:
        """What tokenizer_config.json says about special tokens and chats."""
        chats = {} if self.chat_template is None else {"chat_template": self.chat_template}
        return {**self.special_tokens, "pad_token": self.pad_token, **chats}

    def with_bos_first(self) -> bytes | None:
        """tokenizer.json that puts BOS first if special tokens are requested; None if it already does.

        Other special tokens that its post-processor adds are left out, as in training.
        """
        ids = self._tokenizer.encode("a", add_special_tokens=False).ids
        if self._tokenizer.encode("a").ids == [self.bos_id, *ids]:
            return None
        content = json.loads(self.model)
        bos = self.special_tokens["bos_token"]
        first, second = (
            [{"SpecialToken": {"id": bos, "type_id": i}}, {"Sequence": {"id": text, "type_id": i}}]
            for i, text in enumerate("AB")
        )
        put_first = {
            "type": "TemplateProcessing",
            "single": first,
            "pair": first + second,
            "special_tokens": {bos: {"id": bos, "ids": [self.bos_id], "tokens": [bos]}},
        }
        given = content.get("post_processor")
        if given is None or self._tokenizer.num_special_tokens_to_add(False):
            content["post_processor"] = put_first
        else:  # kept, since it trims offsets
            content["post_processor"] = {"type": "Sequence", "processors": [given, put_first]}
        return json.dumps(content, ensure_ascii=False).encode()

    def save(self, folder: Path) -> None:
        write_atomically(folder / self.file_name, self.model)
        write_json(
            folder / "tokenizer_config.json",
            {"tokenizer_class": "PreTrainedTokenizerFast", **self.roles()},
        )
        _write_info(folder, self)


class _HuggingFaceDecoder:
    def __init__(self, tokenizer: tokenizers.Tokenizer):
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._ids: list[int] = []
        self._num_characters = 0

    def push(self, token_id: int) -> str:
        self._ids.append(token_id)
        text = self._stream.step(self._tokenizer, token_id) or ""
        self._num_characters += len(text)
        return text

    def flush(self) -> str:
        return self._tokenizer.decode(self._ids, skip_special_tokens=True)[self._num_characters :]


def split_segments(text: str, size: int = SEGMENT_CHARACTERS) -> Iterator[str]:
    """Cut a text into parts of at most `size` characters, after a newline if there is one."""
    start = 0
    while len(text) - start > size:
        stop = text.rfind("\n", start, start + size) + 1 or start + size
        yield text[start:stop]
        start = stop
    yield text[start:]


def train_sentencepiece(texts: Iterable[str], config: TokenizerConfig) -> SentencePieceTokenizer:
    """Train a reversible SentencePiece model on texts (Kudo and Richardson 2018), with byte fallback.

    DataError if the text is too small for the requested vocabulary.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_training_chunks(texts),
            model_writer=model,
            vocab_size=config.vocab_size,
            model_type=config.model_type,
            byte_fallback=True,
            character_coverage=0.9995,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            max_sentence_length=8 * TRAINING_CHUNK_CHARACTERS,
            pad_id=PAD_ID,
            bos_id=BOS_ID,
            eos_id=EOS_ID,
            unk_id=UNK_ID,
            num_threads=TRAINING_THREADS,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise DataError(_explain_training_error(str(error), config.vocab_size)) from None
    return SentencePieceTokenizer(model.getvalue())


def _training_chunks(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        escaped = escape_text(text)
        for start in range(0, len(escaped), TRAINING_CHUNK_CHARACTERS):
            yield escaped[start : start + TRAINING_CHUNK_CHARACTERS]


def _explain_training_error(message: str, vocab_size: int) -> str:
    if largest := re.search(r"value <= (\d+)", message):
        return (
            f"tokenizer.vocab_size={vocab_size} is too large for this text: the largest possible is"
            f" {largest[1]}, lower it or give more text"
        )
    if smallest := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return (
            f"tokenizer.vocab_size={vocab_size} is too small for this text: it needs more than {smallest[1]}"
        )
    return f"tokenizer=sentencepiece can't be trained on this text: {message[:120]}"


def train_characters(texts: Iterable[str]) -> CharacterTokenizer:
    """The tokenizer of every character that the texts use."""
    characters: set[str] = set()
    for text in texts:
        characters.update(text)
    return CharacterTokenizer("".join(sorted(characters)))


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read a SentencePiece model, a folder written by `save`, or a Hugging Face tokenizer folder.

    DataError if there is none, if it is damaged, or if a file is a link.
    """
    path = Path(path)
    if path.suffix == ".json" and path.is_file():
        raise DataError(f"{path} is one of the files of a tokenizer: give their folder, {path.parent}")
    if not path.exists():
        raise DataError(f"{path} is missing: give a SentencePiece model or the folder of a tokenizer")
    if not path.is_dir():
        return _build(path, SentencePieceTokenizer, read_limited(path, MAX_FILE_BYTES))
    if (path / INFO_FILE).exists():
        return _load_saved(path)
    if (path / HuggingFaceTokenizer.file_name).exists():
        return _load_huggingface(path)
    model_path = path / SentencePieceTokenizer.file_name
    if model_path.exists():
        return _build(model_path, SentencePieceTokenizer, read_limited(model_path, MAX_FILE_BYTES))
    raise DataError(
        f"{path} holds no tokenizer: expected {INFO_FILE}, {HuggingFaceTokenizer.file_name}"
        f" or {SentencePieceTokenizer.file_name} (that of a run is in checkpoints/step_…/tokenizer)"
    )


def _load_saved(folder: Path) -> Tokenizer:
    info = read_json_object(folder / INFO_FILE, MAX_FILE_BYTES)
    kind = info.get("kind")
    if info.get("version") != INFO_VERSION:
        raise DataError(
            f"{folder / INFO_FILE} has version {str(info.get('version'))[:20]}, not {INFO_VERSION}"
        )
    if kind == "bytes":
        tokenizer: Tokenizer = ByteTokenizer()
    elif kind == "characters":
        characters = info.get("characters")
        if not isinstance(characters, str) or list(characters) != sorted(set(characters)):
            raise DataError(f"{folder / INFO_FILE}: characters must be a sorted string without repeats")
        tokenizer = _build(folder / INFO_FILE, CharacterTokenizer, characters)
    elif kind == "sentencepiece":
        model_path = folder / SentencePieceTokenizer.file_name
        tokenizer = _build(model_path, SentencePieceTokenizer, read_limited(model_path, MAX_FILE_BYTES))
    elif kind == "huggingface":
        tokenizer = _load_huggingface(folder)
    else:
        raise DataError(f"{folder / INFO_FILE} has the unknown kind {str(kind)[:40]!r}")
    if info.get("fingerprint") != tokenizer.fingerprint:
        raise DataError(
            f"{folder}: the tokenizer does not match its {INFO_FILE}, it is damaged or was replaced"
        )
    return tokenizer


def _load_huggingface(folder: Path) -> Tokenizer:
    model_path = folder / HuggingFaceTokenizer.given_file_name
    if not model_path.exists():
        model_path = folder / HuggingFaceTokenizer.file_name
    tokens: dict[str, str | None] = {"bos_token": None, "eos_token": None, "pad_token": None}
    chat_template = None
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if not (folder / name).exists():
            continue
        values = read_json_object(folder / name, MAX_FILE_BYTES)
        for role in tokens:
            value = values.get(role)
            value = value.get("content") if isinstance(value, dict) else value
            tokens[role] = value if isinstance(value, str) else tokens[role]
        chat_template = values.get("chat_template", chat_template)
        if not isinstance(chat_template, str | list | None):
            raise DataError(f"{folder / name}: chat_template must be a text, or a list of named ones")
    if (folder / "chat_template.jinja").exists():
        try:
            chat_template = read_limited(folder / "chat_template.jinja", MAX_FILE_BYTES).decode()
        except UnicodeDecodeError:
            raise DataError(f"{folder / 'chat_template.jinja'} is not UTF-8") from None
    model = read_limited(model_path, MAX_FILE_BYTES)
    return _build(model_path, HuggingFaceTokenizer, model, *tokens.values(), chat_template)


def _build(path: Path, tokenizer_class, *arguments) -> Tokenizer:
    try:
        return tokenizer_class(*arguments)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the libraries raise anything, and a panic in Rust is not an Exception
        reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
        raise DataError(f"{path} is not a usable tokenizer: {reason}") from None


def _write_info(folder: Path, tokenizer: Tokenizer, **extra: str) -> None:
    info = {"version": INFO_VERSION, "kind": tokenizer.kind, "fingerprint": tokenizer.fingerprint}
    write_json(folder / INFO_FILE, info | extra)
