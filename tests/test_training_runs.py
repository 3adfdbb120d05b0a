"""Real runs of train.py on the CPU: ZeRO stages, ranks, resumes, interruptions."""

import hashlib
import json
import os
import signal
import time
from pathlib import Path

import pytest
from training_helpers import ROOT, assert_same_state, finish, lines, run, settings, start, write_text

from training.checkpoint import list_checkpoints, newest_checkpoint
from training.config import load_saved_config
from training.optimizer import default_lr

pytestmark = pytest.mark.slow

STEPS = 6


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("corpus") / "text")


@pytest.fixture(scope="module")
def reference(text, tmp_path_factory):
    """An uninterrupted run of two ranks, ZeRO 1, with gradient accumulation."""
    run_dir = tmp_path_factory.mktemp("reference") / "run"
    result = run(["train.py", *settings(text, run_dir, f"max_steps={STEPS}")], num_ranks=2)
    assert result.returncode == 0, result.stderr
    return run_dir


def curve(run_dir: Path) -> list[tuple[float, float]]:
    return [(line["loss"], line["grad_norm"]) for _, line in sorted(lines(run_dir).items())]


@pytest.mark.parametrize(("stage", "tolerance"), [(0, 2e-3), (2, 0), (3, 0)])
def test_stages_give_the_same_losses(stage, tolerance, text, reference, tmp_path):
    arguments = settings(text, tmp_path / "run", f"max_steps={STEPS}", f"engine=zero{stage}")
    result = run(["train.py", *arguments], num_ranks=2)
    assert result.returncode == 0, result.stderr
    losses = [loss for loss, _ in curve(tmp_path / "run")]
    assert losses == pytest.approx([loss for loss, _ in curve(reference)], abs=tolerance)
    assert losses[-1] < losses[0] - 0.05


def test_stages_take_the_same_steps_in_bf16(text, tmp_path):
    losses = []
    for stage in (1, 2, 3):
        more = ["engine.precision=bf16", "max_steps=4", f"engine=zero{stage}"]
        result = run(["train.py", *settings(text, tmp_path / str(stage), *more)], num_ranks=2)
        assert result.returncode == 0, result.stderr
        losses.append([loss for loss, _ in curve(tmp_path / str(stage))])
    assert losses[1] == losses[2] == losses[0]


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
        "import sys; from pathlib import Path; from training import distributed;"
        "from training.checkpoint import open_checkpoint, save_checkpoint;"
        "from training.config import TrainConfig, compose; from training.engine import Engine;"
        "from models.transnormer import TransNormer;"
        "config = compose(TrainConfig, sys.argv[3:], 'train'); world = distributed.start(1);"
        "engine = Engine(TransNormer(config.model), config, world, accumulation_steps=1, micro_batch_size=2);"
        "engine.load(open_checkpoint(Path(sys.argv[1])).read, 6);"
        "save_checkpoint(Path(sys.argv[2]), step=6, fragments=engine.fragments_to_save(), world=world,"
        " write_files=lambda folder: None, state={}, facts={}); distributed.stop()"
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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_a_checkpoint_to_go_on_from(number, text, tmp_path):
    run_dir = tmp_path / "run"
    arguments = ["train.py", *settings(text, run_dir, "max_steps=100000")]
    processes = start(arguments, num_ranks=2)
    try:
        wait_for_step(run_dir, 3)
        processes[1].send_signal(number)  # the other rank hears of it
        results = finish(processes, timeout=60)
    finally:
        for process in processes:
            process.kill()
    assert [result.returncode for result in results] == [75, 75], results[0].stderr
    newest = newest_checkpoint(run_dir / "checkpoints")
    assert newest.step == max(lines(run_dir))
    assert "run the same command to go on" in results[0].stderr


