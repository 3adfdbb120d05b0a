"""Documents are split by content, and a sample is drawn from all that train."""

import gzip
import json
import random

import pytest
import zstandard

from data.config import DataConfig
from data.sources import Source, open_source
from data.split import sample_documents, split_documents
from data.text_files import Document

COMPRESS = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}


def documents_of(count, seed=0):
    rng = random.Random(seed)
    return [Document(f"{rng.random()} text {i}", str(i)) for i in range(count)]


def split_of(documents, fraction):
    parts = {"train": set(), "valid": set()}
    for split, document in split_documents(iter(documents), fraction):
        parts[split].add(document.text)
    return parts["train"], parts["valid"]


def test_split_is_disjoint_complete_and_near_the_fraction():
    documents = documents_of(3000)
    train, valid = split_of(documents, 0.1)
    assert not train & valid
    assert train | valid == {document.text for document in documents}
    assert 200 < len(valid) < 400


def test_split_is_stable_when_order_and_number_change():
    documents = documents_of(3000)
    _, valid = split_of(documents, 0.1)
    _, valid_of_fewer = split_of(documents[::-1][:1500], 0.1)
    assert valid_of_fewer == valid & {document.text for document in documents[1500:]}


def test_equal_texts_stay_together():
    documents = [Document(document.text, f"copy of {document.name}") for document in documents_of(50)] * 2
    train, valid = split_of(documents, 0.3)
    assert not train & valid


@pytest.mark.parametrize("count", [2, 3, 10])
@pytest.mark.parametrize("fraction", [0.001, 0.999])
def test_small_sources_have_both_splits(count, fraction):
    for seed in range(20):
        train, valid = split_of(documents_of(count, seed), fraction)
        assert train
        assert valid


def test_lone_document_is_split_by_position():
    text = "".join(f"{i}\n" for i in range(1000))
    (train,), (valid,) = split_of([Document(text, "lone")], 0.1)
    assert train + valid == text
    assert len(train) == int(len(text) * 0.9)


def test_fractions_zero_and_one_take_everything():
    assert split_of(documents_of(5), 0.0)[1] == set()
    assert split_of(documents_of(5), 1.0)[0] == set()


def test_empty_documents_are_left_out():
    assert split_of([Document("", "a"), Document("b", "b")], 0.0) == ({"b"}, set())


@pytest.mark.parametrize(
    ("suffix", "other_text"), [("", ""), ("", "x" * 500), (".gz", ""), (".zst", "x" * 500)]
)
def test_sample_is_drawn_from_all_training_documents_and_fills_its_budget(tmp_path, suffix, other_text):
    documents = documents_of(4000)
    lines = [json.dumps({"text": document.text, "other": other_text}) + "\n" for document in documents]
    content = "".join(lines).encode()
    (tmp_path / f"a.jsonl{suffix}").write_bytes(COMPRESS[suffix](content))
    config = DataConfig(source="text", path=str(tmp_path), valid_fraction=0.5)
    train, _ = split_of(documents, 0.5)
    sample = list(sample_documents(open_source(config), config, 20_000))
    assert sample == list(sample_documents(open_source(config), config, 20_000))
    assert sum(map(len, sample)) == 20_000
    places = {document.text: place for place, document in enumerate(documents)}
    cut = [text for text in sample if text not in train]
    assert len(cut) <= 1
    quarters = [places[text] // 1000 for text in sample if text in train]
    assert all(quarters.count(quarter) > len(sample) / 6 for quarter in range(4))
    assert quarters == sorted(quarters)


def test_sample_of_a_remote_source_is_what_comes_first():
    read = []

    def documents():
        for document in documents_of(4000):
            read.append(document.text)
            yield document

    source = Source(read=documents, fingerprint="", is_remote=True)
    sample = list(sample_documents(source, DataConfig(valid_fraction=0.0), 50_000))
    assert sum(map(len, sample)) == 50_000
    assert len(sample) == len(read) < 2500


@pytest.mark.parametrize("num_documents", [1, 3])
def test_sample_of_few_large_documents_is_drawn_from_all_of_them(tmp_path, num_documents):
    lines = [f"{index} of many lines\n" for index in range(30_000)]
    length = len(lines) // num_documents
    for index in range(num_documents):
        part = lines[index * length : (index + 1) * length]
        (tmp_path / f"{index}.txt").write_text("".join(part))
    config = DataConfig(source="text", path=str(tmp_path), valid_fraction=0.1)
    sampled = "".join(sample_documents(open_source(config), config, 100_000)).splitlines()
    assert 99_000 < sum(len(line) + 1 for line in sampled) <= 100_001
    places = [int(line.split()[0]) for line in sampled if line.endswith("lines")]
    assert max(places) - min(places) > 10_000


@pytest.mark.parametrize("alphabet", ["天地玄黃宇宙洪荒", "𠀀𠀁𠀂𠀃", "añ天𠀀"])
@pytest.mark.parametrize("is_remote", [False, True])
def test_sample_counts_bytes_in_every_script(alphabet, is_remote):
    text = "".join(random.Random(0).choices(alphabet, k=100_000))
    source = Source(read=lambda: iter([Document(text, "lone")]), fingerprint="", is_remote=is_remote)
    for budget in range(20_000, 20_008):
        sample = list(sample_documents(source, DataConfig(valid_fraction=0.0), budget))
        assert budget - 4 < len("".join(sample).encode()) <= budget
        assert max(len(piece.encode()) for piece in sample) <= budget / 16
        assert all(piece in text for piece in sample)


def test_sample_is_never_empty(tmp_path):
    (tmp_path / "a.txt").write_text("abc\n" * 1000)
    config = DataConfig(source="text", path=str(tmp_path), valid_fraction=0.5)
    for budget in range(1, 30):
        (first, *_) = sample_documents(open_source(config), config, budget)
        assert 0 < len(first) <= budget


def test_first_documents_are_sampled_as_a_source_of_their_own(tmp_path):
    lines = [json.dumps({"text": document.text}) + "\n" for document in documents_of(4000)]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    config = DataConfig(source="text", path=str(tmp_path), valid_fraction=0.0, max_documents=20)
    sample = list(sample_documents(open_source(config), config, 20_000))
    assert sample == [document.text for document in documents_of(4000)[:20]]
