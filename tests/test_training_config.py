"""Settings: what is accepted, and that what is refused is refused in one or two helpful lines."""

import sys
from dataclasses import asdict, replace
from itertools import pairwise

import pytest
import torch
import yaml
from training_helpers import run, settings

from data.errors import DataError
from scripts.benchmark_kernels import KernelBenchmarkConfig
from scripts.generate import GenerateConfig
from scripts.sweep import SweepConfig
from training.command import command_line
from training.config import compose, override, sweep_points
from training.errors import SettingError
from training.optimizer import ScheduleConfig, default_lr, lr_factor
from training.saved_config import check_resumable, flatten, load_saved_config, model_config_from, save_config
from training.train_config import EngineConfig, TrainConfig

REFUSED = [
    ("modle=tnl-1b", "modle: unknown setting. Did you mean model?"),
    ("model.num_head=3", "Did you mean model.num_heads?"),
    ("model=tnl-9b", "Allowed: llama-13b"),
    ("micro_batch_size=)(", "a number of sequences, or auto"),
    ("micro_batch_size=1,2", "a number of sequences, or auto"),
    ("seq_len=0", "seq_len=0 must be at least 1"),
    ("seq_len=many", "seq_len=many: must be a whole number."),
    ("seq_len=null", "seq_len=null: must be a whole number."),
    (
        "seq_len=???",
        "seq_len=???: ??? is OmegaConf's mark of a missing value. Give a value, or leave seq_len out.",
    ),
    ("sample_prompt='???'", "mark of a missing value"),
    ("run_dir=a${x}", "run_dir=a${x}: Interpolation key 'x' not found. Write \\${ for a plain ${; "),
    ("sample_tokens=0", "must be at least 1"),
    ("run_dir=null", "run_dir=null: must be a text."),
    ("run_dir=", "run_dir= is empty"),
    ("overwrite=perhaps", "overwrite=perhaps: must be true or false."),
    ("optim.lr=fast", "optim.lr=fast: must be a number, or null."),
    ("optim.lr=inf", "optim.lr=inf must be a finite number"),
    ("optim.grad_clip=nan", "optim.grad_clip=nan must be a finite number"),
    ("seed=99999999999999999999", "at most 64 bits"),
    ("micro_batch_size=true", "a number of sequences, or auto"),
    ("model.num_layers=99999999999", "model.num_layers=99999999999"),
    ("experiment=dmeo", "experiment=dmeo: unknown. Allowed: ablations, demo"),
    ("experiment=demo,length", "Allowed: ablations, demo"),
    ("model=null", "model=null: unknown. Allowed: llama-13b"),
    ("wandb=true", "wandb.<part>=value"),
    ("+foo=1", "foo: unknown setting"),
    ("data@x=text", "data@x: unknown setting"),
    ("a b=c", "a b: unknown setting"),
    ("batch_tokens=1000", "batch_tokens=1000 is not a multiple of seq_len=1024"),
    ("batch_tokens=5000", "Try batch_tokens=4096"),
    ("max_steps=-1", "max_steps=-1 must be at least 1"),
    ("resume=maybe", "Allowed: auto, never, must"),
    ("micro_batch_size=some", "a number of sequences, or auto"),
    ("micro_batch_size=0", "micro_batch_size=0"),
    ("optim.lr=-1", "optim.lr=-1.0 must be above 0"),
    ("optim.beta1=1", "optim.beta1=1.0"),
    ("schedule.min_lr_ratio=2", "between 0 and 1"),
    ("engine.precision=fp8", "Allowed: auto, bf16, fp32"),
    ("engine.offload_optimizer=true", "engine.zero_stage 2 or 3"),
    ("model.num_heads=3", "not divisible by model.num_heads=3"),
    ("model.decay=fast", "Allowed: published, paper, none"),
    ("seq_len=1,2", "need -m"),
    ("--verbose", "Write key=value"),
    ("seq_len", "Write key=value"),
    ("seq_len=[", "seq_len=[: must be a whole number"),
    ("optim.lr=nan", "optim.lr=nan must be above 0"),
]


