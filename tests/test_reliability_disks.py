"""A disk that fills up while a run saves, logs or prepares data, and one without room for a checkpoint."""

import contextlib
import errno
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import reliability_faults
import torch
from reliability_checks import train
from training_helpers import lines

from data.errors import DataError
from data.files import explain_write_errors
from training import setup
from training.checkpoint import newest_checkpoint, write_safetensors
from training.config import compose
from training.errors import SettingError
from training.run_folder import RunFolder
from training.state import RunState
from training.train_config import TrainConfig

pytestmark = pytest.mark.slow


@contextlib.contextmanager
def small_disk(folder: Path, size_kib: int):
    """A file system of its own of that size; needs root."""
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size_kib}k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a file system needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def assert_clear_end(ranks, num_ranks: int) -> None:
    """Every rank exits with 2; one message, no traceback."""
    assert ranks.wait() == [2] * num_ranks, ranks.stderr()
    errors = [line for line in ranks.stderr().splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert "no space left" in errors[0] or "are free" in errors[0]
    for rank in range(num_ranks):
        assert "Traceback" not in ranks.stderr(rank)


def assert_nothing_half_written(run_dir: Path) -> None:
    assert not list(run_dir.rglob("*.tmp"))
    assert not list(run_dir.rglob(".*.tmp"))


def test_a_save_that_finds_no_space_leaves_the_last_checkpoint_and_no_rest(text, tmp_path):
    """Files larger than a limit fail as on a full disk: the second save here."""
    run_dir = tmp_path / "run"
    faults = {1: [("limit_file_size", 100_000, 2)]}
    ranks = train(text, run_dir, "max_steps=9", num_ranks=2, faults=faults)
    assert_clear_end(ranks, 2)
    assert_nothing_half_written(run_dir)
    assert newest_checkpoint(run_dir / "checkpoints").step == 1
    assert train(text, run_dir, "max_steps=3", num_ranks=2).wait() == [0, 0]


def test_a_log_that_finds_no_space_ends_all_ranks_with_its_message(text, tmp_path):
    run_dir = tmp_path / "run"
    faults = {0: [("no_space_for_logs", 3)]}
    ranks = train(text, run_dir, "max_steps=9", "save_every=2", num_ranks=2, faults=faults)
    assert_clear_end(ranks, 2)
    assert newest_checkpoint(run_dir / "checkpoints").step == 2


def test_preparing_data_without_space_says_so(text, tmp_path):
    faults = {rank: [("limit_file_size", 2000, 0)] for rank in range(2)}
    more = ("max_steps=2", f"data.cache_dir={tmp_path / 'cache'}")
    assert_clear_end(train(text, tmp_path / "run", *more, num_ranks=2, faults=faults), 2)
    assert_nothing_half_written(tmp_path / "cache")


def test_a_start_without_room_for_its_checkpoints_is_refused(tmp_path, monkeypatch):
    settings = ["run_dir=R", "model=tnl-tiny", "model.vocab_size=1000", "keep_checkpoints=3", "save_every=10"]
    config = compose(TrainConfig, [*settings, "max_steps=100"], "train")
    size = 12 * config.model.num_parameters()
    state, folder = RunState(1, "id"), RunFolder(tmp_path)
    free = [4 * size]
    monkeypatch.setattr(setup.shutil, "disk_usage", lambda _: SimpleNamespace(free=free[0]))
    setup._check_space(config, folder, state)
    free[0] -= 1
    with pytest.raises(SettingError, match=r"its checkpoints need [1-9]\d*\.\d\d MiB more \(4 of"):
        setup._check_space(config, folder, state)


def test_a_start_that_can_t_write_its_lock_says_so(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(DataError, match="no space left to write"):
        RunFolder(tmp_path).lock()


def test_a_model_that_finds_no_space_says_so(tmp_path):
    """Its library hides the operating system's error."""
    with small_disk(tmp_path / "disk", 40) as disk, explain_write_errors(disk):
        write_safetensors(disk / "small.safetensors", {"w": torch.zeros(100)})
        with pytest.raises(OSError, match="No space left"):
            write_safetensors(disk / "large.safetensors", {"w": torch.zeros(100_000)})


@pytest.mark.parametrize("words", ["eval.py --help", "-m scripts.plan tokenizer=bytes"])
def test_output_that_finds_no_space_says_so(words):
    with open("/dev/full", "w") as full:
        ended = subprocess.run(
            [sys.executable, *words.split()], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert ended.returncode == 2
    assert ended.stderr == "error: the output can't be written (No space left on device): free some space.\n"


def test_a_full_disk_of_compiled_code_is_named(text, tmp_path):
    with small_disk(tmp_path / "disk", 100) as disk:
        caches = {"TORCHINDUCTOR_CACHE_DIR": str(disk / "cache")}
        ranks = train(text, tmp_path / "run", "max_steps=3", "engine.compile=true", **caches)
        assert ranks.wait() == [1]
    assert "no space left where compiled code is kept" in ranks.stderr()
    assert newest_checkpoint(tmp_path / "run/checkpoints").step == 0


def test_weights_and_biases_may_fail_without_the_run(text, tmp_path):
    offline = {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    faults = {0: [("break_wandb",)]}
    ranks = train(text, tmp_path / "run", "max_steps=3", "wandb.enabled=true", faults=faults, **offline)
    assert ranks.wait() == [0], ranks.stderr()
    assert "Weights & Biases failed (ConnectionError: the service is gone)" in ranks.stderr()
    assert sorted(lines(tmp_path / "run")) == [1, 2, 3]


def test_a_file_system_without_locks_is_said_and_trained_on(text, tmp_path):
    ranks = train(text, tmp_path / "run", "max_steps=1", faults={0: [("no_locks",)]})
    assert ranks.wait() == [0], ranks.stderr()
    assert "its file system can't lock files (Function not implemented)" in ranks.stderr()


@pytest.mark.torture
def test_ten_fill_levels_while_saving(text, tmp_path, record_property):
    """A checkpoint has 345 KiB, so there is room for a part of one."""
    for left_kib in (0, 8, 40, 80, 120, 160, 200, 240, 280, 320):
        with small_disk(tmp_path / f"disk{left_kib}", 4096) as disk:
            faults = {0: [("fill_disk", str(disk), left_kib, 3)]}
            ranks = train(
                text, disk / "run", "max_steps=40", "keep_checkpoints=1", num_ranks=2, faults=faults
            )
            assert_clear_end(ranks, 2)
            assert_nothing_half_written(disk)
            assert newest_checkpoint(disk / "run/checkpoints").step >= 2
    record_property("figure", "10 of 10 levels end with a message, the last checkpoint whole, no temporaries")


@pytest.mark.torture
def test_ten_fill_levels_while_logging(text, tmp_path, record_property):
    for left_kib in range(0, 40, 4):
        with small_disk(tmp_path / f"disk{left_kib}", 4096) as disk:
            more = ["schedule.total_steps=100"]
            assert train(text, disk / "run", *more, "max_steps=2").wait() == [0]
            faults = {0: [("fill_disk", str(disk), left_kib, 1)]}
            more += ["max_steps=100000", "save_every=0"]
            ranks = train(text, disk / "run", *more, num_ranks=2, faults=faults, stderr=tmp_path / "stderr")
            assert_clear_end(ranks, 2)
            assert_nothing_half_written(disk)
            assert newest_checkpoint(disk / "run/checkpoints").step == 2
            assert max(lines(disk / "run")) >= 2
    record_property("figure", "10 of 10 levels end with a message, the last checkpoint whole, no temporaries")


@pytest.mark.torture
def test_ten_fill_levels_while_preparing(text, tmp_path, record_property):
    for left_kib in range(0, 40, 4):
        with small_disk(tmp_path / f"disk{left_kib}", 4096) as disk:
            more = ["max_steps=2", f"data.cache_dir={disk / 'cache'}"]
            reliability_faults.fill_up(str(disk), left_kib)
            ranks = train(text, tmp_path / "run", *more, num_ranks=2)
            assert_clear_end(ranks, 2)
            assert_nothing_half_written(disk)
            (disk / "filler").unlink()
            assert train(text, tmp_path / "run", *more, "resume=never", "overwrite=true").wait() == [0]
    record_property("figure", "10 of 10 levels end with a message; the next start goes on")
