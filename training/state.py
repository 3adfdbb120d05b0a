"""Where a run stands: what a resume needs beside weights and moments (a checkpoint's state.json)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from training.checkpoint import Checkpoint, CheckpointError


@dataclass(slots=True)
class RunState:
    """Counts and positions of a run.

    Attributes:
        step: optimizer steps tried; the next step's number.
        num_updates: those that were not skipped.
        skipped_in_row: skipped steps since the last update.
        passed_over_batches: batches left out after loss spikes; step s trains on batch s + that.
        recent_losses: what the next loss is compared with (see training/spikes.py).
    """

    micro_batch_size: int
    run_id: str
    step: int = 0
    tokens: int = 0
    num_updates: int = 0
    skipped_in_row: int = 0
    passed_over_batches: int = 0
    recent_losses: list[float] = field(default_factory=list)

    @property
    def data_step(self) -> int:
        """The next step's place in the order of the data (`TrainLoader.batch`)."""
        return self.step + self.passed_over_batches


def saved_tokens(checkpoint: Checkpoint) -> int:
    """The tokens that a checkpoint was trained on.

    Raises:
        CheckpointError: it doesn't say.
    """
    tokens = checkpoint.state().get("tokens")
    if type(tokens) is not int or tokens < 0:
        raise CheckpointError(f"{checkpoint.folder / 'state.json'}: tokens is {str(tokens)[:40]!r}.")
    return tokens


def saved_state(checkpoint: Checkpoint) -> RunState:
    """The state of a checkpoint.

    Raises:
        CheckpointError: a value is missing, unknown or of another kind.
    """
    values = checkpoint.state()
    where = checkpoint.folder / "state.json"
    for name, value in values.items():
        if name == "run_id":
            right = isinstance(value, str) and len(value) <= 64
        elif name == "recent_losses":
            right = isinstance(value, list) and all(
                type(x) in (int, float) and math.isfinite(x) for x in value
            )
        else:
            right = type(value) is int and 0 <= value < 2**63
        if not right:
            raise CheckpointError(f"{where}: {name[:40]} is {str(value)[:40]!r}, which can't be.")
    try:
        state = RunState(**values)
    except TypeError as error:
        raise CheckpointError(f"{where}: {error}") from None
    if state.step != checkpoint.step or state.micro_batch_size < 1:
        raise CheckpointError(f"{where} does not fit its checkpoint, that of step {checkpoint.step}.")
    return state
