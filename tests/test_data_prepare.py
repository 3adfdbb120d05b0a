"""Preparation is whole or absent, continues after a kill, and finds every kind of damage."""

import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from data import shards
from data.config import DataConfig, TokenizerConfig
from data.errors import DataError
from data.files import exclusive_lock
from data.loader import TrainLoader
from data.prepare import prepare, prepare_folder
from data.shards import MANIFEST_FILE, read_manifest

SHARD_BYTES = 4_000


def make_texts(count=120, seed=0):
    rng = random.Random(seed)
    return [f"{i} " + " ".join(rng.choices(["alpha", "beta", "\u2581", "é\r\n"], k=40)) for i in range(count)]


def write_corpus(folder, texts):
    folder.mkdir()
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


def config_in(folder):
    path = write_corpus(folder / "corpus", make_texts())
    return DataConfig(
        source="text",
        path=str(path),
        cache_dir=str(folder / "cache"),
        valid_fraction=0.2,
        shard_bytes=SHARD_BYTES,
    )


@pytest.fixture
def data(tmp_path):
    return config_in(tmp_path)


@pytest.fixture
def lines():
    return []


BYTES = TokenizerConfig(kind="bytes")


def texts_of(prepared, split):
    """The texts of a split, after checking its begin and end tokens and its byte counts."""
    tokenizer = prepared.tokenizer
    texts = []
    for ids, num_bytes in split:
        assert (ids[0], ids[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
        texts.append(tokenizer.decode(ids[1:-1]))
        assert len(texts[-1].encode()) == num_bytes
    return texts


@pytest.mark.parametrize(
    "tokenizer",
    [BYTES, TokenizerConfig(kind="characters"), TokenizerConfig(vocab_size=300)],
    ids=lambda config: config.kind,
)
def test_every_text_is_stored_once(data, tokenizer, lines):
    prepared = prepare(data, tokenizer, log=lines.append)
    train, valid = texts_of(prepared, prepared.train), texts_of(prepared, prepared.valid)
    assert sorted(train + valid) == sorted(make_texts())
    assert len(valid) > 5
    assert prepared.train.tokens == sum(len(ids) for ids, _ in prepared.train)
    assert prepared.train.bytes == sum(len(text.encode()) for text in train)
    assert len(list(prepared.folder.glob("train-*.tokens"))) > 3
    assert prepared.name == "corpus"
    assert open_folder(prepared.folder).name == "corpus"
    assert open_folder(prepared.folder, name="../my label").name == "my_label"


def test_second_call_opens_what_is_there(data, lines, monkeypatch):
    first = prepare(data, BYTES, log=lines.append)
    monkeypatch.setattr("data.prepare._build", None)
    second = prepare(data, BYTES, log=lines.append)
    assert second.fingerprint == first.fingerprint
    assert len(lines) == 1


def test_changed_source_or_settings_are_prepared_anew(data, tmp_path, lines):
    folders = {prepare(data, BYTES, log=lines.append).folder}
    folders.add(prepare(replace(data, valid_fraction=0.3), BYTES, log=lines.append).folder)
    folders.add(prepare(data, TokenizerConfig(kind="characters"), log=lines.append).folder)
    with open(tmp_path / "corpus" / "texts.jsonl", "a") as file:
        file.write('{"text": "one more"}\n')
    folders.add(prepare(data, BYTES, log=lines.append).folder)
    assert len(folders) == 4


def test_fingerprint_depends_on_content_only(data, tmp_path, lines):
    first = prepare(data, BYTES, log=lines.append)
    copy = write_corpus(tmp_path / "copy", make_texts())
    second = prepare(replace(data, path=str(copy)), BYTES, log=lines.append)
    assert second.folder != first.folder
    assert second.fingerprint == first.fingerprint
    other = write_corpus(tmp_path / "other", make_texts(seed=1))
    assert prepare(replace(data, path=str(other)), BYTES, log=lines.append).fingerprint != first.fingerprint


def test_validation_file_of_its_own(data, tmp_path, lines):
    (tmp_path / "valid.txt").write_text("held out")
    prepared = prepare(replace(data, valid_path=str(tmp_path / "valid.txt")), BYTES, log=lines.append)
    assert texts_of(prepared, prepared.train) == make_texts()
    assert texts_of(prepared, prepared.valid) == ["held out"]


def test_wide_vocabulary_takes_four_bytes(data, monkeypatch, lines):
    monkeypatch.setattr("data.tokenizer.ByteTokenizer.vocab_size", 70_000)
    prepared = prepare(data, BYTES, log=lines.append)
    assert read_manifest(prepared.folder).dtype_name == "uint32"
    assert sorted(texts_of(prepared, prepared.train) + texts_of(prepared, prepared.valid)) == sorted(
        make_texts()
    )


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "no document with any text in"),
        ([""], "no document with any text in"),
        (["same"] * 3, r"data\.valid_fraction=0\.2 leaves no validation .*all documents are equal"),
    ],
)
def test_too_little_text(tmp_path, data, texts, message, lines):
    path = write_corpus(tmp_path / "little", texts)
    with pytest.raises(DataError, match=message):
        prepare(replace(data, path=str(path)), BYTES, log=lines.append)
    assert os.listdir(data.cache_dir) == []


