"""Requests to stop in every phase, ranks that die, stand still or are started twice."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from reliability_checks import QUICK, train, wait_for
from training_helpers import ROOT, environment, lines, settings

from training.checkpoint import newest_checkpoint

pytestmark = pytest.mark.slow

PHASES = ("data wait", "forward", "backward", "step", "evaluation", "sampling", "save", "first compile")
STOP_SECONDS = 20
WITH_ALL_PHASES = ("eval_every=1", "sample_every=1", "sample_tokens=8", "max_steps=100000")


def assert_stopped_at_a_checkpoint(run_dir: Path) -> None:
    """The newest checkpoint is valid and that of the last step."""
    newest = newest_checkpoint(run_dir / "checkpoints")
    assert newest is not None
    metrics = run_dir / "metrics.jsonl"
    assert newest.step == max(lines(run_dir) if metrics.exists() else {}, default=0)


def faults_for(phase: str) -> list[tuple]:
    """What every rank gets: a real first compilation takes too long here, so waiting stands for it."""
    return [("impatient",)] + ([("pretend_to_compile",)] if phase == "first compile" else [])


def stop_a_rank(text: Path, folder: Path, phase: str, rank: int, number: int) -> None:
    marker, run_dir = folder / "marker", folder / "run"
    faults = {each: faults_for(phase) for each in range(2)}
    faults[rank].append(("pause_in", phase, str(marker), 1.0 if phase != "first compile" else 60.0))
    ranks = train(text, run_dir, *WITH_ALL_PHASES, num_ranks=2, faults=faults)
    wait_for(marker.exists)
    ranks.signal(number, rank)
    assert ranks.wait(STOP_SECONDS) == [75, 75], ranks.stderr(0) + ranks.stderr(1)
    assert "run the same command to go on" in ranks.stderr()
    assert_stopped_at_a_checkpoint(run_dir)


def stop_the_launcher(text: Path, folder: Path, phase: str, number: int) -> None:
    marker, run_dir = folder / "marker", folder / "run"
    pause = ["pause_in", phase, str(marker), 1.0 if phase != "first compile" else 60.0]
    faults = {"0": [*faults_for(phase), pause], "1": faults_for(phase)}
    variables = environment() | {"FAULTS": json.dumps(faults)}
    variables["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    variables["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), variables["PATH"]])
    arguments = settings(text, run_dir, *QUICK, *WITH_ALL_PHASES)
    command = ["deepspeed", "--num_accelerators", "2", "tests/reliability_faults.py", *arguments]
    with open(folder / "stderr", "w") as log:  # SIGINT is ignored by what a shell runs in the background
        runner = subprocess.Popen(
            command,
            cwd=ROOT,
            env=variables,
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
    wait_for(marker.exists, 120)
    family = psutil.Process(runner.pid).children(recursive=True)
    runner.send_signal(number)
    _, left = psutil.wait_procs(family, timeout=STOP_SECONDS)
    for process in left:
        process.kill()
    runner.wait(STOP_SECONDS)
    assert not left, (folder / "stderr").read_text()
    assert_stopped_at_a_checkpoint(run_dir)


@pytest.mark.parametrize(
    ("phase", "rank", "number"),
    [
        ("data wait", 1, signal.SIGTERM),
        ("backward", 0, signal.SIGINT),
        ("evaluation", 1, signal.SIGINT),
        ("sampling", 0, signal.SIGTERM),
        ("save", 1, signal.SIGTERM),
        ("first compile", 1, signal.SIGTERM),
    ],
)
def test_a_signal_stops_all_ranks_with_a_checkpoint(phase, rank, number, text, tmp_path):
    stop_a_rank(text, tmp_path, phase, rank, number)


@pytest.mark.torture
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("phase", PHASES)
def test_every_signal_in_every_phase(phase, rank, number, text, tmp_path):
    stop_a_rank(text, tmp_path, phase, rank, number)


@pytest.mark.torture
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("phase", PHASES)
def test_every_signal_to_the_launcher(phase, number, text, tmp_path):
    stop_the_launcher(text, tmp_path, phase, number)


def family_of(pid: int) -> list[tuple[str, psutil.Process]]:
    """Names and processes of all that a process has started and that still live."""
    found = []
    for process in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            found.append((process.name(), process))
    return found


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles for a CPU with g++")
@pytest.mark.parametrize("moment", ["tracing", "g++"])
def test_a_signal_in_a_real_compilation_leaves_a_checkpoint_and_no_compiler(moment, text, tmp_path):
    marker, run_dir = tmp_path / "marker", tmp_path / "run"
    faults = {0: [("pause_in", "first compile", str(marker), 0.0)]}  # only says that it begins
    caches = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}
    more = ("max_steps=100000", "engine.compile=true", "tokenizer=bytes")
    ranks = train(text, run_dir, *more, faults=faults, **caches)
    wait_for(marker.exists, 120)
    if moment == "g++":
        wait_for(lambda: any("cc1plus" in name for name, _ in family_of(ranks.processes[0].pid)), 120)
    family = [process for _, process in family_of(ranks.processes[0].pid)]
    ranks.signal(signal.SIGTERM, 0)
    assert ranks.wait(STOP_SECONDS) == [75], ranks.stderr()
    assert not psutil.wait_procs(family, timeout=STOP_SECONDS)[1], "a compiler is left behind"
    assert_stopped_at_a_checkpoint(run_dir)


def test_a_stop_before_the_first_step_leaves_at_once(text, tmp_path):
    """Nothing is to be saved yet: the signalled rank leaves, the other hears of it."""
    faults = {rank: [("impatient",)] for rank in range(2)}
    marker = tmp_path / "marker"
    faults[0].append(("pause_in_preparation", str(marker), 60.0))
    ranks = train(text, tmp_path / "run", "max_steps=100", num_ranks=2, faults=faults)
    wait_for(marker.exists)
    ranks.signal(signal.SIGTERM, 0)
    assert ranks.wait(STOP_SECONDS) == [75, 75], ranks.stderr(0) + ranks.stderr(1)


def test_a_rank_that_waits_for_one_that_never_came_leaves_at_once(text, tmp_path):
    """No handler of Python's runs while a group is joined. The launcher, here the test, signals the rest."""
    marker = tmp_path / "marker"
    faults = {0: [("impatient",), ("mark_joining", str(marker))], 1: [("never_start",)]}
    ranks = train(text, tmp_path / "run", "max_steps=3", num_ranks=2, faults=faults)
    wait_for(marker.exists)
    ranks.signal(signal.SIGTERM, 0)
    assert ranks.wait(STOP_SECONDS) == [75, -signal.SIGKILL]


