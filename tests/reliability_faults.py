"""Faults for the reliability tests, put into a rank before it trains; nothing of them is in the product."""

from __future__ import annotations

import builtins
import dataclasses
import errno
import json
import multiprocessing.util
import os
import random
import resource
import runpy
import shutil
import signal
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from training import (
    checkpoint,
    command,
    engine,
    evaluation_text,
    interrupt,
    loop,
    metrics,
    report,
    run_folder,
    setup,
    watchdog,
)
from training.engine import Engine


def skip_report() -> None:
    """Leave out the plots: they take longer than the run."""
    loop.write_run_report = lambda folder: None


def real_report() -> None:
    """Draw the plots after all."""
    loop.write_run_report = report.write_run_report


def before(owner: Any, name: str, action: Callable[[], None]) -> None:
    """Call `action` before every call of owner.name."""
    original = getattr(owner, name)

    def patched(*arguments, **keywords):
        action()
        return original(*arguments, **keywords)

    setattr(owner, name, patched)


def impatient() -> None:
    """Short waits: tests have no minutes."""
    watchdog.POLL_SECONDS, watchdog.WAITING_SECONDS = 0.2, 1.0
    watchdog.FROZEN_SECONDS, watchdog.GONE_SECONDS = 1.5, 1.0
    watchdog.STOPPED_SECONDS = 7.0  # more than the limit that tests set
    interrupt.POLL_SECONDS, interrupt.LEAVE_SECONDS = 0.2, 2.0


PHASES: dict[str, tuple[Any, str]] = {
    "data wait": (setup.TrainLoader, "batch"),
    "forward": (Engine, "_loss"),
    "backward": (torch.Tensor, "backward"),
    "step": (Engine, "_update"),
    "evaluation": (loop, "evaluate"),
    "sampling": (loop, "generate"),
    "save": (checkpoint, "write_safetensors"),
    "first compile": (Engine, "_loss"),
}


def pause_in(phase: str, marker: str, seconds: float, step: int = 2) -> None:
    """Once `step` steps have been taken, write `marker` at the next entry of a phase and wait there, once."""
    if phase == "first compile":
        step = 0
    owner, name = PHASES[phase]
    taken = _count_steps()
    paused = []

    def pause() -> None:
        if taken[0] >= step and not paused:
            paused.append(True)
            Path(marker).touch()
            deadline = time.monotonic() + seconds
            while time.monotonic() < deadline:
                time.sleep(0.05)

    before(owner, name, pause)


def pause_in_preparation(marker: str, seconds: float) -> None:
    """Write `marker` and wait while the data is prepared."""

    def pause() -> None:
        Path(marker).touch()
        time.sleep(seconds)

    before(setup, "prepare", pause)


def pretend_to_compile() -> None:
    """Let the run take its first step for one that compiles."""
    Engine.compiles = lambda self: True
    engine.compile_for_any_documents = lambda forward: forward


def _count_steps() -> list[int]:
    """A list whose one number is that of the steps taken in this process."""
    taken = [0]
    train_step = Engine.train_step

    def patched(self, *arguments):
        result = train_step(self, *arguments)
        taken[0] += 1
        return result

    Engine.train_step = patched
    return taken


def signal_after_steps(steps: list[int], number: int = signal.SIGTERM) -> None:
    """Signal this process once so many optimizer steps of the run have been taken."""
    train_step = Engine.train_step

    def patched(self, *arguments):
        result = train_step(self, *arguments)
        if self.num_steps in steps:
            os.kill(os.getpid(), number)
        return result

    Engine.train_step = patched


def never_start() -> None:
    """kill -9 this process before it has joined the others."""
    os.kill(os.getpid(), signal.SIGKILL)


def die_in_set_up() -> None:
    """kill -9 this process, as for want of memory, before the watchdog's first look around."""
    before(setup, "prepare", never_start)


def mark_joining(marker: str) -> None:
    """Write `marker` when this process is about to join the others."""
    before(loop, "process_group", Path(marker).touch)


def _die_at(count: int) -> Callable[[], None]:
    """Something to call, which kills this process (SIGKILL) at the `count`-th call."""
    left = [count]

    def act() -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    return act


def kill_in_save(count: int) -> None:
    """kill -9 this process inside its `count`-th save, where it would write tensors."""
    before(checkpoint, "save_file", _die_at(count))


def kill_at_write(count: int) -> None:
    """kill -9 this process before its `count`-th action on the run's files (writes, renames, removals)."""
    act = _die_at(count)
    for owner, name in (
        (os, "fsync"),
        (os, "replace"),
        (shutil, "rmtree"),
        (Path, "mkdir"),
        (Path, "unlink"),
        (checkpoint, "save_file"),
        (loop.MetricsFile, "write"),
    ):
        before(owner, name, act)
    original = builtins.open

    def opened(path, mode="r", *arguments, **keywords):
        if "w" in mode or "a" in mode:
            act()
        return original(path, mode, *arguments, **keywords)

    builtins.open = opened


