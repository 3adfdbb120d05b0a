"""Pretrain a TransNormer language model.

    python train.py model=tnl-tiny max_steps=200                    one process
    deepspeed train.py model=tnl-1b seq_len=8192 engine=zero2       every GPU of this machine
    python train.py -m seq_len=1024,2048 run_dir=outputs/lengths    one run after another

The run folder holds everything: config, metrics, log, samples, plots, report and checkpoints.
The same command again resumes it.
"""

from __future__ import annotations

import faulthandler
import signal
import sys

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C in the imports, which take seconds: no traceback

from training.command import command_line, fail, run_command
from training.errors import SettingError
from training.interrupt import Interrupt
from training.multirun import multirun
from training.train_config import TrainConfig


def main(config: TrainConfig) -> int:
    """Train on this rank."""
    interrupt = Interrupt()
    with interrupt.at_once():  # the import takes seconds, in which a signal or the launcher's end may come
        from training.loop import train

    return train(config, interrupt)


if __name__ == "__main__":
    faulthandler.enable(2)  # a crash outside Python names the line that it came from
    settings = command_line()
    wants_help = "--help" in settings or "-h" in settings
    if ("-m" in settings or "--multirun" in settings) and not wants_help:
        try:
            sys.exit(multirun([setting for setting in settings if setting not in ("-m", "--multirun")]))
        except SettingError as error:
            fail(error)
    run_command(main, TrainConfig, __doc__, "train")
