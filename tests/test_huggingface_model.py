"""The model in transformers says what the training model says, padded, cached, generated or trained on."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from model_helpers import make_model

from models.config import ModelConfig
from models.generation import SamplingConfig, generate
from models.huggingface import CACHE_NAME, TransnormerCache, TransnormerConfig, TransnormerForCausalLM
from models.published import model_config_from_published, published_fields
from models.standalone import MODULES, standalone_source
from models.transnormer import PREFILL_TOKENS, DecodeState, TransNormer

ROOT = Path(__file__).resolve().parent.parent
VARIANTS = {
    "default": {},
    "untied": {"tie_embeddings": False, "lrpe": "all", "scale_embedding": False},
    "low_rank_gate": {"gate": "low_rank", "norm": "rmsnorm", "channel_mixer": "swiglu"},
    "hybrid": {"softmax_every": 2, "norm": "layernorm", "decay": "paper"},
    "norm_per_head": {"output_norm": "head", "gate": "none", "lrpe": "all"},
    "llama": {"attention": "softmax", "norm": "rmsnorm", "channel_mixer": "swiglu", "lrpe": "none"},
}


def make_pair(**settings) -> tuple[TransNormer, TransnormerForCausalLM]:
    """A training model and the same weights in transformers."""
    values = {"vocab_size": 64, "hidden_size": 32, "num_layers": 3, "num_heads": 2, "glu_size": 48}
    config = ModelConfig(**values | settings)
    model = make_model(config)
    wrapped = TransnormerForCausalLM(TransnormerConfig(**published_fields(config)))
    wrapped.load_state_dict(model.state_dict())
    return model, wrapped.eval()


@pytest.fixture(params=VARIANTS)
def pair(request):
    return make_pair(**VARIANTS[request.param])


def random_tokens(*shape: int) -> torch.Tensor:
    return torch.randint(3, 64, shape, generator=torch.Generator().manual_seed(0))


def close(value, expected, tolerance=2e-5):
    error = (value - expected).norm() / expected.norm()
    assert error <= tolerance, f"relative error {error:.1e}"


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
def test_fields_come_back(settings):
    values = {"vocab_size": 64, "hidden_size": 32, "num_layers": 3, "num_heads": 2, "glu_size": 48}
    config = ModelConfig(name="x", **values | settings)
    assert model_config_from_published(published_fields(config), name="x") == config
    assert TransnormerConfig(**published_fields(config)).architecture() == model_config_from_published(
        published_fields(config)
    )


@torch.no_grad()
def test_padding_on_either_side_changes_nothing(pair):
    model, wrapped = pair
    tokens = random_tokens(4, 70)
    mask = torch.ones_like(tokens)
    mask[0, :30] = 0  # left
    mask[1, 55:] = 0  # right
    mask[2, :3], mask[2, 20:25], mask[2, 66:] = 0, 0, 0  # both, and a hole
    garbage = torch.where(mask.bool(), tokens, 1)
    output = wrapped(garbage, attention_mask=mask, use_cache=True)
    more = random_tokens(4, 75)[:, 70:]
    more_mask = torch.cat([mask, torch.ones_like(more)], dim=1)
    more_mask[3, -5:-2] = 0  # a shorter second turn, padded on the left: its state must not decay
    continued = wrapped(more, attention_mask=more_mask, cache=output[1], use_cache=True)
    last = wrapped(more[:, :1], cache=continued[1])
    for row in range(4):
        real = mask[row].bool()
        new = more_mask[row, 70:].bool()
        alone = torch.cat([tokens[row, real], more[row, new], more[row, :1]])[None]
        expected = model(alone)[0]
        got = [output.logits[row, real], continued.logits[row, new], last.logits[row]]
        close(torch.cat(got), expected)


def left_padded() -> tuple[torch.Tensor, torch.Tensor]:
    """Two prompts of 7 and 12 tokens, and their mask."""
    tokens = random_tokens(2, 12)
    mask = torch.ones_like(tokens)
    mask[0, :5] = 0
    return tokens, mask


def packed_batch(**settings) -> tuple[list[torch.Tensor], dict]:
    """Three sequences, and what transformers' collator of padding-free training makes of them."""
    rows = [row[:n] for row, n in zip(random_tokens(3, 70), (40, 1, 70), strict=True)]
    collate = transformers.DataCollatorWithFlattening(**settings)
    return rows, collate([{"input_ids": row.tolist()} for row in rows])


