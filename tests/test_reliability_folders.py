"""What happens around a run: ranks that differ, a folder that is moved, a job that is suspended."""

import os
import shutil
import signal
import time

import pytest
import torch
from reliability_checks import train, wait_for
from training_helpers import lines, write_text

from training.checkpoint import newest_checkpoint
from training.metrics import MetricsFile, read_metrics
from training.run_folder import RunFolder

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("optim.lr=0.0001", "rank 1 differs from rank 0: optim.lr=0.0001 (rank 0: "),
        ("model.num_layers=3", "model.num_layers=3 (rank 0: "),
        ("resume=never", "resume=never (rank 0: auto)"),
    ],
)
def test_ranks_with_other_settings_are_refused(setting, said, text, tmp_path):
    faults = {1: [("add_settings", setting)]}
    ranks = train(text, tmp_path / "run", "max_steps=4", num_ranks=2, faults=faults)
    assert ranks.wait() == [2, 2], ranks.stderr()
    assert said in ranks.stderr()
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_ranks_with_other_text_are_refused_and_with_a_copy_of_it_train(text, tmp_path):
    other, copy = write_text(tmp_path / "other", 30), tmp_path / "copy"
    shutil.copytree(text, copy)
    for path, codes in ((other, [2, 2]), (copy, [0, 0])):
        faults = {
            1: [("prepare_other_text", str(path)), ("add_settings", f"data.cache_dir={tmp_path}/cache")]
        }
        ranks = train(text, tmp_path / "run", "max_steps=1", num_ranks=2, faults=faults)
        assert ranks.wait() == codes, ranks.stderr()
        assert ("rank 1 differs from rank 0: data=" in ranks.stderr()) == (codes == [2, 2])


def test_a_run_whose_checkpoints_are_gone_is_not_started_over(text, tmp_path):
    run_dir = tmp_path / "run"
    assert train(text, run_dir, "max_steps=3").wait() == [0]
    before = (run_dir / "metrics.jsonl").read_bytes()
    (run_dir / "checkpoints").rename(tmp_path / "archive")
    ranks = train(text, run_dir, "max_steps=3", "optim.lr=0.001")
    assert ranks.wait() == [2]
    assert "holds no checkpoint, but the run was saved before: its metrics go to step 3" in ranks.stderr()
    assert (run_dir / "metrics.jsonl").read_bytes() == before
    shutil.rmtree(run_dir / "checkpoints")
    (tmp_path / "archive").rename(run_dir / "checkpoints")
    assert train(text, run_dir, "max_steps=4").wait() == [0]


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_again(text, tmp_path):
    run_dir = tmp_path / "run"
    faults = {0: [("signal_after_steps", [3], signal.SIGKILL)]}
    assert train(text, run_dir, "max_steps=5", "save_every=4", faults=faults).wait() == [-9]
    ranks = train(text, run_dir, "max_steps=5", "save_every=4")
    assert ranks.wait() == [0]
    assert "holds a run without a checkpoint: it starts again" in ranks.stderr()
    assert "it starts again" in (run_dir / "train.log").read_text()
    assert sorted(lines(run_dir)) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("deleted", [False, True])
def test_a_run_whose_folder_goes_away_stops_at_its_next_save(deleted, text, tmp_path):
    run_dir, moved = tmp_path / "run", tmp_path / "moved"
    ranks = train(text, run_dir, "max_steps=100000", "save_every=5", num_ranks=2)
    wait_for(lambda: newest_checkpoint(run_dir / "checkpoints") is not None)
    run_dir.rename(moved)
    if deleted:
        shutil.rmtree(moved, ignore_errors=True)
    assert ranks.wait() == [2, 2], ranks.stderr()
    assert f"run_dir={run_dir} was moved or deleted while this run trained in it" in ranks.stderr()
    assert not run_dir.exists()
    if not deleted:
        assert "error: run_dir=" in (moved / "train.log").read_text()
        step = newest_checkpoint(moved / "checkpoints").step
        assert train(text, moved, f"max_steps={step + 1}", "save_every=5").wait() == [0]


