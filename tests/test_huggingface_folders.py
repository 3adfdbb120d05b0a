"""Published weights in, exports out, and every bad folder refused in one line that names the file."""

import json
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers as tokenizers_lib
import torch
from model_helpers import make_model
from safetensors.torch import load_file, save_file

import scripts.export_hf
import training.model_folder
from data.config import TokenizerConfig
from data.errors import DataError
from data.tokenizer import (
    ByteTokenizer,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    load_tokenizer,
    train_characters,
    train_sentencepiece,
)
from data.tokenizer_json import are_tied, user_defined, write_tokenizer_json
from models.config import ModelConfig
from models.transnormer import TransNormer
from scripts.export_hf import ExportConfig, ExportError, verify_tokenizer
from scripts.export_hf import main as export_main
from scripts.import_hf import ImportConfig
from scripts.import_hf import main as import_main
from training.checkpoint import save_checkpoint
from training.distributed import World
from training.engine import KINDS, Fragment
from training.errors import SettingError
from training.saved_config import save_config
from training.train_config import EngineConfig, TrainConfig
from training.weights import find_model, load_initial_weights, load_model

ROOT = Path(__file__).resolve().parent.parent
TEXT = "def f(x):\n    return  x + 1  # <s> </s> ▁ 日本 é\n"


def make_config(**settings) -> ModelConfig:
    values = {"vocab_size": 260, "hidden_size": 32, "num_layers": 2, "num_heads": 2, "glu_size": 48}
    return ModelConfig(**values | settings)


