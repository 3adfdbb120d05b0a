"""The memory estimate against what autograd really keeps, hand-made sums, and the micro-batch it leads to."""

from types import SimpleNamespace

import pytest
import torch

from models.config import ModelConfig
from models.transnormer import TransNormer
from training import setup
from training.config import compose
from training.distributed import World
from training.errors import SettingError
from training.gpus import find_gpu, require_gpu
from training.memory import (
    activation_bytes_per_token,
    layer_activation_bytes,
    loss_bytes,
    memory_parts,
    state_parts,
)
from training.micro_batch import largest_micro_batch, resolve_micro_batch
from training.out_of_memory import ways_to_fit
from training.planning import with_vocabulary
from training.train_config import TrainConfig

CPU = torch.device("cpu")
LLAMA = {"attention": "softmax", "norm": "rmsnorm", "channel_mixer": "swiglu", "lrpe": "none"}


def settings(*arguments: str) -> TrainConfig:
    return with_vocabulary(compose(TrainConfig, list(arguments), "train"))


def saved_bytes_per_token(config: ModelConfig, tokens: torch.Tensor) -> float:
    """Bytes of all different storages that autograd keeps in a bf16 forward, weights left out."""
    model = TransNormer(config).bfloat16()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        features, _ = model.model(tokens, torch.bfloat16, None, None)
    assert features.requires_grad
    return sum(storage.nbytes() for storage in storages.values()) / tokens.numel()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gate": "none"},
        {"gate": "low_rank"},
        {"lrpe": "all"},
        {"attention": "quadratic"},
        {"softmax_every": 2},
        LLAMA,
        {"activation_checkpointing": "full"},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())) or "default",
)
def test_activations_are_those_that_autograd_keeps(changes):
    config = ModelConfig(vocab_size=300, num_layers=4, hidden_size=256, num_heads=4, glu_size=704, **changes)
    measured = saved_bytes_per_token(config, torch.randint(0, 300, (4, 256)))
    largest_layer = max(sum(layer_activation_bytes(config, layer).values()) for layer in range(4))
    if config.activation_checkpointing == "full":
        largest_layer += 2 * 2 * (config.glu_size + config.hidden_size)  # gradients in its backward
    kept_by_the_head = 2 * config.hidden_size  # which does not run here
    estimate = activation_bytes_per_token(config) - largest_layer - kept_by_the_head
    assert estimate == pytest.approx(measured, rel=0.03)


def test_activations_by_hand():
    config = ModelConfig(vocab_size=100, num_layers=2, hidden_size=64, num_heads=4, glu_size=160, lrpe="none")
    # norms 3 · 6 D, q k v u 8 D, activated q and k 4 D, gated output 2 D, channel mixer 6 G
    assert sum(layer_activation_bytes(config, 1).values()) == 32 * 64 + 6 * 160
    # fp32 compute doubles what is kept in bf16 and leaves the norms' fp32 copies
    assert sum(layer_activation_bytes(config, 1, 4).values()) == 2 * (20 * 64 + 6 * 160) + 12 * 64


def test_loss_holds_one_chunk_of_logits():
    config = ModelConfig(vocab_size=64000, hidden_size=64)
    few = loss_bytes(config, 10)
    assert few == 2 * 10 * 64000 + 4 * 10 * 64 + 8 * 64000 * 64
    many, more = loss_bytes(config, 100_000), loss_bytes(config, 100_001)
    assert more - many == 4 * 64  # only the features' gradient still grows


@pytest.mark.parametrize(
    ("engine", "num_ranks", "bytes_per_parameter"),
    [
        ("zero0", 4, 6 + 4 + 8),
        ("zero1", 1, 2 + 2 + 4 + 4 + 8),
        ("zero1", 4, 2 + 2 + 4 + 12 / 4),
        ("zero1 engine.precision=fp32", 4, 4 + 4 + 12 / 4),
        ("zero1 optim=adamw_8bit", 4, 2 + 2 + 4 + (6 + 8 / 256) / 4),
        ("zero2", 4, 2 + 16 / 4),
        ("zero2_offload", 4, 2),
        ("zero3", 4, 20 / 4),
        ("zero3_offload", 4, 2 / 4),
    ],
)
def test_state_by_hand(engine, num_ranks, bytes_per_parameter):
    config = settings(*f"engine={engine}".split(), "tokenizer=bytes")
    parts = state_parts(config, num_ranks)
    buffers = parts.pop("communication buffers")
    assert sum(parts.values()) == pytest.approx(bytes_per_parameter * config.model.num_parameters())
    assert (buffers > 0) == (config.engine.zero_stage >= 2)