def slow_saves(seconds: float) -> None:
    """Let saving take most of the time, in small pieces."""
    pause = lambda: time.sleep(random.random() * seconds)  # noqa: E731
    for owner, name in ((os, "fsync"), (os, "replace"), (checkpoint, "save_file"), (shutil, "rmtree")):
        before(owner, name, pause)


def poison_gradient(steps: list[int], value: float) -> None:
    """Make one gradient element of this rank nan or inf at these steps (counted in this process from 1)."""
    taken = _count_steps()
    loss = Engine._loss

    def patched(self, batch):
        result = loss(self, batch)
        if taken[0] + 1 in steps:
            result = result + _Poison.apply(next(self.model.parameters()), value)
        return result

    Engine._loss = patched


class _Poison(torch.autograd.Function):
    """Zero forward; a gradient with one bad element backward."""

    @staticmethod
    def forward(context, parameter, value):
        context.shape, context.value, context.like = parameter.shape, value, parameter
        return torch.zeros((), device=parameter.device)

    @staticmethod
    def backward(context, _):
        gradient = torch.zeros_like(context.like)
        gradient.view(-1)[-1] = context.value
        return gradient, None


def poison_weights(after_steps: int) -> None:
    """Make one master weight nan after so many steps."""
    taken = _count_steps()
    fragments = Engine.fragments

    def patched(self):
        for fragment in fragments(self):
            if taken[0] >= after_steps:
                fragment.tensors["param"].view(-1)[0] = float("nan")
            yield fragment

    Engine.fragments = patched


def record_states(folder: str) -> None:
    """Append to same<rank>, for each step, 1 if it left this rank's weights and moments alone, else 0."""
    train_step = Engine.train_step

    def patched(self, *arguments):
        first = _state(self)
        result = train_step(self, *arguments)
        same = all(torch.equal(first[key], value) for key, value in _state(self).items())
        with open(f"{folder}/same{self.world.rank}", "a") as file:
            file.write(str(int(same)))
        return result

    Engine.train_step = patched


def _state(engine: Engine) -> dict[str, torch.Tensor]:
    state = {
        f"{kind}/{fragment.name}": tensor.clone()
        for fragment in engine.fragments()
        for kind, tensor in fragment.tensors.items()
    }
    if engine.stage < 3:
        state |= {f"weight/{name}": p.detach().clone() for name, p in engine.model.named_parameters()}
    return state


def record_loaded(folder: str) -> None:
    """Write what this rank owns after a checkpoint was loaded to loaded<rank>.pt."""
    load = Engine.load

    def patched(self, *arguments):
        load(self, *arguments)
        pieces = [
            (kind, fragment.name, fragment.start, tensor.to("cpu", copy=True))
            for fragment in self.fragments()
            for kind, tensor in fragment.tensors.items()
        ]
        torch.save(pieces, f"{folder}/loaded{self.world.rank}.pt")

    Engine.load = patched


def nudge_weights() -> None:
    """After a checkpoint was loaded, move every fp32 master weight of stages 1 to 3 to the next number."""
    load = Engine.load

    def patched(self, *arguments):
        load(self, *arguments)
        for fragment in self.fragments():
            weight = fragment.tensors["param"]
            weight.copy_(torch.nextafter(weight, torch.full_like(weight, torch.inf)))

    Engine.load = patched


def break_wandb() -> None:
    """Let Weights & Biases fail at every call, as when its service has died."""
    import wandb

    def fail(*_, **__):
        raise ConnectionError("the service is gone")

    wandb.Run.log = wandb.Run.finish = fail


def no_locks() -> None:
    """Let no file of the run be locked, as on some network file systems."""

    def flock(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    run_folder.fcntl = types.SimpleNamespace(flock=flock, LOCK_EX=0, LOCK_NB=0)


def add_settings(*added: str) -> None:
    """Start this rank with further settings than the command's."""
    command_line = command.command_line
    command.command_line = lambda: [*command_line(), *added]


def prepare_other_text(path: str) -> None:
    """Let this rank find other text at the same path."""
    prepare = setup.prepare
    setup.prepare = lambda data, *rest, **more: prepare(dataclasses.replace(data, path=path), *rest, **more)


def pretend_version(torch_version: str) -> None:
    """Save checkpoints as those of another PyTorch."""
    running_code = setup._running_code
    setup._running_code = lambda: running_code() | {"torch": torch_version}


def notice_suspensions(seconds: float) -> None:
    """Take shorter ones for suspensions than in earnest."""
    watchdog.SUSPENDED_SECONDS = seconds


def bad_batch(batches: list[int], rise: float) -> None:
    """Add to the loss of these batches of the data's order."""
    step = loop.Trainer._step

    def patched(self, *arguments):
        batch = self.state.data_step
        result = step(self, *arguments)
        result.loss += rise * (batch in batches)
        return result

    loop.Trainer._step = patched


def record_batches(folder: str) -> None:
    """Write the numbers of the batches that were trained on to batches<rank>, in order."""
    batches: list[int] = []
    step = loop.Trainer._step

    def patched(self, *arguments):
        batches.append(self.state.data_step)
        Path(f"{folder}/batches{self.world.rank}").write_text(json.dumps(batches))
        return step(self, *arguments)

    loop.Trainer._step = patched


def _after_steps(steps: int, action: Callable[[], None]) -> None:
    """Call `action` when so many steps have been taken; 0: at once."""
    if steps == 0:
        action()
        return
    train_step = Engine.train_step
    left = [steps]

    def patched(self, *arguments):
        result = train_step(self, *arguments)
        left[0] -= 1
        if left[0] == 0:
            action()
        return result

    Engine.train_step = patched


def limit_file_size(limit_bytes: int, steps: int) -> None:
    """Let files of this process grow to a limit only, as on a full disk."""
    _after_steps(steps, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes)))


