"""training.distributed: groups that follow each other."""

from datetime import timedelta

import torch.distributed as dist

from training import distributed


def test_runs_under_one_agent_have_keys_of_their_own(monkeypatch):
    port = distributed.free_port()
    agent = dist.TCPStore("127.0.0.1", port, is_master=True, timeout=timedelta(seconds=5))
    values = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    values |= {"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    for point in ("0", "1"):
        monkeypatch.setenv("MULTIRUN_POINT", point)
        store = distributed._open_store(0, 1, join_seconds=5)
        assert store.add("ranks", 1) == 1
    assert agent.check(["start 0 0/ranks", "start 0 1/ranks"])
