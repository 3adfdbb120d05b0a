"""Documents come out of every kind of file and source unchanged."""

import codecs
import gzip
import json
import lzma
import os
import random
import shutil
import sysconfig
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from data import text_files
from data.config import DataConfig, TokenizerConfig
from data.errors import DataError
from data.sources import open_source
from data.text_files import read_file

TEXTS = ["first  line\r\nsecond\0", "\ufeffzwei\n\n", "\u2581 \U0001f600", "last"]
COMPRESS = {".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstandard.ZstdCompressor().compress}


def jsonl(texts, field="text"):
    return "".join(json.dumps({field: text, "id": i}) + "\n" for i, text in enumerate(texts)).encode()


def flip_byte(content):
    return content[:20] + bytes([content[20] ^ 255]) + content[21:]


def read_texts(path, **settings):
    return [
        document.text
        for document in open_source(DataConfig(source="text", path=str(path), **settings)).read()
    ]


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz", ".zst"])
def test_text_and_jsonl_compressed_or_not(tmp_path, suffix):
    compress = COMPRESS.get(suffix, bytes)
    (tmp_path / f"a.txt{suffix}").write_bytes(compress(TEXTS[0].encode()))
    (tmp_path / f"b.jsonl{suffix}").write_bytes(compress(jsonl(TEXTS[1:])))
    assert read_texts(tmp_path) == TEXTS
    assert read_texts(tmp_path / "*.txt*") == TEXTS[:1]
    assert read_texts(tmp_path / f"b.jsonl{suffix}") == TEXTS[1:]


def test_zstandard_file_of_several_frames(tmp_path):
    content = jsonl(TEXTS)
    compress = COMPRESS[".zst"]
    (tmp_path / "a.jsonl.zst").write_bytes(compress(content[:20]) + compress(content[20:]))
    assert read_texts(tmp_path) == TEXTS


def test_parquet(tmp_path):
    table = pyarrow.table({"body": TEXTS * 300, "id": list(range(1200))})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert read_texts(tmp_path, text_field="body") == TEXTS * 300
    with pytest.raises(DataError, match=r"no column 'text': set data\.text_field to one of body, id"):
        read_texts(tmp_path)
    packed = tmp_path / "b.parquet.gz"
    packed.write_bytes(gzip.compress((tmp_path / "a.parquet").read_bytes()))
    assert read_texts(packed, text_field="body") == TEXTS * 300


def test_folders_are_read_sorted_and_other_files_left_out(tmp_path):
    of_a_run = ("runs/x/run.lock", "runs/x/samples.jsonl", "runs/x/checkpoints/a.txt")
    for name in ("b/2.TXT", "a.txt", "b/1.txt", "b/notes.md", "c.py", ".git/x.txt", "b/.old.txt", *of_a_run):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert read_texts(tmp_path) == ["a.txt", "b/1.txt", "b/2.TXT"]
    assert read_texts(tmp_path, max_documents=2) == ["a.txt", "b/1.txt"]
    shutil.rmtree(tmp_path / "runs")
    left_out = "left out files of other kinds, 2 in all: .md (1), .py (1)"
    for path in (tmp_path, tmp_path / "**" / "*"):
        source = open_source(DataConfig(source="text", path=str(path)))
        assert source.left_out == f"data.path={path}: {left_out}"
    assert open_source(DataConfig(source="text", path=str(tmp_path / "*.txt"))).left_out == ""


@pytest.mark.parametrize("valid", ["valid", "valid/*", "valid/b.txt", "link"])
def test_validation_files_inside_the_folder_are_not_trained_on(tmp_path, valid):
    (tmp_path / "texts" / "valid").mkdir(parents=True)
    (tmp_path / "texts" / "a.txt").write_text("a")
    (tmp_path / "texts" / "valid" / "b.txt").write_text("b")
    (tmp_path / "link").symlink_to(tmp_path / "texts" / "valid")
    valid_path = str(tmp_path / valid if valid == "link" else tmp_path / "texts" / valid)
    assert read_texts(tmp_path / "texts", valid_path=valid_path) == ["a"]
    with pytest.raises(DataError, match=r"data\.valid_path=.* takes every file of data\.path="):
        read_texts(tmp_path / "texts" / "valid", valid_path=valid_path)


def test_fingerprint_follows_the_files(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("one")
    config = DataConfig(source="text", path=str(tmp_path))
    before = open_source(config).fingerprint
    assert open_source(config).fingerprint == before
    file.write_text("two!")
    longer = open_source(config).fingerprint
    os.utime(file, ns=(0, 7))
    assert len({before, longer, open_source(config).fingerprint}) == 3


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"abc\xffdef", r"a\.txt is not UTF-8 at byte 3 "),
        ("a.jsonl", b'{"text": "ok"}\n{"text": "\xe9"}\n', r"a\.jsonl is not UTF-8 at byte 25 "),
        ("a.jsonl", b'{"text": "ok"}\n{"text": \n', r"a\.jsonl:2 is not valid JSON"),
        (
            "a.jsonl",
            b'{"body": "ok"}\n',
            r"a\.jsonl:1 has no text in the field 'text': set data\.text_field .* of body",
        ),
        ("a.jsonl", b'["text"]\n', r"a\.jsonl:1 has no text"),
        ("a.jsonl", b'{"text": null}\n', r"a\.jsonl:1 is null in the field 'text': leave such rows out"),
        ("a.jsonl", b'{"text": 7}\n', r"a\.jsonl:1 has no text"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', r"a\.jsonl:1 holds half a surrogate pair"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl:1 is not valid JSON"),
        ("a.jsonl.gz", b"no gzip", r"a\.jsonl\.gz can't be read"),
        ("a.jsonl.gz", gzip.compress(jsonl(TEXTS))[:-12], r"a\.jsonl\.gz can't be read"),
        ("a.txt.gz", flip_byte(gzip.compress(jsonl(TEXTS))), r"a\.txt\.gz can't be read"),
        ("a.jsonl.xz", lzma.compress(jsonl(TEXTS))[:-12], r"a\.jsonl\.xz can't be read"),
        ("a.txt.zst", b"no zstandard", r"a\.txt\.zst can't be read"),
        ("a.parquet", b"no parquet", r"a\.parquet is not a valid \.parquet file"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_texts(tmp_path)


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
@pytest.mark.parametrize("kind", [".txt", ".jsonl"])
def test_archive_bombs_are_refused(tmp_path, monkeypatch, suffix, kind):
    monkeypatch.setattr(text_files, "MAX_LINE_BYTES", 10_000)
    path = tmp_path / f"bomb{kind}{suffix}"
    path.write_bytes(COMPRESS[suffix](bytes(500_000)))
    with pytest.raises(DataError, match=r"over \d+ bytes"):
        list(read_file(path, "text"))


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
@pytest.mark.parametrize("missing", [3, 20_000])
def test_a_file_that_is_cut_off_is_refused(tmp_path, suffix, missing):
    content = COMPRESS[suffix](random.Random(0).randbytes(40_000).hex().encode())
    (tmp_path / f"a.txt{suffix}").write_bytes(content[:-missing])
    with pytest.raises(DataError, match=r"can't be read"):
        read_texts(tmp_path)


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
def test_long_compressed_text_is_read(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(text_files, "MAX_LINE_BYTES", 10_000)
    text = random.Random(0).randbytes(20_000).hex()
    (tmp_path / f"a.txt{suffix}").write_bytes(COMPRESS[suffix](text.encode()))
    assert read_texts(tmp_path) == [text]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "nothing", "no such file or folder"),
        (lambda folder: folder, "no file in it ends in one of .txt"),
    ],
)
def test_bad_paths_are_named(tmp_path, make, message):
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(DataError, match=f"^data.path=.*{message}"):
        read_texts(make(tmp_path))


def test_links_out_of_a_folder_are_refused(tmp_path):
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("a")
    (tmp_path / "texts" / "b.txt").symlink_to(tmp_path / "texts" / "a.txt")
    (tmp_path / "texts" / "b.pdf").symlink_to(tmp_path / "secret.txt")  # is not read anyway
    assert read_texts(tmp_path / "texts") == ["a", "a"]
    (tmp_path / "texts" / "c.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(DataError, match=r"c\.txt is a link out of the folder"):
        read_texts(tmp_path / "texts")
    assert read_texts(tmp_path / "texts" / "c.txt") == ["secret"]  # what the user names is the user's choice


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.symlink_to(path.parent.parent), "is a linked folder, which is not followed"),
        (lambda path: path.symlink_to("nowhere"), "is not a regular file, or is a broken link: remove it"),
        (os.mkfifo, "is not a regular file, or is a broken link: remove it"),
    ],
)
def test_no_part_of_a_folder_is_dropped_in_silence(tmp_path, make, message):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("a")
    make(tmp_path / "texts" / "b.txt")
    with pytest.raises(DataError, match=rf"^data\.path=.*b\.txt {message}"):
        read_texts(tmp_path / "texts")