@pytest.mark.parametrize("key", ["path", "valid_path"])
def test_training_or_validation_file_without_text(tmp_path, data, key, lines):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "blank.txt").write_text(" \n")
    paths = {"path": str(tmp_path / "a.txt"), "valid_path": str(tmp_path / "a.txt")}
    paths |= {key: str(tmp_path / "blank.txt")}
    with pytest.raises(DataError, match=r"no document with any text in") as refused:
        prepare(replace(data, **paths), BYTES, log=lines.append)
    assert paths[key] in str(refused.value)


def test_sentencepiece_without_training_text(data, lines):
    with pytest.raises(DataError, match="tokenizer=sentencepiece is trained on training documents"):
        prepare(replace(data, valid_fraction=1.0), TokenizerConfig(), log=lines.append)


def test_text_in_the_middle_that_is_not_utf8(data, tmp_path, lines):
    (tmp_path / "corpus" / "zz.txt").write_bytes(b"fine\xff")
    with pytest.raises(DataError, match=r"zz\.txt is not UTF-8 at byte 4"):
        prepare(data, BYTES, log=lines.append)


def test_output_folder_is_never_overwritten(data, tmp_path, lines):
    output = tmp_path / "output"
    output.mkdir()
    (output / "precious.txt").write_text("mine")
    with pytest.raises(DataError, match="nothing is overwritten"):
        prepare_folder(output, data, BYTES, log=lines.append)
    assert os.listdir(output) == ["precious.txt"]
    shutil.rmtree(output)
    prepare_folder(output, data, BYTES, log=lines.append)
    assert prepare_folder(output, data, BYTES, log=lines.append).train.documents > 0
    with pytest.raises(DataError, match="prepared with other settings"):
        prepare_folder(output, replace(data, valid_fraction=0.5), BYTES, log=lines.append)


def test_output_that_is_a_link_to_an_empty_folder(data, tmp_path, lines):
    (tmp_path / "empty").mkdir()
    (tmp_path / "output").symlink_to("empty")
    prepared = prepare_folder(tmp_path / "output", data, BYTES, log=lines.append)
    assert prepared.folder == tmp_path / "empty"
    assert (tmp_path / "output").is_symlink()
    assert prepare_folder(tmp_path / "output", data, BYTES, log=lines.append).fingerprint
    assert len(lines) == 1


def test_output_that_is_a_mount_point_is_refused_at_once(data, tmp_path, monkeypatch, lines):
    monkeypatch.setattr("os.path.ismount", lambda path: path == tmp_path / "mount")
    monkeypatch.setattr("data.prepare._build", None)
    (tmp_path / "mount").mkdir()
    with pytest.raises(DataError, match=r"mount is a mount point.* give a folder inside it"):
        prepare_folder(tmp_path / "mount", data, BYTES, log=lines.append)


# Kills, locks and full disks

KILLED = """
import os, signal, sys
from data import shards
from data.config import DataConfig, TokenizerConfig
from data.prepare import prepare
complete, after = shards.ShardWriter._complete_shard, int(sys.argv[3])
def complete_or_die(writer):
    global after
    after -= 1
    if after == 0 and sys.argv[4] == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    complete(writer)
    if after == 0:
        os.kill(os.getpid(), signal.SIGKILL)
shards.ShardWriter._complete_shard = complete_or_die
write = shards.write_json
def write_or_die(path, value):
    if sys.argv[4] == "manifest" and path.name == shards.MANIFEST_FILE:
        path.with_name(path.name + ".tmp").write_text("{")
        os.kill(os.getpid(), signal.SIGKILL)
    write(path, value)
shards.write_json = write_or_die
prepare(
    DataConfig(source="text", path=sys.argv[1], cache_dir=sys.argv[2], valid_fraction=0.2, shard_bytes=4000),
    TokenizerConfig(kind="bytes"),
)
"""


