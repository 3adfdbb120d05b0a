"""From settings to what a run trains with on this rank: data, checkpoint, state, model, engine."""

from __future__ import annotations

import math
import platform
import shutil
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch

from data.loader import TrainLoader
from data.prepare import PreparedData, prepare
from models.transnormer import TransNormer
from training.checkpoint import (
    BYTES_PER_PARAMETER,
    Checkpoint,
    CheckpointError,
    list_checkpoints,
    newest_of,
    open_checkpoint,
)
from training.distributed import World
from training.engine import Engine
from training.errors import SettingError
from training.launching import commit
from training.memory import state_parts
from training.metrics import last_step
from training.micro_batch import resolve_micro_batch
from training.optimizer import default_lr
from training.run_folder import RunFolder
from training.saved_config import as_written, check_resumable, flatten, load_saved_config
from training.state import RunState, saved_state
from training.train_config import TrainConfig
from training.weights import check_weights, find_initial_model, load_initial_weights

Log = Callable[[str], None]

SETTINGS_OF_A_RANK = ("data.cache_dir", "data.workers")  # which hosts may have of their own


@dataclass(slots=True)
class Run:
    """A run that is ready to train.

    Attributes:
        resumed: its state came from a checkpoint.
        code: commit and versions of what runs.
        notes: what was said on the way, for train.log.
        seconds: that each part of the set-up took.
    """

    config: TrainConfig
    folder: RunFolder
    world: World
    data: PreparedData
    loader: TrainLoader
    state: RunState
    engine: Engine
    resumed: bool
    code: dict[str, str | None]
    notes: list[str]
    seconds: dict[str, float]


def set_up(config: TrainConfig, folder: RunFolder, world: World) -> Run | None:
    """Prepare the data, take up the newest valid checkpoint and build the engine; None for a finished run.

    Raises:
        SettingError: something the user can mend; nothing has been overwritten.
    """
    times = [time.perf_counter()]
    notes: list[str] = []

    def log(text: str) -> None:
        notes.append(text)
        world.log(text)

    _check_ranks_agree(world, _shared_settings(config))
    world.on_all(partial(_check_backend, config, world))
    if not world.is_first:  # the first rank's hashes are enough
        config = replace(config, data=replace(config.data, verify="quick"))
    checkpoint = find_checkpoint(config.resume, folder, world, log)
    saved = None
    if checkpoint is not None:  # before data is prepared that the run may not have
        saved = world.on_all(partial(_saved_settings, config, checkpoint))
    elif config.resume != "never" and world.on_first(lambda: _starts_again(folder)):
        log(f"{folder.path} holds a run without a checkpoint: it starts again, and its metrics with it")
    initial = None
    if checkpoint is None and config.init_from:
        initial = world.on_all(partial(find_initial_model, config.init_from, config.tokenizer))
    data = world.on_all(partial(prepare, config.data, config.tokenizer, log=world.log))
    times.append(time.perf_counter())
    config = world.on_all(partial(_settle, config, data, checkpoint, saved, log))
    found = {"data": data.fingerprint, "tokenizer": data.tokenizer.fingerprint}
    _check_ranks_agree(world, found | {"engine.precision": config.engine.precision})
    loader = world.on_all(partial(_make_loader, config, data))
    state = _initial_state(config, checkpoint, world)
    if world.on_first(lambda: _is_done(config, folder, data, state.step)):
        world.log(f"{folder.path}: finished at step {state.step}; raise max_steps to train on.")
        return None
    world.on_first(lambda: _check_space(config, folder, state))
    world.on_all(partial(_check_memory, config, world))
    model = world.on_all(partial(_make_model, config, data, checkpoint, initial))
    times.append(time.perf_counter())
    engine = Engine(
        model,
        config,
        world,
        accumulation_steps=config.sequences_per_step // world.size // state.micro_batch_size,
        micro_batch_size=state.micro_batch_size,
    )
    code = world.on_first(_running_code)
    if checkpoint is not None:
        _compare_code(checkpoint, code, log)
        engine.load(checkpoint.read, state.num_updates)
    times.append(time.perf_counter())
    parts = zip(("data", "model", "engine"), times[:-1], times[1:], strict=True)
    seconds = {name: end - begin for name, begin, end in parts}
    resumed = checkpoint is not None
    return Run(config, folder, world, data, loader, state, engine, resumed, code, notes, seconds)


def _shared_settings(config: TrainConfig) -> dict[str, Any]:
    """The settings that all ranks of a run must have in common."""
    return {key: value for key, value in flatten(config).items() if key not in SETTINGS_OF_A_RANK}


def _check_ranks_agree(world: World, values: dict[str, Any]) -> None:
    """Refuse ranks that would train together on different things: none of them would notice.

    Raises:
        SettingError: names the first rank that differs from rank 0, and what differs.
    """
    first, *others = world.gather(values)
    for rank, other in enumerate(others, start=1):
        differing = [key for key in first if other.get(key) != first[key]]
        if differing:
            listed = "; ".join(
                f"{key}={as_written(other.get(key))} (rank 0: {as_written(first[key])})" for key in differing
            )[:500]
            raise SettingError(
                f"rank {rank} differs from rank 0: {listed}. All ranks need the same settings, data and "
                "tokenizer: start them by one command from one checkout, on text that is complete everywhere."
            )


