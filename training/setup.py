"""From settings to what a run trains with on this rank: data, checkpoint, state, model, engine."""

from __future__ import annotations

import math
import shutil
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil

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
from training.memory import state_parts
from training.metrics import last_step
from training.micro_batch import resolve_micro_batch
from training.optimizer import default_lr
from training.run_folder import RunFolder
from training.saved_config import check_resumable, load_saved_config
from training.state import RunState, saved_state
from training.train_config import TrainConfig
from training.weights import check_weights, load_initial_weights

Log = Callable[[str], None]


@dataclass(slots=True)
class Run:
    """A run that is ready to train; `resumed` says that its state came from a checkpoint."""

    config: TrainConfig
    folder: RunFolder
    world: World
    data: PreparedData
    loader: TrainLoader
    state: RunState
    engine: Engine
    resumed: bool
    seconds: dict[str, float]  # that each part of the set-up took


def set_up(config: TrainConfig, folder: RunFolder, world: World) -> Run | None:
    """Prepare the data, take up the newest valid checkpoint and build the engine; None for a finished run.

    Raises:
        SettingError: something the user can mend; nothing has been overwritten.
    """
    times = [time.perf_counter()]
    world.on_all(partial(_check_backend, config, world))
    if not world.is_first:  # the first rank's hashes are enough
        config = replace(config, data=replace(config.data, verify="quick"))
    checkpoint = find_checkpoint(config.resume, folder, world, world.log)
    saved = None
    if checkpoint is not None:  # before data is prepared that the run may not have
        saved = world.on_all(partial(_saved_settings, config, checkpoint))
    data = world.on_all(partial(prepare, config.data, config.tokenizer, log=world.log))
    times.append(time.perf_counter())
    if checkpoint is None and config.resume != "never" and world.on_first(folder.holds_run):
        world.log(f"{folder.path} holds a run without a checkpoint: it starts again, and its metrics with it")
    config = world.on_all(partial(_settle, config, data, checkpoint, saved, world.log))
    loader = world.on_all(partial(_make_loader, config, data))
    state = _initial_state(config, checkpoint, world)
    if state.step >= config.max_steps and world.on_first(lambda: _is_whole(config, folder, data, state.step)):
        world.log(f"{folder.path}: finished at step {state.step}; raise max_steps to train on.")
        return None
    world.on_first(lambda: _check_space(config, folder, state))
    world.on_all(partial(_check_memory, config, world))
    model = world.on_all(partial(_make_model, config, data, checkpoint))
    times.append(time.perf_counter())
    engine = Engine(
        model,
        config,
        world,
        accumulation_steps=config.sequences_per_step // world.size // state.micro_batch_size,
        micro_batch_size=state.micro_batch_size,
    )
    if checkpoint is not None:
        engine.load(checkpoint.read, state.num_updates)
    times.append(time.perf_counter())
    parts = zip(("data", "model", "engine"), times[:-1], times[1:], strict=True)
    seconds = {name: end - begin for name, begin, end in parts}
    return Run(config, folder, world, data, loader, state, engine, checkpoint is not None, seconds)


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


def _make_loader(config: TrainConfig, data: PreparedData) -> TrainLoader:
    return TrainLoader(
        data.train,
        config.seq_len,
        config.sequences_per_step,
        config.seed,
        config.data.isolate_documents,
        config.sequences_of_ramp,
    )


def _make_model(config: TrainConfig, data: PreparedData, checkpoint: Checkpoint | None) -> TransNormer:
    """The model with its first weights; those of a checkpoint that fits are loaded by the engine."""
    model = TransNormer(config.model, config.seed)
    if checkpoint is not None:
        check_weights(model, checkpoint.shapes, checkpoint.folder)
    elif config.init_from:
        load_initial_weights(model, config.init_from, data.tokenizer)
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


def _is_whole(config: TrainConfig, folder: RunFolder, data: PreparedData, step: int) -> bool:
    """Whether the last evaluation and sample have been made: a run can be stopped in them."""
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
