"""The schedule's ramp: shorter sequences and smaller batches at first, the same tokens in the same order."""

import numpy as np
import pytest
import torch
from training_helpers import lines, run, settings

from data.loader import Batch, TrainLoader, shorten
from data.shards import TokenSplit
from training.config import compose
from training.errors import SettingError
from training.optimizer import ScheduleConfig, ramped
from training.train_config import TrainConfig


def test_values_double_in_equal_stages():
    config = ScheduleConfig(ramp_steps=6, ramp_seq_len=4)
    assert [ramped(config, 4, 32, step) for step in range(8)] == [4, 4, 8, 8, 16, 16, 32, 32]
    assert ramped(config, None, 32, 0) == 32


def test_batches_of_a_ramp_follow_each_other():
    """The sequences are those that a constant batch deals, cut into other steps."""
    split = TokenSplit("train", [np.arange(4000, dtype=np.uint32)], np.array([[4000], [4000]]), 4000)
    constant = TrainLoader(split, 8, 4, seed=0)
    growing = TrainLoader(split, 8, 4, seed=0, ramp=[1, 1, 2, 2, 2])
    assert [growing.sequences(step) for step in (0, 2, 4, 5, 9)] == [
        (0, 1),
        (2, 4),
        (6, 8),
        (8, 12),
        (24, 28),
    ]
    dealt = np.concatenate([growing.starts(step) for step in range(7)])
    assert dealt.tolist() == np.concatenate([constant.starts(step) for step in range(4)]).tolist()
    assert growing.num_targets(0) + growing.num_targets(1) <= 16
    assert growing.batch(2, 1, 2, 0, 1).tokens[0, 0] == growing.starts(2)[1]


def test_shorter_sequences_hold_the_same_tokens():
    tokens = torch.arange(16)[None]
    packed = shorten(Batch(tokens, tokens + 1, torch.tensor([0, 3, 8, 16], dtype=torch.int32)), 4)
    assert packed.cu_seqlens.tolist() == [0, 3, 4, 8, 12, 16]
    assert packed.cu_seqlens.dtype == torch.int32
    assert torch.equal(packed.tokens, tokens)
    rows = shorten(Batch(tokens.view(2, 8), tokens.view(2, 8) + 1, None), 4)
    assert torch.equal(rows.tokens, tokens.view(4, 4))
    assert torch.equal(rows.targets, tokens.view(4, 4) + 1)


@pytest.mark.parametrize(
    ("more", "explanation"),
    [
        (["schedule.ramp_seq_len=128"], "need schedule.ramp_steps"),
        (["schedule.ramp_steps=100"], "ramp_steps=100 has nothing to ramp: set schedule.ramp_seq_len or"),
        (
            ["schedule.ramp_steps=9", "schedule.ramp_seq_len=100"],
            "ramp_seq_len=100 must reach 1024 by doubling",
        ),
        (["schedule.ramp_steps=9", "schedule.ramp_batch_tokens=3072"], "ramp_batch_tokens=3072 must reach"),
        (["schedule.ramp_steps=9", "schedule.ramp_batch_tokens=512"], "not a multiple of seq_len=1024"),
    ],
)
def test_a_ramp_that_does_not_fit_is_refused(more, explanation):
    with pytest.raises(SettingError, match=explanation):
        compose(TrainConfig, more, "train")


@pytest.mark.slow
def test_a_run_with_a_ramp_resumes_as_if_it_had_not_stopped(text, tmp_path):
    more = ["schedule.ramp_steps=4", "schedule.ramp_seq_len=8", "schedule.ramp_batch_tokens=64"]
    more += ["schedule.total_steps=6", "micro_batch_size=1"]
    for name, stops in (("whole", [6]), ("parts", [3, 6])):
        for stop in stops:
            result = run(["train.py", *settings(text, tmp_path / name, *more, f"max_steps={stop}")], 2)
            assert result.returncode == 0, result.stderr
    whole, parts = lines(tmp_path / "whole"), lines(tmp_path / "parts")
    assert [line["tokens"] for line in whole.values()] == [64, 128, 256, 384, 640, 896]
    assert [line["loss"] for line in parts.values()] == [line["loss"] for line in whole.values()]


@pytest.mark.slow
def test_past_its_ramp_a_run_goes_on_on_more_ranks_than_the_first_step_s_sequences(text, tmp_path):
    more = ["schedule.ramp_steps=2", "schedule.ramp_batch_tokens=32", "schedule.total_steps=4"]
    for stop, num_ranks in ((3, 1), (4, 2)):
        arguments = settings(
            text, tmp_path / "run", *more, "seq_len=32", "micro_batch_size=1", f"max_steps={stop}"
        )
        result = run(["train.py", *arguments], num_ranks)
        assert result.returncode == 0, result.stderr
    assert list(lines(tmp_path / "run")) == [1, 2, 3, 4]
