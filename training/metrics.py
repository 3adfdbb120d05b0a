"""What a run says: metrics.jsonl, train.log, a progress bar, and Weights & Biases if asked for.

metrics.jsonl is the record: one JSON object a line, floats at full precision, one line per logged step.
"""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from data.errors import DataError
from data.files import explain_write_errors, open_regular, write_atomically
from training.errors import SettingError
from training.gpus import find_gpu
from training.tables import duration
from training.train_config import TrainConfig

FILE_LIMIT_BYTES = 2**30  # of metrics.jsonl: three million lines
LINE_LIMIT_BYTES = 2**20
WANDB_FINISH_SECONDS = 10.0  # to upload what is left; a launcher kills 30 s after it asked to stop
LARGEST_NUMBER = 1e18  # nothing that a run counts or measures comes near


def peak_flops(device: torch.device) -> float | None:
    """Peak dense bf16 rate of the device in FLOP/s, or None where it is not on record."""
    if device.type != "cuda":
        return None
    gpu = find_gpu(torch.cuda.get_device_name(device))
    return gpu.peak_flops if gpu else None


def peak_memory_gib(device: torch.device) -> float:
    """Most memory this process has held so far, in GiB: of the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class MetricsFile:
    """metrics.jsonl or samples.jsonl, opened at a step: later lines of it are dropped (`drop_after`)."""

    def __init__(self, path: Path, step: int, passed_over_batches: int = 0) -> None:
        self.path = path
        self._file: Any = None
        self.drop_after(step, passed_over_batches)

    def write(self, values: dict[str, Any]) -> None:
        """Append one line; non-finite floats become null, since JSON has none."""
        line = {key: finite(value) for key, value in values.items()}
        with explain_write_errors(self.path):
            _append(self._file, json.dumps(line) + "\n")

    def drop_after(self, step: int, passed_over_batches: int = 0) -> None:
        """Take out what a later, lost part of the run had written: also of going back to this very step."""
        self.close()
        kept = (
            text
            for line, text in _whole_lines(self.path)
            if line["step"] <= step and not _passed_over(line) > passed_over_batches
        )
        with explain_write_errors(self.path):
            write_atomically(self.path, kept)
            self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 (open for the run)

    def sync(self) -> None:
        """Make all lines durable; called before a checkpoint refers to them."""
        with explain_write_errors(self.path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def _passed_over(line: dict[str, Any]) -> float:
    value = line.get("passed_over_batches", 0)
    return value if is_number(value) else 0


def _append(file: Any, text: str) -> None:
    """Write all of a line or none of it, unbuffered: closing the file does not try again."""
    content, size = text.encode(), os.fstat(file.fileno()).st_size
    try:
        while content:
            content = content[file.write(content) :]
    except OSError:
        file.truncate(size)
        raise


def last_step(path: Path, key: str) -> int:
    """The last step with a line that has `key`, or 0."""
    return max((line["step"] for line, _ in _whole_lines(path) if key in line), default=0)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole lines of metrics.jsonl or samples.jsonl; a line cut short by a crash is left out.

    Raises:
        DataError: a link, not a file, or larger than FILE_LIMIT_BYTES.
    """
    return [line for line, _ in _whole_lines(path)]


def is_number(value: Any) -> bool:
    """Whether a value of a line is a finite number of plausible size; the file may be anyone's."""
    return type(value) in (int, float) and abs(value) < LARGEST_NUMBER


