"""Tiny training runs for the tests: real processes, launcher variables, a few thousand weights."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
from pathlib import Path

import torch

from training.checkpoint import open_checkpoint

ROOT = Path(__file__).resolve().parent.parent

TINY = [
    "tokenizer=bytes",
    "model.num_layers=2",
    "model.hidden_size=32",
    "model.num_heads=2",
    "model.glu_size=48",
    "seq_len=32",
    "batch_tokens=256",
    "micro_batch_size=2",
    "optim.lr=0.003",
    "log_every=1",
    "eval_every=0",
    "sample_every=0",
    "save_every=0",
]


def write_text(folder: Path, num_documents: int = 40) -> Path:
    """A folder of small documents of made-up words, the same every time."""
    folder.mkdir(parents=True, exist_ok=True)
    random_words = random.Random(0)
    words = ["".join(random_words.choices("abcdefgh", k=random_words.randint(1, 6))) for _ in range(50)]
    for index in range(num_documents):
        text = " ".join(random_words.choices(words, k=random_words.randint(5, 60)))
        (folder / f"{index:03d}.txt").write_text(text)
    return folder


def settings(text: Path, run_dir: Path, *more: str) -> list[str]:
    """Arguments of a tiny run."""
    return [
        *TINY,
        "data=text",
        f"data.path={text}",
        f"data.cache_dir={text.parent / 'cache'}",
        "data.valid_fraction=0.1",
        f"run_dir={run_dir}",
        *more,
    ]


def environment(rank: int = 0, num_ranks: int = 1, port: int = 0) -> dict[str, str]:
    """What a launcher would set; nothing for a single process."""
    values = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TRITON_INTERPRET"):
        values.pop(name, None)
    if num_ranks > 1:
        values |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks)}
        values |= {"LOCAL_WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return values


def start(command: list[str], num_ranks: int = 1) -> list[subprocess.Popen]:
    """Start `python COMMAND` once a rank, as a launcher does."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [
        subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env=environment(rank, num_ranks, port),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(num_ranks)
    ]


def finish(processes: list[subprocess.Popen], timeout: float = 300) -> list[subprocess.CompletedProcess]:
    """Wait for all; kill what is left over."""
    results = []
    try:
        for process in processes:
            out, err = process.communicate(timeout=timeout)
            results.append(subprocess.CompletedProcess(process.args, process.returncode, out, err))
    finally:
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
    return results


def run(command: list[str], num_ranks: int = 1) -> subprocess.CompletedProcess:
    """Run to the end; the first rank's result."""
    return finish(start(command, num_ranks))[0]


def lines(run_dir: Path, key: str = "loss") -> dict[int, dict]:
    """Step to metrics line, of the lines that have `key`."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row for row in rows if key in row}


def weights_and_moments(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = open_checkpoint(folder)
    return {
        f"{kind}/{name}": checkpoint.read(name, kind, 0, torch.Size(shape).numel())
        for name, shape in checkpoint.shapes.items()
        for kind in ("param", "exp_avg", "exp_avg_sq")
    }


def assert_same_state(left: Path, right: Path) -> None:
    """Two checkpoints hold the same weights and moments, bit for bit."""
    first, second = weights_and_moments(left), weights_and_moments(right)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
