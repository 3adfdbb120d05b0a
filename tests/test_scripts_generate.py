"""Generation: the tokens that a full forward pass would give, drawn as asked, printed as they come."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from model_helpers import make_model
from test_eval_checkpoints import make_run
from training_helpers import run

from data.tokenizer import ByteTokenizer
from models import generation
from models.config import ModelConfig
from models.generation import SamplingConfig, generate, sample
from models.transnormer import TransNormer
from scripts.generate import GenerateConfig, continuation

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
GREEDY = SamplingConfig(temperature=0.0)


def tiny_model(**settings) -> TransNormer:
    sizes = {"vocab_size": 260, "hidden_size": 32, "num_layers": 2, "num_heads": 2, "glu_size": 48}
    return make_model(ModelConfig(**sizes, **settings))


def scripted(*ids: int, vocab_size: int = 260):
    """A model that wants to write `ids`, whatever it reads."""
    left = list(ids)

    def forward(tokens, state, last_only=False):
        logits = torch.zeros(1, 1, vocab_size)
        logits[0, 0, left.pop(0)] = 100.0
        return logits, state

    return forward


@pytest.mark.parametrize("attention", [{}, {"softmax_every": 2}, {"attention": "softmax"}])
@pytest.mark.parametrize("prefill_tokens", [3, 4096])
@torch.no_grad()
def test_greedy_text_is_that_of_full_passes(monkeypatch, attention, prefill_tokens):
    monkeypatch.setattr(generation, "PREFILL_TOKENS", prefill_tokens)
    model = tiny_model(**attention)
    ids = [1, 70, 80, 90, 75, 66, 71, 99]
    found = list(generate(model, ids, 12, GREEDY, CPU))
    for token in found:
        assert token == model(torch.tensor([ids]))[0, -1].argmax().item()
        ids.append(token)


def test_state_does_not_grow():
    model = tiny_model()
    sizes = []

    def forward(tokens, state, **settings):
        logits, state = model(tokens, state=state, **settings)
        sizes.append(sum(layer.numel() for layer in state.layers))
        return logits, state

    assert len(list(generate(forward, [1] * 50, 40, SamplingConfig(), CPU))) == 40
    assert len(sizes) == 40  # the last token is not read again
    assert len(set(sizes)) == 1


def test_generation_ends_at_the_stop_id_or_max_tokens():
    assert list(generate(scripted(7, 8, 2, 9), [1], 10, GREEDY, CPU, stop_id=2)) == [7, 8]
    assert list(generate(scripted(7, 8, 2, 9), [1], 2, GREEDY, CPU, stop_id=2)) == [7, 8]
    assert list(generate(scripted(2), [1], 5, SamplingConfig(), CPU, stop_id=2)) == []


def test_ids_that_the_tokenizer_lacks_are_not_drawn():
    forward = scripted(300, 300, 300, vocab_size=400)
    tokens = list(generate(forward, [1], 3, SamplingConfig(), CPU, num_ids=260))
    assert all(token < 260 for token in tokens)


@pytest.mark.parametrize(
    ("settings", "allowed"),
    [
        ({"top_k": 1}, {2}),
        ({"top_k": 2}, {1, 2}),
        ({"top_p": 0.5}, {2}),
        ({"top_p": 0.8}, {1, 2}),
        ({"top_k": 2, "top_p": 0.5}, {2}),
        ({}, {0, 1, 2, 3}),
        ({"temperature": 1e-30}, {2}),
        ({"temperature": 1e-50}, {2}),
        ({"temperature": 0.0}, {2}),
        ({"top_k": 9}, {0, 1, 2, 3}),
    ],
)
def test_what_may_be_drawn(settings, allowed):
    logits = torch.tensor([0.1, 0.25, 0.6, 0.05]).log()
    sampling = SamplingConfig(**{"temperature": 1.0} | settings)
    generator = torch.Generator().manual_seed(0)
    assert {sample(logits, sampling, generator) for _ in range(300)} == allowed


def test_temperature_and_probabilities():
    logits = torch.tensor([0.2, 0.8]).log()
    for temperature, expected in ((1.0, 0.8), (0.5, 0.64 / 0.68)):
        generator = torch.Generator().manual_seed(0)
        sampling = SamplingConfig(temperature=temperature)
        drawn = [sample(logits, sampling, generator) for _ in range(2000)]
        assert sum(drawn) / 2000 == pytest.approx(expected, abs=0.03)


def test_seed_decides_the_text():
    model = tiny_model()
    texts = [list(generate(model, [1], 30, SamplingConfig(seed=seed), CPU)) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_a_character_is_printed_when_it_is_whole():
    ids = [4 + byte for byte in "aé€".encode()]
    config = GenerateConfig(checkpoint="x", prompt="p", temperature=0.0)
    pieces = continuation(scripted(*ids, 2), ByteTokenizer(), config, CPU)
    assert list(pieces) == ["a", "", "é", "", "", "€", ""]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "scripts.generate", *arguments]


ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.mark.slow
def test_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = [f"checkpoint={make_run(tmp_path / 'run')}", 'prompt=it\'s {x}, "ü"', "max_tokens=40"]
    texts = [run(["-m", "scripts.generate", *settings]) for _ in range(2)]
    assert texts[0].returncode == 0, texts[0].stderr
    assert texts[0].stdout.startswith('it\'s {x}, "ü"')
    assert texts[0].stdout == texts[1].stdout


@pytest.mark.slow
def test_reader_that_leaves_early_ends_it_quietly(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "run")
    words = command("checkpoint=run", "prompt=hello", "max_tokens=100000", "seed=3")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(words, env=ENVIRONMENT, **pipes) as process:
        assert process.stdout.read(5) == b"hello"
        process.stdout.close()
        assert process.wait(timeout=100) == 0
        assert process.stderr.read() == b""


@pytest.mark.slow
def test_help_s_reader_may_leave_early():
    with subprocess.Popen(
        command("--help"), env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.close()
        assert process.wait(timeout=100) == 0
        assert process.stderr.read() == b""


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, "temperature=-0.1 must"),
        ({"temperature": float("nan")}, "temperature=nan must"),
        ({"top_k": -1}, "top_k=-1 must be 0"),
        ({"top_p": 0.0}, r"top_p=0.0 must be above 0"),
        ({"top_p": 1.1}, r"top_p=1.1 must be above 0"),
        ({"max_tokens": 0}, "max_tokens=0 must be at least 1"),
        ({"device": "tpu"}, "device='tpu' is unknown. Allowed: auto, cpu, cuda"),
        ({"precision": "fp16"}, "precision='fp16' is unknown"),
        ({"seed": 2**63}, "seed=9223372036854775808 must"),
        ({"prompt": "\udcff"}, "prompt: it is not UTF-8"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        GenerateConfig(**settings)
