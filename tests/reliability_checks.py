"""How reliability tests start a tiny run, and what several of them check of its folder."""

import time
from collections.abc import Callable
from pathlib import Path

from forked_ranks import Ranks, launch
from training_helpers import assert_same_state, lines, settings

# no evaluation of its own: what a test needs it switches on
QUICK = ["save_every=1", "keep_checkpoints=3", "eval_tokens=200"]


def wait_for(condition: Callable[[], bool], timeout: float = 60) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def assert_same_results(run_dir: Path, whole: Path, last_step: int) -> None:
    """The same losses, gradient norms, validation losses, weights and moments, bit for bit."""
    for key in ("loss", "grad_norm", "valid_loss"):
        values = {step: line[key] for step, line in lines(run_dir, key).items()}
        assert values == {step: line[key] for step, line in lines(whole, key).items()}, key
    name = f"checkpoints/step_{last_step:08d}"
    assert_same_state(run_dir / name, whole / name)


def train(
    text: Path,
    run_dir: Path,
    *more: str,
    num_ranks: int = 1,
    faults=None,
    stderr: Path | None = None,
    **variables,
) -> Ranks:
    """Start a tiny run in run_dir; `stderr` is a folder for what the ranks write there."""
    command = ["train.py", *settings(text, run_dir, *QUICK, *more)]
    return launch(stderr or run_dir.parent / "stderr", command, num_ranks, faults, **variables)
