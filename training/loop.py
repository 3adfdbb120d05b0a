"""The training loop: settings in, a run folder out.

`train` sets up (folder, data, engine, checkpoint), hands over to `Trainer`, and always cleans up. Each
optimizer step is a pure function of its number: data order, learning rate and dropout seeds come from it,
so a run that stops and resumes is the run that never stopped.

Ranks act together: a request to stop, and an error of one rank, take effect where all of them ask for it
(`_agree`), so that no rank waits in a collective for another that has left.
"""

from __future__ import annotations

import os
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from data.errors import DataError
from data.files import explain_write_errors
from data.loader import Batch, Prefetcher, shorten
from data.tokenizer import decode_with
from kernels.lightning_attention import default_backend
from models.generation import SamplingConfig, generate
from models.llama import softmax_backend
from training.checkpoint import NonFiniteError, remove_old, save_checkpoint
from training.distributed import World, is_first, is_restart, process_group
from training.engine import Fragment, StepResult
from training.errors import EXIT_FAILED, EXIT_PREEMPTED, EXIT_USER_ERROR, SettingError
from training.evaluation import describe_unknown, documents_of, evaluate
from training.interrupt import Interrupt, StopRequested
from training.metrics import Console, MetricsFile, WandbRun, last_step, peak_flops, peak_memory_gib
from training.optimizer import learning_rate, ramped
from training.out_of_memory import is_out_of_memory, ways_to_fit
from training.report import write_run_report
from training.run_folder import RunFolder
from training.saved_config import save_config
from training.setup import Run, find_checkpoint, set_up
from training.spikes import remember, spike_limit
from training.state import saved_state
from training.train_config import TrainConfig
from training.watchdog import Watchdog

DATA_POLL_SECONDS = 0.5
MAX_ROLLBACKS = 3  # from one checkpoint: a spike that comes back with other batches is not due to a bad batch


class Stopped(Exception):
    """All ranks have agreed to stop here."""


def train(config: TrainConfig, interrupt: Interrupt) -> int:
    """Run or resume the training that `config` describes, on this rank; returns the exit code.

    `interrupt` says when to stop, and is closed.

    Raises:
        SettingError: something the user can mend; nothing has been overwritten.
    """
    folder = RunFolder(config.run_dir)
    if is_restart() and config.resume == "never":
        config = replace(config, resume="auto")
        if is_first():
            print("started again by torchrun: going on, in spite of resume=never", file=sys.stderr)
    try:
        with ExitStack() as stack:
            with interrupt.at_once():
                group = process_group(config.engine.timeout_minutes, config.engine.join_seconds)
                world = stack.enter_context(group)
                world.on_first(lambda: folder.enter(config.resume, config.overwrite))
                start_id = world.from_first(uuid.uuid4().hex)
            watchdog = Watchdog(folder, world, interrupt, start_id, config.engine.watchdog_seconds)
            return _train(config, folder, world, interrupt, stack.enter_context(watchdog))
    except StopRequested:
        if is_first():
            print(f"stopped ({interrupt.reason}); {_how_to_go_on(config)}.", file=sys.stderr)
        return EXIT_PREEMPTED
    except KeyboardInterrupt:
        if is_first():
            print(
                f"stopped at once (SIGINT twice), saving nothing; {_how_to_go_on(config)} from the last "
                "checkpoint.",
                file=sys.stderr,
            )
        return EXIT_FAILED
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        print(f"error: {_out_of_memory(error, config, folder)}", file=sys.stderr)
        return EXIT_USER_ERROR
    finally:
        folder.unlock()
        interrupt.close()


def _how_to_go_on(config: TrainConfig) -> str:
    if config.resume == "never":  # the same command would refuse the run, or delete it
        return "run it with resume=auto to go on"
    return "run the same command to go on"