def _starts_again(folder: RunFolder) -> bool:
    """Whether there is a run that was ended before its first checkpoint, to be started again.

    Raises:
        CheckpointError: it had checkpoints, which are elsewhere now; starting again would delete its record.
    """
    if not folder.holds_run():
        return False
    step = last_step(folder.metrics, "loss")
    saved = load_saved_config(folder.config) if folder.config.exists() else {}
    save_every, max_steps = saved.get("save_every"), saved.get("max_steps")
    had_one = type(save_every) is int and 0 < save_every < step
    if had_one or (step == max_steps and folder.report.exists()):
        raise CheckpointError(
            f"{folder.checkpoints} holds no checkpoint, but the run was saved before: its metrics go to step "
            f"{step}. Bring its checkpoints back, choose another run_dir, or delete the run with "
            "resume=never overwrite=true."
        )
    return True


def _check_backend(config: TrainConfig, world: World) -> None:
    """Refuse a kernel that this rank's device can't run, before data and model are made."""
    if config.model.backend == "triton" and world.device.type != "cuda":
        raise SettingError(
            "model.backend=triton needs a CUDA device and there is none: use model.backend=auto."
        )


def find_checkpoint(resume: str, folder: RunFolder, world: World, log: Log) -> Checkpoint | None:
    """The run's newest checkpoint that is valid on all ranks, which verify its files together.

    Raises:
        CheckpointError: there are checkpoints, but none is valid.
    """
    if resume == "never":
        return None

    def opened(path: Path) -> Checkpoint:
        return world.on_all(partial(open_checkpoint, path, share=(world.rank, world.size)))

    try:
        newest = newest_of(world.from_first(list_checkpoints(folder.checkpoints)), log, opened)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error} Restore one, choose another run_dir, or start anew with resume=never overwrite=true."
        ) from None
    if newest is None and resume == "must":
        raise CheckpointError(f"{folder.checkpoints} holds no checkpoint to resume from.")
    return newest


def _saved_settings(config: TrainConfig, checkpoint: Checkpoint) -> dict[str, Any]:
    """The settings of the run that is resumed.

    Raises:
        SettingError: lists the new ones that differ where they may not.
    """
    saved = load_saved_config(checkpoint.folder / "config.yaml")
    if saved.get("micro_batch_size") == "auto":
        saved["micro_batch_size"] = saved_state(checkpoint).micro_batch_size
    check_resumable(config, saved, checkpoint.folder)
    return saved


def _settle(
    config: TrainConfig,
    data: PreparedData,
    checkpoint: Checkpoint | None,
    saved: dict[str, Any] | None,
    log: Log,
) -> TrainConfig:
    """Fill in what the settings leave open: by the resumed run, the data, the model's width and the machine.

    Raises:
        SettingError: the data or the tokenizer differs from the resumed run's.
    """
    total_steps = config.schedule.total_steps
    vocab_size = config.model.vocab_size
    lr = config.optim.lr
    if checkpoint is not None and saved is not None:
        _check_data(config, data, checkpoint, log)
        total_steps = total_steps or saved["schedule"]["total_steps"]
        vocab_size = vocab_size or saved["model"]["vocab_size"]
        lr = lr or saved["optim"]["lr"]
        config = replace(config, init_from=saved.get("init_from"))
        is_rate = type(lr) is float and math.isfinite(lr)
        if type(total_steps) is not int or type(vocab_size) is not int or not is_rate:
            raise CheckpointError(
                f"{checkpoint.folder / 'config.yaml'}: total_steps is {str(total_steps)[:40]}, "
                f"vocab_size {str(vocab_size)[:40]}, lr {str(lr)[:40]}."
            )
        if total_steps <= checkpoint.step < config.max_steps:
            log(f"the schedule ended at step {total_steps}: the learning rate stays what it was there")
    vocab_size = vocab_size or data.tokenizer.vocab_size
    if vocab_size < data.tokenizer.vocab_size:
        raise SettingError(
            f"model.vocab_size={vocab_size} is smaller than the tokenizer's {data.tokenizer.vocab_size}."
        )
    return replace(
        config,
        schedule=replace(config.schedule, total_steps=total_steps or config.max_steps),
        model=replace(config.model, vocab_size=vocab_size),
        optim=replace(config.optim, lr=lr or default_lr(config.optim.name, config.model.hidden_size)),
        engine=config.engine.with_precision(),
    )


