"""training.watchdog: whose processes it may look up, and disks that fail for a while."""

import socket

import torch

from training import watchdog
from training.distributed import World
from training.processes import this_process
from training.run_folder import RunFolder


def test_processes_of_another_container_are_not_looked_up_by_their_numbers():
    beat = {"host": socket.gethostname(), "pid": this_process().pid, "started": this_process().started}
    here, elsewhere = (
        watchdog._Peer(beat | {"space": watchdog.pid_space()}),
        watchdog._Peer(beat | {"space": "x"}),
    )
    assert here.process() == this_process()
    assert elsewhere.process() is None


def test_a_heartbeat_that_can_t_be_written_is_left_out(tmp_path):
    folder = RunFolder(tmp_path)
    with watchdog.Watchdog(folder, World(0, 2, torch.device("cpu")), None, "start", 300) as dog:
        file = folder.heartbeats / "rank00000.json"
        file.unlink()
        folder.heartbeats.rename(tmp_path / "away")
        folder.heartbeats.touch()
        dog._write()
        dog._look()
        folder.heartbeats.unlink()
        (tmp_path / "away").rename(folder.heartbeats)
        dog._write()
        assert file.exists()
