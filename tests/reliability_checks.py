"""What several reliability tests check of a run's folder."""

import time
from collections.abc import Callable
from pathlib import Path

from training_helpers import assert_same_state, lines


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