@pytest.mark.parametrize(
    ("after", "moment"),
    [(1, "before"), (1, "behind"), (3, "behind"), (4, "before"), (100, "manifest")],
)
def test_goes_on_after_a_kill(data, tmp_path, lines, after, moment):
    uninterrupted = prepare(replace(data, cache_dir=str(tmp_path / "other")), BYTES, log=lines.append)
    command = [sys.executable, "-c", KILLED, data.path, data.cache_dir, str(after), moment]
    killed = subprocess.run(command, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not any(name.endswith(MANIFEST_FILE) for name in os.listdir(data.cache_dir))
    lines.clear()
    resumed = prepare(data, BYTES, log=lines.append)
    assert resumed.fingerprint == uninterrupted.fingerprint
    complete = after - (moment == "before")
    assert any("continuing after" in line for line in lines) == (complete > 0)
    assert os.listdir(data.cache_dir) == [resumed.folder.name]
    assert sorted(os.listdir(resumed.folder)) == sorted(os.listdir(uninterrupted.folder))


def test_kill_between_manifest_and_rename(data, monkeypatch, lines):
    replace_file = os.replace

    def stop_at_folder(source, target):
        if os.path.isdir(source):
            raise KeyboardInterrupt
        replace_file(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", stop_at_folder)
        with pytest.raises(KeyboardInterrupt):
            prepare(data, BYTES, log=lines.append)
    monkeypatch.setattr("data.prepare._write_documents", None)
    assert prepare(data, BYTES, log=lines.append).train.documents > 0


def test_damaged_shard_of_a_killed_preparation_is_made_again(data, tmp_path, lines):
    uninterrupted = prepare(replace(data, cache_dir=str(tmp_path / "other")), BYTES, log=lines.append)
    command = [sys.executable, "-c", KILLED, data.path, data.cache_dir, "3", "behind"]
    subprocess.run(command, capture_output=True)
    (shard,) = (tmp_path / "cache").glob("*/train-00000.tokens")
    os.truncate(shard, 10)
    assert prepare(data, BYTES, log=lines.append).fingerprint == uninterrupted.fingerprint


def test_several_ranks_prepare_once(data, tmp_path):
    script = KILLED + "print('done')"
    command = [sys.executable, "-c", script, data.path, data.cache_dir, "1000", "never"]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert sum("prepared corpus" in output for output in outputs) == 1
    assert len(os.listdir(data.cache_dir)) == 1


def test_lock_waits_for_its_holder_and_not_for_a_dead_one(tmp_path, lines):
    path = tmp_path / "lock"
    path.write_text("left behind by a dead process")
    order = []

    def second():
        with exclusive_lock(path, lines.append):
            order.append("second")

    with exclusive_lock(path, lines.append):
        thread = threading.Thread(target=second)
        thread.start()
        while not lines:
            time.sleep(0.01)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
    assert not path.exists()


def test_full_disk_is_named_and_leaves_no_temporary_file(data, lines):
    prepare(data, BYTES, log=lines.append)
    shutil.rmtree(data.cache_dir)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        for limit_bytes in (100, 2_000, 3_900, SHARD_BYTES):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limits[1]))
            with pytest.raises(DataError, match="no space left"):
                prepare(data, BYTES, log=lines.append)
            assert not [name for _, _, names in os.walk(data.cache_dir) for name in names if ".tmp" in name]
            assert lines[-1].startswith("1 finished") or not os.listdir(data.cache_dir)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert prepare(data, BYTES, log=lines.append).train.documents > 0


@pytest.mark.parametrize("failing_write", [0, 1, 2, 3, 4, 5, 6, 7, -1, -2, -3, -4, -5, -6])
def test_disk_that_fills_up_at_any_write(data, tmp_path, monkeypatch, failing_write, lines):
    num_writes, failing, fsync = 0, None, os.fsync

    def full_disk(descriptor):
        nonlocal num_writes
        num_writes += 1
        if num_writes - 1 == failing:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full_disk)
        uninterrupted = prepare(replace(data, cache_dir=str(tmp_path / "other")), BYTES, log=lines.append)
        failing, num_writes = failing_write % num_writes, 0
        with pytest.raises(DataError, match="no space left"):
            prepare(data, BYTES, log=lines.append)
    assert not list((tmp_path / "cache").rglob("*.tmp"))
    resumed = prepare(data, BYTES, log=lines.append)
    assert resumed.fingerprint == uninterrupted.fingerprint
    assert sorted(os.listdir(resumed.folder)) == sorted(os.listdir(uninterrupted.folder))