@pytest.mark.parametrize(("argument", "explanation"), REFUSED)
def test_a_wrong_setting_is_explained_in_a_line(argument, explanation):
    with pytest.raises(SettingError) as refusal:
        compose(TrainConfig, [argument], "train")
    assert explanation in str(refusal.value)
    assert len(str(refusal.value).splitlines()) <= 2


def test_data_settings_are_checked_too():
    with pytest.raises(DataError, match=r"data\.path"):
        compose(TrainConfig, ["data=text"], "train")


def test_settings_reach_their_owners():
    config = compose(TrainConfig, ["model=tnl-1b", "optim.lr=0.5", "engine=zero3", "schedule=wsd"], "train")
    assert (config.model.hidden_size, config.model.num_layers) == (2048, 16)
    assert (config.optim.lr, config.engine.zero_stage, config.schedule.name) == (0.5, 3, "wsd")
    assert config.run_dir == "outputs/tnl-1b"


def test_a_saved_config_comes_back_and_nothing_in_it_is_interpreted(tmp_path):
    config = TrainConfig()
    save_config(config, tmp_path / "config.yaml")
    assert load_saved_config(tmp_path / "config.yaml") == asdict(config)
    (tmp_path / "config.yaml").write_text("run_dir: ${oc.env:HOME}\n")
    assert load_saved_config(tmp_path / "config.yaml") == {"run_dir": "${oc.env:HOME}"}
    (tmp_path / "config.yaml").write_text("a: !!python/object/apply:os.system [false]\n")
    with pytest.raises(SettingError, match=r"config\.yaml"):
        load_saved_config(tmp_path / "config.yaml")


def test_a_saved_model_with_unknown_fields_is_refused(tmp_path):
    saved = asdict(TrainConfig())
    saved["model"]["_target_"] = "os.system"
    with pytest.raises(SettingError, match="_target_"):
        model_config_from(saved, tmp_path)


def test_resume_allows_what_may_change_and_names_the_rest():
    config = TrainConfig()
    saved = asdict(replace(config, max_steps=7, save_every=3, seed=5, batch_tokens=2048))
    saved["engine"]["zero_stage"] = 3
    saved["schedule"]["total_steps"] = 7
    saved["model"]["vocab_size"] = 300
    saved["init_from"] = "pretrained"
    with pytest.raises(SettingError) as refusal:
        check_resumable(config, saved, "run")
    assert "seed=0 (run: 5)" in str(refusal.value)
    assert "batch_tokens=65536 (run: 2048)" in str(refusal.value)
    for allowed in ("max_steps", "save_every", "zero_stage", "total_steps", "vocab_size", "init_from"):
        assert allowed not in str(refusal.value)


def test_the_dataclass_and_the_yaml_have_the_same_defaults():
    composed = compose(TrainConfig, [], "train")
    assert replace(composed, run_dir=TrainConfig().run_dir) == TrainConfig()


def test_flatten_gives_dotted_keys():
    flat = flatten(TrainConfig())
    assert flat["model.num_layers"] == 4
    assert flat["seed"] == 0


TEXTS = ["a, b", "def main(x): return {x}", "it's \\n 100%", "a=b", "[1", "x y", "def ", "    return", "true"]


@pytest.mark.parametrize("text", [*TEXTS, "1e3", "1_000", "[1,2]", "{a:1}", "", "\\", "a'"])
def test_text_is_taken_as_it_stands(text):
    assert compose(TrainConfig, [f"sample_prompt={text}"], "train").sample_prompt == text
    assert compose(GenerateConfig, [f"prompt={text}"]).prompt == text


def test_text_may_stand_in_hydras_quotes_and_name_other_settings():
    config = compose(TrainConfig, ["sample_prompt='it\\'s'", "run_dir=runs/${model.name}-${seed}"], "train")
    assert (config.sample_prompt, config.run_dir) == ("it's", "runs/tnl-tiny-0")
    assert compose(TrainConfig, ["+seed=3", "experiment=demo"], "train").seed == 3
    assert compose(TrainConfig, ["seed=many", "model=tnl-1b", "model=tnl-tiny", "seed=4"], "train").seed == 4
    for text in ("${seed}", "it's", "a\\", "x ' y \\' z"):
        assert compose(TrainConfig, [override("sample_prompt", text)], "train").sample_prompt == text


