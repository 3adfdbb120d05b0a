"""Real runs of train.py on the CPU: ZeRO stages, ranks, resumes, interruptions."""

import hashlib
import json
import os
import re
import signal
import time
from pathlib import Path

import pytest
from forked_ranks import launch
from training_helpers import assert_same_state, finish, lines, run, settings, start, write_text

from training import multirun
from training.checkpoint import list_checkpoints, newest_checkpoint
from training.config import compose
from training.errors import SettingError
from training.optimizer import default_lr
from training.saved_config import load_saved_config
from training.state import saved_state
from training.train_config import TrainConfig

pytestmark = pytest.mark.slow

STEPS = 6


@pytest.fixture(scope="module")
def reference(text, tmp_path_factory):
    """An uninterrupted run of two ranks, ZeRO 1, with gradient accumulation."""
    run_dir = tmp_path_factory.mktemp("reference") / "run"
    result = run(["train.py", *settings(text, run_dir, f"max_steps={STEPS}")], num_ranks=2)
    assert result.returncode == 0, result.stderr
    return run_dir


def curve(run_dir: Path) -> list[tuple[float, float]]:
    return [(line["loss"], line["grad_norm"]) for _, line in sorted(lines(run_dir).items())]


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_stages_give_the_same_losses(stage, text, reference, tmp_path):
    arguments = settings(text, tmp_path / "run", f"max_steps={STEPS}", f"engine=zero{stage}")
    result = run(["train.py", *arguments], num_ranks=2)
    assert result.returncode == 0, result.stderr
    losses = [loss for loss, _ in curve(tmp_path / "run")]
    assert losses == pytest.approx([loss for loss, _ in curve(reference)], abs=1e-6)
    assert losses[-1] < losses[0] - 0.05


def test_stages_take_the_same_steps_in_bf16(text, tmp_path):
    """The norm too: AdamW and clipping hide gradients that are all too large by one factor."""
    curves = []
    for stage in range(4):
        more = ["engine.precision=bf16", "max_steps=4", f"engine=zero{stage}"]
        result = run(["train.py", *settings(text, tmp_path / str(stage), *more)], num_ranks=2)
        assert result.returncode == 0, result.stderr
        curves.append(curve(tmp_path / str(stage)))
    for other in curves[1:]:
        assert [loss for loss, _ in other] == [loss for loss, _ in curves[0]]
        assert [norm for _, norm in other] == pytest.approx([norm for _, norm in curves[0]], rel=1e-7)


def test_one_rank_gives_the_losses_of_two(text, reference, tmp_path):
    result = run(["train.py", *settings(text, tmp_path / "run", f"max_steps={STEPS}")])
    assert result.returncode == 0, result.stderr
    losses = [loss for loss, _ in curve(tmp_path / "run")]
    assert losses == pytest.approx([loss for loss, _ in curve(reference)], abs=2e-3)


