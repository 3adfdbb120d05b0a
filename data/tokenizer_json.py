"""Our tokenizers as the `tokenizer.json` that transformers' AutoTokenizer loads without any code.

Ids and text are those of data/tokenizer.py, with one addition: BOS is put first if special tokens are
requested. Special tokens spelled out in a text stay text (`split_special_tokens`).

Unigram models are equal up to ties (`are_tied`): SentencePiece sums the scores of a text in fp32 and
transformers in fp64, and of two spellings of equal scores each may take the other. Byte pieces of a
SentencePiece model that end inside a character all decode to U+FFFD, as Llama's do in transformers.
"""

import math
import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path

from sentencepiece import SentencePieceProcessor
from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from data.errors import DataError
from data.files import write_atomically, write_json
from data.tokenizer import (
    ESCAPE,
    ESCAPED_ESCAPE,
    ESCAPED_SPACE_MARK,
    SPACE_MARK,
    ByteTokenizer,
    CharacterTokenizer,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
)
from data.tokenizer import Tokenizer as OurTokenizer

SPECIALS = ("<pad>", "<s>", "</s>", "<unk>")  # ids 0 to 3 of the tokenizers that have no pieces of their own
NORMAL, USER_DEFINED = ModelProto.SentencePiece.NORMAL, ModelProto.SentencePiece.USER_DEFINED
NEVER = -1e4  # unigram score of a piece that is not text, below any spelling of it


def write_tokenizer_json(tokenizer: OurTokenizer, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json beside what `tokenizer.save` has put into the folder.

    A given tokenizer.json changes only if it does not put BOS first; the given file is then kept beside it.
    """
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,
        "padding_side": "left",
        "model_input_names": ["input_ids", "attention_mask"],
    }
    if isinstance(tokenizer, HuggingFaceTokenizer):
        write_json(folder / "tokenizer_config.json", settings | tokenizer.roles())
        changed = tokenizer.with_bos_first()
        if changed is not None:
            write_atomically(folder / tokenizer.given_file_name, tokenizer.model)
            write_atomically(folder / tokenizer.file_name, changed)
        return
    converted, specials = _convert(tokenizer)
    bos = specials["bos_token"]
    converted.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.bos_id)]
    )
    converted.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in dict.fromkeys(specials.values())]
    )
    write_atomically(folder / "tokenizer.json", converted.to_str().encode())
    write_json(folder / "tokenizer_config.json", settings | specials)


def _convert(tokenizer: OurTokenizer) -> tuple[Tokenizer, dict[str, str]]:
    """The tokenizer in the tokenizers library, and its special tokens by role."""
    if isinstance(tokenizer, SentencePieceTokenizer):
        return _convert_sentencepiece(tokenizer)
    pad, bos, eos, unk = SPECIALS
    if isinstance(tokenizer, ByteTokenizer):
        converted = _single_pieces(_byte_pieces())
        converted.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        converted.decoder = decoders.ByteLevel()
    elif isinstance(tokenizer, CharacterTokenizer):
        converted = _single_pieces(tokenizer.characters)
        converted.decoder = decoders.Fuse()
    else:
        raise DataError(f"a tokenizer of kind {tokenizer.kind} can't be written for transformers")
    roles = {"pad_token": pad, "bos_token": bos, "eos_token": eos, "unk_token": unk}
    return converted, roles


def _single_pieces(pieces: Iterable[str]) -> Tokenizer:
    """Every piece an id of its own, after those of SPECIALS; nothing is merged."""
    vocabulary = {piece: index for index, piece in enumerate([*SPECIALS, *pieces])}
    return Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=SPECIALS[3], fuse_unk=False))


def _byte_pieces() -> list[str]:
    """The character that the tokenizers library writes for each byte: GPT-2's, printable ones as they are."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    stand_ins = (character for character in alphabet if ord(character) >= 256)
    return [chr(byte) if chr(byte) in alphabet else next(stand_ins) for byte in range(256)]


def are_tied(tokenizer: OurTokenizer, ids: list[int], others: list[int]) -> bool:
    """Whether these spell one text with the same score in a unigram model, to the precision of its sums."""
    if not isinstance(tokenizer, SentencePieceTokenizer) or _is_bpe(tokenizer):
        return False
    score, other = (math.fsum(map(tokenizer.processor.get_score, spelling)) for spelling in (ids, others))
    return math.isclose(score, other, rel_tol=1e-6) and tokenizer.decode(ids) == tokenizer.decode(others)


def user_defined(tokenizer: OurTokenizer) -> list[str]:
    """The pieces of a SentencePiece model that are cut out of a text before anything else."""
    if not isinstance(tokenizer, SentencePieceTokenizer):
        return []
    processor = tokenizer.processor
    return [processor.id_to_piece(i) for i, kind in enumerate(_types(processor)) if kind == USER_DEFINED]


@lru_cache(maxsize=1)  # called several times in an export, on up to some 100,000 pieces
def _types(processor: SentencePieceProcessor) -> list[int]:
    """The type of each piece, which only the model's protobuf holds."""
    return [piece.type for piece in ModelProto.FromString(processor.serialized_model_proto()).pieces]


def _cut_out(tokenizer: SentencePieceTokenizer) -> list[str]:
    """The user-defined pieces that the tokenizers library can cut out of a raw text as SentencePiece does.

    It would match those with a space before spaces are marked, and put a dummy prefix after each.
    """
    return [] if tokenizer.has_dummy_prefix else [p for p in user_defined(tokenizer) if SPACE_MARK not in p]


def _text_pieces(tokenizer: SentencePieceTokenizer) -> list[bool]:
    """For each id, whether its piece is assembled from text: neither special nor cut out."""
    processor, cut_out = tokenizer.processor, set(_cut_out(tokenizer))
    return [
        kind == NORMAL or (kind == USER_DEFINED and processor.id_to_piece(i) not in cut_out)
        for i, kind in enumerate(_types(processor))
    ]


def _is_bpe(tokenizer: SentencePieceTokenizer) -> bool:
    """BPE scores are minus the merge's rank; unigram scores are log probabilities."""
    score = tokenizer.processor.get_score
    return all(score(i).is_integer() for i, text in enumerate(_text_pieces(tokenizer)) if text)


def _convert_sentencepiece(tokenizer: SentencePieceTokenizer) -> tuple[Tokenizer, dict[str, str]]:
    processor = tokenizer.processor
    pieces = [processor.id_to_piece(index) for index in range(processor.vocab_size())]
    scores = [processor.get_score(index) for index in range(processor.vocab_size())]
    unk = pieces[processor.unk_id()]
    is_text = _text_pieces(tokenizer)
    if _is_bpe(tokenizer):
        vocabulary = {piece: index for index, piece in enumerate(pieces)}
        merges = _merges({p: s for p, s, text in zip(pieces, scores, is_text, strict=True) if text})
        model: models.Model = models.BPE(
            vocab=vocabulary, merges=merges, unk_token=unk, byte_fallback=True, fuse_unk=True
        )
    else:
        scored = [(p, s if text else NEVER) for p, s, text in zip(pieces, scores, is_text, strict=True)]
        model = models.Unigram(scored, processor.unk_id(), byte_fallback=True)
    converted = Tokenizer(model)
    converted.add_tokens([AddedToken(piece, normalized=False) for piece in _cut_out(tokenizer)])
    if isinstance(model, models.Unigram) and (lone := _lone_starts(pieces, is_text)):
        converted.pre_tokenizer = pre_tokenizers.Split(Regex(lone), "isolated")
    steps: list[normalizers.Normalizer] = [
        normalizers.Replace(ESCAPE, ESCAPED_ESCAPE),
        normalizers.Replace(SPACE_MARK, ESCAPED_SPACE_MARK),
        *_own_normalizers(processor.serialized_model_proto()),
        normalizers.Replace(" ", SPACE_MARK),
    ]
    unescape: list[decoders.Decoder] = [
        decoders.Replace(SPACE_MARK, " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Replace(ESCAPED_SPACE_MARK, SPACE_MARK),
        decoders.Replace(ESCAPED_ESCAPE, ESCAPE),
    ]
    if tokenizer.has_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE_MARK))
        unescape.append(decoders.Strip(" ", 1, 0))
    converted.normalizer = normalizers.Sequence(steps)
    converted.decoder = decoders.Sequence(unescape)
    roles = {
        "pad_token": pieces[tokenizer.pad_id],
        "bos_token": pieces[tokenizer.bos_id],
        "eos_token": pieces[tokenizer.eos_id],
        "unk_token": unk,
    }
    return converted, roles