def test_a_lock_file_that_is_deleted_is_renewed(text, tmp_path):
    run_dir = tmp_path / "run"
    ranks = train(text, run_dir, "max_steps=100000", "save_every=5")
    wait_for(lambda: newest_checkpoint(run_dir / "checkpoints") is not None)
    (run_dir / "run.lock").unlink()
    wait_for((run_dir / "run.lock").exists)
    second = train(text, run_dir, "max_steps=100000", stderr=tmp_path / "second")
    assert second.wait() == [2]
    assert "is being trained by" in second.stderr()
    ranks.signal(signal.SIGTERM, 0)
    assert ranks.wait() == [75]


def test_a_run_whose_lock_another_has_taken_stops(text, tmp_path):
    run_dir = tmp_path / "run"
    first = train(text, run_dir, "max_steps=100000", "save_every=50")
    wait_for(lambda: newest_checkpoint(run_dir / "checkpoints") is not None)
    (run_dir / "run.lock").unlink()
    second = train(text, run_dir, "max_steps=100000", "save_every=50", stderr=tmp_path / "second")
    assert first.wait() == [2]
    assert f"is being trained by process {second.processes[0].pid}" in first.stderr()
    second.signal(signal.SIGUSR1, 0)
    assert second.wait() == [75]
    assert "(SIGUSR1)" in second.stderr()


def test_a_job_that_is_suspended_goes_on(text, tmp_path):
    """Longer than the watchdog waits, all ranks together."""
    run_dir = tmp_path / "run"
    faults = {rank: [("impatient",), ("notice_suspensions", 2.0)] for rank in range(2)}
    more = ("max_steps=100000", "save_every=100000", "engine.watchdog_seconds=3")
    ranks = train(text, run_dir, *more, num_ranks=2, faults=faults)
    wait_for(lambda: (run_dir / "metrics.jsonl").exists() and len(lines(run_dir)) > 3)
    for rank in range(2):
        ranks.signal(signal.SIGSTOP, rank)
    time.sleep(6)
    step = max(lines(run_dir))
    for rank in range(2):
        ranks.signal(signal.SIGCONT, rank)
    wait_for(lambda: max(lines(run_dir)) > step + 3)
    ranks.signal(signal.SIGTERM, 0)
    assert ranks.wait() == [75, 75], ranks.stderr()


def test_a_kill_while_a_run_is_deleted_leaves_nothing_to_resume(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path)
    (folder.checkpoints / "step_00000003").mkdir(parents=True)
    folder.metrics.write_text("{}\n")

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.unlink", killed)
        with pytest.raises(KeyboardInterrupt):
            folder.clear()
    assert folder.metrics.exists()
    assert not folder.has_checkpoint()
    folder.clear()
    assert os.listdir(tmp_path) == ["checkpoints"]


def test_metrics_forget_going_back_to_a_step_when_a_kill_has_undone_it(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl", 0)
    for line in (
        {"step": 20, "loss": 1.0},
        {"step": 20, "rolled_back_from": 23, "passed_over_batches": 3},
        {"step": 21, "loss": 1.0},
    ):
        file.write(line)
    file.drop_after(20, 3)
    assert len(read_metrics(file.path)) == 2
    file.drop_after(20, 0)
    assert read_metrics(file.path) == [{"step": 20, "loss": 1.0}]


def test_fewer_steps_than_have_been_trained_change_nothing(text, tmp_path):
    run_dir = tmp_path / "run"
    assert train(text, run_dir, "max_steps=3", "eval_every=2").wait() == [0]
    before = {name: (run_dir / name).read_bytes() for name in ("config.yaml", "metrics.jsonl", "train.log")}
    ranks = train(text, run_dir, "max_steps=2")
    assert ranks.wait() == [0]
    assert "finished at step 3; raise max_steps to train on" in ranks.stderr()
    assert {name: (run_dir / name).read_bytes() for name in before} == before


def test_a_resume_with_other_code_says_what_changed(text, tmp_path):
    run_dir = tmp_path / "run"
    assert train(text, run_dir, "max_steps=1", faults={0: [("pretend_version", "2.0.1")]}).wait() == [0]
    ranks = train(text, run_dir, "max_steps=2")
    assert ranks.wait() == [0]
    said = f"was saved by other code: torch 2.0.1, now {torch.__version__}"
    assert said in ranks.stderr()
    assert said in (run_dir / "train.log").read_text()