@pytest.mark.parametrize(
    ("given", "lengths"),
    [("64", [64]), ("64,128", [64, 128]), ("[64,128]", [64, 128]), ("[64]", [64]), ("null", None)],
)
def test_a_list_may_leave_its_brackets_out(given, lengths):
    assert compose(KernelBenchmarkConfig, [f"lengths={given}"]).lengths == lengths


def test_a_list_of_settings_needs_no_quotes():
    for given in ("a=1,b=[2", "[a=1,'b']x"):
        with pytest.raises(SettingError, match="can't be read as a list"):
            compose(SweepConfig, [f"sweep.settings={given}"], "sweep")
    for given in ("[seq_len=1,seed=2]", '["seq_len=1","seed=2"]', "seq_len=1, seed=2"):
        config = compose(SweepConfig, [f"sweep.settings={given}"], "sweep")
        assert config.sweep.settings == ["seq_len=1", "seed=2"]
    with pytest.raises(
        SettingError, match=r"lengths=1k: must be a list of whole numbers, as \[1024,8192\], or null"
    ):
        compose(KernelBenchmarkConfig, ["lengths=1k"])


def test_an_experiment_is_recorded_by_name():
    config = compose(TrainConfig, ["experiment=demo"], "train")
    assert (config.experiment, config.max_steps) == ("demo", 500)


def test_of_a_sweep_s_key_that_is_given_twice_the_last_counts():
    assert sweep_points(["seq_len=8", "seed=3", "seq_len=1,2"]) == [
        ["seq_len=1", "seed=3"],
        ["seq_len=2", "seed=3"],
    ]


def test_sweep_points_cross_in_order():
    points = sweep_points(["seq_len=1,2", "seed=range(0,2)", "max_steps=3"])
    assert points == [
        ["seq_len=1", "seed=0", "max_steps=3"],
        ["seq_len=1", "seed=1", "max_steps=3"],
        ["seq_len=2", "seed=0", "max_steps=3"],
        ["seq_len=2", "seed=1", "max_steps=3"],
    ]


@pytest.mark.parametrize(
    ("argument", "values"),
    [
        ("sample_prompt=a b,c d", ["a b", "c d"]),
        ("data.path=my dir/é.txt, b.txt", ["my dir/é.txt", "b.txt"]),
        ("sample_prompt='a, b','c'", ["'a, b'", "'c'"]),
        ("sample_prompt='ä, b'", ["'ä, b'"]),
        ("sample_prompt=def f(x, y):", ["def f(x, y):"]),
        ("engine.fp8=true,false", ["True", "False"]),
        ("a=[1,2],[3]", ["[1,2]", "[3]"]),
    ],
)
def test_values_of_a_sweep_stand_as_they_were_written(argument, values):
    key = argument.split("=")[0]
    assert sweep_points([argument]) == [[f"{key}={value}"] for value in values]


@pytest.mark.parametrize("value", ["range(3,0)", "range(0,4,0)", "glob(tnl-*)", "interval(0,1)"])
def test_sweeps_without_a_list_of_values_are_refused(value):
    with pytest.raises(SettingError, match=r"^seed="):
        sweep_points([f"seed={value}"])


def test_no_experiment_is_the_default():
    for given in (["experiment=null"], ["experiment=demo", "experiment=null"]):
        assert compose(TrainConfig, given, "train") == compose(TrainConfig, [], "train")


