"""All forms of the model say the same: whole, step by step, packed, recomputed; and the loss is plain."""

import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F
from model_helpers import make_model

import models.layers
from models.attention import LRPE
from models.config import ModelConfig
from models.generation import SamplingConfig, generate
from models.layers import LinearCrossEntropy, LMHead
from models.transnormer import PREFILL_TOKENS, DecodeState, TransNormer

VARIANTS = {
    "default": {},
    "lrpe_everywhere": {"lrpe": "all", "tie_embeddings": False},
    "norm_per_head": {"output_norm": "head", "gate": "none"},
    "low_rank_gate": {"gate": "low_rank", "norm": "rmsnorm"},
    "ablated": {"gate": "none", "lrpe": "none", "decay": "none", "activation": "none"},
    "paper_decay": {"decay": "paper", "norm": "layernorm", "channel_mixer": "swiglu"},
    "quadratic": {"attention": "quadratic"},
    "hybrid": {"softmax_every": 2},
    "llama": {"attention": "softmax", "norm": "rmsnorm", "channel_mixer": "swiglu", "lrpe": "none"},
}


def make_config(**settings) -> ModelConfig:
    values = {"vocab_size": 64, "hidden_size": 32, "num_layers": 3, "num_heads": 2, "glu_size": 48}
    return ModelConfig(**values | settings)


@pytest.fixture(params=VARIANTS)
def model(request) -> TransNormer:
    return make_model(make_config(**VARIANTS[request.param]))


def random_tokens(*shape: int) -> torch.Tensor:
    return torch.randint(64, shape, generator=torch.Generator().manual_seed(0))


def close(value, expected, tolerance=2e-5):
    error = (value - expected).norm() / expected.norm()
    assert error <= tolerance, f"relative error {error:.1e}"


def test_norm_of_each_head():
    model = make_model(make_config(output_norm="head", gate="none"))
    seen = []
    for block in model.model.layers:
        block.token_mixer.out_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(random_tokens(2, 40))
    heads = torch.stack(seen).unflatten(-1, (2, 16))
    close(heads.square().mean(-1), torch.ones(3, 2, 40, 2), 1e-3)


def test_no_token_sees_the_future(model):
    tokens = random_tokens(2, 80)
    changed = tokens.clone()
    changed[:, 50:] = (changed[:, 50:] + 1) % 64
    before, after = model(tokens), model(changed)
    close(after[:, :50], before[:, :50], 1e-6)
    assert (after[:, 50:] - before[:, 50:]).abs().amax(-1).min() > 1e-4


@torch.no_grad()
def test_prefill_and_steps_equal_one_pass(model):
    tokens = random_tokens(2, 90)
    state, outputs = DecodeState(), []
    for start, stop in itertools.pairwise([0, 1, 40, 70, *range(71, 91)]):
        logits, state = model(tokens[:, start:stop], state=state)
        outputs.append(logits)
    assert state.position == 90
    close(torch.cat(outputs, dim=1), model(tokens))


@torch.no_grad()
def test_packed_sequences_are_separate_sequences(model):
    tokens = random_tokens(1, 100)
    bounds = [0, 1, 30, 30, 100]
    separate = [model(tokens[:, a:b]) for a, b in itertools.pairwise(bounds) if b > a]
    packed = model(tokens, cu_seqlens=torch.tensor(bounds, dtype=torch.int32))
    close(packed, torch.cat(separate, dim=1))


@torch.no_grad()
def test_packed_sequences_carry_their_states(model):
    sequences = [random_tokens(1, 40)[:, :12], random_tokens(1, 60)[:, 10:60], random_tokens(1, 9)]
    state, outputs = DecodeState(), [[] for _ in sequences]
    cuts = [(0, 5, 12), (0, 50, 50), (0, 0, 9)]  # one has nothing in the second call, one in the first
    for call in range(2):
        parts = [s[:, cut[call] : cut[call + 1]] for s, cut in zip(sequences, cuts, strict=True)]
        lengths = torch.tensor([0, *(part.shape[1] for part in parts)], dtype=torch.int32)
        cu_seqlens = lengths.cumsum(0).int()
        logits, state = model(torch.cat(parts, dim=1), cu_seqlens=cu_seqlens, state=state)
        for index, (start, stop) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
            outputs[index].append(logits[:, start:stop])
    assert state.position.tolist() == [12, 50, 9]
    for sequence, output in zip(sequences, outputs, strict=True):
        close(torch.cat(output, dim=1), model(sequence))


