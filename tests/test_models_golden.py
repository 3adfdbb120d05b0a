"""The golden vectors of docs/model.md, which other implementations test against, hold for ours."""

import json
from pathlib import Path

import pytest
import torch

from kernels import lightning_attention, lightning_attention_step
from models.attention import LRPE, GatedLinearAttention
from models.config import ModelConfig
from models.decay import layer_slopes

GOLDEN = Path(__file__).resolve().parent.parent / "docs" / "golden"


def load(name: str) -> dict:
    return json.loads((GOLDEN / f"{name}.json").read_text())


def close(value, expected, tolerance=1e-5):
    expected = torch.as_tensor(expected)
    assert value.shape == expected.shape
    error = (value.double() - expected.double()).norm() / expected.double().norm()
    assert error <= tolerance, f"relative error {error:.1e}"


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_linear_attention(backend):
    golden = load("linear_attention")
    q, k, v, initial = (torch.tensor(golden[name])[None] for name in ("q", "k", "v", "initial_state"))
    slopes = torch.tensor(golden["slopes"])
    for length in range(1, 9):
        o, state = lightning_attention(
            q[:, :length], k[:, :length], v[:, :length], slopes, initial, True, backend=backend
        )
        close(o[0], golden["outputs"][:length])
        close(state[0], golden["states"][length - 1])


def test_one_token_at_a_time():
    golden = load("linear_attention")
    q, k, v, state = (torch.tensor(golden[name])[None] for name in ("q", "k", "v", "initial_state"))
    for token in range(8):
        o, state = lightning_attention_step(
            q[:, token], k[:, token], v[:, token], torch.tensor(golden["slopes"]), state
        )
        close(o[0], golden["outputs"][token])
        close(state[0], golden["states"][token])


def test_lrpe():
    golden = load("lrpe")
    lrpe = LRPE(ModelConfig(vocab_size=8, hidden_size=16, num_heads=2, num_layers=1))
    lrpe.theta.data = torch.tensor(golden["theta"])[:, None, :]
    x = torch.tensor(golden["x"])[None]
    out, same = lrpe(x, x, torch.tensor(golden["positions"])[None])
    assert torch.equal(out, same)
    assert golden["positions"][-1] == 1_000_000
    close(out[0], golden["outputs"], 1e-6)


def test_slopes():
    for key, expected in load("slopes")["slopes"].items():
        decay, heads, layers = key.replace(" heads", "").replace(" layers", "").split(", ")
        config = ModelConfig(
            vocab_size=8,
            hidden_size=8 * int(heads),
            num_heads=int(heads),
            num_layers=int(layers),
            decay=decay,
        )
        for layer, slopes in enumerate(expected):
            assert layer_slopes(config, layer) == pytest.approx(slopes, rel=1e-9)


def test_token_mixer():
    golden = load("token_mixer")
    mixer = GatedLinearAttention(ModelConfig(vocab_size=8, hidden_size=16, num_heads=2, num_layers=2), 0)
    mixer.qkvu_proj.weight.data = torch.tensor(golden["qkvu_proj"])
    mixer.out_proj.weight.data = torch.tensor(golden["out_proj"])
    mixer.lrpe.theta.data = mixer.lrpe.initial_theta()
    x = torch.tensor(golden["x"])[None]
    with torch.no_grad():
        out, state = mixer(x, torch.arange(8)[None], None, None, True)
    close(out[0], golden["outputs"])
    close(state[0], golden["state"])