def _check_data(config: TrainConfig, data: PreparedData, checkpoint: Checkpoint, log: Log) -> None:
    """Refuse other data or another tokenizer than the run was started with, unless that is allowed."""
    for key, value in (("tokenizer", data.tokenizer.fingerprint), ("data", data.fingerprint)):
        if checkpoint.manifest.get(f"{key}_fingerprint") == value:
            continue
        if not config.allow_changed_data:
            raise SettingError(
                f"{checkpoint.folder}: the {key} has changed since this run was started. Restore it, set "
                "allow_changed_data=true, or start another run_dir (init_from= takes this run's weights)."
            )
        log(f"the {key} has changed since this run was started; continuing, as allow_changed_data=true says")


def _running_code() -> dict[str, str | None]:
    return {
        "commit": commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "deepspeed": version("deepspeed"),
    }


def _compare_code(checkpoint: Checkpoint, code: dict[str, str | None], log: Log) -> None:
    """Say what has changed since the checkpoint was saved: the next steps may be rounded otherwise."""
    saved = checkpoint.manifest.get("versions")
    saved = saved if isinstance(saved, dict) else {}
    changed = [
        f"{name} {str(saved.get(name))[:40]}, now {now}"
        for name, now in code.items()
        if saved.get(name) != now
    ]
    if changed:
        log(f"{checkpoint.folder} was saved by other code: {'; '.join(changed)}")


def _make_loader(config: TrainConfig, data: PreparedData) -> TrainLoader:
    return TrainLoader(
        data.train,
        config.seq_len,
        config.sequences_per_step,
        config.seed,
        config.data.isolate_documents,
        config.sequences_of_ramp,
    )


def _make_model(
    config: TrainConfig, data: PreparedData, checkpoint: Checkpoint | None, initial: Path | None
) -> TransNormer:
    """The model with its first weights; those of a checkpoint that fits are loaded by the engine."""
    model = TransNormer(config.model, config.seed)
    if checkpoint is not None:
        check_weights(model, checkpoint.shapes, checkpoint.folder)
    elif initial is not None:
        load_initial_weights(model, initial, data.tokenizer)
    return model


def _initial_state(config: TrainConfig, checkpoint: Checkpoint | None, world: World) -> RunState:
    saved = saved_state(checkpoint) if checkpoint is not None else None
    previous = saved.micro_batch_size if saved else None
    data_step = saved.data_step if saved else 0
    resolve = partial(resolve_micro_batch, config, world.size, world.device, previous, data_step)
    micro_batch_size = min(world.gather(world.on_all(resolve)))  # GPUs may differ
    if saved is None:
        return RunState(micro_batch_size, world.from_first(uuid.uuid4().hex[:12]))
    return replace(saved, micro_batch_size=micro_batch_size)


def _is_done(config: TrainConfig, folder: RunFolder, data: PreparedData, step: int) -> bool:
    """Whether all steps have been taken and the last evaluation and sample made: a run can stop in them."""
    if step != config.max_steps:
        return step > config.max_steps
    is_evaluated = not data.valid.documents or last_step(folder.metrics, "valid_loss") >= step
    return is_evaluated and (not config.sample_every or last_step(folder.samples, "text") >= step)


def _check_space(config: TrainConfig, folder: RunFolder, state: RunState) -> None:
    """Refuse to start where there is no room for the checkpoints that will exist at the same time.

    Raises:
        SettingError: how much is free and how much is needed.
    """
    old = list_checkpoints(folder.checkpoints)
    replaced = old if config.resume == "never" else []  # which leave before any is written
    freed = sum(file.stat().st_size for path in replaced for file in path.rglob("*") if file.is_file())
    kept = len(old) - len(replaced)
    coming = 1 + (config.max_steps - state.step) // config.save_every if config.save_every else 1
    most = min(config.keep_checkpoints + 1, kept + coming)  # one more while the newest is written
    size = BYTES_PER_PARAMETER * config.model.num_parameters()
    needed, free = max(most - kept, 1) * size, shutil.disk_usage(folder.path).free + freed
    if free < needed:
        raise SettingError(
            f"run_dir={folder.path}: {_format_bytes(free)} are free, and its checkpoints need "
            f"{_format_bytes(needed)} more ({max(most - kept, 1)} of {_format_bytes(size)}). "
            "Free some space, lower keep_checkpoints, or choose another run_dir."
        )


def _check_memory(config: TrainConfig, world: World) -> None:
    """Refuse a model on a CPU whose memory can't hold it: the system would kill the process in silence.

    Raises:
        SettingError: how much is free and how much is needed at least.
    """
    if world.device.type != "cpu":
        return
    parts = state_parts(config, world.size)
    needed = sum(size for name, size in parts.items() if name != "communication buffers")
    free = psutil.virtual_memory().available + psutil.swap_memory().free
    if free < needed:
        raise SettingError(
            f"out of memory: model={config.model.name} needs {_format_bytes(int(needed))} for its weights, "
            f"gradients and optimizer alone, and {_format_bytes(free)} are free. Choose a smaller model, or "
            "train on a GPU (python -m scripts.plan says what fits)."
        )


def _format_bytes(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.2f} MiB"
