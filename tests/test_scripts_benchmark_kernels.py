"""The kernels' benchmark on the CPU: what is timed, and that a wrong provider is not."""

import csv
import json

import pytest
import torch

from kernels import lightning_attention
from scripts import benchmark_kernels
from scripts.benchmark_kernels import BenchmarkConfig, Clock, Provider, main, time_extras
from training.errors import SettingError


def ignores_documents(q, k, v, slopes, cu_seqlens=None):
    return lightning_attention(q, k, v, slopes)[0]


def fails_on_documents(q, k, v, slopes, cu_seqlens=None):
    if cu_seqlens is not None:
        raise TypeError("no cu_seqlens here")
    return ignores_documents(q, k, v, slopes)


def test_extras_leave_out_what_is_wrong(monkeypatch, capsys):
    monkeypatch.setitem(
        benchmark_kernels.EXTRA_SHAPES, "wide_keys", ((1, 128, 2, 64, 32), (1, 77, 2, 64, 32))
    )
    monkeypatch.setattr(benchmark_kernels, "PACKED_SHAPE", (1, 32768, 1, 8, 8))
    config = BenchmarkConfig(
        extras=["wide_keys", "packed", "one_token"], heads=2, k_dim=16, v_dim=16, dtype="fp32", rounds=1
    )
    providers = [
        Provider("ours", benchmark_kernels._ours, general=True),
        Provider("wrong", lambda *_: pytest.fail("timed"), general=True),
        Provider("joins documents", ignores_documents, general=True),
        Provider("fails", fails_on_documents, general=True),
        Provider("official", lambda *_: pytest.fail("timed")),
    ]
    wrong = {("wrong", 64, 32), ("wrong", 8, 8)}
    wide, packed, token = time_extras(config, providers, wrong, "cpu", Clock("cpu"), bandwidth=1e7)
    assert [row.provider for row in wide] == ["ours", "joins documents", "fails"]
    assert len(packed) == 4
    assert {row.provider.split(",")[0] for row in packed} == {"ours"}
    assert "not timed: joins documents, packed: wrong by" in capsys.readouterr().out
    assert wrong == {("wrong", 64, 32), ("wrong", 8, 8), ("joins documents", "packed"), ("fails", "packed")}
    assert [(row.batch, row.forward_backward_ms) for row in token] == [(1, None), (64, None)]
    assert all(row.forward_ms > 0 and row.forward_of_floor > 0 for row in wide + packed + token)


def test_command_writes_what_it_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = BenchmarkConfig(
        lengths=[64, 128], tokens=128, heads=2, k_dim=16, v_dim=16, rounds=1, output=str(tmp_path)
    )
    assert main(config) == 0
    with open(tmp_path / "results.csv") as file:
        rows = [(row["provider"], row["length"]) for row in csv.DictReader(file)]
    assert rows == [(name, n) for n in ("64", "128") for name in ("ours", "quadratic", "recurrent")]
    checks = json.loads((tmp_path / "results.json").read_text())["correctness"]
    assert {check["verdict"] for check in checks} == {"right"}
    assert (tmp_path / "lengths.png").stat().st_size > 10_000


def test_unknown_extras_are_refused():
    with pytest.raises(SettingError, match="extras: decode is unknown"):
        BenchmarkConfig(extras=["decode"])