def test_unreadable_folder_inside_a_folder_is_named(tmp_path, monkeypatch):
    (tmp_path / "inner").mkdir()
    (tmp_path / "a.txt").write_text("a")
    scandir = os.scandir

    def refuse(path):
        if os.path.basename(path) == "inner":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=r"inner can't be read: Permission denied"):
        read_texts(tmp_path)


def test_a_file_named_by_itself_is_text_whatever_its_name(tmp_path):
    (tmp_path / "notes.md").write_text("# text")
    assert read_texts(tmp_path / "notes.md") == ["# text"]


@pytest.mark.parametrize("name", ["a.json", "a.ndjson.gz", "A.CSV"])
def test_other_formats_are_not_taken_for_plain_text(name, tmp_path):
    (tmp_path / name).write_text("{}")
    with pytest.raises(DataError, match=r"Name it \.jsonl if each line is a JSON object"):
        read_texts(tmp_path / name)


@pytest.mark.parametrize("name", ["a.tar.gz", "a.TGZ", "a.zip", "a.txt.bz2"])
def test_archives_are_not_taken_for_plain_text(name, tmp_path):
    (tmp_path / name).write_bytes(b"text")
    with pytest.raises(DataError, match=r"archives are not opened: unpack it and name the folder"):
        read_texts(tmp_path / name)


