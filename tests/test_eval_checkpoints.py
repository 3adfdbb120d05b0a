"""eval.py: the right numbers in the right files, reused when nothing changed, and refusals in a line."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from training_helpers import run

from data.config import DataConfig, TokenizerConfig
from data.errors import DataError
from data.prepare import prepare, prepare_folder
from data.tokenizer import ByteTokenizer
from eval import with_implied_groups
from models.transnormer import TransNormer
from training import evaluate_checkpoints as module
from training.checkpoint import save_checkpoint
from training.config import compose
from training.distributed import World
from training.engine import Fragment
from training.errors import SettingError
from training.evaluate_checkpoints import EvalConfig, evaluate_checkpoints
from training.model_folder import write_model_folder
from training.saved_config import save_config
from training.train_config import TrainConfig
from training.weights import load_model

ALONE = World(0, 1, torch.device("cpu"))
MODEL = ["model.hidden_size=32", "model.num_layers=2", "model.num_heads=2", "model.glu_size=48"]


def text_of(num_words: int, seed: int = 0) -> str:
    random = np.random.default_rng(seed)
    return " ".join(random.choice(["def", "ä", "return", "x", "(y)"], num_words)) + "\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working folder whose caches are its own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make_run(path: Path, steps=(3,)) -> Path:
    """A run folder with checkpoints of random models, trained on 40 uneven documents in corpus.jsonl."""
    texts = [text_of(1 + 7 * (index % 9), index) for index in range(40)]
    Path("corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    path.mkdir()
    save_config(run_config(), path / "config.yaml")
    for step in steps:
        write_checkpoint(path / "checkpoints", step, seed=step)
    return path


def run_config() -> TrainConfig:
    arguments = ["data=text", "data.path=corpus.jsonl", "data.valid_fraction=0.3", "tokenizer=bytes"]
    arguments += ["seq_len=64", "batch_tokens=128", "engine.precision=fp32"]
    config = compose(TrainConfig, [*arguments, *MODEL], "train")
    config.model.vocab_size = ByteTokenizer.vocab_size
    return config


def write_checkpoint(root: Path, step: int, seed: int) -> Path:
    config = run_config()
    model = TransNormer(config.model, seed)
    fragments = []
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten() * (1.0 if "theta" in name else 3.0)
        moments = {"exp_avg": torch.zeros_like(flat), "exp_avg_sq": torch.zeros_like(flat)}
        fragments.append(Fragment(name, tuple(parameter.shape), 0, {"param": flat, **moments}))

    def write_files(folder: Path) -> None:
        save_config(config, folder / "config.yaml")
        (folder / "tokenizer").mkdir()
        ByteTokenizer().save(folder / "tokenizer")

    state = {"step": step, "tokens": 128 * step}
    return save_checkpoint(
        root, step=step, fragments=fragments, world=ALONE, write_files=write_files, state=state, facts={}
    )


def score(*arguments: str) -> int:
    return evaluate_checkpoints(compose(EvalConfig, with_implied_groups(list(arguments)), "eval"))


def results_of(run: Path, name: str = "step_00000003-corpus.json") -> dict:
    return json.loads((run / "eval" / name).read_text())


@torch.no_grad()
def plain_loss(checkpoint: Path, documents: list[bytes], seq_len: int, precision: str | None = None) -> float:
    """Mean loss over documents in disjoint windows, from logits, one window at a time."""
    model = load_model(checkpoint, precision=precision).model
    losses = []
    for document in documents:
        ids = torch.tensor([1, *(4 + byte for byte in document), 2])
        for start in range(0, len(ids) - 1, seq_len):
            targets = ids[start + 1 : start + seq_len + 1]
            logits = model(ids[None, start : start + len(targets)])[0].double()
            losses += torch.nn.functional.cross_entropy(logits, targets, reduction="none").tolist()
    return float(np.mean(losses))


def test_a_text_is_scored_as_a_whole_and_exactly(folder, capsys):
    run = make_run(folder / "run")
    text = text_of(100) + "last"
    Path("some text.txt").write_text(text)
    assert score(f"checkpoint={run}", "data.path='some text.txt'", "seq_lens=[16,64]") == 0
    content = results_of(run, "step_00000003-some_text.json")
    assert content["checkpoint"] == str(run / "checkpoints" / "step_00000003")
    assert (content["data"], content["step"], content["training_tokens"]) == ("some_text", 3, 384)
    assert content["tokenizer"] == ByteTokenizer.fingerprint
    num_bytes = len(text.encode())
    for result, seq_len in zip(content["results"], (16, 64), strict=True):
        expected = plain_loss(run / "checkpoints/step_00000003", [text.encode()], seq_len)
        assert (result["seq_len"], result["window"]) == (seq_len, "disjoint")
        assert (result["tokens"], result["bytes"]) == (num_bytes + 1, num_bytes)
        assert result["loss"] == pytest.approx(expected, abs=1e-5)
        assert result["perplexity"] == pytest.approx(math.exp(expected), rel=1e-4)
        summed = (num_bytes + 1) * result["loss"]
        assert result["bits_per_byte"] == pytest.approx(summed / math.log(2) / num_bytes)
        assert result["word_perplexity"] == pytest.approx(math.exp(summed / len(text.split())))
    table = capsys.readouterr().out.splitlines()
    assert table[0].startswith("window=disjoint: ")
    assert [line.split()[:4] for line in table[2:]] == [
        ["step", "3", "some_text", "16"],
        ["step", "3", "some_text", "64"],
    ]
    assert (run / "plots/perplexity_by_length.png").stat().st_size > 1000


def test_default_is_the_run_s_validation_split_at_its_length(folder):
    run = make_run(folder / "run")
    assert score(f"checkpoint={run}") == 0
    (result,) = results_of(run)["results"]
    assert result["seq_len"] == 64
    texts = [json.loads(line)["text"] for line in Path("corpus.jsonl").read_text().splitlines()]
    assert 0 < result["documents"] < len(texts)
    assert 0 < result["bytes"] < len("".join(texts).encode())
    assert result["loss_low"] < result["loss"] < result["loss_high"]


def test_second_call_computes_nothing_and_other_lengths_are_added(folder, monkeypatch, capsys):
    run = make_run(folder / "run")
    assert score(f"checkpoint={run}", "seq_lens=[16,32]") == 0
    first, first_table = results_of(run), capsys.readouterr().out

    def refuse(*_):
        raise AssertionError("there was nothing to compute")

    with monkeypatch.context() as patch:
        patch.setattr(module, "load_model", refuse)
        assert score(f"checkpoint={run}", "seq_lens=[16,32]") == 0
        assert capsys.readouterr().out == first_table
        changed_settings = ("window=strided", "max_tokens=50", "precision=bf16", "window=strided stride=3")
        for setting in changed_settings:
            with pytest.raises(AssertionError, match="nothing to compute"):
                score(f"checkpoint={run}", "seq_lens=[16]", *setting.split())
    assert score(f"checkpoint={run}", "seq_lens=[64]", "output=out/mine.json") == 0
    assert results_of(run)["results"][:2] == first["results"]
    assert [result["seq_len"] for result in results_of(run)["results"]] == [16, 32, 64]
    mine = json.loads(Path("out/mine.json").read_text())
    assert [result["seq_len"] for result in mine["results"]] == [64]


def test_results_of_other_weights_are_not_reused(folder):
    run = make_run(folder / "run")
    score(f"checkpoint={run}", "seq_lens=[16,32]")
    before = results_of(run)["results"][0]["loss"]
    write_checkpoint(run / "checkpoints", step=3, seed=99)
    score(f"checkpoint={run}", "seq_lens=[16]")
    (result,) = results_of(run)["results"]
    assert abs(result["loss"] - before) > 1e-3


def test_text_without_spaces_has_word_perplexities_that_are_kept(folder):
    """They may be as large as a float goes."""
    run = make_run(folder / "run")
    Path("zh.txt").write_text("線性注意力" * 3)
    for window in ("disjoint", "streaming"):
        score(f"checkpoint={run}", "data.path=zh.txt", "seq_lens=[16]", f"window={window}")
    results = results_of(run, "step_00000003-zh.json")["results"]
    assert [result["window"] for result in results] == ["disjoint", "streaming"]
    assert results[0]["word_perplexity"] > 1e30


def test_texts_of_one_name_don_t_overwrite_each_other(folder):
    run = make_run(folder / "run")
    for place, words in (("a", 30), ("b", 60)):
        Path(place).mkdir()
        Path(place, "text.txt").write_text(text_of(words, seed=words))
        score(f"checkpoint={run}", f"data.path={place}/text.txt", "seq_lens=[16]")
    first = results_of(run, "step_00000003-text.json")
    (second,) = (run / "eval").glob("step_00000003-text-*.json")
    second = json.loads(second.read_text())
    assert first["results"][0]["bytes"] == len(text_of(30, seed=30).encode())
    assert second["results"][0]["bytes"] == len(text_of(60, seed=60).encode())


def test_a_run_s_history_in_one_table_plot_and_file(folder, capsys):
    run = make_run(folder / "run", steps=(1, 2, 10))
    assert score(f"checkpoint={run}/checkpoints/*", "seq_lens=[32]", "output=all.json") == 0
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()[2:]] == ["1", "2", "10"]
    contents = json.loads(Path("all.json").read_text())
    assert [content["step"] for content in contents] == [1, 2, 10]
    assert len({content["results"][0]["loss"] for content in contents}) == 3
    assert (run / "plots/perplexity_over_tokens.png").exists()


def test_a_glob_leaves_out_what_is_no_model(folder, capsys):
    (folder / "runs/b").mkdir(parents=True)
    make_run(folder / "runs/a")
    assert score(f"checkpoint={folder}/runs/*", "seq_lens=[32]") == 0
    assert "runs/b: neither a run folder" in capsys.readouterr().err
    with pytest.raises(SettingError, match="runs/b: neither a run folder"):
        score(f"checkpoint={folder}/runs/b*", "seq_lens=[32]")


def test_points_that_fail_leave_the_others(folder, capsys, monkeypatch):
    """A length without memory, one that is too long, a damaged checkpoint: the rest is scored and kept."""
    run = make_run(folder / "run", steps=(3, 4))
    (run / "checkpoints/step_00000004/manifest.sha256").unlink()

    def load_with_little_memory(*arguments):
        trained = load_model(*arguments)
        forward = trained.model.forward

        def limited(tokens, *others, **settings):
            if settings["cu_seqlens"].diff().max() > 100:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return forward(tokens, *others, **settings)

        trained.model.forward = limited
        return trained

    monkeypatch.setattr(module, "load_model", load_with_little_memory)
    with pytest.raises(SettingError) as caught:
        score(f"checkpoint={run}/checkpoints/*", "seq_lens=[128,5000,32]")
    assert str(caught.value).splitlines() == [
        "seq_lens=128: out of memory. Use a shorter length, or a smaller batch_tokens.",
        "a length of 5000 is longer than the longest document (230 tokens): use a shorter one, a longer "
        "text, or window=streaming.",
        f"{run}/checkpoints/step_00000004 is not a complete checkpoint: manifest.sha256 is missing.",
    ]
    assert [result["seq_len"] for result in results_of(run)["results"]] == [32]
    assert [line.split()[3] for line in capsys.readouterr().out.splitlines()[2:]] == ["32"]


@pytest.mark.slow
@torch.no_grad()
def test_an_export_scores_as_its_checkpoint_and_as_transformers_does(folder, capsys):
    from transformers import AutoModelForCausalLM

    run = make_run(folder / "run")
    trained = load_model(run / "checkpoints/step_00000003")
    write_model_folder(trained.model, trained.tokenizer, Path("export"))
    score("checkpoint=run", "data.path=corpus.jsonl", "seq_lens=[32]")
    score("checkpoint=export", "data.path=corpus.jsonl", "seq_lens=[32]")
    loss = results_of(run)["results"][0]["loss"]
    exported = json.loads(Path("export/eval/export-corpus.json").read_text())
    assert exported["step"] is None
    assert exported["results"][0]["loss"] == pytest.approx(loss, abs=1e-6)
    theirs = AutoModelForCausalLM.from_pretrained("export", trust_remote_code=True, dtype=torch.float32)
    losses: list[float] = []
    for line in Path("corpus.jsonl").read_text().splitlines():
        ids = torch.tensor([1, *(4 + byte for byte in json.loads(line)["text"].encode()), 2])
        for start in range(0, len(ids) - 1, 32):
            targets = ids[start + 1 : start + 33]
            logits = theirs(ids[None, start : start + len(targets)]).logits[0]
            losses += torch.nn.functional.cross_entropy(logits, targets, reduction="none").tolist()
    assert np.mean(losses) == pytest.approx(loss, abs=1e-4)
    capsys.readouterr()
    assert score("checkpoint='[re][ux][np]*'", "data.path=corpus.jsonl", "seq_lens=[32]") == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[2:]] == ["export", "run"]
    with pytest.raises(SettingError, match="data is not set, and export does not say"):
        score("checkpoint=export")
    with pytest.raises(SettingError, match="seq_lens is not set, and export does not say"):
        score("checkpoint=export", "data.path=corpus.jsonl")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["checkpoint=nowhere"], "checkpoint=nowhere: no such folder"),
        (["checkpoint='no*'"], r"checkpoint=no\*: no file or folder matches"),
        ([], "checkpoint is not set"),
        (["checkpoint=run", "seq_lens=[16,0]"], r"seq_lens=\[16, 0\] must be"),
        (["checkpoint=run", "seq_lens=[]"], r"seq_lens=\[\] must be"),
        (["checkpoint=run", "window=sliding"], "window='sliding' is unknown. Allowed: disjoint"),
        (["checkpoint=run", "stride=4"], "stride=4 needs window=strided"),
        (["checkpoint=run", "window=strided", "stride=65"], "stride=65 is longer than the length, 64"),
        (["checkpoint=run", "precision=fp8"], "precision='fp8' is unknown"),
        (["checkpoint=run", "data.path=none.txt"], "data.path=none.txt: no such file"),
        (["checkpoint=run", "data.path=empty.txt"], "no document with any text in empty.txt"),
        (["checkpoint=run", "data.path=short.txt", "seq_lens=[64]"], "longer than the longest document"),
        (["checkpoint=run", "tokenizer=sentencepiece"], "tokenizer=sentencepiece is not the tokenizer of"),
        (["checkpoint=run", "output=run"], "output=run is a folder"),
        (["checkpoint=run/eval"], "neither a run folder nor a checkpoint nor an export"),
    ],
)
def test_refusals(folder, arguments, message):
    run = make_run(folder / "run")
    (run / "eval").mkdir()
    Path("empty.txt").write_text("")
    Path("short.txt").write_text("x = 1")
    with pytest.raises(SettingError, match=message) as caught:
        score(*arguments)
    assert str(caught.value).count("\n") == 0


def test_a_limit_in_tokens_sets_the_length_by_what_is_scored(folder):
    run = make_run(folder / "run")
    texts = ["x" * 10, "y" * 10, "z" * 1000]
    Path("uneven.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    assert score("checkpoint=run", "data.path=uneven.jsonl", "max_tokens=20") == 0
    (result,) = results_of(run, "step_00000003-uneven.json")["results"]
    assert result["seq_len"] == 11


def test_results_without_results_are_written_anew(folder):
    run = make_run(folder / "run")
    assert score("checkpoint=run", "data.path=corpus.jsonl") == 0
    (file,) = (run / "eval").glob("*.json")
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"results": 3}))
    assert score("checkpoint=run", "data.path=corpus.jsonl") == 0
    assert json.loads(file.read_text()) == content


def test_shards_of_another_tokenizer_are_refused(folder):
    run = make_run(folder / "run")
    data = DataConfig(source="text", path="corpus.jsonl", valid_fraction=0.5)
    prepare_folder(Path("letters"), data, TokenizerConfig(kind="characters"), log=lambda _: None)
    with pytest.raises(SettingError, match="does not match the shards in letters"):
        score(f"checkpoint={run}", "data=prepared", "data.path=letters")
    prepare_folder(Path("bytes"), data, TokenizerConfig(kind="bytes"), log=lambda _: None)
    assert score(f"checkpoint={run}", "data=prepared", "data.path=bytes") == 0


@pytest.mark.slow
@pytest.mark.parametrize(("window", "ranks"), [("disjoint", 2), ("disjoint", 4), ("streaming", 2)])
def test_ranks_agree(folder, window, ranks):
    """Processes on uneven documents give the perplexity of one; a failing length hangs none of them."""
    run_folder = make_run(folder / "run")
    settings = [f"window={window}", "data.path=corpus.jsonl", "seq_lens=[32,100000]", "batch_tokens=96"]
    if window == "disjoint":
        with pytest.raises(SettingError, match="a length of 100000 is longer than the longest"):
            score("checkpoint=run", *settings)
    else:
        score("checkpoint=run", *settings)
    (file,) = (run_folder / "eval").glob("*.json")
    alone = json.loads(file.read_text())["results"]
    file.unlink()
    done = run(["eval.py", "checkpoint=run", *settings], ranks, cwd=folder)
    assert (done.returncode == 0) == (window == "streaming"), done.stderr
    assert done.stdout.count("step 3") == len(alone)
    together = json.loads(file.read_text())["results"]
    perplexities = [result["perplexity"] for result in together]
    assert perplexities == pytest.approx([result["perplexity"] for result in alone], rel=1e-6)


@pytest.mark.slow
def test_training_s_validation_eval_and_a_plain_loop_agree(folder):
    """In bf16, as trained: metrics.jsonl, eval.py and logits of one window after another."""
    make_run(folder / "other")  # for its corpus
    arguments = ["run_dir=run", "data=text", "data.path=corpus.jsonl", "data.valid_fraction=0.3"]
    arguments += ["tokenizer=bytes", "seq_len=64", "batch_tokens=128", "max_steps=3", "eval_every=3"]
    arguments += ["engine.precision=bf16", "optim.lr=0.02", "sample_every=0", *MODEL]
    assert run(["train.py", *arguments], cwd=folder).returncode == 0
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    valid_loss = lines[-1]["valid_loss"]
    assert score("checkpoint=run") == 0
    (result,) = results_of(Path("run"))["results"]
    assert result["precision"] == "bf16"
    assert result["loss"] == pytest.approx(valid_loss, abs=1e-4)
    data = DataConfig(source="text", path="corpus.jsonl", valid_fraction=0.3)
    valid = prepare(data, TokenizerConfig(kind="bytes")).valid
    documents = [bytes((ids[1:-1] - 4).tolist()) for ids, _ in valid]
    plain = plain_loss(Path("run/checkpoints/step_00000003"), documents, 64)
    assert plain == pytest.approx(valid_loss, abs=1e-4)


def test_a_model_on_a_disk_that_can_t_be_written_is_scored_all_the_same(folder, capsys, monkeypatch):
    make_run(folder / "run")

    def refuse(file: Path, content) -> None:
        if file.parent.name == "eval":
            raise DataError(f"{file.parent} can't be written (Read-only file system): choose another folder")
        write(file, content)

    write = module._write
    monkeypatch.setattr(module, "_write", refuse)
    with pytest.raises(SettingError, match=r"can't be written .* Or give output=FILE"):
        score("checkpoint=run", "seq_lens=[16,32]")
    assert [line.split()[3] for line in capsys.readouterr().out.splitlines()[2:]] == ["16", "32"]
    assert score("checkpoint=run", "seq_lens=[16,32]", "output=here.json") == 0
    assert [result["seq_len"] for result in json.loads(Path("here.json").read_text())["results"]] == [16, 32]
    assert "results are kept in here.json only" in capsys.readouterr().err
