"""Statistics of each layer: right at every ZeRO stage, and without effect on the training."""

import json
import math
from pathlib import Path

import pytest
from training_helpers import lines, run, settings

from training.metrics import MetricsFile

pytestmark = pytest.mark.slow


def train(text: Path, run_dir: Path, *more: str) -> dict[int, dict]:
    """Two ranks; step to the line of metrics with layers."""
    fixed = ["engine.precision=fp32", "model.norm=rmsnorm", "model.dropout=0.1", "max_steps=4"]
    result = run(["train.py", *settings(text, run_dir, *fixed, *more)], num_ranks=2)
    assert result.returncode == 0, result.stderr
    return lines(run_dir, "layer_grad_norms")


def test_layers_are_measured_alike_at_every_stage_and_change_nothing(text, tmp_path):
    assert train(text, tmp_path / "plain", "engine=zero1") == {}
    measured = train(text, tmp_path / "zero1", "engine=zero1", "layer_stats_every=2")
    steps, plain = lines(tmp_path / "zero1"), lines(tmp_path / "plain")
    assert [steps[step]["loss"] for step in steps] == [plain[step]["loss"] for step in plain]
    assert list(measured) == [2, 4]
    for step, line in measured.items():
        assert len(line["layer_grad_norms"]) == 2
        of_layers = math.hypot(*line["layer_grad_norms"])
        assert 0 < of_layers < steps[step]["grad_norm"]  # the embedding has the rest
    for stage in (0, 3):
        other = train(text, tmp_path / f"zero{stage}", f"engine=zero{stage}", "layer_stats_every=2")
        for step, line in measured.items():
            for key in ("layer_grad_norms", "layer_activation_rms"):
                assert other[step][key] == pytest.approx(line[key], rel=2e-3)


def test_numbers_that_are_not_finite_become_null_in_lists_too(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl", 0)
    metrics.write({"step": 1, "layer_grad_norms": [1.5, math.nan, math.inf], "loss": math.nan})
    metrics.close()
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line == {"step": 1, "layer_grad_norms": [1.5, None, None], "loss": None}
