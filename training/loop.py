"""The training loop: settings in, a run folder out.

`train` prepares (folder, data, engine, checkpoint), hands over to `Trainer`, and always cleans up. Each
optimizer step is a pure function of its number: data order, learning rate and dropout seeds come from it,
so a run that stops and resumes is the run that never stopped.
"""

from __future__ import annotations

import json
import platform
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from data.files import explain_write_errors
from data.loader import TrainLoader, prefetch
from data.prepare import PreparedData, prepare
from kernels.lightning_attention import default_backend
from models.generation import SamplingConfig, generate
from models.transnormer import TransNormer
from training import distributed
from training.checkpoint import (
    Checkpoint,
    CheckpointError,
    list_checkpoints,
    newest_checkpoint,
    open_checkpoint,
    remove_old,
    save_checkpoint,
)
from training.config import TrainConfig, check_resumable, load_saved_config, save_config
from training.distributed import World
from training.engine import Engine, StepResult
from training.errors import EXIT_PREEMPTED, SettingError
from training.evaluation import documents_of, evaluate
from training.interrupt import Interrupt
from training.memory import resolve_micro_batch
from training.metrics import Console, MetricsFile, WandbRun, peak_flops, peak_memory_gib
from training.optimizer import lr_factor
from training.report import write_report
from training.run_folder import RunFolder
from training.weights import check_weights, load_initial_weights

NON_FINITE_EXIT = 1


def train(config: TrainConfig) -> int:
    """Run or resume the training that `config` describes, on this rank; returns the exit code.

    Raises:
        SettingError, DataError: something the user can mend; nothing has been overwritten.
    """
    distributed.check_launcher()
    folder = RunFolder(config.run_dir)
    interrupt = Interrupt()
    world = distributed.start(config.engine.timeout_minutes)
    try:
        _enter_folder(folder, config, world)
        return _train(config, folder, world, interrupt)
    finally:
        folder.unlock()
        interrupt.close()
        distributed.stop()


def _enter_folder(folder: RunFolder, config: TrainConfig, world: World) -> None:
    """Lock and prepare the run folder on the first rank; a refusal reaches every rank."""
    problem = None
    if world.is_first:
        try:
            folder.lock()
            folder.prepare(config.resume, config.overwrite)
        except ValueError as error:
            problem = str(error)
    problem = world.from_first(problem)
    if problem:
        raise SettingError(problem)


def _train(config: TrainConfig, folder: RunFolder, world: World, interrupt: Interrupt) -> int:
    log = _printer(world)
    _check_backend(config, world)
    data = prepare(config.data, config.tokenizer, log=log)
    checkpoint = _find_checkpoint(config, folder, world, log)
    config = _settle(config, data, checkpoint)
    state = _initial_state(config, data, checkpoint, world)
    if state.step >= config.max_steps:
        log(f"{folder.path}: finished at step {state.step}; raise max_steps to train on.")
        return 0
    sequences = config.sequences_per_step // world.size
    accumulation_steps = sequences // state.micro_batch_size
    model = TransNormer(config.model, config.seed)
    if checkpoint is not None:
        check_weights(model, checkpoint.shapes, checkpoint.folder)
    elif config.init_from:
        load_initial_weights(model, config.init_from, data.tokenizer)
    engine = Engine(
        model,
        config,
        world,
        accumulation_steps=accumulation_steps,
        micro_batch_size=state.micro_batch_size,
    )
    if checkpoint is not None:
        engine.load(checkpoint.read, state.num_updates)
    if world.is_first:
        with explain_write_errors(folder.path):
            save_config(config, folder.config)
    trainer = Trainer(config, folder, world, interrupt, data, engine, state)
    try:
        return trainer.run()
    finally:
        trainer.close()
        engine.close()


def _printer(world: World):
    def log(text: str) -> None:
        if world.is_first:
            print(text, file=sys.stderr, flush=True)

    return log