def gradients(model: TransNormer, tokens: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(tokens[:, :-1], targets=tokens[:, 1:])
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_activation_checkpointing_changes_nothing(model, mode):
    tokens = random_tokens(2, 41)
    recomputed = make_model(dataclasses.replace(model.config, activation_checkpointing=mode))
    (loss, grads), (loss2, grads2) = gradients(model, tokens), gradients(recomputed, tokens)
    assert loss == loss2
    for name, grad in grads.items():
        assert torch.equal(grad, grads2[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_blocks_have_eager_gradients(dtype):
    """Traced only, without generated code, which is quick. PyTorch 2.11 dropped LRPE's gradients here."""
    tokens, gradients = random_tokens(1, 81), []
    bounds = torch.tensor([0, 30, 80], dtype=torch.int32)
    for compiled in (False, True):
        model = make_model(make_config(num_layers=1)).to(dtype)
        if compiled:
            for block in model.model.layers:
                block.compile(backend="aot_eager", dynamic=False)
        model(tokens[:, :-1], tokens[:, 1:], cu_seqlens=bounds).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, expected in gradients[0].items():
        close(gradients[1][name], expected, 2e-5 if dtype == torch.float32 else 2e-2)


def test_quadratic_attention_has_the_same_loss_and_gradients():
    tokens = random_tokens(2, 300)
    lightning, quadratic = (make_model(make_config(attention=name)) for name in ("lightning", "quadratic"))
    (loss, grads), (loss2, grads2) = gradients(lightning, tokens), gradients(quadratic, tokens)
    close(loss2, loss, 1e-6)
    for name, grad in grads.items():
        close(grads2[name], grad, 1e-4)


@pytest.mark.parametrize("chunk_tokens", [7, 10**6])
@pytest.mark.parametrize("tied", [True, False])
def test_loss_is_plain_cross_entropy(tied, chunk_tokens, monkeypatch):
    monkeypatch.setattr(models.layers, "LOGITS_PER_CHUNK", 64 * chunk_tokens)
    model = make_model(make_config(tie_embeddings=tied))
    tokens = random_tokens(2, 33)
    targets = tokens[:, 1:].clone()
    targets[0, 3:9] = -100
    model.zero_grad()
    expected = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), targets.flatten(), reduction="sum")
    expected.backward()
    expected_grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    loss = model(tokens[:, :-1], targets=targets)
    (loss * 0.5).backward()
    assert loss.dtype == torch.float32
    close(loss, expected, 1e-6)
    for name, p in model.named_parameters():
        close(2 * p.grad, expected_grads[name], 1e-5)
    per_token = model(tokens[:, :-1], targets=targets, reduction="none")
    assert per_token.shape == targets.shape
    assert (per_token[0, 3:9] == 0).all()
    close(per_token.sum(), expected, 1e-6)


def test_bf16_loss_keeps_fp32_gradients_of_the_head():
    head = LMHead(32, 64)
    x = torch.randn(1, 50, 32, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    targets = random_tokens(1, 50)
    head(x, targets).backward()
    assert head.weight.grad.dtype == torch.float32
    assert x.grad.dtype == torch.bfloat16


def test_the_loss_is_not_cast_by_autocast():
    """Its gradients are formed in forward, in the dtypes of the weights."""
    head, x, targets = LMHead(16, 50), torch.randn(2, 7, 16), torch.randint(0, 50, (2, 7))
    torch.nn.init.normal_(head.weight)
    with torch.autocast("cpu", torch.bfloat16):
        loss = head(x, targets)
    assert torch.equal(loss, head(x, targets))


def test_an_unknown_reduction_is_refused():
    model = TransNormer(make_config())
    tokens = torch.zeros(1, 4, dtype=torch.long)
    with pytest.raises(ValueError, match=r"reduction='mean' is unknown\. Allowed: sum, none"):
        model(tokens, targets=tokens, reduction="mean")


def test_lrpe_scores_depend_on_the_distance_only():
    lrpe = LRPE(make_config())
    with torch.no_grad():
        lrpe.theta.copy_(lrpe.initial_theta())
    assert lrpe.theta.shape == (2, 1, 16)
    index = torch.arange(32, dtype=torch.float64)
    assert torch.allclose(lrpe.theta.flatten().double(), 10000.0 ** (-2 * index / 32))
    q, k = torch.randn(2, 1, 1, 2, 16, generator=torch.Generator().manual_seed(0))

    def score(i: int, j: int) -> torch.Tensor:
        rotated = [lrpe(q, k, torch.tensor([[position]])) for position in (i, j)]
        return (rotated[0][0] * rotated[1][1]).sum(-1)

    near, far = score(7, 3), score(1_000_004, 1_000_000)
    theta = lrpe.theta.detach().double().squeeze(1)
    exact = (q * k * torch.cos(theta * 4)).sum(-1).float()
    close(near, exact, 1e-6)
    close(far, exact, 1e-5)


def test_lrpe_gradients():
    lrpe = LRPE(make_config()).double()
    x = torch.randn(2, 5, 2, 16, dtype=torch.float64, requires_grad=True)
    theta = torch.rand(2, 1, 16, dtype=torch.float64, requires_grad=True)
    positions = torch.tensor([[0, 1, 2, 3, 4], [7, 8, 9, 10, 11]])
    got = torch.autograd.grad(_weighted(lrpe, x, theta, positions), (x, theta))
    angles = positions[..., None, None] * theta.squeeze(1)
    plain = 3 * torch.cat([x * angles.cos(), x * angles.sin()], dim=-1)
    expected = torch.autograd.grad((plain * torch.arange(32)).sum(), (x, theta))
    for value, wanted in zip(got, expected, strict=True):
        close(value, wanted, 1e-5)  # cosine and sine are fp32


def _weighted(lrpe, x, theta, positions):
    lrpe.theta = torch.nn.Parameter(torch.empty(0))
    del lrpe.theta
    lrpe.theta = theta
    q, k = lrpe(x, 2 * x, positions)
    return ((q + k) * torch.arange(32)).sum()


def test_a_cast_leaves_frequencies_and_slopes_in_fp32():
    model = make_model(make_config()).to(torch.bfloat16)
    mixer = model.model.layers[0].token_mixer
    assert mixer.lrpe.theta.dtype == mixer.slopes.dtype == torch.float32
    assert mixer.qkvu_proj.weight.dtype == torch.bfloat16
    close(model(random_tokens(1, 40)).float(), make_model(make_config())(random_tokens(1, 40)), 0.05)


@torch.no_grad()
def test_decode_at_position_one_million():
    model = make_model(make_config())
    _, state = model(random_tokens(1, 50), state=DecodeState())
    far = DecodeState(1_000_000, state.layers)
    logits, after = model(random_tokens(1, 1), state=far)
    assert logits.isfinite().all()
    assert after.position == 1_000_001
    sizes = [layer.numel() for layer in after.layers]
    assert sizes == [layer.numel() for layer in state.layers]


def test_long_prompts_are_read_in_chunks_that_change_nothing():
    lengths = []

    def forward(tokens, state, last_only=False):
        lengths.append(tokens.shape[1])
        return torch.zeros(1, 1, 8), state

    prompt = [1] * (2 * PREFILL_TOKENS + 5)
    list(generate(forward, prompt, 1, SamplingConfig(temperature=0), torch.device("cpu")))
    assert lengths == [PREFILL_TOKENS, PREFILL_TOKENS, 5]


def test_dropout_acts_in_training_only():
    model = make_model(make_config(dropout=0.5))
    tokens = random_tokens(1, 20)
    assert torch.equal(model(tokens), model(tokens))
    model.train()
    assert not torch.equal(model(tokens), model(tokens))


def test_an_embedding_sums_its_gradient_in_fp32():
    """A token that comes often: bf16 sums of 4096 gradients would be off by percents."""
    embedding = models.layers.Embedding(make_config(scale_embedding=False)).bfloat16()
    tokens = torch.zeros(1, 4096, dtype=torch.long)
    gradient = torch.rand(1, 4096, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    embedding(tokens, torch.bfloat16).backward(gradient)
    close(embedding.weight.grad[0].float(), gradient[0].double().sum(0), tolerance=4e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_s_gradient_can_be_taken_twice(dtype):
    x, weight = (torch.randn(5, 8).to(dtype).requires_grad_() for _ in range(2))
    loss = LinearCrossEntropy.apply(x, weight, torch.tensor([0, 1, -100, 3, 4])) / 3
    first, second = (torch.autograd.grad(loss, (x, weight), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
