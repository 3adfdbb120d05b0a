"""Tiny training runs for the tests: real processes, launcher variables, a few thousand weights."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from forked_ranks import ROOT, environment, launch

from training.checkpoint import open_checkpoint
from training.distributed import free_port

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


def start(command: list[str], num_ranks: int = 1, *, own_session: bool = False) -> list[subprocess.Popen]:
    """Start `python COMMAND` once a rank, as a launcher does, each in an interpreter of its own."""
    port = free_port()
    return [
        subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env=environment(rank, num_ranks, port),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=own_session,
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


def run(
    command: list[str], num_ranks: int = 1, cwd: Path = ROOT, **variables: str
) -> subprocess.CompletedProcess:
    """Run `python COMMAND` to the end in forked ranks, none of which may hang; the first rank's result."""
    with tempfile.TemporaryDirectory() as folder:
        ranks = launch(Path(folder), command, num_ranks, cwd=cwd, **variables)
        codes = ranks.wait(300)
        assert None not in codes, ranks.stderr()
        return subprocess.CompletedProcess(command, codes[0], ranks.stdout(), ranks.stderr())


def lines(run_dir: Path, key: str = "loss", file: str = "metrics.jsonl") -> dict[int, dict]:
    """Step to line of the run's metrics or samples, of the lines that have `key`."""
    rows = [json.loads(line) for line in (run_dir / file).read_text().splitlines()]
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