def _out_of_memory(error: BaseException, config: TrainConfig, folder: RunFolder) -> str:
    """Where, how much was asked for, and what to do."""
    reason = ". ".join(str(error).split(". ")[:3])  # PyTorch's goes on about its allocator
    where = f"rank {os.environ.get('RANK', '0')}" + (f" ({reason})" if reason else "")
    if config.resume == "never" or not folder.has_checkpoint():  # perhaps one of an earlier run
        return f"out of memory on {where}. Try {ways_to_fit(config)}."
    ways = ways_to_fit(config, is_started=True)
    return f"out of memory on {where}. Try {ways}; {_how_to_go_on(config)} from the last checkpoint."


def _train(
    config: TrainConfig, folder: RunFolder, world: World, interrupt: Interrupt, watchdog: Watchdog
) -> int:
    with interrupt.at_once():
        run = set_up(config, folder, world)
    if run is None:
        if world.is_first and folder.report_is_old():  # killed before it was written
            write_run_report(folder)
        return 0
    trainer = None
    try:
        trainer = Trainer(run, interrupt, watchdog)
        return trainer.run()
    except SettingError as error:
        if trainer is not None:
            with suppress(SettingError):  # it may be that the disk is full
                trainer.console.log(f"error: {error}")
        raise
    finally:
        if trainer is not None:
            trainer.close()
        run.engine.close()


@dataclass(slots=True)
class Timing:
    """Sums over the steps since the last one that was logged.

    Attributes:
        tokens: of all ranks.
        seconds: from the wait for a step's batches to its end.
        squares: squared lengths of this rank's documents, which attention's FLOPs depend on.
    """

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    squares: int = 0