def no_space_for_logs(steps: int) -> None:
    """Let metrics.jsonl, samples.jsonl and train.log take nothing more."""

    def full(file, text):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    _after_steps(steps, lambda: setattr(metrics, "_append", full))


def run_out_of_memory(steps: int) -> None:
    """Fail as a GPU that has no memory left does."""

    def fail() -> None:
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 139.80 GiB of "
            "which 1.06 GiB is free. Including non-PyTorch memory, this process has 138.72 GiB in use."
        )

    _after_steps(steps, fail)


def fill_disk(folder: str, left_kib: int, steps: int) -> None:
    """Leave so much space on the disk of a folder."""
    _after_steps(steps, lambda: fill_up(folder, left_kib))


def fill_up(folder: str, left_kib: int) -> None:
    """Leave so much space on the disk of a folder, by a file in it."""
    free = os.statvfs(folder)
    descriptor = os.open(f"{folder}/filler", os.O_CREAT | os.O_WRONLY)
    os.posix_fallocate(descriptor, 0, free.f_bavail * free.f_frsize - left_kib * 1024)
    os.close(descriptor)


def freeze_in(phase: str, step: int) -> None:
    """SIGSTOP this process in a phase after so many steps."""
    owner, name = PHASES[phase]
    taken = _count_steps()
    before(owner, name, lambda: os.kill(os.getpid(), signal.SIGSTOP) if taken[0] >= step else None)


def hang_in(phase: str, step: int) -> None:
    """Never leave a phase after so many steps."""
    owner, name = PHASES[phase]
    taken = _count_steps()
    before(owner, name, lambda: time.sleep(1000) if taken[0] >= step else None)


def own_cache(folder: str) -> None:
    """Let evaluations prepare data in a folder of the test's."""
    evaluation_text.CACHE_DIR = folder


def stand_in_for_lm_eval() -> None:
    """What scripts/lm_eval_tasks.py imports, where the harness is not installed."""
    made = {name: types.ModuleType(name) for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model")}
    made |= {name: types.ModuleType(name) for name in ("lm_eval.tasks", "lm_eval.utils")}
    made["lm_eval"].simple_evaluate = made["lm_eval.utils"].make_table = print
    made["lm_eval.tasks"].TaskManager = made["lm_eval.api.model"].TemplateLM = object
    sys.modules |= made


def watch(path: str, forbidden: str) -> None:
    """Write to `path` what this process does from here on that a file must not make it do.

    It is JSON: processor seconds, growth of memory in MiB, and events: commands, connections,
    classes of a pickle, files opened below `forbidden`.
    """
    events: list[str] = []
    started, memory = time.process_time(), _peak_memory_mib()

    def hook(event: str, arguments: tuple) -> None:
        if event in ("os.system", "subprocess.Popen", "pickle.find_class", "socket.connect", "os.exec"):
            events.append(f"{event} {arguments}")
        elif event == "open" and isinstance(arguments[0], str | os.PathLike):
            path, _, flags = arguments
            real = os.path.realpath(path)
            if flags & os.O_NOFOLLOW:  # a link itself is not opened, one in its folder's path is
                folder, name = os.path.split(path)
                real = os.path.join(os.path.realpath(folder), name)
            if real.startswith(forbidden):
                events.append(f"open {path}")

    def write() -> None:
        seconds, growth = time.process_time() - started, _peak_memory_mib() - memory
        Path(path).write_text(json.dumps({"seconds": seconds, "mib": growth, "events": list(events)}))

    sys.addaudithook(hook)
    multiprocessing.util.Finalize(None, write, exitpriority=1)  # a forked process runs no atexit


def _peak_memory_mib() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def apply(faults: list[tuple]) -> None:
    """Put in faults given as (name, arguments…)."""
    for name, *arguments in faults:
        globals()[name](*arguments)


if __name__ == "__main__":  # under a real launcher: train.py with the faults of the environment
    skip_report()
    apply(json.loads(os.environ["FAULTS"]).get(os.environ["RANK"], []))
    runpy.run_path("train.py", run_name="__main__")
