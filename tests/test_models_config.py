"""Counts that follow from the settings, names of the parameters, and decay rates."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import kernels.quadratic
import kernels.torch_quadratic
import models.attention
import models.llama
from kernels import reference
from models.config import ModelConfig
from models.decay import alibi_slopes, layer_slopes
from models.transnormer import TransNormer
from training.config import compose
from training.train_config import TrainConfig

# size: layers, D, H, GLU width, vocabulary, parameters as published (tied), relative accuracy of that figure
SIZES = {
    "385m": (24, 1024, 8, 2816, 64000, 398.98e6, 1e-4),
    "1b": (16, 2048, 16, 5632, 64000, 1020.3e6, 1e-4),
    "3b": (32, 2560, 20, 6912, 64000, 2911e6, 1e-3),
    "7b": (30, 4096, 32, 11008, 64000, 6837e6, 1e-3),
    "13b": (36, 5120, 40, 13824, 50304, 12.6e9, 1e-2),
    "15b": (42, 5120, 40, 15360, 100280, 14833e6, 1e-3),
    "65b": (72, 8192, 64, 22016, 50304, 63.5e9, 1e-2),
    "175b": (88, 12288, 96, 32768, 50304, 173e9, 1e-2),
}


def composed(name: str, vocab_size: int) -> ModelConfig:
    return compose(TrainConfig, [f"model={name}", f"model.vocab_size={vocab_size}"], "train").model


def parameters_on_meta(config: ModelConfig, monkeypatch) -> dict[str, tuple[int, ...]]:
    monkeypatch.setattr(TransNormer, "initialize", lambda self, seed: None)
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in TransNormer(config).named_parameters()}


@pytest.mark.parametrize("size", SIZES)
def test_parameters_of_every_size(size, monkeypatch):
    layers, hidden, heads, glu, vocab, published, accuracy = SIZES[size]
    config = composed(f"tnl-{size}", vocab)
    assert (config.num_layers, config.hidden_size, config.num_heads) == (layers, hidden, heads)
    mixer = 4 * hidden**2 + 2 * hidden * 16 if size == "15b" else 5 * hidden**2
    by_hand = layers * (mixer + 3 * hidden * glu) + vocab * hidden + hidden
    shapes = parameters_on_meta(config, monkeypatch)
    assert config.num_parameters() == by_hand == sum(map(math.prod, shapes.values()))
    assert by_hand == pytest.approx(published, rel=accuracy)


def test_ablation_vocabulary():
    assert composed("tnl-385m", 50272).num_parameters() == pytest.approx(384.93e6, rel=1e-4)


@pytest.mark.parametrize("size", ["tiny", *SIZES])
def test_llama_has_the_parameters_of_its_size(size, monkeypatch):
    vocab = SIZES[size][4] if size in SIZES else 8192
    llama, tnl = composed(f"llama-{size}", vocab), composed(f"tnl-{size}", vocab)
    shapes = parameters_on_meta(llama, monkeypatch)
    assert llama.num_parameters() == sum(map(math.prod, shapes.values()))
    assert llama.num_parameters() == pytest.approx(tnl.num_parameters(), rel=0.02)


def tiny(**settings) -> ModelConfig:
    values = {"vocab_size": 96, "hidden_size": 64, "num_layers": 3, "num_heads": 2, "glu_size": 96}
    return ModelConfig(**values | settings)


VARIANTS = [
    {},
    {"tie_embeddings": False},
    {"lrpe": "all"},
    {"lrpe": "none", "activation": "none", "decay": "none"},
    {"gate": "low_rank"},
    {"gate": "none", "norm": "layernorm"},
    {"softmax_every": 2, "decay": "paper", "output_norm": "head"},
    {"attention": "softmax", "norm": "rmsnorm", "channel_mixer": "swiglu", "lrpe": "none"},
    {"attention": "quadratic", "decay_layer_scaling": False, "scale_embedding": False},
]


@pytest.mark.parametrize("settings", VARIANTS)
def test_parameters_of_every_variant(settings, monkeypatch):
    config = tiny(**settings)
    shapes = parameters_on_meta(config, monkeypatch)
    assert config.num_parameters() == sum(map(math.prod, shapes.values()))


def reference_operator(q, k, v, slopes, initial_state=None, output_final_state=False, **_):
    return reference.chunked(q, k, v, slopes, initial_state, chunk=64)


def tiled_causal_attention(q, k, v):
    """The products of softmax attention's causal half: PyTorch's counter passes over its CPU kernel."""
    return kernels.quadratic.quadratic_attention(q, k, v, torch.zeros(q.shape[2]))


@pytest.mark.parametrize("settings", VARIANTS)
def test_flops_are_those_counted_by_torch(settings, monkeypatch):
    monkeypatch.setattr(models.attention, "lightning_attention", reference_operator)
    monkeypatch.setattr(models.llama, "causal_attention", tiled_causal_attention)
    monkeypatch.setattr(kernels.torch_quadratic, "TILE_TOKENS", 8)
    config = tiny(**settings)
    model = TransNormer(config)
    tokens = torch.randint(96, (1, 512))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(tokens, targets=tokens)
    assert 3 * counter.get_total_flops() / 512 == pytest.approx(config.flops_per_token(512), rel=0.02)


def test_flops_of_a_training_step(monkeypatch):
    monkeypatch.setattr(models.attention, "lightning_attention", reference_operator)
    config = tiny()
    model = TransNormer(config)
    tokens = torch.randint(96, (2, 256))
    with FlopCounterMode(display=False) as counter:
        model(tokens, targets=tokens).backward()
    assert counter.get_total_flops() / 512 == pytest.approx(config.flops_per_token(256), rel=0.02)


def test_state_dict_has_the_published_names(monkeypatch):
    shapes = parameters_on_meta(tiny(tie_embeddings=False, num_layers=2), monkeypatch)
    expected = {"model.embed_tokens.weight": (96, 64), "lm_head.weight": (96, 64)}
    expected["model.layers.0.token_mixer.lrpe.theta"] = (2, 1, 32)
    for layer in range(2):
        expected[f"model.layers.{layer}.token_mixer.qkvu_proj.weight"] = (256, 64)
        expected[f"model.layers.{layer}.token_mixer.out_proj.weight"] = (64, 64)
        expected[f"model.layers.{layer}.channel_mixer.l1.weight"] = (96, 64)
        expected[f"model.layers.{layer}.channel_mixer.l2.weight"] = (96, 64)
        expected[f"model.layers.{layer}.channel_mixer.l3.weight"] = (64, 96)
    assert shapes == expected


def test_alibi_slopes():
    assert alibi_slopes(8) == [2.0**-i for i in range(1, 9)]
    # 6 heads: those of 4, then every second of 8's
    assert alibi_slopes(6) == [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-1, 2.0**-3]
    assert len(alibi_slopes(20)) == len(set(alibi_slopes(20))) == 20
    assert alibi_slopes(1) == [2.0**-8]


def test_decay_rules():
    config = tiny(num_layers=5)
    first, second = alibi_slopes(2)
    assert layer_slopes(config, 0) == pytest.approx([first * 1.00001, second * 1.00001])
    assert layer_slopes(config, 2) == pytest.approx([first * 0.50001, second * 0.50001])
    assert layer_slopes(config, 4) == pytest.approx([first * 1e-5, second * 1e-5])
    assert layer_slopes(tiny(num_layers=1), 0) == pytest.approx([first * 1.00001, second * 1.00001])
    assert layer_slopes(tiny(decay_layer_scaling=False), 2) == [first, second]
    paper = tiny(num_layers=4, decay="paper")
    assert layer_slopes(paper, 0) == pytest.approx([4.0, 8.0])
    assert layer_slopes(paper, 3) == pytest.approx([1.0, 2.0])
    assert layer_slopes(tiny(decay="none"), 1) == [0.0, 0.0]


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"attention": "linear"}, "model.attention='linear'"),
        ({"num_heads": 3}, "model.num_heads=3"),
        ({"num_heads": 16}, "heads of 4 features"),
        ({"hidden_size": 0}, "model.hidden_size=0"),
        ({"dropout": 1.0}, "model.dropout=1.0"),
        ({"softmax_every": -1}, "model.softmax_every=-1"),
        ({"softmax_every": 5, "num_layers": 4}, "softmax_every=5 .*num_layers=4.* Allowed: 0 .none. to 4"),
        ({"attention": "quadratic", "backend": "reference"}, "model.backend=reference has no quadratic form"),
    ],
)
def test_wrong_settings_are_named(settings, text):
    with pytest.raises(ValueError, match=text):
        tiny(**settings)
