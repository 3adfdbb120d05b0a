"""Which documents train and which validate, and a sample of those that train.

Both depend on the documents alone, so they come out the same whenever and wherever they are made.
"""

import hashlib
import heapq
import itertools
import math
import random
from collections.abc import Iterable, Iterator

from data.config import DataConfig
from data.sources import Source
from data.text_files import Document
from data.tokenizer import split_segments

PEEKED_DOCUMENTS = 1_000
SAMPLED_PIECES = 16  # documents are cut so that a full sample is made of at least so many pieces
MAX_UTF8_BYTES = 4  # of a code point


def split_documents(documents: Iterable[Document], valid_fraction: float) -> Iterator[tuple[str, Document]]:
    """Pair each document with "train" or "valid".

    The hash of a document's content decides, so the split is stable and equal texts stay together. If chance
    leaves one side of a small source empty, it gets the document nearest to the limit; a lone document is
    cut, and its end is for validation. Empty documents are left out.
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
            limit = min(max(limit, math.nextafter(min(places), 1.0)), max(places))
        for document, place in zip(peeked, places, strict=True):
            yield ("valid" if place < limit else "train"), document
        for document in documents:
            yield ("valid" if unit_hash(document.text, "split") < limit else "train"), document


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
    """Training text for a tokenizer: `budget_bytes` of it, short of a code point at most, or all there is.

    The whole source is read once, as preparing it does anyway: a file's size says too little about text
    that is compressed or among other fields. Of a remote source only what comes first is read. Long
    documents are cut; each piece draws a number, and those with the smallest fill the budget.
    """
    valid_fraction = 0.0 if config.valid_path else config.valid_fraction
    documents = split_documents(source.read(), valid_fraction)
    piece_characters = max(budget_bytes // (SAMPLED_PIECES * MAX_UTF8_BYTES), 1)
    pieces: Iterator[bytes] = (
        piece.encode("utf-8")
        for split, document in documents
        if split == "train"
        for piece in split_segments(document.text, piece_characters)
    )
    if source.is_remote:
        pieces = _first_bytes(pieces, budget_bytes)
    draw = random.Random(0)
    kept: list[tuple[float, int, bytes]] = []  # a heap, the largest number first: minus it, position, piece
    kept_bytes = 0
    for position, piece in enumerate(pieces):
        key = -draw.random()
        if kept_bytes >= budget_bytes and key < kept[0][0]:
            continue
        heapq.heappush(kept, (key, position, piece))
        kept_bytes += len(piece)
        while kept_bytes - len(kept[0][2]) >= budget_bytes:
            kept_bytes -= len(heapq.heappop(kept)[2])
    if kept_bytes > budget_bytes:
        key, position, piece = kept[0]
        kept[0] = (key, position, piece[: budget_bytes - kept_bytes])
    for _, _, piece in sorted(kept, key=lambda item: item[1]):
        yield piece.decode("utf-8", "ignore")  # the piece that is cut may end inside a code point


def _first_bytes(pieces: Iterable[bytes], num_bytes: int) -> Iterator[bytes]:
    for piece in pieces:
        yield piece
        num_bytes -= len(piece)
        if num_bytes <= 0:
            return
