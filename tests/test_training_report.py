"""report.md and its plots: complete from a full run folder, and made from whatever is there."""

import json
import shlex

import pytest
import yaml

from models.config import ModelConfig
from training import plots
from training.config import compose, override
from training.errors import SettingError
from training.evaluation_results import with_unique_data_names
from training.report import fenced, write_run_report
from training.run_folder import RunFolder
from training.saved_config import flatten, load_saved_config, save_config
from training.train_config import TrainConfig

PNG = b"\x89PNG\r\n\x1a\n"


def make_folder(path) -> RunFolder:
    """A run folder with two steps, two evaluations and a sample, without any training."""
    folder = RunFolder(path)
    folder.evaluations.mkdir(parents=True)
    config = compose(TrainConfig, [f"run_dir={path}", "model=tnl-tiny", "max_steps=7", "seq_len=64"], "train")
    config.model.vocab_size = 300
    save_config(config, folder.config)
    lines = [
        {"step": 1, "tokens": 64, "loss": 5.5, "grad_norm": 1.5, "lr": 0.1, "tokens_per_second": 10.0},
        {"step": 2, "tokens": 128, "skipped": True},
        {"step": 3, "tokens": 192, "loss": 4.25, "grad_norm": None, "lr": 0.05, "tokens_per_second": 12.0},
        {"step": 3, "tokens": 192, "valid_loss": 4.5, "valid_perplexity": 90.0, "valid_bits_per_byte": 2.0},
    ]
    layers = {"layer_grad_norms": [0.5, None], "layer_activation_rms": [1.0, 2.0]}
    lines += [{"step": 3, "tokens": 192, **layers}]
    folder.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "lo')
    sample = {"step": 3, "prompt": "def ", "text": "x():\n```\n# not a heading"}
    folder.samples.write_text(json.dumps(sample) + "\n")
    for step in (2, 3):
        result = {
            "seq_len": 64,
            "window": "disjoint",
            "precision": "bf16",
            "tokens": 5,
            "bytes": 9,
            "loss": 4.0 + step,
            "loss_low": None,
            "loss_high": None,
            "perplexity": 55.0,
            "bits_per_byte": 2.5,
            "loss_by_position": [[0, 1, 5.0], [1, 1, 4.0]],
        }
        evaluation = {"checkpoint": "c", "tokenizer": "t", "data": "some|text", "step": step}
        evaluation |= {"training_tokens": 64 * step, "results": [result]}
        (folder.evaluations / f"step_{step:08d}-text.json").write_text(json.dumps(evaluation))
    return folder


def test_full_report(tmp_path):
    folder = make_folder(tmp_path / "run")
    write_run_report(folder)
    report = folder.report.read_text()
    assert report.startswith("# run\n")
    assert f"{ModelConfig(vocab_size=300).num_parameters():,} parameters" in report
    assert "after 3 of 7 steps and 192 tokens" in report
    assert "| training loss | 4.2500 nats per token |" in report
    assert "| validation bits per byte | 2.0000 |" in report
    assert "| steps skipped for a non-finite gradient | 1 |" in report
    assert "| step 3 | some\\|text | 64 | disjoint | bf16 | 5 | 7.0000 | – | 55.000 | – | 2.5000 |" in report
    assert "````text\ndef x():\n```\n# not a heading\n````" in report
    names = ["loss", "optimization", "throughput", "perplexity_by_length", "loss_by_position"]
    for name in [*names, "layers", "perplexity_over_tokens"]:
        assert f"](plots/{name}.png)" in report
        assert (folder.plots / f"{name}.png").read_bytes().startswith(PNG)


def test_the_final_training_loss_is_the_mean_of_the_last_tenth(tmp_path):
    folder = make_folder(tmp_path / "run")
    lines = [{"step": 10 * i, "tokens": 640 * i, "loss": float(i)} for i in range(1, 31)]
    folder.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_run_report(folder)
    row = "| training loss, mean of 3 logged steps from 280 on | 29.0000 nats per token |"
    assert row in folder.report.read_text()


def test_evaluations_of_different_kinds_are_lines_of_their_own(tmp_path, monkeypatch):
    folder = make_folder(tmp_path / "run")
    file = folder.evaluations / "step_00000003-text.json"
    evaluation = json.loads(file.read_text())
    (result,) = evaluation["results"]
    kinds = ({"precision": "fp32"}, {"max_tokens": 5}, {"window": "strided", "stride": 8})
    evaluation["results"] = [result, *(result | kind for kind in kinds), result | {"seq_len": 128}]
    file.write_text(json.dumps(evaluation))
    drawn = {}
    monkeypatch.setattr(plots, "plot_perplexity_by_length", lambda _, lines: drawn.update(by_length=lines))
    monkeypatch.setattr(plots, "plot_perplexity_over_tokens", lambda _, lines: drawn.update(over=lines))
    write_run_report(folder)
    labels = {label: lengths for label, lengths, _ in drawn["by_length"]}
    text = "step 3 on some|text, "
    assert labels == {
        f"{text}disjoint bf16": [64, 128],
        f"{text}disjoint fp32": [64],
        f"{text}disjoint max_tokens=5 bf16": [64],
        f"{text}strided stride=8 bf16": [64],
    }
    over_tokens = {label: tokens for label, tokens, _ in drawn["over"]}
    assert over_tokens["some|text, disjoint bf16, seq_len 64"] == [128, 192]