def test_folder_that_can_not_be_written(data, tmp_path, lines):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(DataError, match="can't be written"):
        prepare(replace(data, cache_dir=str(tmp_path / "file")), BYTES, log=lines.append)


# Damage


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    data = config_in(tmp_path_factory.mktemp("whole"))
    return prepare(data, TokenizerConfig(vocab_size=300), log=lambda _: None).folder


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "cache" / whole.name)


def open_folder(folder, tokenizer=None, **settings):
    config = DataConfig(source="prepared", path=str(folder), **settings)
    return prepare(config, tokenizer or TokenizerConfig())


def flip_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def append(path):
    with open(path, "ab") as file:
        file.write(b"\0\0")


def zero_page(path):
    path.write_bytes(bytes(path.stat().st_size))


def link(path):
    outside = path.parent.parent / "outside"
    path.rename(outside)
    path.symlink_to(outside)


def truncate(path):
    os.truncate(path, path.stat().st_size - 2)


FILES = ["train-00000.tokens", "valid-00000.tokens", "train.documents", "tokenizer.model"]


@pytest.mark.parametrize("damage", [flip_bit, truncate, append, zero_page, link, os.remove])
@pytest.mark.parametrize("name", FILES)
def test_damage_is_found_and_named(folder, damage, name):
    assert open_folder(folder).train.documents > 0
    damage(folder / name)
    with pytest.raises(DataError, match=name):
        open_folder(folder)


@pytest.mark.parametrize("damage", [truncate, append, link, os.remove])
@pytest.mark.parametrize("name", FILES)
def test_quick_check_finds_wrong_sizes(folder, damage, name):
    assert open_folder(folder, verify="quick").train.documents > 0
    damage(folder / name)
    with pytest.raises(DataError, match=name):
        open_folder(folder, verify="quick")


def test_swapped_shards_are_found(data, tmp_path, lines):
    text = "x" * 3_000
    path = write_corpus(tmp_path / "even", [f"{i:4d}{text}" for i in range(20)])
    folder = prepare(replace(data, path=str(path), shard_bytes=1), BYTES, log=lines.append).folder
    first, second, other = (folder / f"train-0000{i}.tokens" for i in range(3))
    first.rename(other.with_suffix(".moved"))
    second.rename(first)
    other.with_suffix(".moved").rename(second)
    assert open_folder(folder, verify="quick").train.documents > 3
    with pytest.raises(DataError, match="train-00000"):
        open_folder(folder)


def test_added_shard_is_found(folder):
    number = len(list(folder.glob("train-*.tokens")))
    (folder / f"train-{number:05d}.tokens").write_bytes(b"\0\0")
    with pytest.raises(DataError, match=f"train-{number:05d}"):
        open_folder(folder)


@pytest.mark.parametrize("name", ["train-00000.tokens", "tokenizer_info.json", MANIFEST_FILE])
@pytest.mark.parametrize("damage", [truncate, os.remove])
def test_damaged_cache_is_found_and_can_be_deleted(data, lines, name, damage):
    folder = prepare(data, BYTES, log=lines.append).folder
    damage(folder / name)
    with pytest.raises(DataError, match=f"delete (it|{folder}) and run the same command again$"):
        prepare(data, BYTES, log=lines.append)
    shutil.rmtree(folder)
    assert prepare(data, BYTES, log=lines.append).train.documents > 0


def test_tokenizer_that_does_not_match_the_shards(folder, data, tmp_path, lines):
    other = prepare(data, TokenizerConfig(vocab_size=301), log=lines.append).folder
    assert open_folder(folder, TokenizerConfig(kind="file", path=str(folder))).train.documents > 0
    with pytest.raises(DataError, match=r"tokenizer\.path=.* does not match the shards"):
        open_folder(folder, TokenizerConfig(kind="file", path=str(other)))
    with pytest.raises(DataError, match="tokenizer=bytes does not match the shards"):
        open_folder(folder, BYTES)
    for name in ("tokenizer.model", "tokenizer_info.json"):
        shutil.copy(other / name, folder / name)
    with pytest.raises(DataError, match="tokenizer"):
        open_folder(folder, verify="quick")


def edit_manifest(folder, edit):
    """Change the manifest as an attacker would: with a fingerprint that fits again."""
    values = json.loads((folder / MANIFEST_FILE).read_text())
    edit(values)
    values["fingerprint"] = shards.fingerprint_of(values["tokenizer_fingerprint"], values["files"])
    (folder / MANIFEST_FILE).write_text(json.dumps(values))