@pytest.mark.parametrize("given", ["position_ids", "cu_seq_lens", "both"])
def test_packed_sequences_see_nothing_of_each_other(pair, given):
    model, wrapped = pair
    settings = {
        "return_position_ids": given != "cu_seq_lens",
        "return_flash_attn_kwargs": given != "position_ids",
    }
    rows, batch = packed_batch(**settings)
    output = wrapped(**batch)
    loss = sum(model(row[None, :-1], targets=row[None, 1:]) for row in rows if len(row) > 1) / (39 + 69)
    close(output.loss, loss, 1e-6)
    labels = batch.pop("labels")
    with torch.no_grad():
        logits = wrapped(**batch).logits[0].split([len(row) for row in rows])
        for row, found in zip(rows, logits, strict=True):
            close(found, model(row[None])[0])
        ids = batch["input_ids"]
        close(wrapped(**batch, labels=ids).loss, output.loss, 1e-6)  # borders that labels do not mark
        assert (labels != -100).sum() == len(ids[0]) - 3
    output.loss.backward()
    loss.backward()
    for name, parameter in wrapped.named_parameters():
        close(parameter.grad, model.get_parameter(name).grad, 1e-4)


@torch.no_grad()
def test_several_rows_may_be_packed_and_padded():
    model, wrapped = make_pair(softmax_every=2)
    tokens = random_tokens(2, 30)
    positions = torch.cat([torch.arange(12), torch.arange(18)]).repeat(2, 1)
    mask = torch.ones_like(tokens)
    positions[1], mask[1, :4], mask[1, 20:] = torch.tensor([*[1] * 4, *range(10), *range(6), *[0] * 10]), 0, 0
    logits = wrapped(tokens, attention_mask=mask, position_ids=positions).logits
    for row, start, stop in ((0, 0, 12), (0, 12, 30), (1, 4, 14), (1, 14, 20)):
        close(logits[row, start:stop], model(tokens[row : row + 1, start:stop])[0])


@torch.no_grad()
def test_positions_that_follow_from_the_mask_change_nothing():
    _, wrapped = make_pair()
    tokens = random_tokens(2, 20)
    mask = torch.ones_like(tokens)
    mask[1, :6] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    plain = wrapped(tokens[:, :15], attention_mask=mask[:, :15], use_cache=True)
    given = wrapped(
        tokens[:, :15], attention_mask=mask[:, :15], position_ids=positions[:, :15], use_cache=True
    )
    assert torch.equal(given.logits, plain.logits)
    more = wrapped(tokens[:, 15:], attention_mask=mask, cache=plain[1])
    given = wrapped(tokens[:, 15:], attention_mask=mask, cache=given[1], position_ids=positions[:, 15:])
    assert torch.equal(given.logits, more.logits)
    with pytest.raises(ValueError, match="position_ids are neither"):  # a packing can't go on from a cache
        wrapped(tokens[:, :2], cache=more[1], position_ids=torch.zeros(2, 2, dtype=torch.long))


@torch.no_grad()
def test_a_long_prompt_is_read_in_chunks_that_change_nothing():
    model, wrapped = make_pair(num_layers=2)
    tokens = random_tokens(2, PREFILL_TOKENS + 300)
    mask = torch.ones_like(tokens)
    mask[0, : PREFILL_TOKENS + 10] = 0
    logits = wrapped(tokens, attention_mask=mask, use_cache=True, logits_to_keep=3).logits
    assert logits.shape[1] == 3
    close(logits[1], model(tokens[1:])[0, -3:])
    close(logits[0], model(tokens[:1, PREFILL_TOKENS + 10 :])[0, -3:])


