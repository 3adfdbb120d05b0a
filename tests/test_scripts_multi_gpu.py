"""Several GPUs against one: settings, the report of made-up runs, and killed ranks."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from forked_ranks import launch
from training_helpers import run, settings

from scripts.multi_gpu import MultiGpuConfig, _sweep, gpu_counts, main
from training import rank_kill
from training.errors import SettingError
from training.multi_gpu_report import write_multi_gpu_report
from training.rank_kill import RankKill, losses
from training.sweep import MEASURED, Manifest, expand

ROOT = Path(__file__).resolve().parent.parent


def test_numbers_of_gpus():
    assert gpu_counts([], 2) == [1, 2]
    assert gpu_counts([], 6) == [1, 2, 4, 6]
    assert gpu_counts([], 8) == [1, 2, 4, 8]
    assert gpu_counts([4, 1, 4], 4) == [1, 4]


@pytest.mark.parametrize("counts", [[4], [1, 2], [0, 1, 4], [1, 4, 8]])
def test_counts_need_the_reference_and_all_gpus(counts):
    with pytest.raises(SettingError, match=r"counts=\[.*\] must lie between 1 and num_gpus=4"):
        gpu_counts(counts, 4)
    with pytest.raises(SettingError, match="num_gpus=4"):
        main(MultiGpuConfig(num_gpus=4, counts=counts))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_gpus": 1}, "num_gpus=1 must be at least 2"),
        ({"models": []}, "models is empty"),
        ({"parts": ["rnus"]}, "rnus is unknown. Allowed: runs, kill"),
        ({"retry": ["all"]}, "all is unknown. Allowed: done, oom, failed"),
        (
            {"steps": 20},
            "kill_after=10 must be at least 3, and twice that and two steps more must fit into steps=20",
        ),
        ({"engines": ["zero3"]}, r"kill_engine=zero1 must be one of engines=\['zero3'\]"),
    ],
)
def test_wrong_settings_are_refused_by_name(changes, message):
    with pytest.raises(SettingError, match=message):
        MultiGpuConfig(**changes)


def write_run(folder: Path, values: list[float]) -> None:
    folder.mkdir(parents=True)
    lines = [json.dumps({"step": step, "loss": loss}) for step, loss in enumerate(values, 1)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")


@pytest.fixture
def made_up(tmp_path):
    """One run on one GPU, four on two: a good one, one with other losses, a slow one, one out of memory."""
    config = MultiGpuConfig(
        models=["tnl-tiny"], seq_len=64, batch_tokens=256, steps=4, skip_steps=1, parts=["runs"]
    )
    sweeps = {count: _sweep(config, 2, count) for count in (1, 2)}
    points = {count: expand(sweep) for count, sweep in sweeps.items()}
    base = [4.0, 3.0, 2.0, 1.0]
    runs = {
        (1, "zero1"): (base, 1000),
        (2, "zero0"): ([4.0, 3.0, 2.001, 1.0], 1500),
        (2, "zero1"): ([4.0, 3.003, 2.0, 1.0], 1960),
        (2, "zero2"): (base, 1880),
    }
    for count, sweep in sweeps.items():
        manifest = Manifest(tmp_path / f"gpus_{count}", sweep, points[count])
        for point in points[count]:
            record = manifest.records[point.name]
            found = runs.get((count, point.crossed["engine"]))
            record["status"] = "done" if found else "oom"
            if found:
                write_run(tmp_path / f"gpus_{count}" / "points" / point.name, found[0])
                record["measured"] = dict.fromkeys(MEASURED) | {"tokens_per_second": found[1], "loss": 1.0}
        (tmp_path / f"gpus_{count}").mkdir(exist_ok=True)
        manifest.save()
    uninterrupted = next(point for point in points[2] if point.crossed["engine"] == "zero1")
    kill = RankKill(
        tmp_path / "kill", uninterrupted, tmp_path / "gpus_2" / "points" / uninterrupted.name, 2, 1
    )
    return tmp_path, sweeps, points, kill


def test_the_report_compares_with_one_gpu_and_marks_missed_goals(made_up):
    folder, sweeps, points, kill = made_up
    write_multi_gpu_report(folder, sweeps, points, kill)
    with open(folder / "results.csv") as file:
        rows = {(row["num_gpus"], row["engine"]): row for row in csv.DictReader(file)}
    assert float(rows["2", "zero0"]["max_loss_difference"]) == pytest.approx(1e-3)
    assert float(rows["2", "zero2"]["share_of_one_gpu"]) == pytest.approx(0.94)
    assert rows["2", "zero3"]["max_loss_difference"] == ""
    text = (folder / "table.md").read_text()
    table = {tuple(line.split(" | ")[1:3]): line for line in text.splitlines() if line.startswith("| tnl")}
    assert "| 1.00e-03 | 750 | 75.0% |" in table["2", "zero0"]  # no goal for its speed
    assert "| 3.00e-03 ✗ | 980 | 98.0% |" in table["2", "zero1"]
    assert "| 0.00e+00 | 940 | 94.0% ✗ |" in table["2", "zero2"]
    assert "| OOM | OOM |" in table["2", "zero3"]
    assert "Not run yet." in text
    assert (folder / "plot.png").stat().st_size > 10_000


def test_a_run_without_a_step_counts_as_infinitely_far_apart(made_up):
    folder, sweeps, points, kill = made_up
    metrics = next((folder / "gpus_2" / "points").glob("*zero2*")) / "metrics.jsonl"
    metrics.write_text("\n".join(metrics.read_text().splitlines()[:-1]) + "\n")
    write_multi_gpu_report(folder, sweeps, points, kill)
    (row,) = (line for line in (folder / "table.md").read_text().splitlines() if "| 2 | zero2 |" in line)
    assert "| inf ✗ |" in row


def test_the_report_says_how_the_kill_test_went(made_up):
    folder, sweeps, points, kill = made_up
    write_run(folder / "kill" / "run", [4.0, 3.003, 2.005, 1.0])
    leg = {"num_gpus": 1, "from_step": 1, "to_step": 2, "loading_equal": True, "loading": "", "seconds": 1.0}
    legs = [
        {"num_gpus": 2, "killed_rank": 1, "exit_code": 1, "seconds_to_end": 2.5, "workers_left": 0},
        leg,
        leg | {"num_gpus": 2, "loading_equal": False, "loading": "differs in exp_avg of x"},
    ]
    (folder / "kill" / "kill.json").write_text(json.dumps({"legs": legs, "error": None}))
    write_multi_gpu_report(folder, sweeps, points, kill)
    text = (folder / "table.md").read_text()
    assert "rank 1 killed with SIGKILL after step 3; the command ended with 1 after 2.5 s" in text
    assert "1 GPU(s), from step 1 to 2 (1.0 s): weights and moments loaded, equal bit for bit." in text
    assert "✗ differs in exp_avg of x" in text
    assert "steps 2 to 4 against the run never stopped: at most 5.00e-03 apart ✗." in text


SMALL = ["model.num_layers=2", "model.hidden_size=32", "model.num_heads=2"]
KILLED = {
    "num_gpus": 2,
    "models": ["tnl-tiny"],
    "engines": ["zero1"],
    "seq_len": 32,
    "batch_tokens": 128,
    "steps": 9,
    "skip_steps": 1,
    "kill_after": 3,
    "parts": ["kill"],
    "settings": ["tokenizer=bytes", *SMALL],
}

# In place of DeepSpeed's launcher: starts ranks, and ends them all once one has failed.
FAKE_LAUNCHER = """
import os, subprocess, sys, time
rank_code, num_ranks, *program = sys.argv[1:]
ranks = []
for rank in reversed(range(int(num_ranks))):  # the first rank last: when it trains, all are there
    command = [sys.executable, "-c", rank_code, *program]
    ranks.append(subprocess.Popen(command, env=os.environ | {"RANK": str(rank)}))
