"""training.distributed: how groups are joined and left."""

import contextlib
from datetime import timedelta

import pytest
import torch.distributed as dist

from training import distributed
from training.errors import SettingError


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


@pytest.mark.parametrize(
    ("error", "in_order"),
    [(None, True), (SettingError("of all ranks"), True), (RuntimeError("of this rank"), False)],
)
def test_a_rank_that_fails_alone_does_not_wait_for_the_others(error, in_order, monkeypatch):
    """NCCL's orderly end waits for every rank of the host, and those may wait for this one."""
    destroyed = []
    destroy = dist.destroy_process_group
    monkeypatch.setattr(dist, "destroy_process_group", lambda: (destroyed.append(True), destroy()))
    with contextlib.suppress(SettingError, RuntimeError), distributed.process_group(timeout_minutes=1):
        assert dist.is_initialized()
        if error is not None:
            raise error
    assert destroyed == [True] * in_order
    assert not dist.is_initialized()
