"""Stops, kills and resumes on CUDA devices: `pytest -m gpu tests/test_reliability_gpu.py`, about two minutes.

One run is stopped in a step and killed in a save, and must end as the run that never was, bit for bit. With
two GPUs, one of two ranks is killed, and the run goes on on one GPU and on two.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from reliability_checks import assert_same_results, wait_for
from training_helpers import ROOT, environment, lines, write_text

from training.checkpoint import newest_checkpoint
from training.distributed import free_port

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

STOP_SECONDS = 20
STEPS = 16
SETTINGS = [
    *("model=tnl-tiny", "model.backend=triton", "tokenizer=bytes", "data=text", "data.valid_fraction=0.1"),
    *("seq_len=512", "batch_tokens=16384", "micro_batch_size=8", "optim.lr=0.001", "log_every=1"),
    *("eval_every=0", "eval_tokens=1000", "sample_every=0", "save_every=2", "keep_checkpoints=3"),
    *(f"max_steps={STEPS}", "engine=zero1", "engine.compile=false"),
]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("corpus") / "text", num_documents=2000)


class Ranks:
    """The processes of one start, as a launcher makes them, with faults by rank."""

    def __init__(self, text: Path, run_dir: Path, *more: str, num_ranks: int = 1, faults=None, **variables):
        port = free_port()
        arguments = [f"data.path={text}", f"data.cache_dir={text.parent / 'cache'}", f"run_dir={run_dir}"]
        command = [sys.executable, "tests/reliability_faults.py", *SETTINGS, *arguments, *more]
        by_rank = {str(rank): [("impatient",), *rank_faults] for rank, rank_faults in (faults or {}).items()}
        self.processes, self.logs = [], []
        for rank in range(num_ranks):
            values = gpu_environment(rank, num_ranks, port) | {"FAULTS": json.dumps(by_rank)} | variables
            self.logs.append(run_dir.parent / f"{run_dir.name}.stderr{rank}")
            with open(self.logs[-1], "w") as log:
                started = subprocess.Popen(
                    command, cwd=ROOT, env=values, stdout=log, stderr=log, start_new_session=True
                )
            self.processes.append(started)

    def wait(self, timeout: float = 100) -> list[int | None]:
        """Exit codes; None for a rank that is still there after so many seconds (it is killed)."""
        deadline = time.monotonic() + timeout
        for process in self.processes:
            try:
                process.wait(max(deadline - time.monotonic(), 0))
            except subprocess.TimeoutExpired:
                process.kill()
        return [process.poll() for process in self.processes]

    def stderr(self, rank: int = 0) -> str:
        return self.logs[rank].read_text()


def gpu_environment(rank: int, num_ranks: int, port: int) -> dict[str, str]:
    """What a launcher sets, with every GPU of this machine to be seen."""
    values = environment() | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks)}
    values |= {"LOCAL_WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    paths = [str(ROOT), str(ROOT / "tests"), values.get("PYTHONPATH")]
    values["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    if torch.cuda.is_available():
        del values["DS_ACCELERATOR"], values["CUDA_VISIBLE_DEVICES"]
        if "CUDA_VISIBLE_DEVICES" in os.environ:
            values["CUDA_VISIBLE_DEVICES"] = os.environ["CUDA_VISIBLE_DEVICES"]
    return values


def signal_at(ranks: Ranks, marker: Path, number: int, rank: int = 0) -> list[int | None]:
    """Signal a rank when `marker` appears; the exit codes, within STOP_SECONDS."""
    wait_for(lambda: marker.exists() or ranks.processes[rank].poll() is not None, 120)
    assert marker.exists(), ranks.stderr(rank)
    ranks.processes[rank].send_signal(number)
    return ranks.wait(STOP_SECONDS)


def test_a_run_that_is_stopped_and_killed_is_the_run_that_was_not(text, tmp_path):
    whole, run_dir = tmp_path / "whole", tmp_path / "run"
    ranks = Ranks(text, whole)
    assert ranks.wait() == [0], ranks.stderr()

    marker = tmp_path / "in a step"
    ranks = Ranks(text, run_dir, faults={0: [("pause_in", "step", str(marker), 1.0, 4)]})
    assert signal_at(ranks, marker, signal.SIGTERM) == [75], ranks.stderr()
    assert newest_checkpoint(run_dir / "checkpoints").step == max(lines(run_dir)) == 5

    marker = tmp_path / "in a save"
    ranks = Ranks(text, run_dir, faults={0: [("pause_in", "save", str(marker), 60.0, 4)]})
    assert signal_at(ranks, marker, signal.SIGKILL) == [-signal.SIGKILL]
    assert list((run_dir / "checkpoints").glob(".step_*.tmp"))
    assert newest_checkpoint(run_dir / "checkpoints").step == 8

    ranks = Ranks(text, run_dir)
    assert ranks.wait() == [0], ranks.stderr()
    assert "resuming at step 8" in ranks.stderr()
    assert_same_results(run_dir, whole, STEPS)


def test_a_signal_while_blocks_compile_leaves_a_checkpoint(text, tmp_path):
    """Cold caches of inductor and Triton: a few seconds after its first forward pass a run is compiling."""
    marker, run_dir = tmp_path / "compiling", tmp_path / "run"
    caches = {
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"),
        "TRITON_CACHE_DIR": str(tmp_path / "triton"),
    }
    faults = {0: [("pause_in", "first compile", str(marker), 0.0)]}
    ranks = Ranks(text, run_dir, "engine.compile=true", faults=faults, **caches)
    wait_for(lambda: marker.exists() or ranks.processes[0].poll() is not None, 120)
    time.sleep(2)
    family = psutil.Process(ranks.processes[0].pid).children(recursive=True)
    ranks.processes[0].send_signal(signal.SIGTERM)
    assert ranks.wait(STOP_SECONDS) == [75], ranks.stderr()
    assert not psutil.wait_procs(family, timeout=STOP_SECONDS)[1], "compile workers are left behind"
    assert newest_checkpoint(run_dir / "checkpoints").step == max(lines(run_dir), default=0)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_one_of_two_ranks_is_killed_and_the_run_goes_on_on_one_gpu_and_on_two(text, tmp_path):
    whole, run_dir, alone = tmp_path / "whole", tmp_path / "run", tmp_path / "alone"
    ranks = Ranks(text, whole, num_ranks=2)
    assert ranks.wait() == [0, 0], ranks.stderr()

    marker = tmp_path / "in a step"
    faults = {0: [], 1: [("pause_in", "step", str(marker), 60.0, 9)]}
    ranks = Ranks(text, run_dir, num_ranks=2, faults=faults)
    assert signal_at(ranks, marker, signal.SIGKILL, rank=1) == [1, -signal.SIGKILL], ranks.stderr()
    assert f"rank 1 (process {ranks.processes[1].pid}" in ranks.stderr()
    assert newest_checkpoint(run_dir / "checkpoints").step == 8

    shutil.copytree(run_dir, alone)
    ranks = Ranks(text, alone)
    assert ranks.wait() == [0], ranks.stderr()
    expected, losses = lines(whole), lines(alone)
    assert max(abs(losses[step]["loss"] - expected[step]["loss"]) for step in range(9, STEPS + 1)) < 2e-3

    ranks = Ranks(text, run_dir, num_ranks=2)
    assert ranks.wait() == [0, 0], ranks.stderr()
    assert_same_results(run_dir, whole, STEPS)
