"""Kill one rank of a run, resume it on fewer GPUs and then on more, and compare it with one never stopped.

Legs, all in one run folder: (1) all GPUs, saved at step K, one worker killed with SIGKILL two steps later;
(2) half of the GPUs for K steps from the checkpoint; (3) all GPUs from there to the end. Before legs 2 and 3
the checkpoint is loaded at their number of GPUs and compared bit for bit with its files, by
scripts/check_loading.py.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from data.files import read_json_object, write_json
from training.checkpoint import list_checkpoints, step_of
from training.config import override
from training.errors import EXIT_PREEMPTED, SettingError
from training.launching import (
    ROOT,
    Device,
    device_groups,
    free_devices,
    last_lines,
    launch_command,
    processes_of,
    start_process,
    stop_processes,
)
from training.metrics import last_step, read_metrics
from training.run_folder import RunFolder
from training.sweep import Point

RESULT_LIMIT_BYTES = 2**20
POLL_SECONDS = 0.05
SHOWN_LINES = 5  # of a log that says why a leg failed
GONE_SECONDS = 120.0  # for the other ranks and the launcher to end after a kill


class LegFailed(RuntimeError):
    """A leg that did not do what it should; the text says why."""


@dataclass(slots=True)
class RankKill:
    """A test that kills one rank.

    Attributes:
        folder: of this test; the run is in run/, its logs next to it, the result in kill.json.
        point: the settings of the run.
        uninterrupted: the folder of the same run on all GPUs that was never stopped.
        kill_after: K, steps.
    """

    folder: Path
    point: Point
    uninterrupted: Path
    num_gpus: int
    kill_after: int

    @property
    def result(self) -> dict[str, Any]:
        """What is known so far: `settings`, `legs`, one dictionary each, and `error` if one failed."""
        path = self.folder / "kill.json"
        return read_json_object(path, RESULT_LIMIT_BYTES) if path.exists() else {"legs": []}

    @property
    def _settings(self) -> dict[str, Any]:
        return {"num_gpus": self.num_gpus, "kill_after": self.kill_after, "run": self.point.values}

    def curve(self) -> dict[int, float]:
        """Step to loss of the run that was killed and resumed."""
        return losses(self.folder / "run")

    def describe(self, leg: dict[str, Any]) -> str:
        """What happened in a leg."""
        if "killed_rank" in leg:
            return (
                f"{self.point.label}, {self.point.crossed['engine']}, {leg['num_gpus']} GPUs: rank "
                f"{leg['killed_rank']} killed with SIGKILL after step {self.kill_after + 2}; the command "
                f"ended with {leg['exit_code']} after {leg['seconds_to_end']} s, "
                f"workers left: {leg['workers_left']}."
            )
        equal = "equal bit for bit" if leg["loading_equal"] else f"✗ {leg['loading']}"
        return (
            f"{leg['num_gpus']} GPU(s), from step {leg['from_step']} to {leg['to_step']} "
            f"({leg['seconds']} s): weights and moments loaded, {equal}."
        )

    def run(self, changed: Callable[[], None]) -> int:
        """Run the legs that are missing; 0, or 1 if one failed. `changed` is called after each leg.

        SIGTERM ends the run of the leg at once, and this process with 75.

        Raises:
            SettingError: the folder holds the test of a run with other settings.
        """
        if self.result.get("settings", self._settings) != self._settings:
            raise SettingError(f"{self.folder} holds the test of another run: choose another run_dir.")
        if len(self.result["legs"]) == 3:
            return 0
        previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_PREEMPTED))
        try:
            return self._run_legs(changed)
        finally:
            stop_processes([self.folder.resolve()], patience_seconds=0)
            signal.signal(signal.SIGTERM, previous)

    def _run_legs(self, changed: Callable[[], None]) -> int:
        self.folder.mkdir(parents=True, exist_ok=True)
        stop_processes([self.folder.resolve()])  # of a test that was stopped
        devices = device_groups(free_devices(), self.num_gpus)[0]
        fewer, last = max(1, self.num_gpus // 2), self.point.config.max_steps
        legs = [
            lambda: self._killed_leg(devices),
            lambda: self._resumed_leg("fewer", fewer, devices[:fewer], self.kill_after),
            lambda: self._resumed_leg("more", self.num_gpus, devices, last),
        ]
        result = {"settings": self._settings, "legs": self.result["legs"], "error": None}
        for leg in legs[len(result["legs"]) :]:
            try:
                result["legs"].append(leg())
            except LegFailed as error:
                result["error"] = str(error)
            stop_processes([self.folder.resolve()])  # what a launcher has left behind
            write_json(self.folder / "kill.json", result)
            changed()
            text = result["error"] or self.describe(result["legs"][-1])
            print(f"kill test: {text}", file=sys.stderr, flush=True)
            if result["error"]:
                return 1
        return 0

    def _killed_leg(self, devices: Sequence[Device]) -> dict[str, Any]:
        """Train on all GPUs, and kill the last rank two steps after the first checkpoint."""
        metrics = RunFolder(self.folder / "run").metrics
        metrics.unlink(missing_ok=True)
        changes = {"save_every": str(self.kill_after), "resume": "never", "overwrite": "true"}
        process = self._start("killed", self._train(changes), self.num_gpus, devices)
        while last_step(metrics, "loss") < self.kill_after + 2:
            if process.poll() is not None:
                raise LegFailed(f"the run to be killed ended: {self._last_words('killed')}")
            time.sleep(POLL_SECONDS)
        victim = self._workers().get(self.num_gpus - 1)
        if victim is None:
            raise LegFailed("the worker to be killed has ended by itself")
        victim.kill()
        killed = time.monotonic()
        try:
            code = process.wait(GONE_SECONDS)
        except subprocess.TimeoutExpired:
            raise LegFailed(f"the launcher is still there {GONE_SECONDS:.0f} s after the kill") from None
        return {
            "num_gpus": self.num_gpus,
            "killed_rank": self.num_gpus - 1,
            "exit_code": code,
            "seconds_to_end": round(time.monotonic() - killed, 1),
            "workers_left": len(self._workers()),
        }

    def _resumed_leg(
        self, name: str, num_gpus: int, devices: Sequence[Device], num_steps: int
    ) -> dict[str, Any]:
        """Load the newest checkpoint and compare it, then train `num_steps` from it, or to the end."""
        checkpoint = list_checkpoints(self.folder / "run" / "checkpoints")[0]
        last = self.point.config.max_steps
        until = min(step_of(checkpoint) + num_steps, last)
        stage = self.point.config.engine.zero_stage
        settings = [override("checkpoint", checkpoint), f"zero_stage={stage}"]
        check = ["--module", "scripts.check_loading", *settings]
        code = self._start(f"{name}_loading", check, num_gpus, devices).wait()
        words = self._last_words(f"{name}_loading")
        if code not in (0, 1):
            raise LegFailed(f"loading on {num_gpus} rank(s): {words}")
        started = time.monotonic()
        changes = {"save_every": "0", "resume": "must", "overwrite": "false", "max_steps": str(until)}
        changes["schedule.total_steps"] = str(self.point.config.schedule.total_steps or last)
        if self._start(name, self._train(changes), num_gpus, devices).wait() != 0:
            raise LegFailed(f"resuming on {num_gpus} rank(s): {self._last_words(name)}")
        return {
            "num_gpus": num_gpus,
            "from_step": step_of(checkpoint),
            "to_step": until,
            "loading_equal": code == 0,
            "loading": words,
            "seconds": round(time.monotonic() - started, 1),
        }

    def _train(self, changes: dict[str, str]) -> list[str]:
        """train.py with the point's settings and `changes` to them."""
        settings = self.point.values | changes
        run_dir = override("run_dir", self.folder.resolve() / "run")
        return [str(ROOT / "train.py"), *(f"{key}={value}" for key, value in settings.items()), run_dir]

    def _start(
        self, name: str, program: list[str], num_gpus: int, devices: Sequence[Device]
    ) -> subprocess.Popen:
        """Start a program under the launcher; what it prints goes to NAME.log."""
        command, variables = launch_command(program, "deepspeed", num_gpus, devices)
        return start_process(command, variables, self.folder.resolve(), self.folder / f"{name}.log", ROOT)

    def _workers(self) -> dict[int, psutil.Process]:
        """The worker of each rank that is alive; what it has started itself is left out."""
        workers: dict[int, psutil.Process] = {}
        found = processes_of([self.folder.resolve()])
        for process in sorted(found, key=lambda process: process.pid, reverse=True):
            rank = process.info["environ"].get("RANK")
            if rank and any(word.endswith("train.py") for word in process.info["cmdline"] or ()):
                workers[int(rank)] = process  # the first process of a rank comes last
        return workers

    def _last_words(self, name: str) -> str:
        return " | ".join(last_lines(self.folder / f"{name}.log")[-SHOWN_LINES:])


def losses(run_folder: Path) -> dict[int, float]:
    """Step to training loss of a run."""
    lines = read_metrics(RunFolder(run_folder).metrics)
    return {line["step"]: line["loss"] for line in lines if line.get("loss") is not None}
