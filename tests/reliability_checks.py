"""What several reliability tests check of a run's folder."""

import time
from collections.abc import Callable
from pathlib import Path

import torch
from training_helpers import lines

from training.checkpoint import open_checkpoint


def wait_for(condition: Callable[[], bool], timeout: float = 60) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def weights_and_moments(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = open_checkpoint(folder)
    return {
        f"{kind}/{name}": checkpoint.read(name, kind, 0, torch.Size(shape).numel())
        for name, shape in checkpoint.shapes.items()
        for kind in ("param", "exp_avg", "exp_avg_sq")
    }


def assert_same_state(run_dir: Path, whole: Path, last_step: int) -> None:
    """The same losses, gradient norms, validation losses, weights and moments, bit for bit."""
    for key in ("loss", "grad_norm", "valid_loss"):
        values = {step: line[key] for step, line in lines(run_dir, key).items()}
        assert values == {step: line[key] for step, line in lines(whole, key).items()}, key
    name = f"checkpoints/step_{last_step:08d}"
    first, second = weights_and_moments(run_dir / name), weights_and_moments(whole / name)
    assert first.keys() == second.keys()
    for key, tensor in first.items():
        assert torch.equal(tensor, second[key]), key