@pytest.mark.parametrize("dead", [0, 1])
def test_a_rank_that_dies_before_it_joins_is_named_by_the_other(dead, text, tmp_path):
    """As after an import error; no launcher notices it here. The limit is 50 s, 3 in this test."""
    more = ("max_steps=3", "engine.join_seconds=3")
    ranks = train(text, tmp_path / "run", *more, num_ranks=2, faults={dead: [("never_start",)]})
    codes = ranks.wait()
    assert (codes[dead], codes[1 - dead]) == (-signal.SIGKILL, 1)
    expected = "rank 1 of 2 did not come within" if dead else "rank 0 was not at MASTER_PORT="
    assert expected in ranks.stderr(1 - dead)


@pytest.mark.parametrize("dead", [0, 1])
def test_a_rank_that_dies_while_it_sets_up_is_named_by_the_other(dead, text, tmp_path):
    faults = {1 - dead: [("impatient",)], dead: [("die_in_set_up",)]}
    ranks = train(text, tmp_path / "run", "max_steps=3", num_ranks=2, faults=faults)
    codes = ranks.wait(40)
    assert (codes[dead], codes[1 - dead]) == (-signal.SIGKILL, 1)
    named = f"rank {dead} (process {ranks.processes[dead].pid}"
    assert named in ranks.stderr(1 - dead), ranks.stderr(1 - dead)


@pytest.mark.parametrize("phase", ["evaluation", "sampling"])
def test_what_a_stop_left_out_is_made_up_for(phase, text, tmp_path):
    """Stopped in what its last step leaves to do, a run does it at its next start, and is finished."""
    marker, run_dir = tmp_path / "marker", tmp_path / "run"
    more = ("max_steps=3", "sample_every=3", "sample_tokens=8")
    faults = {0: [("impatient",), ("pause_in", phase, str(marker), 1.0, 3)]}
    ranks = train(text, run_dir, *more, faults=faults)
    wait_for(marker.exists)
    ranks.signal(signal.SIGTERM, 0)
    assert ranks.wait() == [75]
    assert (3 in lines(run_dir, "valid_loss")) == (phase == "sampling")
    assert not lines(run_dir, "text", "samples.jsonl")
    assert train(text, run_dir, *more).wait() == [0]
    assert list(lines(run_dir, "valid_loss")) == [3]
    assert list(lines(run_dir, "text", "samples.jsonl")) == [3]
    finished = train(text, run_dir, *more)
    assert finished.wait() == [0]
    assert "finished at step 3" in finished.stderr()


