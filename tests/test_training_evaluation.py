"""Scoring by windows against a plain loop with logits; the carried state against one long window."""

import io
import math
import tracemalloc

import numpy as np
import pytest
import sentencepiece
import torch
from model_helpers import make_model

from data.tokenizer import ByteTokenizer, CharacterTokenizer, SentencePieceTokenizer
from models.config import ModelConfig
from models.transnormer import TransNormer
from training.distributed import World
from training.errors import SettingError
from training.evaluation import EvalDocument, describe_unknown, documents_of, evaluate, resolve_stride

ALONE = World(0, 1, torch.device("cpu"))
VOCABULARY = 32


def tiny_model(**settings) -> TransNormer:
    config = ModelConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_layers=2, num_heads=2, glu_size=48, **settings
    )
    return make_model(config, seed=3)


def make_documents(*lengths: int) -> list[EvalDocument]:
    random = np.random.default_rng(1)
    return [EvalDocument(random.integers(0, VOCABULARY, n), 3 * n, n // 2 + 1) for n in lengths]


@torch.no_grad()
def plain_losses(model, ids: np.ndarray, seq_len: int, stride: int | None) -> list[float]:
    """The loss of every target of a document, one window at a time, from logits."""
    losses: list[float] = []
    tokens = torch.from_numpy(ids)
    while len(losses) < len(ids) - 1:
        done = len(losses)
        stop = min(done + (seq_len if done == 0 or stride is None else stride), len(ids) - 1)
        start = done if stride is None else max(0, stop - seq_len)
        logits = model(tokens[None, start:stop])[0].double()
        log_probabilities = logits.log_softmax(-1)
        losses += [-log_probabilities[t - start, ids[t + 1]].item() for t in range(done, stop)]
    return losses


@pytest.mark.parametrize(("window", "stride"), [("disjoint", None), ("strided", 5), ("strided", None)])
@pytest.mark.parametrize("seq_len", [1, 16, 40])
@pytest.mark.parametrize("batch_tokens", [1, 64])
def test_windows_score_every_target_once(window, stride, seq_len, batch_tokens):
    if stride and stride > seq_len:
        pytest.skip("a stride is no longer than its window")
    model, documents = tiny_model(), make_documents(41, 2, 17, 30)
    result = evaluate(
        model, documents, seq_len, ALONE, window=window, stride=stride, batch_tokens=batch_tokens
    )
    used_stride = resolve_stride(seq_len, window, stride)
    by_document = [plain_losses(model, document.ids, seq_len, used_stride) for document in documents]
    expected = sum(map(sum, by_document)) / 86
    assert result.tokens == sum(map(len, by_document)) == 86
    assert result.loss == pytest.approx(expected, abs=1e-5)
    assert result.perplexity == pytest.approx(math.exp(expected), rel=1e-4)
    assert result.bits_per_byte == pytest.approx(86 * expected / math.log(2) / (3 * 90), rel=1e-4)
    assert result.word_perplexity == pytest.approx(math.exp(86 * expected / result.words), rel=1e-3)
    assert result.loss_low < result.loss < result.loss_high


def test_longer_windows_change_the_loss():
    """The comparison above would be empty if context made no difference."""
    model, documents = tiny_model(), make_documents(200)
    losses = [evaluate(model, documents, seq_len, ALONE).loss for seq_len in (1, 20, 199)]
    assert len({round(loss, 3) for loss in losses}) == 3


@pytest.mark.parametrize("attention", ["lightning", "softmax"])
@pytest.mark.parametrize("chunk_tokens", [1, 7, 64, 500])
def test_streaming_equals_one_window_over_the_document(attention, chunk_tokens):
    model, documents = tiny_model(attention=attention), make_documents(150, 3, 65, 64)
    whole = evaluate(model, documents, 149, ALONE)
    streamed = evaluate(model, documents, chunk_tokens, ALONE, window="streaming", batch_tokens=64)
    assert streamed.loss == pytest.approx(whole.loss, abs=1e-5)
    assert streamed.tokens == whole.tokens
    positions = [(first, tokens) for first, tokens, _ in whole.loss_by_position]
    assert [(first, tokens) for first, tokens, _ in streamed.loss_by_position] == positions
    expected = [loss for *_, loss in whole.loss_by_position]
    assert [loss for *_, loss in streamed.loss_by_position] == pytest.approx(expected, abs=1e-4)


def test_streaming_holds_one_chunk_whatever_the_length():
    """Calls never see more than a chunk, and Python's memory does not grow with the document."""
    seen: list[int] = []
    model = tiny_model()

    def forward(tokens, targets, **settings):
        seen.append(tokens.shape[1])
        return model(tokens, targets, **settings)

    peaks = []
    for length in (20_000, 60_000):
        documents = make_documents(length)
        tracemalloc.start()
        evaluate(forward, documents, 10**6, ALONE, window="streaming", batch_tokens=500)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert max(seen) == 500
    assert peaks[1] < peaks[0] + 40_000  # so less than one byte a token


def test_loss_by_position_is_that_of_the_window():
    model, documents = tiny_model(), make_documents(33, 20)
    result = evaluate(model, documents, 8, ALONE)
    losses: dict[int, list[float]] = {0: [], 1: [], 2: [], 4: []}
    for document in documents:
        for target, loss in enumerate(plain_losses(model, document.ids, 8, None)):
            losses[2 ** ((target % 8).bit_length() - 1) if target % 8 else 0].append(loss)
    assert [(first, tokens) for first, tokens, _ in result.loss_by_position] == [
        (first, len(values)) for first, values in losses.items()
    ]
    means = [loss for *_, loss in result.loss_by_position]
    assert means == pytest.approx([np.mean(values) for values in losses.values()], abs=1e-5)


@pytest.mark.parametrize("window", ["disjoint", "strided", "streaming"])
def test_progress_counts_every_scored_token(window):
    done: list[int] = []
    documents = make_documents(41, 2, 17, 30)
    evaluate(tiny_model(), documents, 8, ALONE, window=window, batch_tokens=16, progress=done.append)
    assert sum(done) == 86


class RankOf(World):
    """One rank of several, run alone: sums stay its own, so that a test can add them up."""

    def sum(self, values):
        return [value + 1e-300 for value in values]  # nothing may divide by a rank's zero tokens


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("window", ["disjoint", "streaming"])
def test_ranks_share_the_work_and_make_equally_many_calls(size, window):
    model, documents = tiny_model(), make_documents(150, 3, 65, 9, 33)
    calls = [0] * size
    total = tokens = 0.0
    for rank in range(size):

        def forward(tokens, targets, rank=rank, **settings):
            calls[rank] += 1
            return model(tokens, targets, **settings)

        world = RankOf(rank, size, torch.device("cpu"))
        try:
            result = evaluate(forward, documents, 16, world, window=window, batch_tokens=32)
        except ZeroDivisionError:  # this rank had nothing of its own to score
            continue
        total += result.loss * result.tokens
        tokens += result.tokens
    expected = evaluate(model, documents, 16, ALONE, window=window, batch_tokens=32)
    assert len(set(calls)) == 1
    assert tokens == expected.tokens
    assert total / tokens == pytest.approx(expected.loss, abs=1e-6)


class WordTokenizer:
    """Id n is the word "wn " in the text; 0 is BOS and 1 EOS."""

    def decode(self, ids):
        return "".join(f"w{i} " for i in ids if i > 1)


def test_documents_are_cut_at_max_tokens():
    split = [(np.array([0, 5, 6, 1]), 6), (np.array([0, 7, 8, 9, 1]), 9), (np.array([0, 3, 1]), 3)]
    assert [len(document.ids) for document in documents_of(split, WordTokenizer())] == [4, 5, 3]
    cut = documents_of(split, WordTokenizer(), max_tokens=5)
    assert [document.ids.tolist() for document in cut] == [[0, 5, 6, 1], [0, 7, 8]]
    assert [(document.num_bytes, document.num_words) for document in cut] == [(6, 2), (6, 2)]
    assert len(documents_of(split, WordTokenizer(), max_tokens=3)) == 1


@pytest.mark.parametrize("max_tokens", range(1, 11))
def test_bytes_are_those_of_the_scored_tokens_within_a_character_too(max_tokens):
    tokenizer = ByteTokenizer()
    text = "é語🙂!"
    ids = np.array([tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id])
    (document,) = documents_of([(ids, len(text.encode()))], tokenizer, max_tokens)
    assert document.num_bytes == max_tokens


@pytest.mark.parametrize(
    ("tokenizer", "text", "max_tokens", "num_bytes"),
    [
        (ByteTokenizer(), "a\ufffd\ufffd\ufffdb", 4, 4),
        *((ByteTokenizer(), "é\ufffd\ufffdab", number, number) for number in range(1, 11)),
        *((ByteTokenizer(), "日\ufffd", number, number) for number in range(1, 7)),
        (CharacterTokenizer("ab"), "a日本語b", 2, 4),
        (CharacterTokenizer("ab"), "a日本語b", 3, 7),
    ],
)
def test_a_replacement_character_of_the_text_is_no_half_one(tokenizer, text, max_tokens, num_bytes):
    ids = np.array([tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id])
    (document,) = documents_of([(ids, len(text.encode()))], tokenizer, max_tokens)
    assert document.num_bytes == num_bytes


def test_bytes_of_a_cut_where_the_tokenizer_drops_a_first_space():
    text = "hello worlds and the argument parser returns a namespace of values"
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([text] * 50),
        model_writer=model,
        vocab_size=310,
        model_type="bpe",
        byte_fallback=True,
        add_dummy_prefix=True,
        minloglevel=2,
    )
    tokenizer = SentencePieceTokenizer(model.getvalue())
    ids = np.array([tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id])
    for max_tokens in range(1, len(ids) - 1):
        (document,) = documents_of([(ids, len(text))], tokenizer, max_tokens)
        assert document.num_bytes == len(tokenizer.decode(ids[: max_tokens + 1].tolist()))


def test_text_that_a_tokenizer_can_t_express_is_said():
    def described(tokenizer, text: str) -> str:
        ids = np.array([tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id])
        return describe_unknown([(ids, len(text.encode()))], tokenizer)

    assert described(CharacterTokenizer("ab"), "a日本b").startswith(
        "2 of 5 tokens of the text to score stand for"
    )
    assert described(CharacterTokenizer("ab"), "abba") == ""
    assert described(ByteTokenizer(), "a日本b") == ""


def test_too_short_or_empty_text_is_refused():
    model = tiny_model()
    with pytest.raises(
        SettingError, match=r"a length of 50 is longer than the longest document \(9 tokens\)"
    ):
        evaluate(model, make_documents(10, 4), 50, ALONE)
    assert evaluate(model, make_documents(10, 4), 50, ALONE, window="streaming").tokens == 12
    with pytest.raises(SettingError, match="no text"):
        evaluate(model, [], 8, ALONE)


def test_a_stride_that_leaves_targets_out_is_refused():
    with pytest.raises(SettingError, match="stride=9 is longer than the length, 8"):
        evaluate(tiny_model(), make_documents(20), 8, ALONE, window="strided", stride=9)
