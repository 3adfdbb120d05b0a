"""scripts.benchmark_training: its ways take the same step, and a point that fails leaves the others alone."""

import csv
import json
import sys
from types import SimpleNamespace

import pytest
from training_helpers import run

from scripts import benchmark_training
from scripts.benchmark_training import TrainingBenchmarkConfig
from training.config import compose
from training.errors import SettingError

TINY = ["model.num_layers=1", "model.hidden_size=32", "model.num_heads=2", "model.glu_size=48"]


@pytest.mark.slow
def test_engine_and_loop_take_the_same_steps(tmp_path, monkeypatch):
    arguments = ["models=[tnl-tiny]", "ways=[engine,loop,fla]", "seq_lens=[32]", "tokens=128"]
    arguments += ["micro_tokens=64", "vocab_size=300", "steps=2", f"output={tmp_path}"]
    arguments += [f"settings={json.dumps([*TINY, 'engine.precision=bf16'])}"]
    forked = SimpleNamespace(run=lambda command, **_: run(command[1:]), TimeoutExpired=TimeoutError)
    monkeypatch.setattr(benchmark_training, "subprocess", forked)
    monkeypatch.setattr(sys, "argv", ["benchmark_training.py", *arguments])
    assert benchmark_training.main(compose(TrainingBenchmarkConfig, arguments)) == 1
    with open(tmp_path / "results.csv", newline="") as file:
        engine, loop, fla = csv.DictReader(file)
    assert (engine["status"], loop["status"]) == ("ok", "ok")
    assert fla["status"] == "failed"  # without a GPU, or without the library
    assert float(engine["loss"]) == pytest.approx(float(loop["loss"]), abs=2e-3)
    assert int(engine["micro_batch_size"]) == 2
    assert "| tnl-tiny | loop |" in (tmp_path / "table.md").read_text()
    assert (tmp_path / "speed.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ways": ["magic"]}, "ways=magic .*engine, loop, fla, plain"),
        ({"seq_lens": [1000]}, "seq_lens=1000 must divide tokens=65536"),
        ({"micro_tokens": 0}, "micro_tokens=0"),
        ({"steps": 0}, "steps=0"),
        ({"models": ["tnl-9b"]}, "model=tnl-9b: unknown"),
        ({"settings": ["modle.num_layers=1"]}, "modle.num_layers: unknown setting"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(SettingError, match=message):
        benchmark_training.main(TrainingBenchmarkConfig(**settings))