@torch.no_grad()
@pytest.mark.parametrize(
    ("num_prompts", "num_tokens"), [(10, 64), pytest.param(50, 256, marks=pytest.mark.torture)]
)
def test_greedy_tokens_are_our_generators(num_prompts, num_tokens):
    model, wrapped = make_pair(num_layers=2)
    prompts = [random_tokens(num_prompts, 40)[i, : 3 + i % 37].tolist() for i in range(num_prompts)]
    longest = max(map(len, prompts))
    padded = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    got = wrapped.generate(
        padded,
        attention_mask=mask,
        max_new_tokens=num_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    for prompt, ids in zip(prompts, got[:, longest:].tolist(), strict=True):
        ours = list(generate(model, prompt, num_tokens, SamplingConfig(temperature=0), torch.device("cpu")))
        assert ids == ours


@torch.no_grad()
def test_prompts_padded_at_the_end_are_not_continued():
    _, wrapped = make_pair()
    tokens = random_tokens(2, 12)
    mask = torch.ones_like(tokens)
    mask[0, 7:] = 0
    settings = {"max_new_tokens": 3, "pad_token_id": 0, "eos_token_id": None}
    for use_cache in (True, False):
        with pytest.raises(ValueError, match="pad prompts on the left"):
            wrapped.generate(tokens, attention_mask=mask, use_cache=use_cache, **settings)
    left = mask.flip(1)
    whole = wrapped.generate(tokens, attention_mask=left, **settings)
    cache = {CACHE_NAME: TransnormerCache()}
    parts = wrapped.generate(tokens, attention_mask=left, prefill_chunk_size=4, **cache, **settings)
    assert torch.equal(parts, whole)


@torch.no_grad()
@pytest.mark.parametrize("name", ["default", "hybrid"])
def test_beam_search_reorders_the_state(name):
    _, wrapped = make_pair(**VARIANTS[name])
    tokens, mask = left_padded()
    settings = {
        "attention_mask": mask,
        "max_new_tokens": 12,
        "num_beams": 4,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    cached = wrapped.generate(tokens, **settings)
    recomputed = wrapped.generate(tokens, use_cache=False, **settings)
    greedy = wrapped.generate(tokens, **settings | {"num_beams": 1})
    assert torch.equal(cached, recomputed)
    assert not torch.equal(cached, greedy)


@pytest.mark.parametrize("name", ["default", "hybrid"])
def test_embeddings_in_place_of_ids(name):
    _, wrapped = make_pair(**VARIANTS[name])
    tokens, mask = left_padded()
    embeddings = wrapped.get_input_embeddings()(tokens)
    assert embeddings.dtype == torch.float32
    expected = wrapped(tokens, attention_mask=mask, labels=tokens)
    found = wrapped(inputs_embeds=embeddings, attention_mask=mask, labels=tokens)
    close(found.logits, expected.logits, 1e-6)
    grads = [
        torch.autograd.grad(output.loss, wrapped.get_input_embeddings().weight)[0]
        for output in (found, expected)
    ]
    close(*grads, 1e-5)
    settings = {"attention_mask": mask, "max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
    for beams in (1, 3):
        ids = wrapped.generate(tokens, **settings, num_beams=beams, eos_token_id=None)
        new = wrapped.generate(inputs_embeds=embeddings, **settings, num_beams=beams, eos_token_id=None)
        assert torch.equal(new, ids[:, 12:])


@torch.no_grad()
def test_sampling_and_a_cache_of_constant_size():
    _, wrapped = make_pair()
    torch.manual_seed(0)
    out = wrapped.generate(random_tokens(3, 5), do_sample=True, max_new_tokens=20, eos_token_id=None)
    assert out.shape == (3, 25)
    sizes = []
    for length in (5, 500):
        cache = wrapped(random_tokens(1, length), use_cache=True)[1]
        sizes.append([layer.numel() for layer in cache.state.layers])
        assert cache.get_seq_length() == length
    assert sizes[0] == sizes[1]


def test_loss_and_gradient_checkpointing():
    model, wrapped = make_pair()
    tokens = random_tokens(2, 30)
    labels = tokens.clone()
    labels[0, 10:] = -100
    targets = torch.cat([labels[:, 1:], torch.full((2, 1), -100)], dim=1)
    expected = model(tokens, targets=targets) / (targets != -100).sum()
    plain = wrapped(tokens, labels=labels)
    close(plain.loss, expected, 1e-6)
    close(wrapped(tokens, labels=labels, num_items_in_batch=10).loss * 10 / 38, expected, 1e-6)
    plain.loss.backward()
    grads = {name: p.grad.clone() for name, p in wrapped.named_parameters()}
    wrapped.zero_grad()
    wrapped.train()
    wrapped.gradient_checkpointing_enable()
    assert wrapped.model.config.activation_checkpointing == "full"
    assert wrapped.is_gradient_checkpointing
    wrapped(tokens, labels=labels).loss.backward()
    for name, parameter in wrapped.named_parameters():
        assert torch.equal(parameter.grad, grads[name]), name
    wrapped.gradient_checkpointing_disable()
    assert wrapped.model.config.activation_checkpointing == "none"


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load(pair, dtype, tmp_path):
    _, wrapped = pair
    wrapped.save_pretrained(tmp_path)
    loaded = TransnormerForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()
    assert loaded.dtype == dtype
    tied = loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert tied == wrapped.config.tie_word_embeddings
    for name, tensor in [*loaded.named_parameters(), *loaded.named_buffers()]:
        kept = name.endswith(("theta", "slopes"))
        assert tensor.dtype == (torch.float32 if kept else dtype), name
    expected = wrapped.state_dict() | dict(wrapped.named_buffers())
    for name, tensor in (loaded.state_dict() | dict(loaded.named_buffers())).items():
        assert torch.equal(tensor, expected[name].to(tensor.dtype)), name
    tokens = random_tokens(1, 40)
    close(loaded(tokens).logits.float(), wrapped(tokens).logits, 2e-5 if dtype == torch.float32 else 0.1)


def test_a_new_model_is_initialised_as_ours():
    config = TransnormerConfig(
        vocab_size=2000, decoder_embed_dim=128, decoder_layers=2, decoder_attention_heads=4, glu_dim=256
    )
    wrapped = TransnormerForCausalLM(config)
    for name, parameter in wrapped.named_parameters():
        if parameter.ndim == 2:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.05), name
    lrpe = wrapped.model.layers[0].token_mixer.lrpe
    assert torch.equal(lrpe.theta, lrpe.initial_theta())


def test_trainer_lowers_the_loss_evaluates_and_predicts(tmp_path):
    pytest.importorskip("accelerate", reason="Trainer needs accelerate")
    _, wrapped = make_pair()
    row = random_tokens(24).tolist()
    rows = [{"input_ids": row[:n], "attention_mask": [1] * n, "labels": row[:n]} for n in (24, 17, 20, 24)]

    def pad(batch):
        fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
        return {
            key: torch.tensor([item[key] + [value] * (24 - len(item[key])) for item in batch])
            for key, value in fill.items()
        }

    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=20,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=3e-3,
        gradient_checkpointing=True,
        eval_strategy="steps",
        eval_steps=10,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
    )
    trainer = transformers.Trainer(
        wrapped, arguments, train_dataset=rows, eval_dataset=rows, data_collator=pad
    )
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert len(losses) == 20
    assert losses[-1] < 0.6 * losses[0]
    evaluated = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
    assert len(evaluated) == 2
    assert evaluated[1] < evaluated[0]
    predicted = trainer.predict(rows[:2])
    assert predicted.predictions.shape == (2, 24, 64)
    assert predicted.label_ids.shape == (2, 24)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"inputs_embeds": torch.zeros(1, 5, 32)}, "input_ids or inputs_embeds must be given"),
        ({"input_ids": None}, "input_ids or inputs_embeds must be given"),
        ({"input_ids": torch.ones(1, 0, dtype=torch.long)}, "no token: give at least one"),
        (
            {"input_ids": torch.ones(1, 0, dtype=torch.long), "use_cache": False},
            "no token: give at least one",
        ),
        ({"output_attentions": True}, "output_attentions"),
        ({"attention_mask": torch.ones(1, 1, 5, 5)}, "attention_mask has shape"),
        ({"attention_mask": torch.ones(1, 4)}, "attention_mask has shape"),
        ({"position_ids": torch.tensor([[0, 1, 2, 5, 6]])}, "position_ids are neither"),
        ({"position_ids": torch.tensor([[3, 4, 0, 1, 2]])}, "position_ids are neither"),
        ({"position_ids": torch.tensor([[0, 1, 0, 1]])}, "position_ids has shape"),
        ({"position_ids": torch.tensor([[0, 1, 0, 1, 2]]), "use_cache": True}, "use_cache=True"),
        ({"cu_seq_lens_q": torch.tensor([0, 4])}, "cu_seq_lens of 1 rows of 5 tokens"),
        (
            {"cu_seq_lens_q": torch.tensor([0, 2, 5]), "cu_seq_lens_k": torch.tensor([0, 3, 5])},
            "cu_seq_lens_q, cu_seq_lens_k and position_ids differ",
        ),
    ],
)
def test_what_it_cannot_honour_is_refused(arguments, text):
    _, wrapped = make_pair()
    with pytest.raises(ValueError, match=text):
        wrapped(**{"input_ids": random_tokens(1, 5)} | arguments)


