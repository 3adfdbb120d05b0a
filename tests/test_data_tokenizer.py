"""Tokenizers give text back exactly, ignore special tokens in text, and load nothing hostile."""

import json
import random

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from data.config import TokenizerConfig
from data.errors import DataError
from data.tokenizer import (
    ESCAPE,
    SEGMENT_CHARACTERS,
    ByteTokenizer,
    load_tokenizer,
    train_characters,
    train_sentencepiece,
)

HOSTILE = [
    "",
    " ",
    "  double  spaces   ",
    "a\r\nb\rc\n\n\n",
    "\0",
    "nul\0in the middle",
    "\ufffd",
    "\u2581 and \u2581\u2581",
    f"{ESCAPE} {ESCAPE}0{ESCAPE}1{ESCAPE}",
    "<s></s><pad><unk> <0x41>",
    "emoji \U0001f600\U0001f468\u200d\U0001f469",
    "\ufeffbyte order mark",
    "é e\u0301 \u2028 \x85 \t",
    "日本語のテキスト",
]
ALPHABET = " \n\r\0\tab01<s>/\u2581\ufffd\ufeff\U0001f600é日" + ESCAPE


def random_texts(count, seed=0):
    rng = random.Random(seed)
    return ["".join(rng.choices(ALPHABET, k=rng.randrange(60))) for _ in range(count)]


def training_texts():
    rng = random.Random(1)
    words = ["def", "return", "self", "<s>", "value", "==", "lambda", "0x1f", "naïve"]
    return [" ".join(rng.choices(words, k=400)) + "\n    \n" + HOSTILE[7] for _ in range(20)]


