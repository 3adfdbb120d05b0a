"""The model in transformers on a CUDA device: generation, padding, far positions, a million tokens.

pytest -m gpu tests/test_huggingface_gpu.py          under a minute; prints times, asserts none
"""

import statistics
import time

import pytest
import torch
from test_huggingface_model import VARIANTS, make_pair

from models.generation import SamplingConfig, generate
from models.huggingface import TransnormerCache, TransnormerConfig, TransnormerForCausalLM
from models.transnormer import DecodeState

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
TOLERANCE = 1e-4  # fp32; the GPU's exp2 is approximate
MIB = 2**20


def on_gpu(**settings):
    return tuple(model.to(DEVICE) for model in make_pair(**settings))


def random_tokens(*shape: int) -> torch.Tensor:
    return torch.randint(3, 64, shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)


def close(value, expected):
    error = (value - expected).norm() / expected.norm()
    assert error <= TOLERANCE, f"relative error {error:.1e}"


def greedy(wrapped, tokens, mask, max_new_tokens=64, **settings):
    return wrapped.generate(
        tokens,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        **settings,
    )


@torch.no_grad()
@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
def test_padding_on_either_side_changes_nothing(settings):
    model, wrapped = on_gpu(**settings)
    tokens = random_tokens(3, 200)
    mask = torch.ones_like(tokens)
    mask[0, :70], mask[1, 150:] = 0, 0
    logits = wrapped(torch.where(mask.bool(), tokens, 1), attention_mask=mask).logits
    for row in range(3):
        real = mask[row].bool()
        close(logits[row, real], model(tokens[row, real][None])[0])


@torch.no_grad()
@pytest.mark.parametrize("name", ["default", "hybrid"])
def test_steps_equal_one_pass(name):
    model, wrapped = on_gpu(**VARIANTS[name])
    tokens = random_tokens(2, 130)
    output = wrapped(tokens[:, :100], use_cache=True)
    steps = [output.logits]
    for position in range(100, 130):
        steps.append(wrapped(tokens[:, position : position + 1], cache=output[1]).logits)
    close(torch.cat(steps, dim=1), model(tokens))


@torch.no_grad()
def test_greedy_tokens_are_our_generators():
    model, wrapped = on_gpu(num_layers=2)
    prompts = [random_tokens(8, 40)[i, : 3 + 5 * i].tolist() for i in range(8)]
    padded = torch.tensor([[0] * (40 - len(prompt)) + prompt for prompt in prompts], device=DEVICE)
    mask = torch.tensor([[0] * (40 - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=DEVICE)
    got = greedy(wrapped, padded, mask)[:, 40:].tolist()
    settings = SamplingConfig(temperature=0.0)
    for prompt, ids in zip(prompts, got, strict=True):
        assert ids == list(generate(model, prompt, 64, settings, torch.device(DEVICE)))


@torch.no_grad()
def test_beams_and_samples_in_bf16():
    _, wrapped = on_gpu(num_layers=2)
    wrapped = wrapped.bfloat16()
    tokens = random_tokens(2, 20)
    beams = greedy(wrapped, tokens, torch.ones_like(tokens), 16, num_beams=3)
    assert beams.shape == (2, 36)
    torch.manual_seed(0)
    sampled = wrapped.generate(tokens, do_sample=True, max_new_tokens=16, eos_token_id=None, pad_token_id=0)
    assert sampled.shape == (2, 36)


@torch.no_grad()
def test_a_prompt_of_a_million_tokens_takes_the_memory_of_a_short_one():
    """Beside the prompt itself: ids, mask and positions, 8 bytes each, which transformers copies."""
    _, wrapped = on_gpu(num_layers=2)
    peaks = []
    for length in (20_000, 1_000_000):
        tokens = random_tokens(1, length)
        mask = torch.ones_like(tokens)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        assert greedy(wrapped, tokens, mask, 4).shape == (1, length + 4)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] - peaks[0] < 10 * 8 * 1_000_000, [peak / MIB for peak in peaks]


@torch.no_grad()
def test_decoding_at_position_one_million(capsys):
    """The same state gives finite logits there; the time of a step is printed for both positions."""
    config = TransnormerConfig(
        vocab_size=32000, decoder_embed_dim=1024, decoder_layers=8, decoder_attention_heads=8, glu_dim=2816
    )
    wrapped = TransnormerForCausalLM(config).to(DEVICE, torch.bfloat16).eval()
    prompt = torch.randint(32000, (1, 1000), device=DEVICE)
    layers = wrapped(prompt, use_cache=True)[1].state.layers
    times: dict[int, list[float]] = {1_000: [], 1_000_000: []}
    for _ in range(5):
        for position, milliseconds in times.items():
            cache = TransnormerCache()
            cache.state, cache.num_seen = DecodeState(position, list(layers)), position
            torch.cuda.synchronize()
            started = time.perf_counter()
            for _ in range(40):
                logits = wrapped(prompt[:, :1], cache=cache).logits
            torch.cuda.synchronize()
            milliseconds.append(1000 * (time.perf_counter() - started) / 40)
            assert logits.isfinite().all()
    with capsys.disabled():
        for position, milliseconds in times.items():
            print(
                f"\ndecode at position {position:,}: {statistics.median(milliseconds):.3f} ms a token", end=""
            )
        print()