while None in [process.poll() for process in ranks] and not any(process.returncode for process in ranks):
    time.sleep(0.02)
for process in ranks:
    process.kill()
sys.exit(any(process.wait() for process in ranks))
"""
# A rank of train.py, which stands still two steps after its first checkpoint, or of check_loading.
FAKE_RANK = """
import json, os, sys, time
settings = dict(word.split("=", 1) for word in sys.argv[1:] if "=" in word)
if sys.argv[1] == "--module":
    print(f"{sys.argv[2]} of {settings['checkpoint'][-8:]}: equal bit for bit")
    sys.exit()
if os.environ["RANK"] != "0":
    time.sleep(600 if settings["resume"] == "never" else 0)
    sys.exit()
folder = f"{settings['run_dir']}/checkpoints"
os.makedirs(folder, exist_ok=True)
save_every, last = int(settings["save_every"]), int(settings["max_steps"])
first = max((int(name[5:]) for name in os.listdir(folder)), default=0) + 1
for step in range(first, last + 1):
    with open(f"{settings['run_dir']}/metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": step, "loss": 5.0 - step}) + "\\n")
    if step == last or save_every and step % save_every == 0:
        os.mkdir(f"{folder}/step_{step:08d}")
    if save_every and step == save_every + 2:
        time.sleep(600)