class Trainer:
    """One run from its current step to `max_steps`."""

    def __init__(self, run: Run, interrupt: Interrupt, watchdog: Watchdog) -> None:
        self.config, self.folder, self.world, self.data = run.config, run.folder, run.world, run.data
        self.loader, self.engine, self.state = run.loader, run.engine, run.state
        self.setup_seconds, self.code = run.seconds, run.code
        self.interrupt, self.watchdog = interrupt, watchdog
        config, data = run.config, run.data
        self.valid_documents = documents_of(data.valid, data.tokenizer, config.eval_tokens)
        peak = peak_flops(self.world.device)
        self.peak_flops = peak * self.world.size if peak else None
        self.first_step = run.state.step
        self.saved_step = run.state.step if run.resumed else None
        self.timing = Timing()
        self.num_rollbacks = 0  # since the last save
        self.problem: str | None = None  # what keeps this rank from going on, until all hear of it
        self.metrics: MetricsFile | None = None
        self.samples: MetricsFile | None = None
        self.wandb: WandbRun | None = None
        self.console = Console(None, config.max_steps, self.first_step)
        self.evaluated_step, self.sampled_step = self.world.on_first(partial(self._open_files, run.notes))
        self._introduce()

    def _open_files(self, notes: list[str]) -> tuple[int, int]:
        """Open the first rank's files without what a lost part of the run wrote; the steps they end at."""
        step, passed_over, folder = self.state.step, self.state.passed_over_batches, self.folder
        if self.config.wandb.enabled:
            self.wandb = WandbRun(self.config, self.state.run_id)
        with explain_write_errors(folder.path):  # whatever may refuse the start has done so
            if self.config.resume == "never" and folder.holds_run():
                folder.clear()  # as overwrite=true allows
            save_config(self.config, folder.config)
        self.console = Console(folder.log, self.config.max_steps, step)
        for note in notes:
            self.console.log(note)
        self.metrics = MetricsFile(folder.metrics, step, passed_over)
        if self.config.sample_every or folder.samples.exists():
            self.samples = MetricsFile(folder.samples, step, passed_over)
        return last_step(folder.metrics, "valid_loss"), last_step(folder.samples, "text")

    def run(self) -> int:
        """Train; returns the exit code."""
        try:
            try:
                return self._run()
            except Stopped:
                return self._preempt()
        except NonFiniteError as error:
            return self._give_up(str(error))

    def _run(self) -> int:
        if self.engine.compiles() and self.config.save_every:
            self._save()  # the first step may take minutes, in which a stop saves nothing
        if self.state.step:
            self._after_step()  # what a stop has left undone
        while self.state.step < self.config.max_steps:
            self._run_steps()
            if self.state.skipped_in_row >= self.config.max_skipped_steps:
                return self._give_up(
                    f"{self.state.skipped_in_row} steps in a row had a gradient that is not finite"
                )
        with self._defer_errors():
            if self.world.is_first:
                self.folder.check_lock()
                write_run_report(self.folder)
                self._say(f"done: {self.folder.report}")
        self._check_problems()
        return 0

    def _run_steps(self) -> None:
        """Train to the last step, a roll-back, or too many skipped steps."""
        config = self.config
        with Prefetcher(self._batches(), depth=2) as steps:
            while self.state.step < config.max_steps:
                result = self._step(steps)
                if self._is_spike(result) and self._roll_back(result.loss):
                    return
                remember(self.state.recent_losses, result.loss)
                if self._due(config.log_every) or self.state.step == 1:
                    self._log(result)
                if self.state.skipped_in_row >= config.max_skipped_steps:
                    return
                self._after_step()

    def _after_step(self) -> None:
        """Evaluate, sample and save where it is due and not done."""
        config, step = self.config, self.state.step
        if self._due(config.eval_every) and self.evaluated_step < step:
            self._evaluate()
        if config.sample_every and self._due(config.sample_every) and self.sampled_step < step:
            self._sample()
        if self._due(config.save_every):
            self._save()

    def _due(self, every: int) -> bool:
        """At every so many steps (0: never) and at the last step."""
        step = self.state.step
        return step >= self.config.max_steps or (every > 0 and step % every == 0)

    def _agree(self) -> None:
        """Stop on every rank if any was asked to, or fail on every rank if any can't go on.

        Raises:
            Stopped, DataError: the same on all ranks.
        """
        urgency = self.world.max(2 if self.problem else int(self.interrupt.requested))
        if urgency == 2:
            self._check_problems()
        if urgency == 1:
            raise Stopped

    def _check_problems(self) -> None:
        """Fail on every rank if any can't go on."""
        problems = [problem for problem in self.world.gather(self.problem) if problem is not None]
        if problems:
            raise DataError(problems[0])

    @contextmanager
    def _defer_errors(self) -> Iterator[None]:
        """Keep an error of this rank alone until all ranks agree on it."""
        try:
            yield
        except SettingError as error:
            self.problem = self.problem or str(error)

    def _batches(self) -> Iterator[tuple[list[Batch], int]]:
        """For each step to come, this rank's micro-batches and the scored tokens over all ranks."""
        micro_batch_size, world = self.state.micro_batch_size, self.world
        first, last = self.state.data_step, self.config.max_steps + self.state.passed_over_batches
        for data_step in range(first, last):
            first_sequence, last_sequence = self.loader.sequences(data_step)
            seq_len = self._seq_len(data_step)
            batches = [
                self.loader.batch(data_step, world.rank, world.size, micro_step, micro_batch_size)
                for micro_step in range((last_sequence - first_sequence) // world.size // micro_batch_size)
            ]
            if seq_len < self.config.seq_len:
                batches = [shorten(micro_batch, seq_len) for micro_batch in batches]
            yield batches, self.loader.num_targets(data_step)

    def _seq_len(self, data_step: int) -> int:
        """Tokens of a sequence in that step's batches, which the schedule's ramp may hold below `seq_len`."""
        schedule = self.config.schedule
        return ramped(schedule, schedule.ramp_seq_len, self.config.seq_len, data_step)

    def _next(self, steps: Prefetcher) -> tuple[list[Batch], int]:
        """The next step's batches; a request to stop cuts the wait for them short."""
        self.watchdog.progress(self.state.step, "waiting for data")
        item = None
        with self._defer_errors():
            while not steps.ready(DATA_POLL_SECONDS) and not self.interrupt.requested:
                pass
            if steps.ready(0):
                item = next(steps)
        self._agree()
        assert item is not None, "a wait is cut short by a request to stop only"
        return item

    def _step(self, steps: Prefetcher) -> StepResult:
        """One optimizer step; its time counts from the wait for its batches on."""
        state, config = self.state, self.config
        start = time.perf_counter()
        batches, num_targets = self._next(steps)
        torch.manual_seed(((config.seed * 1_000_003 + state.step) * 65_537 + self.world.rank) % 2**63)
        lr = learning_rate(config.optim, config.schedule, state.step)
        measure_layers = config.layer_stats_every > 0 and (state.step + 1) % config.layer_stats_every == 0
        with self._first_compilation() as progress:
            result = self.engine.train_step(batches, num_targets, lr, measure_layers, progress)
        first_sequence, last_sequence = self.loader.sequences(state.data_step)
        num_tokens = (last_sequence - first_sequence) * config.seq_len
        self.timing.steps += 1
        self.timing.tokens += num_tokens
        self.timing.squares += sum(batch.sum_of_squared_lengths() for batch in batches)
        self.timing.seconds += time.perf_counter() - start
        state.step += 1
        state.tokens += num_tokens
        state.num_updates = self.engine.num_steps
        state.skipped_in_row = state.skipped_in_row + 1 if result.skipped else 0
        if result.skipped:
            self._say(f"step {state.step}: the gradient is not finite; weights are left as they were.")
            starts = self.loader.starts(state.data_step - 1).tolist()
            self._write({"step": state.step, "skipped": True, "batch_starts_at_tokens": starts})
        if result.layers:
            self._write({"step": state.step, "tokens": state.tokens, **result.layers})
        self.console.advance(state.step)
        return result

    @contextmanager
    def _first_compilation(self) -> Iterator[Callable[[], None]]:
        """Time for blocks to compile in the first step; yields what to call after each micro-step.

        A request to stop ends the process meanwhile, if this step's checkpoint is there.
        """
        step, phase, limit_seconds = self.state.step, "training step", 0.0
        compiling = self.engine.compiles() and step == self.first_step
        if compiling:
            phase, limit_seconds = "first step, compiling", 60 * self.config.engine.timeout_minutes
        progress = partial(self.watchdog.progress, step, phase, limit_seconds)
        progress()
        loses_nothing = compiling and step == self.saved_step
        with self.interrupt.at_once() if loses_nothing else nullcontext():
            yield progress

    def _is_spike(self, result: StepResult) -> bool:
        """Whether the loss is far above those of the last steps; says and records it."""
        limit, step = spike_limit(self.state.recent_losses), self.state.step
        if self.config.spike_action == "none" or result.skipped or not result.loss > limit:
            return False
        self._say(f"step {step}: loss spike, {result.loss:.4f} where at most {limit:.4f} was expected.")
        self._write({"step": step, "spike_loss": result.loss, "spike_limit": limit})
        return True

    def _roll_back(self, loss: float) -> bool:
        """Where settings and checkpoints allow it, take up the last one and leave out the batches since."""
        if self.config.spike_action != "rollback" or self.num_rollbacks == MAX_ROLLBACKS:
            return False
        if self.saved_step is None:
            self._say("there is no checkpoint to go back to yet.")
            return False
        spiked = self.state
        self.watchdog.progress(spiked.step, "going back", 60 * self.config.engine.timeout_minutes)
        checkpoint = find_checkpoint("must", self.folder, self.world, self._say)
        assert checkpoint is not None
        state = saved_state(checkpoint)
        left_out = spiked.step - state.step
        self.engine.load(checkpoint.read, state.num_updates)
        state.micro_batch_size = spiked.micro_batch_size
        state.passed_over_batches = spiked.passed_over_batches + left_out
        self.state, self.saved_step = state, state.step
        self.evaluated_step = min(self.evaluated_step, state.step)
        self.sampled_step = min(self.sampled_step, state.step)
        self.num_rollbacks += 1
        with self._defer_errors():
            for file in (self.metrics, self.samples):
                if file is not None:
                    file.drop_after(state.step, state.passed_over_batches)
        self._write(
            {
                "step": state.step,
                "rolled_back_from": spiked.step,
                "spike_loss": loss,
                "left_out": left_out,
                "passed_over_batches": state.passed_over_batches,
            }
        )
        self._say(f"went back to step {state.step}; {left_out} batches are left out.")
        return True

    def _log(self, result: StepResult) -> None:
        state, config = self.state, self.config
        timing, self.timing = self.timing, Timing()
        step_seconds = timing.seconds / timing.steps
        speed = timing.tokens / timing.seconds
        mean_length = timing.squares * self.world.size / timing.tokens  # ranks have equal shares
        flops_per_second = speed * config.model.flops_per_token(mean_length)
        line = {
            "step": state.step,
            "tokens": state.tokens,
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "lr": learning_rate(config.optim, config.schedule, state.step - 1),
            "tokens_per_second": speed,
            "mfu": flops_per_second / self.peak_flops if self.peak_flops else None,
            "peak_memory_gib": max(self.world.gather(peak_memory_gib(self.world.device))),
            "step_ms": 1000 * step_seconds,
        }
        self._write(line)
        with self._defer_errors():
            self.console.show(line, config.max_steps, self._tokens_left() / speed)

    def _tokens_left(self) -> int:
        """Of the steps to come, which may be larger."""
        steps_left = self.config.max_steps - self.state.step
        next_sequence, _ = self.loader.sequences(self.state.data_step)
        end, _ = self.loader.sequences(self.state.data_step + steps_left)
        return (end - next_sequence) * self.config.seq_len

    def _evaluate(self) -> None:
        """Score the validation documents, unless a request to stop comes between two batches of them."""
        if not self.valid_documents:
            return

        def progress(_: int) -> None:
            self.watchdog.progress(self.state.step, "evaluation")
            self._agree()

        self.watchdog.progress(self.state.step, "evaluation")
        self.engine.model.eval()
        longest = max(len(document.ids) - 1 for document in self.valid_documents)
        seq_len, chunk = self.config.seq_len, self.config.engine.sequence_chunk
        # In chunks, as in training, where that is the same number: no document is longer than a sequence.
        in_chunks = 0 < chunk < seq_len and longest <= seq_len
        result = evaluate(
            self.engine.deepspeed,
            self.valid_documents,
            min(chunk if in_chunks else seq_len, longest),
            self.world,
            window="streaming" if in_chunks else "disjoint",
            batch_tokens=chunk if in_chunks else seq_len * self.state.micro_batch_size,
            progress=progress,
        )
        self.evaluated_step = self.state.step
        self._write(
            {
                "step": self.state.step,
                "tokens": self.state.tokens,
                "valid_loss": result.loss,
                "valid_perplexity": result.perplexity,
                "valid_bits_per_byte": result.bits_per_byte,
            }
        )
        self._say(
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
            num_ids=tokenizer.vocab_size,
            agree=self.world.from_first,
        )
        sampled = []
        for token_id in ids:
            sampled.append(token_id)
            self.watchdog.progress(self.state.step, "sampling")
            self._agree()
        text = decode_with(tokenizer.decoder(), sampled)  # decode would drop a continuation's first space
        self.sampled_step = self.state.step
        with self._defer_errors():
            if self.samples:
                self.samples.write({"step": self.state.step, "prompt": config.sample_prompt, "text": text})
        self._say(f"step {self.state.step}: sample {config.sample_prompt + text!r}")

    def _save(self) -> None:
        """Save this step from all ranks, unless that is done."""
        if self.saved_step == self.state.step:
            return
        self.watchdog.progress(self.state.step, "saving")
        with self._defer_errors():
            if self.metrics:
                self.folder.check_lock()
                self.metrics.sync()
        self._check_problems()  # a checkpoint needs its folder and its metrics
        path = save_checkpoint(
            self.folder.checkpoints,
            step=self.state.step,
            fragments=self._with_heartbeats(self.engine.fragments_to_save()),
            world=self.world,
            write_files=self._write_checkpoint_files,
            state=asdict(self.state),
            facts=self._facts(),
        )
        self.saved_step, self.num_rollbacks = self.state.step, 0
        if self.world.is_first:
            remove_old(self.folder.checkpoints, self.config.keep_checkpoints, self.state.step)
        self._say(f"step {self.state.step}: saved {path}")

    def _with_heartbeats(self, fragments: Iterator[Fragment]) -> Iterator[Fragment]:
        """Large checkpoints take longer to write than the watchdog waits: each fragment counts."""
        for fragment in fragments:
            self.watchdog.progress(self.state.step, "saving")
            yield fragment

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
            "versions": self.code,
        }

    def _preempt(self) -> int:
        """Save and leave when asked to stop; a resume goes on from here."""
        self._save()
        reason = self.interrupt.reason or "another rank was asked to stop"
        self._say(f"stopped at step {self.state.step} ({reason}); {_how_to_go_on(self.config)}.")
        return EXIT_PREEMPTED

    def _give_up(self, reason: str) -> int:
        last = "there is none" if self.saved_step is None else f"step {self.saved_step}"
        self._say(f"stopping at step {self.state.step} without saving it: {reason}. Last checkpoint: {last}.")
        return EXIT_FAILED

    def _introduce(self) -> None:
        """Say what is about to run."""
        config, world = self.config, self.world
        model = config.model
        backend = model.backend if model.backend != "auto" else default_backend(world.device)
        attention = f"{model.attention} (backend {backend})"
        if model.attention == "softmax":
            packed = config.data.isolate_documents
            attention = f"softmax ({softmax_backend(world.device, config.engine.precision, packed)})"
        verb = f"resuming at step {self.state.step}" if self.state.step else "starting"
        self._say(
            f"{verb}: {model.name}, {model.num_parameters():,} parameters, vocabulary {model.vocab_size}, "
            f"attention {attention}, {config.engine.precision}"
            f"{', linear maps in fp8' if config.engine.fp8 else ''}, ZeRO {self.engine.stage}"
        )
        self._say(
            f"data {self.data.name}: {self.data.train.tokens:,} training tokens in "
            f"{self.data.train.documents:,} documents"
        )
        if line := describe_unknown(self.data.valid, self.data.tokenizer):
            self._say(line)
        self._say(
            f"seq_len {config.seq_len}, batch {config.batch_tokens:,} tokens = {world.size} rank(s) x "
            f"{self.engine.accumulation_steps} micro-steps x {self.state.micro_batch_size} sequences, "
            f"on {world.device.type}"
        )
        parts = ", ".join(f"{name} {seconds:.0f}" for name, seconds in self.setup_seconds.items())
        self._say(f"set up in {sum(self.setup_seconds.values()):.0f} s ({parts})")

    def _write(self, line: dict[str, Any]) -> None:
        with self._defer_errors():
            if self.metrics:
                self.metrics.write(line)
            if self.wandb:
                self.wandb.write(line)

    def _say(self, text: str) -> None:
        with self._defer_errors():
            self.console.say(text)

    def close(self) -> None:
        """Close files and the bar, whatever happened."""
        for part in (self.console, self.metrics, self.samples, self.wandb):
            if part is not None:
                part.close()