def _whole_lines(path: Path) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Each line that is an object with a step, parsed and as it stands; streamed, as there may be many."""
    if not os.path.lexists(path):
        return
    with os.fdopen(open_regular(path), "rb") as file:
        if os.fstat(file.fileno()).st_size > FILE_LIMIT_BYTES:
            raise DataError(
                f"{path} is larger than {FILE_LIMIT_BYTES} bytes: it can't be a file of this kind"
            )
        while text := file.readline(LINE_LIMIT_BYTES):
            try:
                line = json.loads(text)
            except (ValueError, RecursionError):
                continue
            if isinstance(line, dict) and type(line.get("step")) is int:
                yield line, text.rstrip(b"\n") + b"\n"


def finite(value: Any) -> Any:
    """The value, with None for each float that is not finite."""
    if isinstance(value, list):
        return [finite(element) for element in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Console:
    """The first rank's output: a bar on a terminal, lines elsewhere, and train.log."""

    def __init__(self, log_path: Path | None, total_steps: int, first_step: int) -> None:
        self._log: Any = None
        if log_path:
            self._path = log_path
            with explain_write_errors(log_path):
                self._log = open(log_path, "ab", buffering=0)  # noqa: SIM115 (open for the run)
        self._bar = None
        if log_path and sys.stderr.isatty():
            self._bar = tqdm(
                total=total_steps, initial=first_step, unit="step", dynamic_ncols=True, leave=True
            )

    def say(self, text: str) -> None:
        """One line to the screen and to train.log."""
        if self._log is None:
            return
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)
        self.log(text)

    def log(self, text: str) -> None:
        """One line to train.log alone."""
        if self._log is not None:
            with explain_write_errors(self._path):
                _append(self._log, f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def advance(self, step: int) -> None:
        """Move the bar to `step`."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def show(self, line: dict[str, Any], total_steps: int, eta_seconds: float) -> None:
        """A logged step: a line of train.log, on a terminal shown in the bar's tail."""
        mfu = f"  MFU {line['mfu']:.1%}" if line["mfu"] is not None else ""
        speed = f"{line['tokens_per_second']:,.0f} tokens/s{mfu}"
        text = (
            f"step {line['step']}/{total_steps}  loss {line['loss']:.4f}  grad norm {line['grad_norm']:.3f}  "
            f"lr {line['lr']:.2e}  {speed}  {line['peak_memory_gib']:.1f} GiB  "
            f"{duration(eta_seconds)} left"
        )
        if self._bar is None:
            self.say(text)
        else:
            self._bar.set_postfix_str(f"loss {line['loss']:.4f}  {speed}")
            self.log(text)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._log is not None:
            self._log.close()


class WandbRun:
    """Weights & Biases: the same lines as metrics.jsonl, in one run across resumes.

    Steps that were done again, after a resume or a roll-back, are there twice: what is sent stays.
    WANDB_MODE says whether it is online; without it, a key in the environment does. What fails later than
    the start is said once and doesn't stop the run: metrics.jsonl is the record.

    Raises:
        SettingError: the service can't be reached, or refuses.
    """

    def __init__(self, config: TrainConfig, run_id: str) -> None:
        import wandb

        self._has_failed = False
        mode: Any = os.environ.get("WANDB_MODE") or (
            "online" if os.environ.get("WANDB_API_KEY") else "offline"
        )
        try:
            self._run = wandb.init(
                project=config.wandb.project,
                name=config.wandb.name or Path(config.run_dir).name,
                id=run_id,
                resume="allow",
                mode=mode,
                dir=config.run_dir,
                config=asdict(config),
                settings=wandb.Settings(finish_timeout=WANDB_FINISH_SECONDS),
            )
            self._run.define_metric("*", step_metric="step")
        except wandb.errors.Error as error:
            reason = str(error).splitlines()[0][:200]
            raise SettingError(
                f"wandb.enabled=true: {reason}. Set WANDB_MODE=offline, or wandb.enabled=false."
            ) from None

    def write(self, values: dict[str, Any]) -> None:
        """Send a line, unless sending has failed before."""
        if not self._has_failed:
            self._try(lambda: self._run.log(values))  # with step=, it would drop what a roll-back does again

    def close(self) -> None:
        """Send what is left, within WANDB_FINISH_SECONDS."""
        self._try(self._run.finish)

    def _try(self, work: Callable[[], Any]) -> None:
        try:
            work()
        except Exception as error:  # whatever its service or the network raises
            self._has_failed = True
            reason = f"{type(error).__name__}: {str(error)[:200]}"
            print(f"Weights & Biases failed ({reason}): going on without it.", file=sys.stderr, flush=True)
