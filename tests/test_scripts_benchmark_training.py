"""scripts.benchmark_training: its ways take the same step, and a point that fails leaves the others alone."""

import csv
import json
import os
import subprocess
import sys

import pytest
from training_helpers import ROOT

from scripts.benchmark_training import BenchmarkConfig
from training.errors import SettingError

TINY = ["model.num_layers=1", "model.hidden_size=32", "model.num_heads=2", "model.glu_size=48"]


@pytest.mark.slow
def test_engine_and_loop_take_the_same_steps(tmp_path):
    command = [
        sys.executable,
        "-m",
        "scripts.benchmark_training",
        "models=[tnl-tiny]",
        "ways=[engine,loop,fla]",
    ]
    command += ["seq_lens=[32]", "tokens=128", "micro_tokens=64", "vocab_size=300", "steps=2"]
    command += [f"settings={json.dumps([*TINY, 'engine.precision=bf16'])}", f"output={tmp_path}"]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
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
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(SettingError, match=message):
        BenchmarkConfig(**settings)
