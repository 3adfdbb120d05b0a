"""The kernels' benchmark on the CPU: what is timed, and that a wrong provider is not."""

import csv
import json

import pytest
import torch

from kernels import lightning_attention, lightning_attention_step
from kernels.benchmark_providers import Provider, ours
from scripts import benchmark_kernels
from scripts.benchmark_kernels import (
    Bench,
    KernelBenchmarkConfig,
    check_correctness,
    main,
    planned_checks,
    time_extras,
)
from training.errors import SettingError


def ignores_documents(q, k, v, slopes, cu_seqlens=None):
    return lightning_attention(q, k, v, slopes)[0]


def fails_on_documents(q, k, v, slopes, cu_seqlens=None):
    if cu_seqlens is not None:
        raise TypeError("no cu_seqlens here")
    return ignores_documents(q, k, v, slopes)


def forgets(q, k, v, slopes, cu_seqlens=None):
    return q * k * v


def forgets_the_state(q, k, v, slopes, state):
    return q * (k * v).sum(-1, keepdim=True), state


@pytest.fixture
def config(monkeypatch):
    monkeypatch.setitem(
        benchmark_kernels.EXTRA_SHAPES, "wide_keys", ((1, 128, 2, 64, 32), (1, 77, 2, 64, 32))
    )
    monkeypatch.setattr(benchmark_kernels, "PACKED_SHAPE", (1, 32768, 1, 8, 8))
    steps = {"ours": lightning_attention_step, "forgets": forgets_the_state}
    monkeypatch.setattr(benchmark_kernels, "installed_steps", lambda: steps)
    return KernelBenchmarkConfig(
        only="extras",
        extras=["wide_keys", "packed", "one_token"],
        heads=2,
        k_dim=16,
        v_dim=16,
        dtype="fp32",
        rounds=1,
    )


def test_what_is_wrong_or_fails_is_found(config):
    config.extras.remove("wide_keys")
    providers = [
        Provider("ours", ours, general=True),
        Provider("joins documents", ignores_documents, general=True),
        Provider("fails", fails_on_documents, general=True),
        Provider("forgets", forgets, general=True),
        Provider("official", lambda *_: pytest.fail("not general"), general=False),
    ]
    checks = check_correctness(planned_checks(config, providers, config.extras, "cpu"))
    verdicts = [(check["provider"], check["case"], check["verdict"]) for check in checks]
    assert verdicts == [
        ("ours", "packed", "right"),
        ("joins documents", "packed", "wrong"),
        ("fails", "packed", "fails: TypeError: no cu_seqlens here"),
        ("forgets", "packed", "wrong"),
        *[("ours", "one_token", "right"), ("forgets", "one_token", "wrong")] * 2,
    ]
    lengths = KernelBenchmarkConfig(heads=2, k_dim=16, v_dim=16)
    checks = check_correctness(planned_checks(lengths, [providers[0], providers[3]], [], "cpu"))
    verdicts = [(check["provider"], check["dtype"], check["verdict"]) for check in checks]
    assert verdicts == [("ours", dtype, "right") for dtype in ("bf16", "fp16", "fp32")] + [
        ("forgets", "fp32", "wrong")
    ]
    assert set(checks[0]) > {"o", "dq", "dk", "dv", "state"}


def test_ours_has_to_work(config):
    broken = [Provider("ours", fails_on_documents, general=True)]
    with pytest.raises(TypeError, match="no cu_seqlens here"):
        check_correctness(planned_checks(config, broken, ["packed"], "cpu"))


def test_extras_leave_out_what_is_wrong(config):
    providers = [
        Provider("ours", ours, general=True),
        Provider("wrong", lambda *_: pytest.fail("timed"), general=True),
        Provider("joins documents", ignores_documents, general=True),
        Provider("official", lambda *_: pytest.fail("timed")),
    ]
    wrong = {("wrong", "batch", 64, 32), ("wrong", "batch", 8, 8)}
    wrong |= {("joins documents", "packed", 8, 8), ("forgets", "one_token", 16, 16)}
    bench = Bench(config, "cpu", bandwidth=1e7, wrong=frozenset(wrong))
    wide, packed, token = time_extras(bench, providers)
    assert [row.provider for row in wide] == ["ours", "joins documents"]
    assert len(packed) == 4
    assert {row.provider.split(",")[0] for row in packed} == {"ours"}
    assert [(row.provider, row.batch, row.forward_backward_ms) for row in token] == [
        ("ours", 1, None),
        ("ours", 64, None),
    ]
    assert all(row.forward_ms > 0 and row.forward_of_floor > 0 for row in wide + packed + token)


def test_command_writes_what_it_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = KernelBenchmarkConfig(
        lengths=[64, 128], tokens=128, heads=2, k_dim=16, v_dim=16, rounds=1, output=str(tmp_path)
    )
    assert main(config) == 0
    with open(tmp_path / "results.csv") as file:
        rows = [(row["provider"], row["length"]) for row in csv.DictReader(file)]
    assert rows == [(name, n) for n in ("64", "128") for name in ("ours", "quadratic")]
    checks = json.loads((tmp_path / "results.json").read_text())["correctness"]
    assert {check["verdict"] for check in checks} == {"right"}
    assert (tmp_path / "lengths.png").stat().st_size > 10_000


def test_unknown_extras_are_refused():
    with pytest.raises(SettingError, match="extras: decode is unknown"):
        KernelBenchmarkConfig(extras=["decode"])
