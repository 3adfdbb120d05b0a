"""Gradients and weights that are not finite, and loss spikes."""

import json
import math
import random
from pathlib import Path

import pytest
from reliability_checks import train
from training_helpers import lines

from training.checkpoint import list_checkpoints, newest_checkpoint
from training.spikes import MIN_STEPS, remember, spike_limit

pytestmark = pytest.mark.slow


def poisoned_run(text, folder: Path, engine: str, precision: str, value: float, rank: int) -> None:
    """A bad gradient element on one of two ranks at steps 3 and 4 of 6."""
    run_dir = folder / "run"
    faults = {each: [("record_states", str(folder))] for each in range(2)}
    faults[rank].append(("poison_gradient", [3, 4], value))
    more = (f"engine={engine}", f"engine.precision={precision}", "max_steps=6")
    ranks = train(text, run_dir, *more, num_ranks=2, faults=faults)
    assert ranks.wait() == [0, 0], ranks.stderr()
    for each in range(2):  # weights and moments of each rank, bit for bit: left alone at steps 3 and 4 only
        assert (folder / f"same{each}").read_text() == "001100"
    skipped = lines(run_dir, "skipped")
    assert sorted(skipped) == [3, 4]
    assert all(len(line["batch_starts_at_tokens"]) == 8 for line in skipped.values())
    assert "the gradient is not finite" in ranks.stderr()
    assert newest_checkpoint(run_dir / "checkpoints").state()["num_updates"] == 4


@pytest.mark.parametrize(
    ("engine", "precision", "rank"),
    [
        ("zero0", "bf16", 0),
        ("zero1", "bf16", 1),
        ("zero2", "bf16", 0),
        ("zero2", "fp32", 1),
        ("zero3", "bf16", 1),
        ("zero2_offload", "bf16", 0),
    ],
)
def test_all_ranks_skip_a_step_with_a_bad_gradient(engine, precision, rank, text, tmp_path):
    poisoned_run(text, tmp_path, engine, precision, math.nan, rank)


@pytest.mark.torture
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("engine", ["zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"])
def test_every_bad_gradient(engine, precision, value, rank, text, tmp_path):
    poisoned_run(text, tmp_path, engine, precision, value, rank)


def test_a_run_stops_after_too_many_skipped_steps_and_keeps_its_last_checkpoint(text, tmp_path):
    run_dir = tmp_path / "run"
    faults = {0: [("poison_gradient", list(range(4, 100)), math.inf)]}
    ranks = train(
        text, run_dir, "max_steps=50", "max_skipped_steps=3", "save_every=3", num_ranks=2, faults=faults
    )
    assert ranks.wait() == [1, 1]
    assert "3 steps in a row had a gradient that is not finite. Last checkpoint: step 3" in ranks.stderr()
    assert newest_checkpoint(run_dir / "checkpoints").step == 3


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_weights_that_are_not_finite_are_never_saved(stage, text, tmp_path):
    run_dir = tmp_path / "run"
    faults = {0: [("poison_weights", 3)]}
    more = (f"engine=zero{stage}", "max_steps=50", "keep_checkpoints=1")
    ranks = train(text, run_dir, *more, num_ranks=2, faults=faults)
    assert ranks.wait() == [1, 1], ranks.stderr()
    assert "is not finite" in ranks.stderr()
    assert [folder.name for folder in (run_dir / "checkpoints").iterdir()] == ["step_00000002"]


def noisy_curve(seed: int, num_steps: int) -> list[float]:
    """A loss that falls by a power law, with correlated noise of one of many sizes and a warm-up bump."""
    numbers = random.Random(seed)
    floor, power = numbers.uniform(1.5, 3.5), numbers.uniform(0.2, 0.5)
    spread, drift, losses = numbers.choice([0.01, 0.03, 0.1, 0.2]), 0.0, []
    for step in range(num_steps):
        drift = 0.5 * drift + numbers.gauss(0, 1)
        bump = 0.2 * math.exp(-(((step - 40) / 15) ** 2))
        losses.append(floor + 8 * (step + 1) ** -power + bump + spread * drift)
    return losses


def spikes_in(losses: list[float]) -> list[int]:
    recent: list[float] = []
    found = []
    for step, loss in enumerate(losses):
        if loss > spike_limit(recent):
            found.append(step)
        remember(recent, loss)
    return found


def test_clean_curves_have_no_spikes_and_a_spike_is_found_at_once():
    for seed in range(20):
        losses = noisy_curve(seed, 2000)
        assert spikes_in(losses) == [], seed
        at = random.Random(seed).randrange(MIN_STEPS, 2000)
        losses[at] += 3.0
        assert spikes_in(losses) == [at], seed


def test_a_spike_is_reported(text, tmp_path):
    faults = {0: [("bad_batch", [20], 40.0)]}
    ranks = train(text, tmp_path / "run", "max_steps=22", "save_every=10", faults=faults)
    assert ranks.wait() == [0]
    assert list(lines(tmp_path / "run", "spike_limit")) == [21]
    assert "step 21: loss spike" in ranks.stderr()


def test_a_rollback_leaves_the_bad_batch_out_and_lasts_over_a_resume(text, tmp_path):
    run_dir = tmp_path / "run"
    faults = {rank: [("bad_batch", [22], 40.0), ("record_batches", str(tmp_path))] for rank in range(2)}
    more = ("save_every=10", "spike_action=rollback", "schedule.total_steps=26", "eval_every=11")
    more = (*more, "sample_every=11", "sample_tokens=2")
    ranks = train(text, run_dir, *more, "max_steps=24", num_ranks=2, faults=faults)
    assert ranks.wait() == [0, 0], ranks.stderr()
    assert "went back to step 20; 3 batches are left out" in ranks.stderr()
    # step 21 and on: 20, 21, 22 (bad), then from the checkpoint of step 20 with the next batches
    assert json.loads((tmp_path / "batches0").read_text()) == [*range(23), *range(23, 27)]
    assert sorted(lines(run_dir)) == list(range(1, 25))
    assert lines(run_dir, "rolled_back_from")[20]["rolled_back_from"] == 23
    assert list(lines(run_dir, "valid_loss")) == [11, 22, 24]  # what was dropped is scored again
    sampled = [json.loads(line)["step"] for line in (run_dir / "samples.jsonl").read_text().splitlines()]
    assert sampled == [11, 22, 24]
    assert train(text, run_dir, *more, "max_steps=26", num_ranks=2, faults=faults).wait() == [0, 0]
    assert json.loads((tmp_path / "batches0").read_text()) == [27, 28]
    assert list_checkpoints(run_dir / "checkpoints")[0].name == "step_00000026"


def test_a_spike_that_comes_back_ends_the_rollbacks(text, tmp_path):
    run_dir = tmp_path / "run"
    faults = {0: [("bad_batch", list(range(20, 40)), 40.0)]}
    ranks = train(text, run_dir, "save_every=17", "spike_action=rollback", "max_steps=22", faults=faults)
    assert ranks.wait() == [0], ranks.stderr()
    assert ranks.stderr().count("went back to step 17") == 3


@pytest.mark.torture
def test_twenty_clean_runs_raise_no_alarm(text, tmp_path, record_property):
    for seed in range(20):
        more = (f"seed={seed}", "max_steps=150", "save_every=0", f"optim.lr={0.001 * (1 + seed % 5)}")
        ranks = train(text, tmp_path / f"run{seed}", *more, "log_every=10")
        assert ranks.wait(120) == [0]
        assert lines(tmp_path / f"run{seed}", "spike_limit") == {}
    record_property("figure", "0 false alarms in 20 clean runs of 150 steps")