RUN_ALONE = """
import sys, torch
sys.path[:] = [path for path in sys.path if path not in ("", {root!r})]
sys.path.insert(0, {folder!r})
import modeling_transnormer as m
assert m.lightning_attention.__module__ == "modeling_transnormer", "not alone"
for name in {names!r}:
    folder = {folder!r} + "/" + name
    model = m.TransnormerForCausalLM.from_pretrained(folder).eval()
    tokens, mask = torch.load(folder + "/inputs.pt")
    with torch.no_grad():
        output = model(tokens, attention_mask=mask, use_cache=True)
        step = model(tokens[:, :1], cache=output[1])
    loss = model.train()(tokens, attention_mask=mask, labels=tokens).loss
    loss.backward()
    grads = {{name: p.grad for name, p in model.named_parameters()}}
    torch.save([output.logits, step.logits, loss.detach(), grads], folder + "/outputs.pt")
"""


@pytest.mark.parametrize("stranger", [False, True], ids=["no_kernels", "package_of_the_same_name"])
def test_the_exported_file_alone_says_the_same(stranger, tmp_path):
    (tmp_path / "modeling_transnormer.py").write_text(standalone_source())
    if stranger:  # what PyPI calls kernels has no such operator
        (tmp_path / "kernels.py").write_text("def get_kernel(name):\n    raise RuntimeError(name)\n")
    tokens = random_tokens(2, 150)
    mask = torch.ones_like(tokens)
    mask[0, :70] = 0
    models = {name: make_pair(**VARIANTS[name])[1] for name in ("default", "hybrid")}
    for name, wrapped in models.items():
        wrapped.save_pretrained(tmp_path / name)
        torch.save((tokens, mask), tmp_path / name / "inputs.pt")
    code = RUN_ALONE.format(root=str(ROOT), folder=str(tmp_path), names=list(models))
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    for name, wrapped in models.items():
        logits, step, loss, grads = torch.load(tmp_path / name / "outputs.pt")
        with torch.no_grad():
            output = wrapped(tokens, attention_mask=mask, use_cache=True)
            close(logits, output.logits)
            close(step, wrapped(tokens[:, :1], cache=output[1]).logits)
        expected = wrapped.train()(tokens, attention_mask=mask, labels=tokens).loss
        close(loss, expected, 1e-6)
        expected.backward()
        for key, parameter in wrapped.named_parameters():
            close(grads[key], parameter.grad, 2e-3 if key.endswith("theta") else 1e-4)  # θ's sum cancels


def test_the_exported_file_is_complete_and_reads_no_environment():
    source = standalone_source()
    compile(source, "modeling_transnormer.py", "exec")
    assert "environ" not in source
    for module in MODULES:
        assert f"# {module}\n" in source
    imports = [line for line in source.splitlines() if line.startswith(("import ", "from "))]
    assert not [line for line in imports if line.split()[1].split(".")[0] in ("models", "kernels")]


def test_state_layout_is_that_of_the_training_model():
    model, wrapped = make_pair()
    tokens = random_tokens(2, 30)
    with torch.no_grad():
        _, state = model(tokens, state=DecodeState())
        cache = wrapped(tokens, use_cache=True)[1]
    for ours, theirs in zip(state.layers, cache.state.layers, strict=True):
        assert theirs.dtype == torch.float32
        close(theirs, ours, 1e-6)