def test_asked_twice_a_run_stops_at_once_in_a_line(text, tmp_path):
    (process,) = start(["train.py", *settings(text, tmp_path / "run", "max_steps=100000")])
    try:
        wait_for_step(tmp_path / "run", 2)
        process.send_signal(signal.SIGINT)
        time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        (result,) = finish([process], timeout=60)
    finally:
        process.kill()
    assert result.returncode in (1, 75), result.stderr  # 75: it had saved already
    assert "Traceback" not in result.stderr
    assert "the same command" in result.stderr.splitlines()[-1]


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


def test_a_second_start_on_a_running_folder_is_refused(text, tmp_path):
    run_dir = tmp_path / "run"
    arguments = ["train.py", *settings(text, run_dir, "max_steps=100000")]
    processes = start(arguments)
    try:
        wait_for_step(run_dir, 1)
        second = run(arguments)
        assert second.returncode == 2
        assert f"process {processes[0].pid}" in second.stderr
    finally:
        processes[0].send_signal(signal.SIGTERM)
        assert finish(processes, timeout=60)[0].returncode == 75


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
    assert "step_00000002 is no complete checkpoint" in result.stderr
    assert "resume=never overwrite=true" in result.stderr
    assert len(result.stderr.strip().splitlines()) <= 2


def test_runs_and_sweeps_have_folders_of_their_own(text, tmp_path):
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "sweep.json").write_text("{}")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    (tmp_path / "empty").mkdir()
    sweep = ["-m", "scripts.sweep", "sweep=seq_len_demo", f"run_dir={tmp_path / 'run'}"]
    for command, reason in [
        (["train.py", *settings(text, tmp_path / "sweep")], "holds a sweep"),
        (sweep, "holds a run"),
        (["-m", "scripts.report", f"run_dir={tmp_path / 'empty'}"], "holds no run"),
        (["train.py", *settings(text, Path("/proc/run"))], "/proc/run can't be written"),
    ]:
        result = run(command)
        assert result.returncode == 2, (command, result.stderr)
        assert reason in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1


def test_resume_refuses_other_settings_by_name(text, reference):
    result = run(["train.py", *settings(text, reference, "max_steps=99", "optim.lr=0.5", "seq_len=16")])
    assert result.returncode == 2
    assert "optim.lr=0.5 (run: 0.003)" in result.stderr
    assert "seq_len=16 (run: 32)" in result.stderr
    assert len(result.stderr.strip().splitlines()) <= 2


def test_an_open_learning_rate_is_that_of_the_run_or_of_the_width(text, tmp_path):
    for given, expected in (("null", default_lr("adamw", 32)), ("0.5", 0.5)):
        for lr, max_steps in ((given, 1), ("null", 2)):
            more = [f"optim.lr={lr}", f"max_steps={max_steps}"]
            result = run(["train.py", *settings(text, tmp_path / given, *more)])
            assert result.returncode == 0, result.stderr
        assert load_saved_config(tmp_path / given / "config.yaml")["optim"]["lr"] == expected
        assert sorted(lines(tmp_path / given)) == [1, 2]


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


def test_multirun_gives_each_point_a_folder(text, tmp_path):
    arguments = settings(text, tmp_path / "runs", "max_steps=1", "optim.beta2=0.9,0.99")
    result = run(["train.py", "-m", *arguments])
    assert result.returncode == 0, result.stderr
    for point in ("optim.beta2-0.9", "optim.beta2-0.99"):
        assert list(lines(tmp_path / "runs" / point)) == [1]
        assert (tmp_path / "runs" / point / "report.md").exists()


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


def test_local_rank_is_dropped(text, tmp_path):
    arguments = settings(text, tmp_path / "run", "max_steps=1")
    assert run(["train.py", "--local_rank=0", *arguments]).returncode == 0
    assert (ROOT / "train.py").exists()


def test_a_run_builds_no_extension_whose_lock_could_outlive_it(text, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    result = run(["train.py", *settings(text, tmp_path / "run", "max_steps=1")])
    assert result.returncode == 0, result.stderr
    assert not list(tmp_path.glob("extensions/**/*"))