@pytest.mark.parametrize(
    "name",
    ["../outside", "/etc/passwd", "a/b", "..", "", "a\0b", "C:\\x", "x" * 300, ".hidden", "-rf", "a\n"],
)
def test_hostile_names_are_refused(folder, name):
    entry = {"size": 4, "sha256": hashlib.sha256(b"mine").hexdigest()}
    (folder.parent / "outside").write_bytes(b"mine")
    edit_manifest(folder, lambda values: values["files"].update({name: entry}))
    with pytest.raises(DataError, match="only plain names"):
        open_folder(folder)
    edit_manifest(folder, lambda values: (values["files"].pop(name), values.update(name=name)))
    with pytest.raises(DataError, match="only plain names"):
        open_folder(folder)


@pytest.mark.parametrize("count", [2**63, 2**62, -1, 2**200, 1.5, True, "7", None, [1]])
@pytest.mark.parametrize("key", ["documents", "tokens", "bytes", "shard_tokens"])
def test_hostile_counts_are_refused(folder, count, key):
    value = [count] if key == "shard_tokens" else count
    edit_manifest(folder, lambda values: values["splits"]["train"].update({key: value}))
    with pytest.raises(DataError):
        open_folder(folder)


def test_claimed_sizes_are_checked_before_mapping(folder):
    def claim(values):
        values["splits"]["train"].update(tokens=2**47, shard_tokens=[2**47])

    edit_manifest(folder, claim)
    with pytest.raises(DataError, match=r"train-00000\.tokens holds \d+ bytes instead of"):
        open_folder(folder, verify="quick")


def test_index_that_does_not_fit_is_refused(folder):
    path = folder / "train.documents"
    index = np.fromfile(path, np.int64)
    index[3], index[4] = index[4], index[3]
    index.tofile(path)
    with pytest.raises(DataError, match=r"train\.documents does not fit"):
        open_folder(folder, verify="quick")


def test_deep_and_huge_manifests_are_refused(folder, monkeypatch):
    path = folder / MANIFEST_FILE
    path.write_text('{"a":' * 200_000)
    with pytest.raises(DataError, match="not valid JSON"):
        open_folder(folder)
    path.write_text('{"version": ' + "9" * 100_000 + "}")
    with pytest.raises(DataError, match="not valid JSON"):
        open_folder(folder)
    monkeypatch.setattr(shards, "MAX_MANIFEST_BYTES", 1000)
    with pytest.raises(DataError, match="larger than 1000 bytes"):
        open_folder(folder)


def test_fuzzed_manifest_never_crashes(folder):
    """Bytes changed, cut and repeated, and values replaced: a DataError or a folder that opens."""
    path = folder / MANIFEST_FILE
    content, rng = path.read_bytes(), random.Random(0)
    strange = [None, -1, 2**63, 0.5, "", "../x", [], {}, True, "uint8", [[]], {"a": 1}]
    refused = 0
    for _ in range(300):
        damaged = bytearray(content)
        for _ in range(rng.randrange(1, 4)):
            start = rng.randrange(len(damaged))
            damaged[start : start + rng.randrange(3)] = rng.randbytes(rng.randrange(3))
        values = json.loads(content)
        node = values
        while isinstance(node, dict) and node:
            parent, key = node, rng.choice(list(node))
            node = node[key] if rng.random() < 0.7 else None
        parent[key] = rng.choice(strange)
        for attempt in (bytes(damaged), json.dumps(values).encode()):
            path.write_bytes(attempt)
            try:
                open_folder(folder, verify="quick")
            except DataError:
                refused += 1
    assert refused > 400


def test_fuzzed_index_never_crashes(folder):
    path = folder / "train.documents"
    content, rng = path.read_bytes(), random.Random(1)
    for _ in range(200):
        damaged = bytearray(content)
        start = rng.randrange(len(damaged) - 8)
        damaged[start : start + 8] = rng.randbytes(8)
        path.write_bytes(damaged)
        with pytest.raises(DataError):
            open_folder(folder, verify="quick")


def test_prepared_data_feeds_the_loader(folder):
    prepared = open_folder(folder)
    batch = TrainLoader(prepared.train, 64, 4, seed=0).batch(0, 0, 1, 0, 4)
    assert batch.tokens.shape == (1, 256)
    assert batch.tokens.max() < prepared.tokenizer.vocab_size


@pytest.mark.parametrize("path", ["nothing", "."])
def test_no_prepared_data_there(tmp_path, path):
    with pytest.raises(DataError, match="prepared data"):
        open_folder(tmp_path / path)
