"""`train.py -m`: one run after another, over all values that settings name."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys

from training.config import compose, override, split_setting, sweep_points
from training.errors import EXIT_PREEMPTED, SettingError
from training.train_config import TrainConfig


def multirun(arguments: list[str]) -> int:
    """Run every point of `key=a,b` settings in a process and a run folder of its own, in order.

    Returns the first exit code that is not 0; later points run all the same, unless a point was preempted.
    """
    points = sweep_points(arguments)
    if len(points) == 1:
        raise SettingError("-m needs a setting with several values, as seq_len=1024,2048.")
    configs = [compose(TrainConfig, point, "train") for point in points]
    swept = [setting for setting in points[0] if any(setting not in point for point in points)]
    keys = [split_setting(setting)[0] for setting in swept]
    run_dirs = []
    for point, config in zip(points, configs, strict=True):
        chosen = [setting for setting in point if split_setting(setting)[0] in keys]
        run_dirs.append(os.path.join(config.run_dir, folder_name(chosen)))
        if run_dirs[-1] in run_dirs[:-1]:
            raise SettingError(f"two points would share the run folder {run_dirs[-1]}: run them one by one.")
    first_failure = 0
    for number, (point, run_dir) in enumerate(zip(points, run_dirs, strict=True)):
        os.environ["MULTIRUN_POINT"] = str(number)
        code = run_point([sys.executable, sys.argv[0], *point, override("run_dir", run_dir)])
        first_failure = first_failure or code
        if code == EXIT_PREEMPTED:
            break
    return first_failure


def folder_name(settings: list[str]) -> str:
    """What a point's settings are called as a folder; long ones are cut and told apart by a hash."""
    name = "_".join(settings).replace("=", "-").replace("/", "-")
    in_bytes = os.fsencode(name)
    if len(in_bytes) <= 200:
        return name
    return f"{in_bytes[:150].decode(errors='ignore')}-{hashlib.sha256(in_bytes).hexdigest()[:16]}"


def run_point(command: list[str]) -> int:
    """Run it to its end; Ctrl-C, which a terminal sends to both, and SIGTERM are for it to save and leave."""
    with subprocess.Popen(command) as process:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda *_: process.terminate())
        try:
            return process.wait()
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