def test_a_byte_order_mark_before_json_lines_is_no_text(tmp_path):
    (tmp_path / "A.JSONL").write_bytes(codecs.BOM_UTF8 + jsonl(TEXTS))
    assert read_texts(tmp_path / "A.JSONL") == TEXTS


def test_standard_library():
    root = Path(sysconfig.get_paths()["stdlib"])
    documents = list(open_source(DataConfig()).read())
    names = [document.name for document in documents]
    assert names == sorted(names, key=Path)
    assert len({document.text for document in documents}) == len(documents) > 200
    assert not any({"site-packages", "test", "tests"} & set(Path(name).parts) for name in names)
    assert documents[names.index("argparse.py")].text == (root / "argparse.py").read_bytes().decode()


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"source": "csv"}, "data.source=csv"),
        ({"source": "text"}, "data.path"),
        ({"source": "prepared"}, "data.path"),
        ({"source": "hub"}, "data.name"),
        ({"path": "x"}, "data.path=x"),
        ({"valid_path": "x"}, "data.valid_path=x"),
        ({"valid_fraction": 1.5}, "data.valid_fraction=1.5"),
        ({"workers": -1}, "data.workers=-1"),
        ({"shard_bytes": 0}, "data.shard_bytes=0"),
        ({"max_documents": 0}, "data.max_documents=0"),
        ({"verify": "no"}, "data.verify=no"),
    ],
)
def test_wrong_settings_are_named(settings, key):
    with pytest.raises(DataError, match=key):
        DataConfig(**settings)


def test_a_leading_tilde_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    config = DataConfig(source="text", path="~/a", valid_path="~/b", cache_dir="~/c")
    assert (config.path, config.valid_path, config.cache_dir) == ("/home/me/a", "/home/me/b", "/home/me/c")
    assert TokenizerConfig(kind="file", path="~/t").path == "/home/me/t"
    assert DataConfig(source="text", path="a~/b").path == "a~/b"


def test_hub_rows_become_documents(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = {}

    def load_dataset(name, config, **settings):
        asked.update(settings, name=name, config=config)
        return iter([{"body": text} for text in TEXTS])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    config = DataConfig(
        source="hub", name="owner/set", text_field="body", hub_revision="abc", max_documents=3
    )
    documents = list(open_source(config).read())
    assert [document.text for document in documents] == TEXTS[:3]
    assert asked == {
        "name": "owner/set",
        "config": None,
        "split": "train",
        "revision": "abc",
        "streaming": True,
    }


@pytest.mark.parametrize("is_generated", [False, True])
def test_unreachable_hub_is_one_clear_error(monkeypatch, is_generated):
    datasets = pytest.importorskip("datasets")

    def load_dataset(*_, **__):
        error = ConnectionError("no route\nmore lines")
        if is_generated:
            raise datasets.exceptions.DatasetGenerationError("An error occurred") from error
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"^data\.name=owner/set can't be read from the hub: no route$"):
        list(open_source(DataConfig(source="hub", name="owner/set")).read())


def test_fingerprint_of_a_local_hub_folder_follows_its_files(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(TEXTS))
    config = DataConfig(source="hub", name=str(tmp_path))
    before = open_source(config).fingerprint
    assert open_source(config).fingerprint == before
    (tmp_path / "a.jsonl").write_bytes(jsonl(TEXTS[1:]))
    assert open_source(config).fingerprint != before