def _find_checkpoint(config: TrainConfig, folder: RunFolder, world: World, log) -> Checkpoint | None:
    """The newest valid checkpoint, verified once on the first rank and opened by the others."""
    chosen = None
    if world.is_first and config.resume != "never":
        found = newest_checkpoint(folder.checkpoints, log)
        chosen = found.folder if found else None
    chosen = world.from_first(chosen)
    if chosen is None:
        if config.resume == "must" or (config.resume == "auto" and list_checkpoints(folder.checkpoints)):
            raise CheckpointError(f"{folder.checkpoints} holds no valid checkpoint to resume from.")
        return None
    return open_checkpoint(chosen, verify=False)


def _check_backend(config: TrainConfig, world: World) -> None:
    """Refuse a kernel that this rank's device can't run, before data and model are made."""
    if config.model.backend == "triton" and world.device.type != "cuda":
        raise SettingError(
            "model.backend=triton needs a CUDA device and there is none: use model.backend=auto."
        )


def _settle(config: TrainConfig, data: PreparedData, checkpoint: Checkpoint | None) -> TrainConfig:
    """Fill in what the settings leave open, from the run that is resumed or from the data.

    Raises:
        SettingError: a setting, the data or the tokenizer differs from the resumed run's.
    """
    total_steps = config.schedule.total_steps
    vocab_size = config.model.vocab_size
    if checkpoint is not None:
        saved = load_saved_config(checkpoint.folder / "config.yaml")
        check_resumable(config, saved, checkpoint.folder)
        total_steps = total_steps or saved["schedule"]["total_steps"]
        vocab_size = vocab_size or saved["model"]["vocab_size"]
        for key, value in (("tokenizer", data.tokenizer.fingerprint), ("data", data.fingerprint)):
            if checkpoint.manifest[f"{key}_fingerprint"] != value:
                raise SettingError(
                    f"{checkpoint.folder}: the {key} has changed since this run was started. "
                    "Restore it, or start another run_dir (init_from= takes this run's weights)."
                )
    vocab_size = vocab_size or data.tokenizer.vocab_size
    if vocab_size < data.tokenizer.vocab_size:
        raise SettingError(
            f"model.vocab_size={vocab_size} is smaller than the tokenizer's {data.tokenizer.vocab_size}."
        )
    return replace(
        config,
        schedule=replace(config.schedule, total_steps=total_steps or config.max_steps),
        model=replace(config.model, vocab_size=vocab_size),
    )


@dataclass(slots=True)
class RunState:
    """Where a run stands: everything a resume needs beside weights and moments (state.json).

    Attributes:
        step: optimizer steps tried; the next step's number.
        num_updates: those that were not skipped.
        skipped_in_row: skipped steps since the last update.
    """

    step: int
    tokens: int
    num_updates: int
    skipped_in_row: int
    micro_batch_size: int
    run_id: str


def _initial_state(
    config: TrainConfig, data: PreparedData, checkpoint: Checkpoint | None, world: World
) -> RunState:
    saved = checkpoint.state() if checkpoint is not None else None
    wish = saved["micro_batch_size"] if saved else None
    micro_batch_size = resolve_micro_batch(config, world.size, world.device, wish)
    if saved is None:
        return RunState(0, 0, 0, 0, micro_batch_size, world.from_first(uuid.uuid4().hex[:12]))
    try:
        return RunState(**saved | {"micro_batch_size": micro_batch_size})
    except TypeError as error:
        raise CheckpointError(f"{checkpoint.folder / 'state.json'}: {error}") from None