@pytest.mark.parametrize("missing", ["config.yaml", "metrics.jsonl", "samples.jsonl", "eval"])
def test_report_without_one_input(tmp_path, missing):
    folder = make_folder(tmp_path / "run")
    path = folder.path / missing
    for file in path.glob("*") if path.is_dir() else [path]:
        file.unlink()
    write_run_report(folder)
    report = folder.report.read_text()
    sections = {"config.yaml": "Settings", "metrics.jsonl": "Final figures", "samples.jsonl": "Samples"}
    for name, section in (sections | {"eval": "Evaluations"}).items():
        assert (f"## {section}\n" in report) == (name != missing)


def test_report_of_an_empty_folder(tmp_path):
    folder = RunFolder(tmp_path)
    write_run_report(folder)
    assert "Nothing has been trained here yet." in folder.report.read_text()
    assert not folder.plots.exists()


def test_damaged_evaluation_is_named(tmp_path):
    folder = make_folder(tmp_path / "run")
    (folder.evaluations / "step_00000009-cut.json").write_text('{"results": [{"seq_')
    (folder.evaluations / "step_00000010-list.json").write_text("[]")
    write_run_report(folder)
    report = folder.report.read_text()
    assert "`eval/step_00000009-cut.json` can't be read" in report
    assert "`eval/step_00000010-list.json` can't be read" in report


RESULT = {"seq_len": 8, "tokens": 9, "loss": 1.5, "bits_per_byte": 0.5, "window": "disjoint"}


@pytest.mark.parametrize(
    "results", [["a"], {"a": 1}, "abc", [RESULT | {"loss_low": 1.4}], [RESULT | {"perplexity": "x"}]]
)
def test_an_evaluation_of_wrong_kinds_is_named(results, tmp_path):
    folder = make_folder(tmp_path / "run")
    evaluation = {"data": "other", "results": results}
    (folder.evaluations / "step_00000010-other.json").write_text(json.dumps(evaluation))
    write_run_report(folder)
    assert "`eval/step_00000010-other.json` can't be read" in folder.report.read_text()


def test_an_evaluation_needs_no_optional_figures(tmp_path):
    folder = make_folder(tmp_path / "run")
    evaluation = {"checkpoint": "exports/x", "data": "other", "results": [RESULT]}
    (folder.evaluations / "x-other.json").write_text(json.dumps(evaluation))
    write_run_report(folder)
    (row,) = (line for line in folder.report.read_text().splitlines() if line.startswith("| x | other"))
    assert row == "| x | other | 8 | disjoint | – | 9 | 1.5000 | – | – | – | 0.5000 |"


def test_a_length_of_another_kind_is_refused(tmp_path):
    folder = make_folder(tmp_path / "run")
    settings = yaml.safe_load(folder.config.read_text()) | {"seq_len": ["8"]}
    folder.config.write_text(yaml.safe_dump(settings))
    with pytest.raises(SettingError, match="seq_len"):
        write_run_report(folder)


@pytest.mark.parametrize("start", [(), ("resume=never", "overwrite=true")])
def test_resume_command_gives_the_same_settings(start, tmp_path):
    """What the report says to type composes into the run's settings, odd strings too, and resumes."""
    folder = RunFolder(tmp_path / "a run")
    folder.path.mkdir()
    arguments = [f"run_dir='{folder.path}'", "model=llama-tiny", "schedule=wsd", "tokenizer=bytes"]
    arguments += ["data=text", "data.path=some/text.txt", "engine.zero_stage=2", "optim.lr=3e-5"]
    arguments += ["sample_prompt='it''s \"x\", {y}'".replace("''", "\\'"), "wandb.enabled=true"]
    arguments += [*start]
    config = compose(TrainConfig, arguments, "train")
    assert config.sample_prompt == 'it\'s "x", {y}'
    save_config(config, folder.config)
    write_run_report(folder)
    command = next(line for line in folder.report.read_text().splitlines() if "train.py" in line)
    words = shlex.split(command)
    assert words[:2] == ["python", "train.py"]
    resumed = {"resume": "auto", "overwrite": False}
    saved = flatten(load_saved_config(folder.config))
    assert flatten(compose(TrainConfig, words[2:], "train")) == saved | resumed


def test_override_quotes_what_hydra_would_read_otherwise():
    assert override("key", None) == "key=null"
    assert override("key", True) == "key=true"
    assert override("key", "a/b-1.txt") == "key=a/b-1.txt"
    assert override("key", "def ") == "key='def '"


def test_fence_is_longer_than_the_text_s():
    assert fenced("a") == "```text\na\n```"
    assert fenced("````") == "`````text\n````\n`````"


def test_different_data_of_one_name_get_unique_names():
    same = [{"data": "text", "data_fingerprint": "0" * 40, "step": step} for step in (1, 2)]
    other = {"data": "text", "data_fingerprint": "1" * 40, "step": 2}
    assert with_unique_data_names(same) == same
    assert [e["data"] for e in with_unique_data_names([*same, other])] == ["text (00000000)"] * 2 + [
        "text (11111111)"
    ]