@pytest.mark.parametrize("stage", [0, 1, pytest.param(2, marks=pytest.mark.torture), 3])
def test_a_resumed_run_is_the_run_that_never_stopped(stage, text, tmp_path):
    more = [f"engine=zero{stage}", f"schedule.total_steps={STEPS}", "model.dropout=0.1"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(["train.py", *settings(text, whole, *more, f"max_steps={STEPS}")], 2).returncode == 0
    assert run(["train.py", *settings(text, parts, *more, "max_steps=2")], 2).returncode == 0
    result = run(["train.py", *settings(text, parts, *more, f"max_steps={STEPS}")], 2)
    assert result.returncode == 0, result.stderr
    assert "resuming at step 2" in result.stderr
    assert curve(parts) == curve(whole)
    name = f"step_{STEPS:08d}"
    assert_same_state(whole / "checkpoints" / name, parts / "checkpoints" / name)


@pytest.mark.parametrize(("ranks", "stage"), [(1, 3), (2, 0), (4, 2)])
def test_a_checkpoint_loads_at_any_ranks_and_stage(ranks, stage, text, reference, tmp_path):
    """The state of two ranks at ZeRO 1 is loaded elsewhere and saved again, bit for bit the same."""
    checkpoint = newest_checkpoint(reference / "checkpoints")
    source, vocab_size = checkpoint.folder, checkpoint.shapes["model.embed_tokens.weight"][0]
    code = (
        "import sys; from pathlib import Path; from training.distributed import process_group;"
        "from training.checkpoint import open_checkpoint, save_checkpoint;"
        "from training.config import compose; from training.engine import Engine;"
        "from training.train_config import TrainConfig;"
        "from models.transnormer import TransNormer;"
        "config = compose(TrainConfig, sys.argv[3:], 'train');"
        "config.engine = config.engine.with_precision()\n"
        "with process_group(1) as world:\n"
        " model = TransNormer(config.model)\n"
        " engine = Engine(model, config, world, accumulation_steps=1, micro_batch_size=2)\n"
        " engine.load(open_checkpoint(Path(sys.argv[1])).read, 6)\n"
        " save_checkpoint(Path(sys.argv[2]), step=6, fragments=engine.fragments_to_save(), world=world,"
        " write_files=lambda folder: None, state={}, facts={})"
    )
    arguments = settings(text, tmp_path / "run", f"engine=zero{stage}", f"model.vocab_size={vocab_size}")
    result = run(["-c", code, str(source), str(tmp_path / "saved"), *arguments], ranks)
    assert result.returncode == 0, result.stderr
    assert_same_state(source, tmp_path / "saved" / source.name)


def test_a_run_goes_on_at_another_number_of_ranks_and_stage(text, reference, tmp_path):
    more = [f"schedule.total_steps={STEPS}"]
    run_dir = tmp_path / "run"
    assert run(["train.py", *settings(text, run_dir, *more, "max_steps=3")], 2).returncode == 0
    result = run(["train.py", *settings(text, run_dir, *more, f"max_steps={STEPS}", "engine=zero3")])
    assert result.returncode == 0, result.stderr
    losses = [loss for loss, _ in curve(run_dir)]
    assert losses == pytest.approx([loss for loss, _ in curve(reference)], abs=2e-3)


def test_a_finished_run_says_so_and_stays_as_it_is(text, reference):
    before = hashlib.sha256((reference / "metrics.jsonl").read_bytes()).hexdigest()
    result = run(["train.py", *settings(text, reference, f"max_steps={STEPS}")])
    assert result.returncode == 0
    assert "finished" in result.stderr
    assert hashlib.sha256((reference / "metrics.jsonl").read_bytes()).hexdigest() == before


def test_asked_twice_a_run_stops_at_once_in_a_line(text, tmp_path):
    command = ["train.py", *settings(text, tmp_path / "run", "max_steps=100000")]
    ranks = launch(tmp_path / "logs", command)
    wait_for_step(tmp_path / "run", 2)
    ranks.signal(signal.SIGINT, 0)
    time.sleep(0.02)
    ranks.signal(signal.SIGINT, 0)
    assert ranks.wait(60)[0] in (1, 75), ranks.stderr()  # 75: it had saved already
    assert "Traceback" not in ranks.stderr()
    assert "the same command" in ranks.stderr().splitlines()[-1]


def test_workers_go_when_their_parent_dies(text, tmp_path):
    run_dir = tmp_path / "run"
    command = ["train.py", *settings(text, run_dir, "max_steps=100000")]
    code = f"import subprocess, sys; subprocess.run([sys.executable, *{command!r}])"
    (parent,) = start(["-c", code])
    wait_for_step(run_dir, 3)
    parent.kill()
    deadline = time.time() + 60
    while not list_checkpoints(run_dir / "checkpoints") and time.time() < deadline:
        time.sleep(0.2)
    assert newest_checkpoint(run_dir / "checkpoints").step >= 3


def wait_for_step(run_dir: Path, step: int) -> None:
    deadline = time.time() + 120
    while time.time() < deadline:
        if (run_dir / "metrics.jsonl").exists() and max(lines(run_dir), default=0) >= step:
            return
        time.sleep(0.1)
    raise AssertionError(f"no step {step} in {run_dir}")


def test_a_damaged_checkpoint_is_passed_over(text, reference, tmp_path):
    run_dir = tmp_path / "run"
    more = ["save_every=2", f"schedule.total_steps={STEPS}"]
    assert run(["train.py", *settings(text, run_dir, *more, "max_steps=4")]).returncode == 0
    newest = run_dir / "checkpoints" / "step_00000004"
    weights = next(newest.glob("rank*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    result = run(["train.py", *settings(text, run_dir, *more, f"max_steps={STEPS}")])
    assert result.returncode == 0, result.stderr
    assert str(weights) in result.stderr
    assert "resuming at step 2" in result.stderr
    assert sorted(lines(run_dir)) == list(range(1, STEPS + 1))


def test_with_every_checkpoint_damaged_two_lines_say_what_to_do(text, tmp_path):
    run_dir = tmp_path / "run"
    more = ["save_every=1", "max_steps=2"]
    assert run(["train.py", *settings(text, run_dir, *more)]).returncode == 0
    for folder in list_checkpoints(run_dir / "checkpoints"):
        (folder / "manifest.sha256").unlink()
    result = run(["train.py", *settings(text, run_dir, *more)])
    assert result.returncode == 2
    assert "step_00000002 is not a complete checkpoint" in result.stderr
    assert "resume=never overwrite=true" in result.stderr
    assert len(result.stderr.strip().splitlines()) <= 2


def test_a_run_is_overwritten_when_its_successor_is_ready(text, tmp_path):
    run_dir = tmp_path / "run"
    assert run(["train.py", *settings(text, run_dir, "save_every=1", "max_steps=3")]).returncode == 0
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    anew = [*settings(text, run_dir, "max_steps=2"), "resume=never", "overwrite=true"]
    refused = run(["train.py", *anew, "data.path=nowhere"])
    assert refused.returncode == 2
    assert all(path.read_bytes() == content for path, content in before.items() if path.suffix != ".lock")
    result = run(["train.py", *anew])
    assert result.returncode == 0, result.stderr
    assert sorted(lines(run_dir)) == [1, 2]
    assert [path.name for path in list_checkpoints(run_dir / "checkpoints")] == ["step_00000002"]


def test_files_in_a_folder_without_a_run_stay(text, tmp_path):
    mine = tmp_path / "run" / "eval" / "mine.json"
    mine.parent.mkdir(parents=True)
    mine.write_text("{}")
    result = run(["train.py", *settings(text, tmp_path / "run", "resume=never", "max_steps=1")])
    assert result.returncode == 0, result.stderr
    assert mine.read_text() == "{}"


def test_runs_and_sweeps_have_folders_of_their_own(text, tmp_path):
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "sweep.json").write_text("{}")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "run" / "run.lock").touch()
    nested = tmp_path / "run" / "checkpoints" / "run"
    sweep = ["-m", "scripts.sweep", "sweep=seq_len_demo", f"run_dir={tmp_path / 'run'}"]
    for command, reason in [
        (["train.py", *settings(text, tmp_path / "sweep")], "holds a sweep"),
        (sweep, "holds a run"),
        (["-m", "scripts.report", f"run_dir={tmp_path / 'empty'}"], "holds no run"),
        (["train.py", *settings(text, Path("/proc/run"))], "/proc/run can't be written"),
        (["train.py", *settings(text, nested)], "lies among the checkpoints of "),
    ]:
        result = run(command)
        assert result.returncode == 2, (command, result.stderr)
        assert reason in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1


def test_a_restart_by_torchrun_goes_on_in_spite_of_resume_never(text, tmp_path):
    command = ["train.py", *settings(text, tmp_path / "run", "max_steps=2", "resume=never")]
    assert run(command).returncode == 0
    assert run(command).returncode == 2
    again = run(command, TORCHELASTIC_RESTART_COUNT="1")
    assert again.returncode == 0, again.stderr
    assert "going on, in spite of resume=never" in again.stderr
    assert "finished at step 2" in again.stderr


def test_resume_refuses_other_settings_by_name(text, reference):
    more = ["max_steps=99", "optim.lr=0.5", "seq_len=16", "data.max_documents=7"]
    result = run(["train.py", *settings(text, reference, *more)])
    assert result.returncode == 2
    assert "data.max_documents=7 (run: null)" in result.stderr
    assert "optim.lr=0.5 (run: 0.003)" in result.stderr
    assert "seq_len=16 (run: 32)" in result.stderr
    assert "prepared" not in result.stderr  # a large text would take hours
    assert len(result.stderr.strip().splitlines()) <= 2


def test_an_open_learning_rate_is_that_of_the_run_or_of_the_width(text, tmp_path):
    for given, expected in (("null", default_lr("adamw", 32)), ("0.5", 0.5)):
        for lr, max_steps in ((given, 1), ("null", 2)):
            more = [f"optim.lr={lr}", f"max_steps={max_steps}"]
            result = run(["train.py", *settings(text, tmp_path / given, *more)])
            assert result.returncode == 0, result.stderr
        assert load_saved_config(tmp_path / given / "config.yaml")["optim"]["lr"] == expected
        assert sorted(lines(tmp_path / given)) == [1, 2]


def test_the_micro_batch_that_auto_chose_may_be_named(text, tmp_path):
    arguments = settings(text, tmp_path / "run", "micro_batch_size=auto", "save_every=1")
    assert run(["train.py", *arguments, "max_steps=1"]).returncode == 0
    chosen = saved_state(newest_checkpoint(tmp_path / "run" / "checkpoints")).micro_batch_size
    refused = run(["train.py", *arguments, f"micro_batch_size={chosen // 2}", "max_steps=2"])
    assert refused.returncode == 2
    assert f"micro_batch_size={chosen // 2} (run: {chosen})" in refused.stderr
    assert run(["train.py", *arguments, f"micro_batch_size={chosen}", "max_steps=2"]).returncode == 0


def test_resume_refuses_changed_data(text, reference, tmp_path):
    other = write_text(tmp_path / "other", num_documents=41)
    arguments = settings(text, reference, "max_steps=99", f"data.path={other}")
    result = run(["train.py", *arguments])
    assert result.returncode == 2
    assert "data.path" in result.stderr


def test_an_initialised_run_starts_from_the_weights_of_another(text, reference, tmp_path):
    arguments = settings(text, tmp_path / "run", "max_steps=1", f"init_from={reference}")
    result = run(["train.py", *arguments])
    assert result.returncode == 0, result.stderr
    losses = [loss for loss, _ in curve(reference)]
    assert curve(tmp_path / "run")[0][0] < losses[0] - 0.1


@pytest.mark.parametrize("other", ["tokenizer=characters", "tokenizer=sentencepiece"])
def test_an_initialised_run_with_another_tokenizer_is_refused_before_data_is_prepared(
    other, text, reference, tmp_path
):
    cache = tmp_path / "cache"
    arguments = settings(text, tmp_path / "run", "max_steps=1", f"init_from={reference}", *other.split())
    result = run(["train.py", *arguments, f"data.cache_dir={cache}"])
    assert result.returncode == 2
    assert "has another tokenizer: use tokenizer=file tokenizer.path=" in result.stderr
    assert not cache.exists()


def test_multirun_gives_each_point_a_folder(text, tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(
        multirun, "run_point", lambda command: started.append(command[2:]) or 5 - len(started)
    )
    arguments = settings(text, tmp_path / "runs", "optim.beta2=0.9,0.99", "model.dropout=0,0.1")
    assert multirun.multirun(arguments) == 4  # the first that is not 0; the others run all the same
    configs = [compose(TrainConfig, command, "train") for command in started]
    assert [Path(config.run_dir).relative_to(tmp_path / "runs").name for config in configs] == [
        f"optim.beta2-{beta2}_model.dropout-{dropout}" for beta2 in (0.9, 0.99) for dropout in ("0", "0.1")
    ]
    assert [config.optim.beta2 for config in configs] == [0.9, 0.9, 0.99, 0.99]
    assert [config.model.dropout for config in configs] == [0, 0.1, 0, 0.1]


def test_multirun_ends_with_a_point_that_was_stopped(text, tmp_path, monkeypatch):
    codes = iter([0, 75])
    monkeypatch.setattr(multirun, "run_point", lambda command: next(codes))
    assert multirun.multirun(settings(text, tmp_path / "runs", "seed=1,2,3")) == 75


def test_a_run_draws_its_report(text, tmp_path):
    arguments = settings(text, tmp_path / "run", "max_steps=1")
    ranks = launch(tmp_path / "logs", ["train.py", *arguments], faults={0: [("real_report",)]})
    assert ranks.wait() == [0], ranks.stderr()
    assert (tmp_path / "run" / "report.md").exists()
    assert list((tmp_path / "run" / "plots").glob("*.png"))


def test_multirun_tells_long_values_apart_and_refuses_one_folder_for_two_points(text, tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(multirun, "run_point", lambda command: started.append(command[-1]) or 0)
    names = ["/".join([100 * "d"] * 3) + end for end in ("a", "b")]
    multirun.multirun(settings(text, tmp_path / "runs", f"wandb.project={','.join(names)}"))
    assert len({Path(run_dir).name for run_dir in started}) == 2
    assert all(len(Path(run_dir).name) <= 200 for run_dir in started)
    with pytest.raises(SettingError, match="two points would share the run folder"):
        multirun.multirun(settings(text, tmp_path / "runs", "wandb.project=a/b,a-b"))
    assert len(started) == 2


@pytest.mark.parametrize(
    "command", ["train.py run_dir=", "eval.py checkpoint=", "-m scripts.report run_dir="]
)
def test_a_name_that_is_too_long_is_said_in_a_line(command):
    result = run(f"{command}{300 * 'n'}".split())
    assert result.returncode == 2
    assert re.fullmatch(r"error: .+…: the path, or a name in it .* is too long\.\n", result.stderr)


def test_multirun_of_one_point_is_refused(text, tmp_path):
    result = run(["train.py", "-m", *settings(text, tmp_path / "runs", "max_steps=1")])
    assert result.returncode == 2
    assert result.stderr == "error: -m needs a setting with several values, as seq_len=1024,2048.\n"
    assert not (tmp_path / "runs").exists()


def test_ctrl_c_on_a_multirun_lets_the_point_save(text, tmp_path):
    arguments = settings(text, tmp_path / "runs", "max_steps=100000", "seed=1,2")
    (process,) = start(["train.py", "-m", *arguments], own_session=True)
    try:
        wait_for_step(tmp_path / "runs" / "seed-1", 2)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        (result,) = finish([process], timeout=60)
    finally:
        process.kill()
    assert result.returncode == 75, result.stderr
    assert "run the same command to go on" in result.stderr
    assert "Traceback" not in result.stderr
    assert newest_checkpoint(tmp_path / "runs" / "seed-1" / "checkpoints").step >= 2
    assert not (tmp_path / "runs" / "seed-2").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["seq_len=65536", "batch_tokens=65536"], "seq_len=65536"),
        (
            ["engine.fp8=true", "engine.precision=bf16", "model.hidden_size=128", "model.glu_size=200"],
            "of 16",
        ),
        (["sample_prompt=" + 40_000 * "x"], "sample_prompt is too long"),
    ],
)
def test_a_refused_start_leaves_no_run(text, tmp_path, changes, message):
    arguments = settings(text, tmp_path / "run", "max_steps=1", "resume=never")
    refused = run(["train.py", *arguments, *changes])
    last = refused.stderr.strip().splitlines()[-1]
    assert (refused.returncode, last[:7]) == (2, "error: "), refused.stderr
    assert message in last
    done = run(["train.py", *arguments])
    assert done.returncode == 0, done.stderr


def test_files_of_a_checkpoint_are_as_readable_as_any(reference, tmp_path):
    (tmp_path / "any").touch()
    files = [path for path in newest_checkpoint(reference / "checkpoints").folder.iterdir() if path.is_file()]
    assert {path.stat().st_mode for path in files} == {(tmp_path / "any").stat().st_mode}


def test_metrics_hold_the_promised_fields(reference):
    line = json.loads((reference / "metrics.jsonl").read_text().splitlines()[0])
    promised = ["step", "tokens", "loss", "grad_norm", "lr", "tokens_per_second", "mfu"]
    assert set(promised) | {"peak_memory_gib", "step_ms"} <= set(line)
    assert (line["tokens"], line["mfu"]) == (256, None)


def test_a_run_builds_no_extension_whose_lock_could_outlive_it(text, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    result = run(["train.py", *settings(text, tmp_path / "run", "max_steps=1")])
    assert result.returncode == 0, result.stderr
    assert not list(tmp_path.glob("extensions/**/*"))