def test_parts_grow_with_the_micro_batch():
    config = settings("tokenizer=bytes", "micro_batch_size=1")
    one, two = memory_parts(config, 1, 1), memory_parts(config, 1, 2)
    assert two["activations"] == 2 * one["activations"]
    assert [name for name in one if one[name] != two[name]] == ["activations", "loss"]


def test_gradients_and_their_sums_over_a_step():
    """At the start of backward: what earlier micro-steps have left, and what stage 1 in bf16 always holds."""
    shape = ("model=tnl-1b", "model.vocab_size=64000", "seq_len=8192", "batch_tokens=65536")
    weights = settings(*shape).model.num_parameters()
    names = ("gradients", "fp32 gradient sums")
    for more, one_pass, several in [
        ("engine=zero1", (0, 4), (2, 4)),
        ("engine=zero2", (0, 0), (0, 4)),
        ("engine=zero0", (4, 0), (4, 0)),
    ]:
        for size, expected in ((8, one_pass), (4, several)):
            parts = memory_parts(settings(*shape, more), 1, size)
            assert tuple(parts[name] / weights for name in names) == expected, (more, size)


def test_with_few_tokens_the_peak_is_the_update_where_it_copies():
    few = ("model=tnl-1b", "model.vocab_size=64000", "seq_len=128")
    weights = settings(*few).model.num_parameters()
    for more, copied in (("engine=zero1", 0), ("engine=zero2", 4), ("engine.precision=fp32", 4)):
        parts = memory_parts(settings(*few, more), 1, 1)
        assert parts["copied gradients"] == copied * weights
        assert parts["fp32 gradient sums"] == 4 * weights
        assert (parts["activations"] == 0) == (copied > 0)  # stage 1 holds as much in every backward pass


def test_chunks_of_a_sequence_need_the_memory_of_one():
    long = ("model=tnl-1b", "model.vocab_size=64000", "seq_len=1048576", "batch_tokens=1048576")
    short = ("model=tnl-1b", "model.vocab_size=64000", "seq_len=65536", "batch_tokens=1048576")
    chunks = memory_parts(settings(*long, "engine.sequence_chunk=65536"), 1, 1)
    assert chunks == memory_parts(settings(*short), 1, 1)


def test_largest_micro_batch_is_the_last_that_fits():
    config = settings("model=tnl-385m", "model.vocab_size=64000", "seq_len=2048", "batch_tokens=131072")
    memory = 40 * 2**30
    size = largest_micro_batch(config, 1, memory)
    assert size == 8
    assert sum(memory_parts(config, 1, size).values()) <= 0.9 * memory
    assert sum(memory_parts(config, 1, 2 * size).values()) > 0.9 * memory
    assert largest_micro_batch(config, 1, 2**30) == 0


def test_resolve_micro_batch():
    config = settings("seq_len=1024", "batch_tokens=65536", "tokenizer=bytes")
    assert resolve_micro_batch(config, 1, CPU, None) == 8
    assert resolve_micro_batch(config, 2, CPU, 16) == 16  # what the run used before
    long = settings("seq_len=32768", "batch_tokens=65536", "tokenizer=bytes")
    assert resolve_micro_batch(long, 1, CPU, None) == 1
    fixed = settings("micro_batch_size=3", "tokenizer=bytes")
    sizes = "1, 2, 4, 8, 16, 32, 64, or auto; for a resumed run only auto"
    with pytest.raises(SettingError, match=rf"micro_batch_size=3 .* 64 sequences .*{sizes}"):
        resolve_micro_batch(fixed, 1, CPU, None)
    with pytest.raises(SettingError, match=r"batch_tokens=65536 .* 3 ranks .*multiple of 3072"):
        resolve_micro_batch(config, 3, CPU, None)
    uneven = settings("seq_len=1000", "batch_tokens=24000", "tokenizer=bytes")
    assert resolve_micro_batch(uneven, 1, CPU, None) == 8  # the largest divisor of 24 in 8,192 tokens
    assert resolve_micro_batch(uneven, 2, CPU, None) == 6
    assert resolve_micro_batch(uneven, 1, CPU, previous=5) == 4


