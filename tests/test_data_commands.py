"""scripts.prepare_data and scripts.train_tokenizer: results, and one clear line for bad input."""

import os
import subprocess
import sys

import pytest

from data.config import DataConfig, TokenizerConfig
from data.prepare import prepare
from data.tokenizer import load_tokenizer


def run(script, *settings):
    command = [sys.executable, "-m", f"scripts.{script}", *settings]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus"
    path.mkdir()
    for i in range(40):
        (path / f"{i}.txt").write_text(f"document {i} with some words in it\n" * 20)
    return path


def test_prepare_and_open(corpus, tmp_path):
    output = tmp_path / "shards"
    settings = ["data=text", f"data.path={corpus}", "data.valid_fraction=0.1", f"output={output}"]
    first = run("prepare_data", *settings, "tokenizer=bytes")
    assert first.returncode == 0, first.stderr
    assert f"data=prepared data.path={output}" in first.stdout
    prepared = prepare(DataConfig(source="prepared", path=str(output)), TokenizerConfig())
    assert prepared.train.documents + prepared.valid.documents == 40
    assert prepared.fingerprint in first.stdout
    again = run("prepare_data", *settings, "tokenizer=bytes")
    assert again.returncode == 0
    assert "prepared corpus in" in first.stdout
    assert "prepared corpus in" not in again.stdout
    other = run("prepare_data", *settings, "tokenizer=characters")
    assert other.returncode == 2
    assert "was prepared with other settings" in other.stderr


def test_train_tokenizer_and_use_it(corpus, tmp_path):
    output = tmp_path / "tokenizer"
    settings = ["data=text", f"data.path={corpus}", "tokenizer.vocab_size=290", f"output={output}"]
    result = run("train_tokenizer", *settings)
    assert result.returncode == 0, result.stderr
    assert load_tokenizer(output).vocab_size == 290
    used = run(
        "prepare_data",
        "data=text",
        f"data.path={corpus}",
        f"data.cache_dir={tmp_path / 'cache'}",
        "tokenizer=file",
        f"tokenizer.path={output}",
    )
    assert used.returncode == 0, used.stderr
    assert "sentencepiece, 290 ids" in used.stdout
    assert run("train_tokenizer", *settings).returncode == 2


@pytest.mark.parametrize(
    ("script", "settings", "message"),
    [
        ("prepare_data", ["data=text", "data.path=EMPTY", "output=OUT"], "data.path="),
        ("prepare_data", ["data.sources=text"], "data.sources"),
        ("prepare_data", ["tokenizer.vocab_size=-5"], "tokenizer.vocab_size=-5"),
        ("train_tokenizer", ["tokenizer=bytes", "output=OUT"], "tokenizer=bytes is not trained"),
    ],
)
def test_bad_input_is_one_or_two_lines(tmp_path, script, settings, message):
    (tmp_path / "EMPTY").mkdir()
    settings = [
        s.replace("EMPTY", str(tmp_path / "EMPTY")).replace("OUT", str(tmp_path / "OUT")) for s in settings
    ]
    result = run(script, *settings)
    assert result.returncode == 2
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) <= 2
    assert not result.stdout
    assert not (tmp_path / "OUT").exists()


@pytest.mark.parametrize("script", ["prepare_data", "train_tokenizer"])
def test_help_shows_an_example(script):
    result = run(script, "--help")
    assert result.returncode == 0
    assert f"python -m scripts.{script} data=text" in result.stdout
    assert "vocab_size" in result.stdout