def make_run(folder: Path, config: ModelConfig, tokenizer=None) -> Path:
    """A run folder with one checkpoint and one logged step, without training."""
    tokenizer = tokenizer or ByteTokenizer()
    model = make_model(config)

    def write_files(into: Path) -> None:
        save_config(TrainConfig(model=config, engine=EngineConfig(precision="fp32")), into / "config.yaml")
        (into / "tokenizer").mkdir()
        tokenizer.save(into / "tokenizer")

    fragments = [
        Fragment(name, tuple(p.shape), 0, {kind: p.detach().flatten().clone() for kind in KINDS})
        for name, p in model.named_parameters()
    ]
    save_checkpoint(
        folder / "checkpoints",
        step=7,
        fragments=fragments,
        world=World(0, 1, torch.device("cpu")),
        write_files=write_files,
        state={"step": 7, "tokens": 1234},
        facts={},
    )
    lines = [{"step": 7, "loss": 2.5}, {"step": 7, "valid_perplexity": 12.25}, {"step": 9, "loss": 1.0}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def export(run: Path, output: Path, **settings) -> Path:
    export_main(ExportConfig(checkpoint=str(run), output=str(output), **settings))
    return output


LOAD = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
folder, text = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
generate = pipeline("text-generation", model=model, tokenizer=tokenizer)
batch = tokenizer([text, "a"], return_tensors="pt", padding=True)
print(json.dumps({
    "ids": tokenizer(text).input_ids,
    "text": tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True),
    "padding": batch.attention_mask[1, 0].item(),
    "greedy": model.generate(**batch, max_new_tokens=9, do_sample=False)[:, -9:].tolist(),
    "pipeline": generate("ab", max_new_tokens=3, do_sample=False)[0]["generated_text"],
}))
"""


def test_an_export_loads_in_transformers(tmp_path):
    run = make_run(tmp_path / "run", make_config())
    folder = export(run, tmp_path / "hf")
    assert len({path.stat().st_mode for path in folder.iterdir() if path.is_file()}) == 1
    result = subprocess.run(
        [sys.executable, "-c", LOAD, str(folder), TEXT],
        capture_output=True,
        text=True,
        cwd=tmp_path,  # without this repository on the path
        env=os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    got = json.loads(result.stdout.splitlines()[-1])
    ids = [1, *ByteTokenizer().encode(TEXT).tolist()]
    assert (got["ids"], got["text"], got["padding"]) == (ids, TEXT, 0)
    assert got["pipeline"].startswith("ab")
    model = make_model(make_config())
    for prompt, greedy in zip([ids, [1, ord("a") + 4]], got["greedy"], strict=True):
        for token in greedy:
            if token == 0:  # after EOS
                break
            assert token == int(model(torch.tensor([prompt]))[0, -1].argmax())
            prompt = [*prompt, token]


VARIANTS = {
    "default": {},
    "untied": {"tie_embeddings": False, "lrpe": "all", "decay": "paper"},
    "low_rank_gate": {"gate": "low_rank", "gate_size": 4, "scale_embedding": False},
    "hybrid": {"softmax_every": 2, "norm": "layernorm"},
    "llama": {"attention": "softmax", "norm": "rmsnorm", "channel_mixer": "swiglu", "lrpe": "none"},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_round_trip_is_exact(name, tmp_path, monkeypatch):
    if name == "untied":
        monkeypatch.setattr(training.model_folder, "SHARD_BYTES", 40_000)
    run = make_run(tmp_path / "run", make_config(**VARIANTS[name]))
    folder = export(run, tmp_path / "hf")
    assert (folder / "model.safetensors.index.json").exists() == (name == "untied")
    import_main(ImportConfig(source=str(folder), run_dir=str(tmp_path / "imported")))
    checkpoint = load_model(find_model(str(run)), precision="fp32")
    models = [load_model(find_model(str(path))) for path in (folder, tmp_path / "imported")]
    for loaded in models:
        assert replace(loaded.model.config, name="") == replace(checkpoint.model.config, name="")
        assert loaded.tokenizer.fingerprint == checkpoint.tokenizer.fingerprint
        assert (loaded.step, loaded.home.path) == (None, loaded.path)
        for key, value in loaded.model.named_parameters():
            assert torch.equal(value, checkpoint.model.get_parameter(key)), key
    assert models[0].hash == models[1].hash
    again = export(tmp_path / "imported", tmp_path / "again")
    for file in folder.glob("*.safetensors"):
        assert file.read_bytes() == (again / file.name).read_bytes()


def test_the_model_card_has_the_figures_of_the_step(tmp_path):
    folder = export(make_run(tmp_path / "run", make_config()), tmp_path / "hf")
    card = (folder / "README.md").read_text()
    for figure in ("27,808", "| 7 |", "1,234", "2.5000", "12.2500"):
        assert figure in card
    assert "1.0000" not in card  # a step after the checkpoint


@pytest.mark.parametrize(
    ("name", "says", "says_not"),
    [
        ("default", ["A TransNormer language model", "one size", "Triton"], ["softmax", "grow"]),
        ("hybrid", ["softmax in layers 2:", "grows", "Triton"], ["The attention state"]),
        ("llama", ["softmax attention", "grows"], ["TransNormer", "one size", "Triton"]),
    ],
)
def test_the_model_card_says_what_the_layers_are(name, says, says_not, tmp_path):
    folder = export(make_run(tmp_path / "run", make_config(**VARIANTS[name])), tmp_path / "hf")
    text = (folder / "README.md").read_text()
    assert not [words for words in says if words not in text]
    assert not [words for words in says_not if words in text]


def test_a_model_card_leaves_out_what_is_no_number(tmp_path):
    run = make_run(tmp_path / "run", make_config())
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "loss": null, "valid_loss": null}\n{"step": 7, "lo')
    card = (export(run, tmp_path / "hf") / "README.md").read_text()
    assert "2.5000" in card


@pytest.mark.parametrize(("vocab_size", "num_suppressed"), [(260, 0), (272, 12), (260 + 1025, 0)])
def test_ids_beyond_the_tokenizer_s_are_not_generated(vocab_size, num_suppressed, tmp_path):
    from transformers import GenerationConfig

    folder = export(make_run(tmp_path / "run", make_config(vocab_size=vocab_size)), tmp_path / "hf")
    suppressed = GenerationConfig.from_pretrained(folder).suppress_tokens or []
    assert suppressed == list(range(260, 260 + num_suppressed))
    if suppressed:
        model = scripts.export_hf.load_modeling_file(folder).TransnormerForCausalLM.from_pretrained(folder)
        torch.manual_seed(0)
        drawn = model.generate(torch.ones(40, 1).long(), do_sample=True, temperature=9.0, max_new_tokens=20)
        assert drawn.max() < 260


def test_stored_dtypes(tmp_path):
    run = make_run(tmp_path / "run", make_config())
    folder = export(run, tmp_path / "hf", dtype="bfloat16")
    tensors = load_file(folder / "model.safetensors")
    assert {tensor.dtype for name, tensor in tensors.items() if "theta" not in name} == {torch.bfloat16}
    assert tensors["model.layers.0.token_mixer.lrpe.theta"].dtype == torch.float32
    assert load_model(folder).precision == "bf16"
    with pytest.raises(SettingError, match="dtype='int8'"):
        ExportConfig(dtype="int8")


def test_a_wrong_export_is_removed(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run", make_config())
    write = training.model_folder.published_fields
    wrong = {"no_scale_embedding": True}
    monkeypatch.setattr(training.model_folder, "published_fields", lambda config: write(config) | wrong)
    with pytest.raises(ExportError, match="prefill differ by"):
        export(run, tmp_path / "hf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
    assert issubclass(ExportError, SettingError)


def test_bytes_of_a_cut_character_leave_the_text_before_them_alone(tmp_path):
    """As generation leaves them that ends at max_new_tokens."""
    from transformers import AutoTokenizer

    tokenizer = ByteTokenizer()
    tokenizer.save(tmp_path)
    write_tokenizer_json(tokenizer, tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer.encode("def f(): return '天地'").tolist()
    for kept in (ids[:-2], ids[:-3], [*range(4, 260)]):
        assert loaded.decode(kept) == tokenizer.decode(kept)
    assert loaded.decode(ids[:-2]).startswith("def f(): return '天")
    every = "".join(map(chr, range(0x250))) + "日本語 <s>"
    assert loaded(every, add_special_tokens=False).input_ids == tokenizer.encode(every).tolist()


def test_a_tokenizer_that_reads_otherwise_is_no_export(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run", make_config())
    monkeypatch.setattr(scripts.export_hf, "write_tokenizer_json", write_shifted)
    with pytest.raises(ExportError, match="bytes tokenizer"):
        export(run, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_a_tokenizer_with_other_special_ids_is_no_export(tmp_path):
    tokenizer = given_tokenizer(tmp_path / "given")
    tokenizer.save(tmp_path)
    write_tokenizer_json(tokenizer, tmp_path)
    verify_tokenizer(tmp_path, tokenizer)
    os.replace(tmp_path / "tokenizer_given.json", tmp_path / "tokenizer.json")  # without BOS
    with pytest.raises(ExportError, match="special ids differently"):
        verify_tokenizer(tmp_path, tokenizer)


def write_shifted(tokenizer, folder: Path) -> None:
    write_tokenizer_json(tokenizer, folder)
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace('"d"', '"<d>"'))


def given_tokenizer(folder: Path, post_processor=None, **roles) -> HuggingFaceTokenizer:
    """A byte-level BPE as transformers saves one, with specials <s>, </s> and <pad>."""
    given = tokenizers_lib.Tokenizer(tokenizers_lib.models.BPE())
    given.pre_tokenizer = tokenizers_lib.pre_tokenizers.ByteLevel(add_prefix_space=False)
    given.decoder = tokenizers_lib.decoders.ByteLevel()
    alphabet = tokenizers_lib.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers_lib.trainers.BpeTrainer(
        vocab_size=260,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    given.train_from_iterator([TEXT], trainer)
    if post_processor is not None:
        given.post_processor = post_processor
    folder.mkdir()
    given.save(str(folder / "tokenizer.json"))
    roles = {"bos_token": "<s>", "eos_token": "</s>"} | roles
    (folder / "tokenizer_config.json").write_text(json.dumps(roles))
    return load_tokenizer(folder)


POST_PROCESSORS = tokenizers_lib.processors
AFTER = {"special_tokens": [("<s>", 0), ("</s>", 1)]}


@pytest.mark.parametrize(
    ("post_processor", "changed", "last"),
    [
        (None, True, []),
        (POST_PROCESSORS.ByteLevel(trim_offsets=True), True, []),
        (POST_PROCESSORS.TemplateProcessing("$A </s>", "$A </s> $B </s>", **AFTER), True, []),
        (POST_PROCESSORS.TemplateProcessing("<s> $A </s>", "<s> $A $B </s>", **AFTER), True, []),
    ],
    ids=["none", "offsets", "eos", "bos and eos"],
)
def test_a_given_tokenizer_reads_and_pads_in_transformers_as_in_training(
    post_processor, changed, last, tmp_path
):
    from transformers import AutoTokenizer

    tokenizer = given_tokenizer(tmp_path / "given", post_processor)
    folder = export(make_run(tmp_path / "run", make_config(), tokenizer), tmp_path / "hf")
    loaded = AutoTokenizer.from_pretrained(folder)
    batch = loaded([TEXT, "a"], add_special_tokens=False, padding=True)
    ids = tokenizer.encode(TEXT).tolist()
    assert batch.input_ids[0] == ids
    assert batch.attention_mask[1][0] == 0
    assert loaded(TEXT).input_ids == [0, *ids, *last]
    assert loaded("a", "b").input_ids[0] == 0
    assert load_tokenizer(folder).fingerprint == tokenizer.fingerprint
    given = folder / ("tokenizer_given.json" if changed else "tokenizer.json")
    assert given.read_bytes() == (tmp_path / "given" / "tokenizer.json").read_bytes()
    again = export(folder, tmp_path / "again")
    for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer_info.json"):
        assert (folder / name).read_bytes() == (again / name).read_bytes()


def test_a_given_padding_token_and_chat_template_are_kept(tmp_path):
    from transformers import AutoTokenizer

    template = "{{ messages[0].content }}!"
    named = [{"name": "default", "template": template}, {"name": "short", "template": "x"}]
    tokenizer = given_tokenizer(tmp_path / "given", pad_token="<pad>", chat_template=named)
    plain = given_tokenizer(tmp_path / "plain", pad_token="<unknown>")
    assert (tokenizer.pad_id, plain.pad_id) == (2, tokenizer.eos_id)
    assert tokenizer.fingerprint == plain.fingerprint
    folder = export(make_run(tmp_path / "run", make_config(), tokenizer), tmp_path / "hf")
    loaded = AutoTokenizer.from_pretrained(folder)
    assert (loaded.pad_token, loaded.pad_token_id) == ("<pad>", 2)
    assert loaded.chat_template == {"default": template, "short": "x"}
    for name in ("config.json", "generation_config.json"):
        assert json.loads((folder / name).read_text())["pad_token_id"] == 2
    (tmp_path / "given" / "chat_template.jinja").write_text(template)
    load_tokenizer(tmp_path / "given").save(tmp_path / "plain")
    message = [{"role": "user", "content": "hi"}]
    saved = AutoTokenizer.from_pretrained(tmp_path / "plain")
    assert saved.apply_chat_template(message, tokenize=False) == "hi!"
    (tmp_path / "given" / "chat_template.jinja").unlink()
    (tmp_path / "given" / "tokenizer_config.json").write_text('{"bos_token": "<s>", "chat_template": 3}')
    with pytest.raises(DataError, match="chat_template must be"):
        load_tokenizer(tmp_path / "given")


@pytest.mark.parametrize(
    ("model_type", "pieces"),
    [
        ("bpe", ["<sep>", "def", "\n\n"]),
        ("unigram", ["<sep>", "def", "\n\n"]),
        ("bpe", ["\u2581\u2581", "\u2581\u2581\u2581\u2581"]),
    ],
)
def test_user_defined_pieces_are_cut_out_in_transformers_too(model_type, pieces, tmp_path):
    from sentencepiece import SentencePieceTrainer
    from transformers import AutoTokenizer

    SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.split()),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=330,
        hard_vocab_limit=False,
        model_type=model_type,
        byte_fallback=True,
        minloglevel=2,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        user_defined_symbols=pieces,
    )
    tokenizer = SentencePieceTokenizer((tmp_path / "tokenizer.model").read_bytes())
    assert user_defined(tokenizer) == pieces
    write_tokenizer_json(tokenizer, tmp_path)
    verify_tokenizer(tmp_path, tokenizer)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("a<sep>b", "undefined", "a\n\n\nb", "<s>", "return  x", "a     b"):
        ids, found = tokenizer.encode(text).tolist(), loaded(text, add_special_tokens=False).input_ids
        assert found == ids or are_tied(tokenizer, ids, found)


def test_nothing_is_overwritten(tmp_path):
    run = make_run(tmp_path / "run", make_config())
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "mine.txt").write_text("kept")
    with pytest.raises(SettingError, match="nothing is overwritten"):
        export(run, tmp_path / "hf")
    assert [path.name for path in (tmp_path / "hf").iterdir()] == ["mine.txt"]


def tokenizers() -> dict:
    sample = [(ROOT / "training" / "config.py").read_text(), TEXT]
    return {
        "characters": train_characters(sample),
        "bpe": train_sentencepiece(sample, TokenizerConfig(vocab_size=400)),
        "unigram": train_sentencepiece(sample, TokenizerConfig(vocab_size=400, model_type="unigram")),
    }


NORMALIZING = {  # as published models are trained; ours leave a text as it is
    "defaults": {},
    "bpe": {"model_type": "bpe"},
    "case folding": {"normalization_rule_name": "nmt_nfkc_cf"},
    "spaces only": {"normalization_rule_name": "identity"},
    "no prefix": {"normalization_rule_name": "nfkc", "add_dummy_prefix": False},
}


@pytest.mark.parametrize("kind", NORMALIZING)
def test_sentencepiece_models_with_a_normalizer_are_the_same_in_transformers(kind, tmp_path):
    from sentencepiece import SentencePieceTrainer
    from transformers import AutoTokenizer

    source = (ROOT / "training" / "config.py").read_text()
    SentencePieceTrainer.train(
        sentence_iterator=iter(source.split("\n")),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=500,
        byte_fallback=True,
        minloglevel=2,
        **NORMALIZING[kind],
    )
    tokenizer = SentencePieceTokenizer((tmp_path / "tokenizer.model").read_bytes())
    write_tokenizer_json(tokenizer, tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    texts = [TEXT, "", "  ", " a\n\n\tb   ", "ﬁ ① ｆｕｌｌ Å e\u0301 <0x0A> <unk> < <<s>"]
    for text in [*texts, *source.split("\n")]:
        ids = tokenizer.encode(text).tolist()
        found = loaded(text, add_special_tokens=False).input_ids
        assert found == ids or are_tied(tokenizer, ids, found), text[:60]
        assert loaded.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids)


def test_special_tokens_in_a_text_stay_text_without_a_piece_for_their_first_character(tmp_path):
    from transformers import AutoTokenizer

    sample = [(ROOT / "training" / "config.py").read_text().replace("<", "")]
    tokenizer = train_sentencepiece(sample, TokenizerConfig(vocab_size=400, model_type="unigram"))
    assert tokenizer.processor.piece_to_id("<") == tokenizer.processor.unk_id()
    tokenizer.save(tmp_path)
    write_tokenizer_json(tokenizer, tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("a <s> b</s><unk>", "<0x0A>", "<<s"):
        ids = tokenizer.encode(text).tolist()
        assert loaded(text, add_special_tokens=False).input_ids == ids
        assert loaded.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("kind", ["characters", "bpe", "unigram"])
def test_tokenizers_are_the_same_in_transformers(kind, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = tokenizers()[kind]
    tokenizer.save(tmp_path)
    write_tokenizer_json(tokenizer, tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    texts = [TEXT, "", "  ", (ROOT / "training" / "config.py").read_text()]
    if kind != "characters":
        spelled = [tokenizer.processor.piece_to_id(letter) for letter in "return"]
        assert not are_tied(tokenizer, tokenizer.encode("return").tolist(), spelled)
        texts += ["\ufdd0 \ufdd00 \u2581\u2581 🙂 \x00\u200b", " a\n\n\n\tb   "]
    for text in texts:
        ids = tokenizer.encode(text).tolist()
        found = loaded(text, add_special_tokens=False).input_ids
        assert found == ids or are_tied(tokenizer, ids, found)
        assert loaded(text).input_ids == [tokenizer.bos_id, *found]
        assert loaded.decode(ids, skip_special_tokens=True) == text
    assert (loaded.pad_token_id, loaded.bos_token_id, loaded.eos_token_id) == (0, 1, 2)
    assert load_tokenizer(tmp_path).fingerprint == tokenizer.fingerprint


# Published folders


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory) -> bytes:
    folder = tmp_path_factory.mktemp("tokenizer")
    sample = (ROOT / "training" / "config.py").read_text()
    train_sentencepiece([sample], TokenizerConfig(vocab_size=400)).save(folder)
    return (folder / "tokenizer.model").read_bytes()


PUBLISHED = {
    "architectures": ["TransnormerForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_transnormer.TransnormerConfig",
        "AutoModelForCausalLM": "modeling_transnormer.TransnormerForCausalLM",
    },
    "model_type": "transnormer",
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "vocab_size": 400,
    "use_cache": True,
    "init_std": 0.02,
    "decoder_embed_dim": 32,
    "decoder_layers": 2,
    "decoder_attention_heads": 2,
    "no_scale_embedding": False,
    "add_bos_token": False,
    "norm_type": "simplermsnorm",
    "linear_use_lrpe_list": [1, 0],
    "hidden_dim": 32,
    "linear_act_fun": "swish",
    "glu_dim": 48,
    "bias": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.32.0",
}


class Published:
    """A small folder in the published layout, to be spoiled in one place."""

    def __init__(self, path: Path, tokenizer: bytes, **settings) -> None:
        self.path = path
        path.mkdir()
        self.model = make_model(make_config(vocab_size=400, tie_embeddings=False, **settings)).bfloat16()
        self.weights = dict(self.model.state_dict())
        self.config = dict(PUBLISHED)
        (path / "tokenizer.model").write_bytes(tokenizer)
        for name in ("modeling_transnormer.py", "configuration_transnormer.py"):
            (path / name).write_text(f"open({str(path / 'executed')!r}, 'w')\n")

    def write(self) -> "Published":
        (self.path / "config.json").write_text(json.dumps(self.config))
        weights = {name: tensor.contiguous() for name, tensor in self.weights.items()}
        save_file(weights, self.path / "model.safetensors", metadata={"format": "pt"})
        return self

    def shard(self) -> None:
        names = sorted(self.weights)
        files = {
            "model-00001-of-00002.safetensors": names[::2],
            "model-00002-of-00002.safetensors": names[1::2],
        }
        for file, held in files.items():
            save_file({name: self.weights[name].contiguous() for name in held}, self.path / file)
        (self.path / "model.safetensors").unlink()
        weight_map = {name: file for file, held in files.items() for name in held}
        self.write_index(weight_map)

    def write_index(self, weight_map: dict[str, str]) -> None:
        (self.path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.fixture
def published(tmp_path, sentencepiece_model) -> Published:
    return Published(tmp_path / "published", sentencepiece_model)


def take_in(published: Published) -> TransNormer:
    run_dir = published.path.parent / "run"
    import_main(ImportConfig(source=str(published.path), run_dir=str(run_dir)))
    assert not (published.path / "executed").exists()
    return load_model(find_model(str(run_dir))).model


@pytest.mark.parametrize("sharded", [False, True])
def test_published_weights_come_in(published, sharded, capsys):
    published.write()
    if sharded:
        published.shard()
    model = take_in(published)
    assert not model.config.tie_embeddings
    tokens = torch.randint(400, (1, 40))
    with torch.no_grad():
        assert torch.equal(model(tokens), published.model(tokens))
    assert "separate head, bfloat16" in capsys.readouterr().out


def test_equal_heads_are_tied_unless_the_config_says_otherwise(published):
    published.weights["lm_head.weight"] = published.weights["model.embed_tokens.weight"].clone()
    assert take_in(published.write()).config.tie_embeddings


def test_untied_by_the_config(published):
    published.weights["lm_head.weight"] = published.weights["model.embed_tokens.weight"].clone()
    published.config["tie_word_embeddings"] = False
    assert not take_in(published.write()).config.tie_embeddings


def test_unscaled_embedding_and_softmax_free_defaults(published):
    published.config["no_scale_embedding"] = True
    config = take_in(published.write()).config
    assert not config.scale_embedding
    assert (config.attention, config.decay, config.lrpe, config.gate) == (
        "lightning",
        "published",
        "first",
        "full",
    )


def test_a_low_rank_gate_is_found_by_its_shapes(tmp_path, sentencepiece_model):
    published = Published(tmp_path / "published", sentencepiece_model, gate="low_rank", gate_size=8)
    names = {"qkv_proj": "fused_qkv", "gate_proj.0": "output_gate.down", "gate_proj.1": "output_gate.up"}
    for ours, theirs in names.items():
        published.weights = {key.replace(ours, theirs): value for key, value in published.weights.items()}
    model = take_in(published.write())
    assert (model.config.gate, model.config.gate_size) == ("low_rank", 8)
    tokens = torch.randint(400, (1, 40))
    with torch.no_grad():
        assert torch.equal(model(tokens), published.model(tokens))


@pytest.mark.parametrize("gate_size", [32, 96])
def test_a_low_rank_gate_of_the_size_of_other_projections_is_read_back(
    gate_size, tmp_path, sentencepiece_model
):
    published = Published(tmp_path / "published", sentencepiece_model, gate="low_rank", gate_size=gate_size)
    published.config |= {"gate": "low_rank", "gate_dim": gate_size}
    tokens = torch.randint(400, (1, 40))
    with torch.no_grad():
        assert torch.equal(take_in(published.write())(tokens), published.model(tokens))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_keep_the_dtype_that_they_are_stored_in(dtype, published):
    published.config["torch_dtype"] = "bfloat16"
    published.weights = {name: tensor.to(dtype) for name, tensor in published.weights.items()}
    take_in(published.write())
    weights = load_file(published.path.parent / "run" / "model.safetensors")
    for name, tensor in published.weights.items():
        kept = torch.float32 if name.endswith("theta") else dtype
        assert torch.equal(weights[name], tensor.to(kept)), name


def test_a_run_starts_from_an_import(published):
    take_in(published.write())
    run_dir = published.path.parent / "run"
    model = TransNormer(make_config(vocab_size=400, tie_embeddings=False))
    load_initial_weights(model, run_dir, load_tokenizer(run_dir))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, published.weights[name].float()), name
    with pytest.raises(SettingError, match=f"tokenizer.path={run_dir}\\."):
        load_initial_weights(model, run_dir, ByteTokenizer())


def refusal(published: Published) -> str:
    run_dir = published.path.parent / "run"
    with pytest.raises(SettingError) as caught:
        import_main(ImportConfig(source=str(published.path), run_dir=str(run_dir)))
    assert sorted(path.name for path in published.path.parent.iterdir()) == ["published"]
    assert not (published.path / "executed").exists()
    text = str(caught.value)
    assert "\n" not in text
    assert str(published.path) in text
    return text


@pytest.mark.parametrize(
    ("fields", "texts"),
    [
        ({"use_flash": True}, ["config.json", "unknown fields use_flash"]),
        ({"model_type": "llama"}, ["config.json", "model_type='llama'"]),
        ({"auto_map": {"AutoModel": "evil.Model"}}, ["config.json", "evil.Model", "no code"]),
        ({"auto_map": {"AutoModel": "x/y--modeling_transnormer.M"}}, ["config.json", "no code"]),
        ({"norm_type": "batchnorm"}, ["config.json", "norm_type='batchnorm'", "simplermsnorm"]),
        ({"hidden_dim": 64}, ["config.json", "hidden_dim=64"]),
        ({"bias": True}, ["config.json", "bias=true"]),
        ({"linear_use_lrpe_list": [0, 1]}, ["config.json", "linear_use_lrpe_list=[0, 1]"]),
        ({"decoder_layers": "2"}, ["config.json", "decoder_layers"]),
        ({"decoder_attention_heads": True}, ["config.json", "decoder_attention_heads"]),
        ({"softmax_every": True}, ["config.json", "softmax_every='True' must be of type int"]),
        ({"dropout": "x"}, ["config.json"]),
        ({"torch_dtype": "int8"}, ["config.json", "int8"]),
        ({"decoder_layers": 3, "linear_use_lrpe_list": [1, 0, 0]}, ["layers.2", "is missing"]),
        ({"glu_dim": 56}, ["l1.weight is (48, 32), expected (56, 32)"]),
        ({"tie_word_embeddings": True}, ["config.json", "lm_head.weight differs"]),
        ({"tie_word_embeddings": None}, ["config.json", "tie_word_embeddings='None' must be true or false"]),
        (
            {"no_scale_embedding": "false"},
            ["config.json", "no_scale_embedding='false' must be true or false"],
        ),
    ],
)
def test_bad_configs_are_refused(published, fields, texts):
    published.config |= fields
    message = refusal(published.write())
    for text in texts:
        assert text in message


def test_unknown_and_missing_keys_are_listed(published):
    published.weights["model.layers.1.extra"] = torch.zeros(3)
    del published.weights["model.layers.0.channel_mixer.l2.weight"]
    text = refusal(published.write())
    assert "model.layers.1.extra is unknown" in text
    assert "model.layers.0.channel_mixer.l2.weight is missing" in text


def test_an_unknown_gate_is_refused_with_the_list(published):
    weights = published.weights
    for layer in range(2):
        key = f"model.layers.{layer}.token_mixer.qkvu_proj.weight"
        weights[key.replace("qkvu", "mystery")] = weights.pop(key)
    assert "mystery_proj.weight (128, 32)" in refusal(published.write())


def pickle_weights(published: Published, weights: dict) -> Path:
    file = published.path / "pytorch_model.bin"
    (published.path / "model.safetensors").unlink(missing_ok=True)
    torch.save(weights, file)
    return file


def test_older_folders_hold_pickled_tensors(published):
    pickle_weights(published.write(), published.weights)
    loaded = take_in(published)
    weights = loaded.state_dict()
    assert all(
        torch.equal(weights[name], tensor.to(weights[name].dtype))
        for name, tensor in published.weights.items()
    )


def test_pickled_tensors_may_be_in_parts(published):
    file = pickle_weights(published.write(), published.weights)
    names = sorted(published.weights)
    parts = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
    for part, held in parts.items():
        torch.save({name: published.weights[name] for name in held}, published.path / part)
    file.unlink()
    weight_map = {name: part for part, held in parts.items() for name in held}
    (published.path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    take_in(published)


class Command:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_of_a_pickle_only_tensors_are_made(published):
    file = pickle_weights(
        published.write(), published.weights | {"more": Command(published.path / "executed")}
    )
    assert "holds other objects than tensors" in refusal(published)
    torch.save({"a": 1}, file)
    assert "a is not a tensor" in refusal(published)
    torch.save([torch.ones(2)], file)
    assert "must hold a dictionary of tensors, not list" in refusal(published)
    file.write_bytes(pickle.dumps({"a": 1}))
    assert "is damaged, or not what torch.save has written" in refusal(published)
    file.rename(published.path / "model.safetensors")
    assert "model.safetensors is not a safetensors file" in refusal(published)


def test_links_and_paths_are_not_followed(published, tmp_path_factory):
    published.write()
    outside = tmp_path_factory.mktemp("outside") / "model.safetensors"
    (published.path / "model.safetensors").rename(outside)
    (published.path / "model.safetensors").symlink_to(outside)
    assert "is a link" in refusal(published)
    (published.path / "model.safetensors").unlink()
    published.write_index(dict.fromkeys(published.weights, f"../{outside.parent.name}/model.safetensors"))
    assert "only plain names" in refusal(published)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantised_weights_are_refused(published, dtype):
    name = "model.layers.1.channel_mixer.l1.weight"
    published.weights[name] = published.weights[name].to(dtype)
    text = refusal(published.write())
    assert f"{name} is stored as {str(dtype).removeprefix('torch.')}; allowed are float32" in text


def test_an_index_that_does_not_fit_is_refused(published):
    published.write()
    published.shard()
    index = published.path / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    weight_map["model.layers.9.extra"] = "model-00001-of-00002.safetensors"
    published.write_index(weight_map)
    assert "model.layers.9.extra" in refusal(published)


def test_a_tokenizer_of_another_size_is_refused(published, sentencepiece_model):
    smaller, larger = 256, 600
    for vocab_size in (smaller, larger):
        rows = torch.zeros(vocab_size, 32, dtype=torch.bfloat16)
        published.weights |= {"model.embed_tokens.weight": rows, "lm_head.weight": rows.clone()}
        published.config["vocab_size"] = vocab_size
        text = refusal(published.write())
        assert "the tokenizer has 400 ids" in text
        assert f"vocab_size of {vocab_size}" in text


def test_a_missing_tokenizer_or_config_is_named(published):
    published.write()
    (published.path / "tokenizer.model").unlink()
    assert "holds no tokenizer" in refusal(published)
    (published.path / "config.json").write_text("{")
    assert "config.json is not valid JSON" in refusal(published)
