"""scripts.prepare_data and scripts.train_tokenizer: results, and a clear error for bad input."""

import pytest

from data.config import DataConfig, PrepareConfig, TokenizerConfig
from data.errors import DataError
from data.prepare import prepare
from data.tokenizer import load_tokenizer
from scripts import prepare_data, train_tokenizer
from training.command import help_text
from training.config import compose
from training.errors import SettingError


def run(script, *settings):
    script.main(compose(PrepareConfig, list(settings), "prepare"))


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus"
    path.mkdir()
    for i in range(40):
        (path / f"{i}.txt").write_text(f"document {i} with some words in it\n" * 20)
    (path / "table.csv").write_text("a,b")
    return path


def test_prepare_and_open(corpus, tmp_path, capsys):
    output = tmp_path / "shards"
    settings = ["data=text", f"data.path={corpus}", "data.valid_fraction=0.1", f"output={output}"]
    run(prepare_data, *settings, "tokenizer=bytes")
    printed, logged = capsys.readouterr()
    assert printed.startswith("split ")
    assert printed.endswith(f"use it with: data=prepared data.path={output}\n")
    assert "prepared corpus in" in logged
    assert f"data.path={corpus}: left out files of other kinds, 1 in all: .csv (1)\n" in logged
    prepared = prepare(DataConfig(source="prepared", path=str(output)), TokenizerConfig())
    assert prepared.train.documents + prepared.valid.documents == 40
    assert prepared.fingerprint in printed
    run(prepare_data, *settings, "tokenizer=bytes")
    assert capsys.readouterr() == (printed, "")
    with pytest.raises(DataError, match="was prepared with other settings"):
        run(prepare_data, *settings, "tokenizer=characters")


def test_train_tokenizer_and_use_it(corpus, tmp_path, capsys):
    output = tmp_path / "tokenizer"
    settings = ["data=text", f"data.path={corpus}", "tokenizer.vocab_size=290", f"output={output}"]
    run(train_tokenizer, *settings)
    printed, logged = capsys.readouterr()
    assert printed == f"saved sentencepiece, 290 ids\nuse it with: tokenizer=file tokenizer.path={output}\n"
    assert "left out files of other kinds, 1 in all: .csv (1)\n" in logged
    assert load_tokenizer(output).vocab_size == 290
    run(
        prepare_data,
        "data=text",
        f"data.path={corpus}",
        f"data.cache_dir={tmp_path / 'cache'}",
        "tokenizer=file",
        f"tokenizer.path={output}",
    )
    assert "sentencepiece, 290 ids" in capsys.readouterr().out
    with pytest.raises(DataError, match="is not empty: nothing is overwritten"):
        run(train_tokenizer, *settings)


@pytest.mark.parametrize(
    ("script", "settings", "message"),
    [
        (prepare_data, ["data=text", "data.path=EMPTY", "output=OUT"], "data.path="),
        (prepare_data, ["data.sources=text"], "data.sources"),
        (prepare_data, ["tokenizer.vocab_size=-5"], "tokenizer.vocab_size=-5"),
        (train_tokenizer, ["tokenizer=bytes", "output=OUT"], "tokenizer=bytes is not trained"),
    ],
)
def test_bad_input_is_named_and_nothing_written(tmp_path, monkeypatch, capsys, script, settings, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "EMPTY").mkdir()
    with pytest.raises(SettingError, match=message) as refused:
        run(script, *settings)
    assert str(refused.value).count("\n") <= 1
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "OUT").exists()


@pytest.mark.parametrize("script", [prepare_data, train_tokenizer])
def test_help_shows_an_example(script):
    assert f"python -m {script.__name__} data=text" in help_text(script.__doc__, PrepareConfig, "prepare")