def huggingface_folder(folder):
    """A byte-level BPE as Hugging Face saves it."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_texts(), trainer)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "bos_token": {"content": "<s>"},
        "eos_token": "</s>",
        "auto_map": {"AutoTokenizer": ["evil.py"]},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module", params=["bpe", "unigram", "bytes", "characters", "huggingface"])
def tokenizer(request, tmp_path_factory):
    if request.param in ("bpe", "unigram"):
        vocab_size = {"bpe": 320, "unigram": 300}[request.param]
        config = TokenizerConfig(vocab_size=vocab_size, model_type=request.param)
        return train_sentencepiece(training_texts(), config)
    if request.param == "bytes":
        return ByteTokenizer()
    if request.param == "characters":
        return train_characters([*HOSTILE, ALPHABET])
    return load_tokenizer(huggingface_folder(tmp_path_factory.mktemp("hf") / "folder"))


def test_any_text_comes_back(tokenizer):
    for text in HOSTILE + random_texts(300):
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int64
        assert tokenizer.decode(ids) == text
        assert not {tokenizer.bos_id, tokenizer.eos_id} & set(ids.tolist())
        assert len(ids) == 0 or 0 <= ids.min() <= ids.max() < tokenizer.vocab_size


def test_long_text_comes_back(tokenizer):
    text = "".join(random_texts(5000))
    assert len(text) > 3 * SEGMENT_CHARACTERS
    assert tokenizer.decode(tokenizer.encode(text)) == text
    no_newline = f"{ESCAPE}\u2581" * SEGMENT_CHARACTERS
    assert tokenizer.decode(tokenizer.encode(no_newline)) == no_newline


def test_batch_equals_single(tokenizer):
    texts = HOSTILE + random_texts(50, seed=2)
    for threads in (1, 2):
        batch = tokenizer.encode_batch(texts, threads)
        assert all(
            np.array_equal(ids, tokenizer.encode(text)) for ids, text in zip(batch, texts, strict=True)
        )


def test_decoding_one_id_at_a_time(tokenizer):
    for text in HOSTILE + random_texts(100, seed=3):
        decoder = tokenizer.decoder()
        parts = [decoder.push(i) for i in tokenizer.encode(text).tolist()]
        assert "".join(parts) + decoder.flush() == text


def test_partial_character_is_held_back():
    tokenizer = ByteTokenizer()
    decoder = tokenizer.decoder()
    assert [decoder.push(i) for i in tokenizer.encode("é!").tolist()] == ["", "é", "!"]
    decoder.push(int(tokenizer.encode("é")[0]))
    assert decoder.flush() == "\ufffd"


def test_special_ids_decode_to_nothing(tokenizer):
    ids = tokenizer.encode("text")
    assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.eos_id]) == "text"


def test_our_special_ids():
    trained = train_sentencepiece(training_texts(), TokenizerConfig(vocab_size=300))
    for tokenizer in (trained, ByteTokenizer(), train_characters(["ab"])):
        assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2)


def test_saved_tokenizer_is_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.fingerprint == tokenizer.fingerprint
    assert (loaded.vocab_size, loaded.bos_id, loaded.eos_id) == (
        tokenizer.vocab_size,
        tokenizer.bos_id,
        tokenizer.eos_id,
    )
    assert all(np.array_equal(loaded.encode(text), tokenizer.encode(text)) for text in HOSTILE)


def test_single_model_file_loads(tmp_path):
    tokenizer = train_sentencepiece(training_texts(), TokenizerConfig(vocab_size=300))
    tokenizer.save(tmp_path)
    assert load_tokenizer(tmp_path / "tokenizer.model").fingerprint == tokenizer.fingerprint


def test_training_is_reproducible():
    config = TokenizerConfig(vocab_size=300, model_type="unigram")
    first, second = (train_sentencepiece(training_texts(), config) for _ in range(2))
    assert first.fingerprint == second.fingerprint


def test_unknown_character_becomes_unk():
    tokenizer = train_characters(["abc"])
    assert tokenizer.encode("azb\0~").tolist() == [4, 3, 5, 3, 3]
    assert tokenizer.decode([4, 3, 5]) == "a\ufffdb"


def test_vocabulary_too_large_names_the_largest():
    with pytest.raises(
        DataError, match=r"tokenizer\.vocab_size=50000 is too large .* largest possible is \d+"
    ):
        train_sentencepiece(["too short"], TokenizerConfig(vocab_size=50_000))


def test_vocabulary_too_small_for_the_characters():
    text = "".join(chr(0x4E00 + i) for i in range(3000))
    with pytest.raises(DataError, match=r"tokenizer\.vocab_size=300 is too small"):
        train_sentencepiece([text], TokenizerConfig(vocab_size=300))


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer_info.json", "tokenizer.json"])
def test_damaged_files_are_refused(tmp_path, name):
    folder = huggingface_folder(tmp_path / "hf")
    if name != "tokenizer.json":
        train_sentencepiece(training_texts(), TokenizerConfig(vocab_size=300)).save(folder)
    content = (folder / name).read_bytes()
    rng = random.Random(4)
    for _ in range(20):
        damaged = bytearray(content[: rng.randrange(len(content))])
        for _ in range(3):
            damaged[rng.randrange(len(damaged)) : 0] = rng.randbytes(2)
        (folder / name).write_bytes(damaged)
        with pytest.raises(DataError):
            load_tokenizer(folder)


def test_swapped_model_is_found(tmp_path):
    for name, size in (("a", 300), ("b", 301)):
        (tmp_path / name).mkdir()
        train_sentencepiece(training_texts(), TokenizerConfig(vocab_size=size)).save(tmp_path / name)
    (tmp_path / "a" / "tokenizer.model").write_bytes((tmp_path / "b" / "tokenizer.model").read_bytes())
    with pytest.raises(DataError, match="does not match"):
        load_tokenizer(tmp_path / "a")


def test_links_are_refused(tmp_path):
    folder = huggingface_folder(tmp_path / "hf")
    (folder / "tokenizer.json").rename(tmp_path / "outside.json")
    (folder / "tokenizer.json").symlink_to(tmp_path / "outside.json")
    with pytest.raises(DataError, match="is a link"):
        load_tokenizer(folder)


def test_huge_id_is_refused(tmp_path):
    folder = huggingface_folder(tmp_path / "hf")
    values = json.loads((folder / "tokenizer.json").read_text())
    values["model"]["vocab"]["!!!"] = 2**31
    (folder / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(DataError, match="largest id"):
        load_tokenizer(folder)


def test_panic_of_the_library_is_an_error(tmp_path):
    folder = huggingface_folder(tmp_path / "hf")
    values = json.loads((folder / "tokenizer.json").read_text())
    values["model"]["continuing_subword_prefix"] = "longer than any merge"
    (folder / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(DataError, match="is not a usable tokenizer"):
        load_tokenizer(folder)


def test_missing_tokenizers_are_named(tmp_path):
    with pytest.raises(DataError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)
    with pytest.raises(DataError, match="missing"):
        load_tokenizer(tmp_path / "nothing.model")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_file_out_of_a_tokenizer_folder_names_the_folder(tmp_path, name):
    folder = huggingface_folder(tmp_path / "hf")
    with pytest.raises(DataError, match=rf"{name} is one of the files of a tokenizer: .* {folder}$"):
        load_tokenizer(folder / name)


def test_folder_without_special_tokens_is_refused(tmp_path):
    folder = huggingface_folder(tmp_path / "hf")
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(DataError, match="bos_token"):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"kind": "words"}, "tokenizer.kind=words"),
        ({"vocab_size": 0}, "tokenizer.vocab_size=0"),
        ({"model_type": "word"}, "tokenizer.model_type=word"),
        ({"kind": "file"}, "tokenizer.path"),
        ({"path": "x"}, "tokenizer.path=x"),
        ({"training_bytes": 0}, "tokenizer.training_bytes=0"),
    ],
)
def test_wrong_settings_are_named(settings, key):
    with pytest.raises(DataError, match=key):
        TokenizerConfig(**settings)
