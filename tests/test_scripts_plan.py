"""scripts.plan: its figures against hand calculation, and what it refuses."""

import re

import pytest

from scripts.plan import PlanConfig, main
from training.config import compose
from training.errors import SettingError
from training.memory import memory_parts
from training.planning import with_vocabulary


def plan(capsys, *arguments: str) -> str:
    main(compose(PlanConfig, list(arguments), "train"))
    return capsys.readouterr().out


def figure(text: str, name: str) -> float:
    return float(re.search(rf"{re.escape(name)}\s+([\d.,e+]+)", text)[1].replace(",", ""))


def test_figures_of_the_1b_model(capsys):
    text = plan(
        capsys,
        "model=tnl-1b",
        "model.vocab_size=64000",
        "seq_len=8192",
        "engine=zero1",
        "gpu=h200",
        "tokens=1e9",
    )
    parameters = 16 * (5 * 2048**2 + 3 * 2048 * 5632) + 64000 * 2048 + 2048
    assert figure(text, "parameters") == parameters
    assert figure(text, "embedding and head") == 64000 * 2048
    assert figure(text, "token mixers") == 16 * 5 * 2048**2 + 2048
    assert figure(text, "channel mixers") == 16 * 3 * 2048 * 5632
    # per layer 10 D² + 6 D G, attention 256 · 2 · 128 + 4 · 128² a head (layer 0's q and k are twice as wide)
    attention = 16 * (15 * (2 * 64 * 256 + 4 * 128**2) + 2 * 64 * 384 + 4 * 256 * 128)
    flops = 3 * (2 * 64000 * 2048 + 16 * (10 * 2048**2 + 6 * 2048 * 5632) + attention)
    assert figure(text, "FLOPs per token") == pytest.approx(flops, rel=1e-3)
    gib = parameters / 2**30
    assert figure(text, "weights") == pytest.approx(2 * gib, abs=0.006)
    assert figure(text, "fp32 master weights") == pytest.approx(4 * gib, abs=0.006)
    assert figure(text, "optimizer moments") == pytest.approx(8 * gib, abs=0.006)
    speed = 0.4 * 989e12 / flops
    assert f"{speed:,.0f} tokens/s" in text
    assert f"{1e9 / speed / 3600:,.1f} GPU hours" in text


def test_a_gpu_is_planned_for_in_bf16_on_a_machine_without_its_units(capsys, monkeypatch):
    monkeypatch.setattr("training.train_config.native_precision", lambda: "fp32")
    for settings, size in (((), 2), (("engine.precision=fp32",), 4)):
        text = plan(capsys, "model=tnl-1b", "model.vocab_size=64000", *settings)
        gib = figure(text, "parameters") / 2**30
        assert figure(text, "weights") == pytest.approx(size * gib, abs=0.006)


def test_peak_is_the_sum_of_its_parts_and_the_micro_batch_fits(capsys):
    arguments = ("model=tnl-385m", "seq_len=4096", "batch_tokens=262144", "num_gpus=2", "gpu_memory_gib=40")
    text = plan(capsys, *arguments)
    size = int(figure(text, "largest micro-batch"))
    config = with_vocabulary(compose(PlanConfig, list(arguments), "train"))
    total = sum(memory_parts(config, 2, size).values()) / 2**30
    assert figure(text, "predicted peak") == pytest.approx(total, abs=0.006)
    assert total <= 36 < sum(memory_parts(config, 2, 2 * size).values()) / 2**30
    assert f"micro-batch of {size} x 4096 tokens" in text


def test_says_what_does_not_fit(capsys):
    text = plan(capsys, "model=tnl-65b", "gpu=h100")
    assert "Does not fit: not even one sequence of 1024 tokens" in text
    assert "largest micro-batch" not in text


def test_parts_of_llama():
    config = with_vocabulary(compose(PlanConfig, ["model=llama-tiny", "tokenizer=bytes"], "train"))
    parts = config.model.parameter_parts()
    assert parts["embedding and head"] == config.model.num_ids * 256
    assert parts["channel mixers"] == 4 * 3 * 256 * config.model.glu_size
    assert parts["norms"] == 9 * 256
    assert parts["token mixers"] == 4 * 4 * 256**2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gpu=abacus"], r"gpu=abacus is unknown\. Allowed: b200, h200"),
        (["num_gpus=0"], "num_gpus=0 must be at least 1"),
        (["assumed_mfu=1.5"], r"assumed_mfu=1\.5"),
        (["gpu_memory_gib=0"], r"gpu_memory_gib=0\.0 must be above 0"),
        (["seq_len=1000"], "batch_tokens=65536 is not a multiple of seq_len=1000"),
        (["num_gpus=3"], "3 ranks"),
        (["micro_batch_size=3"], "micro_batch_size=3 does not divide the 64 sequences"),
    ],
)
def test_refuses_bad_settings(capsys, arguments, message):
    with pytest.raises(SettingError, match=message):
        plan(capsys, *arguments)