def test_a_report_that_a_kill_left_out_is_written_at_the_next_start(text, tmp_path):
    run_dir = tmp_path / "run"
    report = run_dir / "report.md"
    for steps in (2, 3):  # these runs leave it out; the second has an older one
        assert train(text, run_dir, f"max_steps={steps}").wait() == [0]
        real = {0: [("real_report",)]}
        assert train(text, run_dir, f"max_steps={steps}", faults=real).wait() == [0]
        assert f"after {steps} of {steps} steps" in report.read_text()


def test_a_stopped_run_says_how_to_go_on_where_the_same_command_would_not(text, tmp_path):
    marker, run_dir = tmp_path / "marker", tmp_path / "run"
    faults = {0: [("impatient",), ("pause_in", "forward", str(marker), 1.0, 3)]}
    ranks = train(text, run_dir, "max_steps=9", "resume=never", faults=faults)
    wait_for(marker.exists)
    ranks.signal(signal.SIGTERM, 0)
    assert ranks.wait() == [75]
    assert "run it with resume=auto to go on" in ranks.stderr()
    assert train(text, run_dir, "max_steps=9", "resume=auto").wait() == [0]
    assert sorted(lines(run_dir)) == list(range(1, 10))


LOSES_ITS_STARTER = """
import os, subprocess, sys, time
starter = os.getppid()
while os.getppid() == starter:
    time.sleep(0.05)
program = "from training.processes import *; print(lost_launcher(launchers()))"
with open(os.environ["ANSWER"] + ".tmp", "w") as answer:
    print(os.getppid(), file=answer, flush=True)
    subprocess.run([sys.executable, "-c", program], stdout=answer, check=True)
os.rename(answer.name, os.environ["ANSWER"])
"""


@pytest.mark.parametrize(("module", "lost"), [("deepspeed.launcher.launch", "deepspeed"), ("other", "None")])
def test_a_launcher_that_has_ended_before_a_rank_could_look_is_missed(module, lost, tmp_path):
    """The launcher of launch.py here is a shell that ends at once; a rank is asked after that."""
    file = tmp_path.joinpath(*module.split(".")).with_suffix(".py")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(LOSES_ITS_STARTER)
    for package in list(file.parents)[: module.count(".")]:
        (package / "__init__.py").touch()  # goes before the installed one
    answer = tmp_path / "answer"
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    variables = os.environ | {"PYTHONPATH": path, "ANSWER": str(answer)}
    start = f"{sys.executable} -m {module} & sleep 0.3"
    subprocess.run(["sh", "-c", start], env=variables, cwd=tmp_path, start_new_session=True, check=True)
    wait_for(answer.exists)
    parent, found = answer.read_text().split()
    if parent != "1":
        pytest.skip("orphans of this machine go to another process than the first")
    assert found == lost


def kill_a_rank(text: Path, folder: Path, rank: int, phase: str) -> None:
    marker, run_dir = folder / "marker", folder / "run"
    faults = {each: [("impatient",)] for each in range(2)}
    faults[rank].append(("pause_in", phase, str(marker), 30.0))
    ranks = train(text, run_dir, *WITH_ALL_PHASES, num_ranks=2, faults=faults)
    wait_for(marker.exists)
    ranks.signal(signal.SIGKILL, rank)
    codes = ranks.wait(STOP_SECONDS)
    assert codes[rank] == -signal.SIGKILL
    other = 1 - rank
    assert codes[other] == 1, ranks.stderr(other)
    assert f"rank {rank} (process {ranks.processes[rank].pid}" in ranks.stderr(other)
    assert "is gone" in ranks.stderr(other)


@pytest.mark.parametrize(("rank", "phase"), [(0, "forward"), (1, "save")])
def test_a_killed_rank_is_named_by_the_other_which_goes_too(rank, phase, text, tmp_path):
    kill_a_rank(text, tmp_path, rank, phase)