def test_vocabulary_follows_the_tokenizer():
    assert settings("tokenizer=bytes").model.vocab_size == 260
    assert settings("tokenizer.vocab_size=512").model.vocab_size == 512
    assert settings("model.vocab_size=999").model.vocab_size == 999
    with pytest.raises(SettingError, match=r"model\.vocab_size .*tokenizer=file"):
        settings("tokenizer=file", "tokenizer.path=x")


def test_gpus_by_name():
    for known, names in {
        "H200": ["h200", "NVIDIA H200"],
        "H100": ["H100", "NVIDIA H100 80GB HBM3"],
        "H100 PCIe": ["h100-pcie", "NVIDIA H100 PCIe"],
        "A100": ["a100", "NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB PCIe"],
        "A100 40GB": ["a100-40gb", "NVIDIA A100-PCIE-40GB"],
        "RTX 4090": ["rtx-4090", "rtx4090", "NVIDIA GeForce RTX 4090"],
    }.items():
        assert [find_gpu(name).name for name in names] == [known] * len(names)


@pytest.mark.parametrize(
    "name",
    [
        "abacus",
        "NVIDIA GH200 480GB",
        "NVIDIA H100 NVL",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
    ],
)
def test_other_gpus_are_not_taken_for_those_on_record(name):
    assert find_gpu(name) is None
    with pytest.raises(SettingError, match=r"is unknown\. Allowed: b200, h200, h100-pcie, "):
        require_gpu(name)


def test_with_many_ranks_the_peak_is_the_start_which_holds_all_weights():
    config = settings("model=tnl-65b", "model.vocab_size=64000", "seq_len=64", "engine=zero3")
    parts = memory_parts(config, 1024, 1)
    assert list(parts.values()) == [2 * config.model.num_parameters()]


def test_a_model_larger_than_the_cpu_s_memory_is_refused(monkeypatch):
    config = compose(TrainConfig, ["run_dir=R", "model.vocab_size=1000", "engine.precision=fp32"], "train")
    free = [20 * config.model.num_parameters()]  # weights, gradient sums, masters, two moments
    monkeypatch.setattr(setup.psutil, "virtual_memory", lambda: SimpleNamespace(available=free[0] - 5))
    monkeypatch.setattr(setup.psutil, "swap_memory", lambda: SimpleNamespace(free=5))
    setup._check_memory(config, World(0, 1, CPU))
    free[0] -= 1
    with pytest.raises(SettingError, match=r"^out of memory: model=tnl-tiny needs [1-9]\S* MiB .* are free"):
        setup._check_memory(config, World(0, 1, CPU))


@pytest.mark.parametrize(
    ("overrides", "is_started", "ways"),
    [
        (
            [],
            False,
            "a smaller micro_batch_size, optim=adamw_8bit, model.activation_checkpointing=selective or full, "
            "engine=zero2_offload, a shorter seq_len, or more GPUs with engine=zero3",
        ),
        (
            ["seq_len=65536", "batch_tokens=65536", "engine=zero3"],
            True,
            "engine.sequence_chunk=32768, engine=zero3_offload, or more GPUs with engine=zero3",
        ),
        (["optim=muon", "model=llama-tiny", "micro_batch_size=1"], True, "more GPUs with engine=zero3"),
    ],
)
def test_what_may_help_out_of_memory(overrides, is_started, ways):
    """Of a run that is started only the engine may change, and each setting works with the others."""
    assert ways_to_fit(settings("model.vocab_size=1000", *overrides), is_started) == ways