class Trainer:
    """One run from its current step to `max_steps`."""

    def __init__(
        self,
        config: TrainConfig,
        folder: RunFolder,
        world: World,
        interrupt: Interrupt,
        data: PreparedData,
        engine: Engine,
        state: RunState,
    ) -> None:
        self.config, self.folder, self.world, self.interrupt = config, folder, world, interrupt
        self.data, self.engine, self.state = data, engine, state
        self.loader = TrainLoader(
            data.train, config.seq_len, config.sequences_per_step, config.seed, config.data.isolate_documents
        )
        self.valid_documents = documents_of(data.valid, data.tokenizer, config.eval_tokens)
        self.flops_per_token = config.model.flops_per_token(config.seq_len)
        peak = peak_flops(world.device)
        self.peak_flops = peak * world.size if peak else None
        self.saved_step = state.step
        self.timed_steps, self.timed_seconds = 0, 0.0
        first = world.is_first
        self.metrics = MetricsFile(folder.metrics, state.step) if first else None
        self.console = Console(folder.log if first else None, config.max_steps, state.step)
        self.wandb = WandbRun(config, state.run_id) if first and config.wandb.enabled else None
        self._drop_later_samples()
        self._introduce()

    def run(self) -> int:
        """Train; returns the exit code."""
        config, state = self.config, self.state
        with prefetch(self._steps(), depth=2) as steps:
            for batches, num_targets in steps:
                if self.world.any(self.interrupt.requested):
                    return self._preempt()
                result = self._step(batches, num_targets)
                if state.skipped_in_row >= config.max_skipped_steps:
                    self.console.say(
                        f"stopping: {state.skipped_in_row} steps in a row had a gradient that is not finite. "
                        f"The last checkpoint is that of step {self.saved_step}."
                    )
                    return NON_FINITE_EXIT
                last = state.step == config.max_steps
                if last or state.step == 1 or _due(state.step, config.log_every):
                    self._log(result)
                if last or _due(state.step, config.eval_every):
                    self._evaluate()
                if _due(state.step, config.sample_every) or (last and config.sample_every):
                    self._sample()
                if last or _due(state.step, config.save_every):
                    self._save()
        if self.world.is_first:
            write_report(self.folder)
            self.console.say(f"done: {self.folder.report}")
        return 0

    def _steps(self) -> Iterator[tuple[list, int]]:
        """For each step to come, this rank's micro-batches and the scored tokens over all ranks."""
        micro_batch_size, world = self.state.micro_batch_size, self.world
        for step in range(self.state.step, self.config.max_steps):
            batches = [
                self.loader.batch(step, world.rank, world.size, micro_step, micro_batch_size)
                for micro_step in range(self.engine.accumulation_steps)
            ]
            yield batches, self.loader.num_targets(step)

    def _step(self, batches: list, num_targets: int) -> StepResult:
        state, config = self.state, self.config
        torch.manual_seed((config.seed * 1_000_003 + state.step) * 65_537 + self.world.rank)
        start = time.perf_counter()
        lr = config.optim.lr * lr_factor(config.schedule, state.step)
        result = self.engine.train_step(batches, num_targets, lr)
        self.timed_seconds += time.perf_counter() - start
        self.timed_steps += 1
        state.step += 1
        state.tokens += config.batch_tokens
        state.num_updates = self.engine.num_steps
        state.skipped_in_row = state.skipped_in_row + 1 if result.skipped else 0
        if result.skipped:
            self.console.say(f"step {state.step}: the gradient is not finite; weights are left as they were.")
            self._write({"step": state.step, "skipped": True})
        self.console.advance(state.step)
        return result

    def _log(self, result: StepResult) -> None:
        state, config = self.state, self.config
        step_seconds = self.timed_seconds / self.timed_steps
        speed = config.batch_tokens / step_seconds
        line = {
            "step": state.step,
            "tokens": state.tokens,
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "lr": config.optim.lr * lr_factor(config.schedule, state.step - 1),
            "tokens_per_second": speed,
            "mfu": speed * self.flops_per_token / self.peak_flops if self.peak_flops else None,
            "peak_memory_gib": max(self.world.gather(peak_memory_gib(self.world.device))),
            "step_ms": 1000 * step_seconds,
        }
        self.timed_steps, self.timed_seconds = 0, 0.0
        self._write(line)
        self.console.show(line, config.max_steps, (config.max_steps - state.step) * step_seconds)

    def _evaluate(self) -> None:
        if not self.valid_documents:
            return
        self.engine.model.eval()
        longest = max(len(document.ids) - 1 for document in self.valid_documents)
        result = evaluate(
            self.engine.deepspeed,
            self.valid_documents,
            min(self.config.seq_len, longest),
            self.world,
            batch_tokens=self.config.seq_len * self.state.micro_batch_size,
        )
        self._write(
            {
                "step": self.state.step,
                "tokens": self.state.tokens,
                "valid_loss": result.loss,
                "valid_perplexity": result.perplexity,
                "valid_bits_per_byte": result.bits_per_byte,
            }
        )
        self.console.say(
            f"step {self.state.step}: validation loss {result.loss:.4f}, perplexity {result.perplexity:.2f}, "
            f"{result.bits_per_byte:.4f} bits per byte"
        )

    def _sample(self) -> None:
        """Continue the sample prompt; every rank takes part, since ZeRO 3 gathers weights on all."""
        config, tokenizer = self.config, self.data.tokenizer
        self.engine.model.eval()
        prompt = [tokenizer.bos_id, *tokenizer.encode(config.sample_prompt).tolist()]
        ids = generate(
            self.engine.deepspeed,
            prompt,
            config.sample_tokens,
            SamplingConfig(seed=config.seed),
            self.world.device,
            tokenizer.eos_id,
        )
        text = tokenizer.decode(list(ids))
        if self.world.is_first:
            line = {"step": self.state.step, "prompt": config.sample_prompt, "text": text}
            with explain_write_errors(self.folder.samples), open(self.folder.samples, "a") as file:
                file.write(json.dumps(line) + "\n")
            self.console.say(f"step {self.state.step}: sample {config.sample_prompt + text!r}")

    def _save(self) -> None:
        if self.saved_step == self.state.step:
            return
        if self.metrics:
            self.metrics.sync()
        path = save_checkpoint(
            self.folder.checkpoints,
            step=self.state.step,
            fragments=self.engine.fragments_to_save(),
            world=self.world,
            write_files=self._write_checkpoint_files,
            state={name: getattr(self.state, name) for name in RunState.__slots__},
            facts=self._facts(),
        )
        self.saved_step = self.state.step
        if self.world.is_first:
            remove_old(self.folder.checkpoints, self.config.keep_checkpoints)
        self.console.say(f"step {self.state.step}: saved {path}")

    def _write_checkpoint_files(self, folder: Path) -> None:
        save_config(self.config, folder / "config.yaml")
        (folder / "tokenizer").mkdir()
        self.data.tokenizer.save(folder / "tokenizer")

    def _facts(self) -> dict[str, Any]:
        return {
            "world_size": self.world.size,
            "zero_stage": self.engine.stage,
            "precision": self.config.engine.precision,
            "tokenizer_fingerprint": self.data.tokenizer.fingerprint,
            "data_fingerprint": self.data.fingerprint,
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "deepspeed": version("deepspeed"),
            },
        }

    def _preempt(self) -> int:
        """Save and leave when asked to stop; the same command goes on from here."""
        self._save()
        reason = self.interrupt.reason or "another rank was asked to stop"
        self.console.say(f"stopped at step {self.state.step} ({reason}); run the same command to go on.")
        return EXIT_PREEMPTED

    def _drop_later_samples(self) -> None:
        """After a resume samples.jsonl holds none of the steps that are run again."""
        path = self.folder.samples
        if self.world.is_first and path.exists():
            lines = [line for line in path.read_text().splitlines() if line.strip()]
            kept = [line for line in lines if json.loads(line)["step"] <= self.state.step]
            path.write_text("".join(line + "\n" for line in kept))

    def _introduce(self) -> None:
        """Say what is about to run."""
        config, world = self.config, self.world
        model = config.model
        backend = model.backend if model.backend != "auto" else default_backend(world.device)
        attention = "softmax" if model.attention == "softmax" else f"{model.attention} (backend {backend})"
        verb = f"resuming at step {self.state.step}" if self.state.step else "starting"
        self.console.say(
            f"{verb}: {model.name}, {model.num_parameters():,} parameters, vocabulary {model.vocab_size}, "
            f"attention {attention}, {config.engine.precision}, ZeRO {self.engine.stage}"
        )
        self.console.say(
            f"data {self.data.name}: {self.data.train.tokens:,} training tokens in "
            f"{self.data.train.documents:,} documents"
        )
        self.console.say(
            f"seq_len {config.seq_len}, batch {config.batch_tokens:,} tokens = {world.size} rank(s) x "
            f"{self.engine.accumulation_steps} micro-steps x {self.state.micro_batch_size} sequences, "
            f"on {world.device.type}"
        )

    def _write(self, line: dict[str, Any]) -> None:
        if self.metrics:
            self.metrics.write(line)
        if self.wandb:
            self.wandb.write(line)

    def close(self) -> None:
        """Close files and the bar, whatever happened."""
        for part in (self.console, self.metrics, self.wandb):
            if part is not None:
                part.close()


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