def stand_still(text: Path, folder: Path, rank: int, fault: str, phase: str, seconds: int = 5) -> str:
    """Returns the report of the ranks, which comes after so many seconds; 5 is a limit that is set here."""
    run_dir = folder / "run"
    faults = {each: [("impatient",)] for each in range(2)}
    faults[rank].append((fault, phase, 2))
    limit = ["engine.watchdog_seconds=5"] if seconds == 5 else []
    ranks = train(text, run_dir, *WITH_ALL_PHASES, *limit, num_ranks=2, faults=faults)
    codes = ranks.wait(60)
    assert None not in codes, "a rank hangs"
    assert 0 not in codes
    log = (run_dir / "train.log").read_text()
    report = log[log.index(f"no rank has made progress for {seconds} s") :]
    for each in range(2):
        assert f"rank {each}: process {ranks.processes[each].pid}" in report, report
    assert report.count("trainer.run()") == 2, report  # a Python stack of each
    return report


@pytest.mark.parametrize(
    ("fault", "rank", "phase"), [("freeze_in", 1, "forward"), ("hang_in", 0, "data wait")]
)
def test_ranks_that_stand_still_are_reported_and_end(fault, rank, phase, text, tmp_path):
    report = stand_still(text, tmp_path, rank, fault, phase)
    assert ("stopped, or its host is gone" in report) == (fault == "freeze_in")


def test_a_rank_that_a_signal_holds_is_not_waited_for_until_the_limit(text, tmp_path):
    """The limit is that of the settings, minutes; STOPPED_SECONDS is 7 here and 30 in earnest."""
    assert "stopped, or its host is gone" in stand_still(text, tmp_path, 1, "freeze_in", "forward", 7)


@pytest.mark.torture
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("fault", "phase"),
    [
        ("freeze_in", "forward"),
        ("freeze_in", "step"),
        ("freeze_in", "save"),
        ("hang_in", "backward"),
        ("hang_in", "sampling"),
    ],
)
def test_every_way_to_stand_still(fault, phase, rank, text, tmp_path):
    stand_still(text, tmp_path, rank, fault, phase)


def test_one_of_two_starts_trains_and_a_dead_holder_is_followed_at_once(text, tmp_path):
    run_dir = tmp_path / "run"
    first = train(text, run_dir, "max_steps=100000")
    wait_for(lambda: newest_checkpoint(run_dir / "checkpoints") is not None)
    second = train(text, run_dir, "max_steps=100000")
    assert second.wait() == [2]
    assert f"is being trained by process {first.processes[0].pid}" in second.stderr()
    first.signal(signal.SIGKILL, 0)
    first.wait()
    third = train(text, run_dir, "max_steps=100000")
    wait_for(lambda: "resuming at step" in third.stderr(), 30)
    third.signal(signal.SIGTERM, 0)
    assert third.wait() == [75]


def test_a_run_out_of_memory_says_what_helps(text, tmp_path):
    """Before its first checkpoint, and after it, where the same command goes on with what may change."""
    run_dir = tmp_path / "run"
    reason = (
        "error: out of memory on rank 0 (CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total "
        "capacity of 139.80 GiB of which 1.06 GiB is free). Try "
    )
    for steps, advice in (
        (1, "a smaller micro_batch_size, optim=adamw_8bit, "),
        (
            3,
            "engine=zero2_offload, or more GPUs with engine=zero3; run the same command to ",
        ),
    ):
        ranks = train(text, run_dir, "max_steps=9", faults={0: [("run_out_of_memory", steps)]})
        assert ranks.wait() == [2], ranks.stderr()
        assert ranks.stderr().splitlines()[-1].startswith(reason + advice)
        assert "Traceback" not in ranks.stderr()
    assert newest_checkpoint(run_dir / "checkpoints").step == 2
    assert train(text, run_dir, "max_steps=3", "engine=zero2").wait() == [0]


def test_one_rank_out_of_memory_ends_all(text, tmp_path):
    faults = {0: [("impatient",)], 1: [("impatient",), ("run_out_of_memory", 2)]}
    ranks = train(text, tmp_path / "run", "max_steps=9", num_ranks=2, faults=faults)
    assert ranks.wait(STOP_SECONDS) == [1, 2], ranks.stderr()
    assert "error: out of memory on rank 1 (" in ranks.stderr(1)
    assert "is gone, last seen at step " in ranks.stderr(0)