@pytest.mark.parametrize("given", [["--local_rank=3"], ["--local-rank", "3"], ["--local_rank", "3"]])
def test_the_launchers_local_rank_is_dropped(given, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", *given, "seed=1"])
    assert command_line() == ["seed=1"]


def test_default_learning_rates_fall_with_the_width():
    assert default_lr("adamw", 512) == default_lr("adamw_8bit", 512) == 2e-3
    assert default_lr("adamw", 4096) == 5e-4  # eight times as wide: by 8^(2/3)
    assert (default_lr("muon", 512), default_lr("muon", 2048)) == (5e-3, 2.5e-3)


@pytest.mark.parametrize(
    ("name", "step", "factor"),
    [
        ("cosine", 0, 0.1),  # warm-up is capped at a tenth of 100 steps
        ("cosine", 9, 1.0),
        ("cosine", 55, 0.55),
        ("cosine", 100, 0.1),
        ("cosine", 500, 0.1),
        ("wsd", 79, 1.0),
        ("wsd", 90, 0.55),
        ("wsd", 100, 0.1),
        ("constant", 99, 1.0),
    ],
)
def test_schedules(name, step, factor):
    config = ScheduleConfig(name=name, warmup_steps=50, total_steps=100, min_lr_ratio=0.1)
    assert lr_factor(config, step) == pytest.approx(factor, abs=1e-6)


def test_without_a_decay_the_rate_stays_past_the_schedule_s_end():
    config = ScheduleConfig(name="wsd", total_steps=100, decay_fraction=0.0)
    assert [lr_factor(config, step) for step in (99, 100, 101)] == [1.0, 1.0, 1.0]


def test_a_decay_over_all_steps_begins_after_the_warm_up():
    config = ScheduleConfig(name="wsd", warmup_steps=50, total_steps=100, decay_fraction=1.0)
    rates = [lr_factor(config, step) for step in range(9, 100)]
    assert rates[0] == rates[1] == 1.0
    steps = [before - after for before, after in pairwise(rates[1:])]
    assert max(steps) == pytest.approx(min(steps))


@pytest.mark.parametrize(("has_units", "precision"), [(True, "bf16"), (False, "fp32")])
def test_precision_follows_the_machine(has_units, precision, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_units)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert compose(TrainConfig, [], "train").engine.with_precision().precision == precision
    assert EngineConfig(precision="bf16").with_precision().precision == "bf16"


def test_fp8_needs_bf16_whoever_chooses_the_precision(monkeypatch):
    with pytest.raises(SettingError, match=r"engine\.fp8=true needs engine\.precision=bf16"):
        EngineConfig(fp8=True, precision="fp32")
    monkeypatch.setattr("training.train_config.native_precision", lambda: "fp32")
    with pytest.raises(SettingError, match=r"engine\.fp8=true needs engine\.precision=bf16"):
        EngineConfig(fp8=True).with_precision()


def test_bad_input_ends_with_2_and_at_most_two_lines(text, tmp_path):
    (tmp_path / "binary").mkdir()
    (tmp_path / "binary" / "a.txt").write_bytes(b"ok \xff\xfe")
    for more, expected in [
        ([f"data.path={tmp_path / 'binary'}"], "a.txt"),
        (["resume=must"], "resume=must"),
        (["model.backend=triton", "max_steps=1"], "backend"),
    ]:
        result = run(["train.py", *settings(text, tmp_path / "run", *more)])
        assert result.returncode == 2, (more, result.stderr)
        assert expected in result.stderr, (more, result.stderr)
        assert "Traceback" not in result.stderr
        assert len(result.stderr.strip().splitlines()) <= 2, (more, result.stderr)
    assert not list((tmp_path / "run" / "checkpoints").glob("*"))


def test_a_half_set_launcher_environment_is_refused(text, tmp_path):
    result = run(["train.py", *settings(text, tmp_path / "run")], RANK="0")
    assert result.returncode == 2
    assert "WORLD_SIZE" in result.stderr


@pytest.mark.parametrize("more", [[], ["-m", "seq_len=1,2"]])
def test_help_lists_every_setting(more):
    result = run(["train.py", *more, "--help"])
    assert result.returncode == 0
    shown = yaml.safe_load(result.stdout.split("key=value")[-1].split(":\n\n", 1)[1].split("\nGroups")[0])
    assert flatten(shown).keys() >= flatten(TrainConfig()).keys()
    assert "engine=zero0|" in result.stdout