"""


def assert_killed_and_resumed(folder: Path) -> None:
    killed, fewer, more = json.loads((folder / "kill" / "kill.json").read_text())["legs"]
    assert killed["exit_code"] != 0
    assert killed["workers_left"] == 0
    assert (fewer["num_gpus"], fewer["from_step"], fewer["loading_equal"]) == (1, 3, True)
    assert (more["num_gpus"], more["from_step"], more["loading_equal"]) == (2, 6, True)
    assert sorted(losses(folder / "kill" / "run")) == list(range(1, 10))
    assert "equal bit for bit" in (folder / "table.md").read_text()


def test_a_rank_is_killed_and_the_run_resumed_on_fewer_and_on_all(tmp_path, monkeypatch):
    """With ranks that only pretend to train."""
    started = []

    def fake(program, launcher, num_ranks, devices):
        started.append((program[1] if program[0] == "--module" else Path(program[0]).name, num_ranks))
        return [sys.executable, "-c", FAKE_LAUNCHER, FAKE_RANK, str(num_ranks), *program], {}

    monkeypatch.setattr(rank_kill, "launch_command", fake)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = MultiGpuConfig(run_dir=str(tmp_path), **KILLED)
    assert main(config) == 0
    assert_killed_and_resumed(tmp_path)
    loads = "scripts.check_loading"
    assert started == [("train.py", 2), (loads, 1), ("train.py", 1), (loads, 2), ("train.py", 2)]
    assert main(config) == 0  # all is done
    assert len(started) == 5

    result = tmp_path / "kill" / "kill.json"  # as if stopped in the second leg
    known = json.loads(result.read_text())
    result.write_text(json.dumps(known | {"legs": known["legs"][:1]}))
    for step in (6, 9):
        (tmp_path / "kill" / "run" / "checkpoints" / f"step_{step:08d}").rmdir()
    assert main(config) == 0
    assert started[5:] == started[1:5]
    assert_killed_and_resumed(tmp_path)
    with pytest.raises(SettingError, match="holds the test of another run"):
        main(MultiGpuConfig(run_dir=str(tmp_path), **KILLED | {"kill_after": 4, "steps": 10}))


@pytest.mark.slow
def test_a_load_is_compared_with_its_files_on_every_rank(text, tmp_path):
    run_dir = tmp_path / "run"
    assert run(["train.py", *settings(text, run_dir, "max_steps=2")], 2).returncode == 0
    command = ["-m", "scripts.check_loading", f"checkpoint={run_dir}"]
    for num_ranks, stage in ((2, 1), (1, 3)):
        checked = run([*command, f"zero_stage={stage}"], num_ranks)
        assert checked.returncode == 0, checked.stderr
        assert f"on {num_ranks} rank(s), ZeRO {stage}" in checked.stdout
        assert "equal bit for bit" in checked.stdout
    nudged = launch(tmp_path / "logs", command, 2, faults={1: [("nudge_weights",)]})
    assert nudged.wait() == [1, 1], nudged.stderr()
    assert "differs in param of " in nudged.stdout()


@pytest.mark.torture
def test_a_killed_rank_on_two_cpu_ranks(tmp_path):
    """The command itself: two ranks, one killed, resumed on one and then on two."""
    arguments = [f"{key}={json.dumps(value)}" for key, value in KILLED.items()]
    result = subprocess.run(
        [sys.executable, "-m", "scripts.multi_gpu", *arguments, f"run_dir={tmp_path}"],
        cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert result.returncode == 0, result.stderr
    assert_killed_and_resumed(tmp_path)