def _lone_starts(pieces: list[str], is_text: list[bool]) -> str:
    """Pattern of characters that begin a piece that is not text ("<" of "<s>") and occur in no text piece.

    The tokenizers library scores an unknown character below any piece, so it would take "<s>" in a text for
    that piece. Such a character is part of no text piece: cut off, it is unknown or bytes, as it should be.
    """
    known = {c for piece, text in zip(pieces, is_text, strict=True) if text for c in piece}
    starts = {piece[0] for piece, text in zip(pieces, is_text, strict=True) if not text}
    return "|".join(re.escape(c) for c in sorted(starts - known))


def _own_normalizers(model: bytes) -> Iterator[normalizers.Normalizer]:
    """A SentencePiece model's own normalization: its table of replacements, and the removal of spaces."""
    spec = ModelProto.FromString(model).normalizer_spec
    if spec.precompiled_charsmap:
        yield normalizers.Precompiled(spec.precompiled_charsmap)
    if spec.remove_extra_whitespaces:
        yield normalizers.Replace(Regex(r"\A +| +\z"), "")
        yield normalizers.Replace(Regex(" {2,}"), " ")


def _merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """Pairs of pieces that join into a piece, best first: by the score of the whole, then of its parts."""
    ranked = []
    for whole, score in scores.items():
        splits = [(whole[:cut], whole[cut:]) for cut in range(1, len(whole))]
        splits = [(left, right) for left, right in splits if left in scores and right in scores]
        splits.sort(key=lambda pair: (-scores[pair[0]], -scores[pair[1]]))
        ranked += [(-score, pair) for pair in splits]
    ranked.sort(key=lambda entry: entry[0])  # stable: splits stay in order
    return [pair for _, pair in ranked]
