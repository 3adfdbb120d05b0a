"""Sweeps: points and their settings, running and resuming them, what is recorded, tables, plots, refusals.

Most points are a small script in place of train.py, told by the model's name what to do.
"""

import csv
import functools
import json
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from scripts.sweep import SweepConfig, main
from training.config import CONFIG_DIR, compose
from training.errors import SettingError
from training.launching import Device, device_groups, last_lines, stop_processes
from training.sweep import Manifest, SweepDefinition, expand, measure
from training.sweep_command import outcome
from training.sweep_report import Grid, paper_figures, rows_of, table, write_results
from training.sweep_runner import Runner, point_command

ROOT = Path(__file__).resolve().parent.parent
CPU = (Device(None, "a CPU"),)

# What a fake point does with its folder: writes metrics of 4 steps, or ends in some other way.
FAKE_POINT = """
import json, os, sys, time
kind, folder, seq_len = sys.argv[1], sys.argv[2], int(sys.argv[3])
open(os.path.join(folder, "started"), "a").write("x")
if kind == "oom":
    sys.exit("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB")
if kind == "fail":
    print("first line"); print("[2026] [ERROR] [launch.py:1:main] noise")
    sys.exit("error: no such thing")
if kind == "killed":
    os.kill(os.getpid(), 9)
os.makedirs(os.path.join(folder, "checkpoints/step_1"), exist_ok=True)
if kind == "hang":
    open(os.path.join(folder, "hangs"), "w")
    time.sleep(600)
if kind == "meet":  # another point, running at the same time
    while len([1 for name in os.listdir("..") if os.path.exists(f"../{name}/started")]) < 2:
        time.sleep(0.05)
if kind == "slow":
    time.sleep(1)  # the sweep must not take an earlier try's figures for this one's
with open(os.path.join(folder, "metrics.jsonl"), "w") as file:
    for step in range(1, 5):
        speed = [1, 500, 1000, 3000][step - 1] * 1024 / seq_len if kind == "softmax" else 1000 + step
        line = {"step": step, "tokens": step, "loss": 5.0 - step, "grad_norm": 1.0, "lr": 0.1, "mfu": 0.25,
                "tokens_per_second": speed, "step_ms": 10.0 * step, "peak_memory_gib": 2.0 + step}
        file.write(json.dumps(line) + "\\n")
if kind == "diverged":
    open(os.path.join(folder, "metrics.jsonl"), "a").write('{"step": 4, "skipped": true}')
if kind == "saving":
    time.sleep(600)
"""


def definition(**changes) -> SweepDefinition:
    settings = {
        "models": ["tnl-tiny"],
        "seq_lens": [64, 128],
        "batch_tokens": 256,
        "steps": 4,
        "skip_steps": 1,
    }
    return SweepDefinition(**settings | {"settings": ["tokenizer=bytes"]} | changes)


@pytest.fixture(scope="module", autouse=True)
def _compose_once():
    """Hydra takes half a second for the settings of a point, and most tests have the same points."""
    composed = functools.cache(lambda schema, settings, name: compose(schema, list(settings), name))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "training.sweep.compose", lambda schema, settings, name: composed(schema, tuple(settings), name)
        )
        yield


def run(
    folder: Path,
    sweep: SweepDefinition,
    kinds: dict[str, str],
    retry=(),
    groups=(CPU,),
    plots: bool = False,
    keep_checkpoints: bool = False,
) -> Manifest:
    """Run a sweep whose points do what `kinds` says for the name of their model."""
    folder.mkdir(exist_ok=True)
    points = expand(sweep)
    manifest = Manifest(folder, sweep, points)

    def command(point, point_folder, devices):
        kind = kinds.get(point.label, "done")
        return [sys.executable, "-c", FAKE_POINT, kind, str(point_folder), str(point.seq_len)], {}

    runner = Runner(
        folder, sweep, manifest, list(groups), command, lambda *_: None, keep_checkpoints=keep_checkpoints
    )
    runner.run(manifest.missing(points, list(retry)))
    with pytest.MonkeyPatch.context() as patch:
        if not plots:  # they take longer than the points
            patch.setattr("training.sweep_report.plot", lambda *_: None)
        write_results(folder, sweep, manifest, points)
    return manifest


def statuses(manifest: Manifest) -> list[str]:
    return [record["status"] for record in manifest.records.values()]


def starts(folder: Path) -> list[int]:
    """How often each point has been started."""
    return [len(path.read_text()) for path in sorted(folder.glob("points/*/started"))]


def read_csv(folder: Path) -> list[dict[str, str]]:
    with open(folder / "results.csv") as file:
        return list(csv.DictReader(file))


# Points


def test_points_cross_models_settings_and_lengths():
    points = expand(
        definition(models=["tnl-tiny", "llama-tiny"], cross=["optim.lr=0.1,0.2", "seed=1,2"], num_gpus=2)
    )
    assert len(points) == 2 * 4 * 2
    assert len({point.name for point in points}) == 16
    config = points[-1].config
    assert (config.model.name, config.seq_len, config.optim.lr, config.seed) == ("llama-tiny", 128, 0.2, 2)
    assert (config.batch_tokens, config.max_steps, config.engine.zero_stage) == (256, 4, 1)
    assert (config.eval_every, config.save_every, config.sample_every, config.log_every) == (0, 0, 0, 1)
    assert points[-1].crossed == {"optim.lr": "0.2", "seed": "2"}


def test_a_points_own_settings_come_last():
    points = expand(definition(models=["tnl-tiny", "tnl-tiny model.attention=quadratic engine=zero2"]))
    assert [point.label for point in points[1:3]] == ["tnl-tiny", "tnl-tiny attention=quadratic engine=zero2"]
    assert points[2].config.model.attention == "quadratic"
    assert points[2].config.engine.zero_stage == 2


def test_micro_steps_can_hold_the_same_tokens_at_every_length():
    points = expand(definition(seq_lens=[32, 128, 256], batch_tokens=256, micro_tokens=128))
    assert [point.config.micro_batch_size for point in points] == [4, 1, 1]
    whole = expand(definition(seq_lens=[32, 128], batch_tokens=256, micro_tokens=131072, num_gpus=2))
    assert [point.config.micro_batch_size for point in whole] == [4, 1]  # a rank's step is less
    with pytest.raises(SettingError, match=r"sweep\.micro_tokens=96 .*the 8 sequences of a rank's step"):
        expand(definition(seq_lens=[32], batch_tokens=256, micro_tokens=96))


def test_evaluation_and_saving_are_off_unless_asked_for():
    asked = expand(definition(evaluate=True, save_every=2))[0].config
    assert (asked.eval_every, asked.save_every, asked.resume) == (4, 2, "auto")
    plain = expand(definition())[0].config
    assert (plain.resume, plain.overwrite) == ("never", True)


@pytest.mark.parametrize("path", sorted((CONFIG_DIR / "sweep").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_sweep_composes(path):
    """With the command in its header, if there is one."""
    name = path.stem
    plain = compose(SweepConfig, [f"sweep={name}"], "sweep")
    assert (plain.sweep.name, plain.run_dir) == (name, f"outputs/sweep-{name}")
    lines = path.read_text().replace(" \\\n#", "").splitlines()
    commands = [shlex.split(line)[4:] for line in lines if "python -m scripts.sweep" in line]
    sweep = compose(SweepConfig, commands[0], "sweep").sweep if commands else plain.sweep
    assert sweep.name == name
    points = expand(sweep)
    assert len(points) >= 4
    if name.startswith("seq_len"):
        assert len(sweep.seq_lens) >= 4
        assert {point.config.model.attention for point in points} == {"lightning", "quadratic", "softmax"}
        assert not any(point.config.data.isolate_documents for point in points)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": []}, r"sweep\.models is empty"),
        ({"seq_lens": []}, r"sweep\.seq_lens is empty"),
        ({"seq_lens": [64, 64]}, r"sweep\.seq_lens=\[64, 64\] names a value twice"),
        ({"seq_lens": [0]}, r"sweep\.seq_lens=\[0\]: all must be at least 1"),
        ({"steps": 0}, r"sweep\.steps=0"),
        ({"skip_steps": 4}, r"sweep\.skip_steps=4 .* below sweep\.steps=4"),
        ({"seq_lens": [100]}, "batch_tokens=256 is not a multiple of seq_len=100"),
        ({"models": ["tnl-nosuch"]}, "tnl-nosuch"),
        ({"models": ["tnl-tiny model.depth=3"]}, r"model\.depth: unknown setting"),
        ({"models": ["tnl-tiny quadratic"]}, "quadratic: not a setting"),
        ({"settings": ["seq_len=5"]}, "seq_len=5: a sweep sets seq_len of its points itself"),
        ({"settings": ["+max_steps=5"]}, r"\+max_steps=5: a sweep sets max_steps of its points itself"),
        ({"cross": ["optim.lr=-1,1"]}, r"optim\.lr=-1\.0 must be above 0"),
        ({"models": ["tnl-tiny", "tnl-tiny model.attention=lightning"], "seq_lens": [64]}, None),
        ({"num_gpus": 3}, "3 ranks can't share evenly"),
    ],
)
def test_bad_sweeps_are_refused_by_name(changes, message):
    if message is None:
        assert len(expand(definition(**changes))) == 2
        return
    with pytest.raises(SettingError, match=message):
        expand(definition(**changes))


# Running


def test_one_failure_does_not_end_the_sweep(tmp_path):
    sweep = definition(models=["tnl-tiny", "llama-tiny", "tnl-tiny seed=1", "tnl-tiny seed=2"], seq_lens=[64])
    kinds = {"llama-tiny": "oom", "tnl-tiny": "fail", "tnl-tiny seed=1": "killed"}
    manifest = run(tmp_path, sweep, kinds)
    assert statuses(manifest) == ["failed", "oom", "failed", "done"]
    failed, oom, killed, done = manifest.records.values()
    assert failed["error"] == "first line | error: no such thing | exit code 1"
    assert oom["error"].startswith("torch.OutOfMemoryError: CUDA out of memory")
    assert killed["error"] == "killed by signal 9, as by a system that is out of memory"
    assert done["error"] is None
    rows = read_csv(tmp_path)
    assert [row["status"] for row in rows] == ["failed", "oom", "failed", "done"]
    assert rows[0]["tokens_per_second"] == ""
    text = (tmp_path / "table.md").read_text()
    assert "| llama-tiny | OOM |" in text
    assert "- tnl-tiny, seq_len 64: first line | error: no such thing" in text


def test_the_same_command_runs_only_what_is_missing(tmp_path):
    kinds = {"llama-tiny": "fail"}
    sweep = definition(models=["tnl-tiny", "llama-tiny"], seq_lens=[64])
    run(tmp_path, sweep, kinds)
    run(tmp_path, sweep, kinds)
    assert starts(tmp_path) == [1, 1]
    manifest = run(tmp_path, sweep, {}, retry=["failed"])
    assert starts(tmp_path) == [2, 1]  # in order of names: llama-tiny again
    assert statuses(manifest) == ["done", "done"]


def test_points_can_be_added_and_nothing_else_changed(tmp_path):
    run(tmp_path, definition(), {})
    manifest = run(tmp_path, definition(models=["tnl-tiny", "llama-tiny"], seq_lens=[32, 64, 128]), {})
    assert statuses(manifest) == ["done"] * 6
    assert sorted(starts(tmp_path)) == [1] * 6
    before = (tmp_path / "sweep.json").read_bytes()
    for changes, message in [
        ({"steps": 5}, r"sweep\.steps=5 \(there: 4\)"),
        ({"skip_steps": 2}, r"sweep\.skip_steps=2 \(there: 1\)"),
        ({"seq_lens": [64]}, r"sweep\.seq_lens=\[64\] \(there: \[32, 64, 128\]\)"),
        ({"cross": ["seed=1,2"]}, r"sweep\.cross=\['seed=1,2'\] \(there: \[\]\)"),
    ]:
        with pytest.raises(SettingError, match=message):
            run(tmp_path, definition(**changes), {})
    assert (tmp_path / "sweep.json").read_bytes() == before


def test_a_damaged_manifest_is_refused(tmp_path):
    for content in ('{"points": 3}', '{"definition": {}, "points": {"a": []}}'):
        (tmp_path / "sweep.json").write_text(content)
        with pytest.raises(ValueError, match=r"sweep\.json: not a sweep's manifest"):
            run(tmp_path, definition(), {})
    (tmp_path / "sweep.json").write_text("{")
    with pytest.raises(ValueError, match=r"sweep\.json is not valid JSON"):
        run(tmp_path, definition(), {})


def test_a_point_ends_with_its_last_step_where_nobody_keeps_its_checkpoint(tmp_path):
    sweep = definition(seq_lens=[64])
    manifest = run(tmp_path, sweep, {"tnl-tiny": "saving"})
    assert statuses(manifest) == ["done"]
    assert manifest.records["tnl-tiny-seq-len-64"]["measured"]["loss"] == 1.0
    assert marked_processes(tmp_path) == []


@pytest.mark.parametrize("save_every", [0, 2])
@pytest.mark.parametrize("keep_checkpoints", [False, True])
def test_figures_of_an_earlier_try_are_not_taken_for_those_of_a_new_one(
    tmp_path, keep_checkpoints, save_every
):
    sweep = definition(seq_lens=[64], save_every=save_every)
    run(tmp_path, sweep, {}, keep_checkpoints=keep_checkpoints)
    manifest = run(tmp_path, sweep, {"tnl-tiny": "slow"}, retry=["done"])
    assert statuses(manifest) == ["done"]
    assert manifest.records["tnl-tiny-seq-len-64"]["seconds"] >= 1
    assert starts(tmp_path) == [2]


def test_points_run_in_parallel_on_groups_of_gpus(tmp_path):
    devices = [Device(str(index), "a GPU") for index in range(5)]
    groups = device_groups(devices, 2)
    assert [[device.id for device in group] for group in groups] == [["0", "1"], ["2", "3"]]
    with pytest.raises(SettingError, match=r"sweep\.num_gpus=6, but 5 GPU"):
        device_groups(devices, 6)
    manifest = run(tmp_path, definition(seq_lens=[32, 64, 128], num_gpus=2), {}, groups=groups)
    assert statuses(manifest) == ["done"] * 3
    assert {record["device"] for record in manifest.records.values()} == {"2 x a GPU"}


def test_points_on_several_gpus_run_at_the_same_time_and_see_their_own_only(tmp_path):
    gpus = [(Device(name, "a GPU"),) for name in ("3", "5")]
    sweep = definition()
    points = expand(sweep)
    manifest = Manifest(tmp_path, sweep, points)
    seen = set()

    def command(point, folder, devices):
        _, variables = point_command(point, folder, "deepspeed", 1, devices)
        seen.add(variables["CUDA_VISIBLE_DEVICES"])
        code = f"import os; os.chdir({str(folder)!r})\n{FAKE_POINT}"
        return [sys.executable, "-c", code, "meet", str(folder), "64"], variables

    Runner(tmp_path, sweep, manifest, gpus, command, lambda *_: None).run(points)
    assert statuses(manifest) == ["done", "done"]  # each waits for the other
    assert seen == {"3", "5"}


def test_commands(tmp_path):
    point = expand(definition())[0]
    folder = tmp_path / "it's, a=b"
    command, variables = point_command(point, folder, "python", 1, CPU)
    assert command[:2] == [sys.executable, str(ROOT / "train.py")]
    assert variables["DS_ACCELERATOR"] == "cpu"
    from training.train_config import TrainConfig

    assert compose(TrainConfig, command[2:], "train").run_dir == str(folder)
    command, _ = point_command(point, folder, "deepspeed", 2, CPU)
    assert command[1:3] == ["-m", "deepspeed.launcher.runner"]
    assert command[command.index("--num_accelerators") + 1] == "2"
    gpus = (Device("3", "a GPU"), Device("5", "a GPU"))
    ports = set()
    for _ in range(2):
        command, variables = point_command(point, folder, "deepspeed", 2, gpus)
        assert variables == {"CUDA_VISIBLE_DEVICES": "3,5"}
        assert "--num_gpus" not in command  # it would make the launcher ignore CUDA_VISIBLE_DEVICES
        ports.add(command[command.index("--master_port") + 1])
    assert len(ports) == 2


DRIVER = """
import sys
from pathlib import Path
sys.path.insert(0, "tests")
from test_scripts_sweep import definition, run, statuses
sweep = definition(models=["tnl-tiny", "llama-tiny"], seq_lens=[64])
print(statuses(run(Path(sys.argv[1]), sweep, {"llama-tiny": "hang"})), flush=True)
"""


def start_driver(folder: Path) -> subprocess.Popen:
    """A sweep in a process of its own, returned once its second point hangs."""
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not (folder / "points" / "llama-tiny-seq-len-64" / "hangs").exists():
        assert time.monotonic() < deadline
        assert driver.poll() is None
        time.sleep(0.1)
    return driver


def marked_processes(folder: Path) -> list[str]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"SWEEP_POINT={folder}".encode() in entry.read_bytes():
                found.append(entry.parent.name)
        except OSError:
            continue
    return found


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_points_and_the_sweep_continues_later(tmp_path, number):
    driver = start_driver(tmp_path)
    driver.send_signal(number)
    printed, _ = driver.communicate(timeout=60)
    assert printed.strip() == "['done', 'stopped']"
    assert marked_processes(tmp_path) == []
    assert [row["status"] for row in read_csv(tmp_path)] == ["done", "stopped"]
    assert list(tmp_path.glob("points/*/checkpoints")) == []  # a point without save_every starts again
    sweep = definition(models=["tnl-tiny", "llama-tiny"], seq_lens=[64])
    assert statuses(run(tmp_path, sweep, {})) == ["done", "done"]
    assert starts(tmp_path) == [2, 1]


def test_after_a_sigkill_the_left_over_point_is_ended_and_run_again(tmp_path):
    driver = start_driver(tmp_path)
    driver.kill()
    driver.communicate()
    assert marked_processes(tmp_path) != []
    manifest = json.loads((tmp_path / "sweep.json").read_text())
    assert [record["status"] for record in manifest["points"].values()] == ["running", "done"]
    stop_processes([tmp_path / "points" / name for name in manifest["points"]])
    assert marked_processes(tmp_path) == []
    sweep = definition(models=["tnl-tiny", "llama-tiny"], seq_lens=[64])
    assert statuses(run(tmp_path, sweep, {})) == ["done", "done"]
    assert starts(tmp_path) == [2, 1]


# Results


def test_a_point_whose_last_step_was_skipped_has_failed(tmp_path):
    (record,) = run(tmp_path, definition(seq_lens=[64]), {"tnl-tiny": "diverged"}).records.values()
    assert (record["status"], record["measured"]) == ("failed", None)
    assert record["error"].startswith("diverged")


def test_measurements_leave_out_the_first_steps(tmp_path):
    run(tmp_path, definition(models=["llama-tiny"], seq_lens=[64]), {"llama-tiny": "softmax"})
    folder = tmp_path / "points" / "llama-tiny-seq-len-64"
    assert measure(folder, definition()) == {
        "tokens_per_second": 1000 * 16,
        "step_ms": 30.0,
        "mfu": 0.25,
        "peak_memory_gib": 6.0,
        "loss": 1.0,
        "valid_loss": None,
        "steps_measured": 3,
    }
    assert measure(folder, definition(steps=9, skip_steps=4)) is None
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 4, "skipped": True}) + "\n")
    assert measure(folder, definition())["loss"] is None
    assert not (folder / "checkpoints").exists()  # of a finished point they are removed


def test_csv_and_table(tmp_path):
    sweep = definition(models=["tnl-tiny", "llama-tiny"], seq_lens=[512, 1024, 2048], batch_tokens=4096)
    manifest = run(tmp_path, sweep, {"llama-tiny": "softmax"}, plots=True)
    rows = read_csv(tmp_path)
    assert [(row["model"], row["seq_len"]) for row in rows[:2]] == [("tnl-tiny", "512"), ("tnl-tiny", "1024")]
    first = rows[0]
    assert (first["status"], first["tokens_per_second"], first["loss"]) == ("done", "1003", "1.0")
    assert (first["peak_memory_gib"], first["mfu"], first["steps_measured"]) == ("6.0", "0.25", "3")
    text = (tmp_path / "table.md").read_text()
    assert "Speeds are medians over steps 2 to 4 (3 steps" in text
    assert "| tnl-tiny | 1,003 | 1,003 | 1,003 | 1.000 |" in text
    assert "| llama-tiny | 2,000 | 1,000 | 500 | 4.000 |" in text
    assert "| seq_len | 512 | 1K | 2K | max/min |" in text
    # ahead by log(1003/1000) at 1024, behind by log(2000/1003) at 512: just below 1024
    assert "tnl-tiny against llama-tiny: faster from about 1,000 tokens on (between 512 and 1,024" in text
    assert "| tnl-tiny | 25.0% | 25.0% | 25.0% |" in text
    assert "a CPU" in text
    for name in ("tokens_per_second", "peak_memory", "loss"):
        assert (tmp_path / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert b"<svg" in (tmp_path / "plots" / f"{name}.svg").read_bytes()
    assert outcome(next(iter(manifest.records.values()))).startswith("1,003 tokens/s, MFU 25.0%, 6.0 GiB")


def test_the_papers_figures_stand_beside_ours(tmp_path):
    models = ["tnl-385m", "tnl-385m model.attention=quadratic", "llama-385m"]
    sweep = definition(models=models, seq_lens=[1024, 131072], batch_tokens=131072)
    points = expand(sweep)
    assert paper_figures(points[0].config.model)[1024] == 38615
    rows = rows_of(tmp_path, sweep, Manifest(tmp_path, sweep, points), points)
    assert [row["paper_tokens_per_second_per_gpu"] for row in rows] == [38615, None, 41789, None, 35931, None]
    text = table(sweep, Grid(sweep, points, rows), rows)
    assert "| *paper: TNL-LA2, 385m, A100 80G* | 38,615 | – | – |" in text
    assert "| tnl-385m | – | – | – |" in text


def test_other_architectures_get_none_of_the_papers_figures(tmp_path):
    models = ["tnl-385m", "tnl-385m model.softmax_every=4", "tnl-385m model.attention=softmax"]
    models += ["tnl-tiny model.name=tnl-385m", "tnl-385m model.activation_checkpointing=full"]
    sweep = definition(
        models=models, seq_lens=[1024], batch_tokens=1024, cross=["model.gate=full,none"], steps=2
    )
    points = expand(sweep)
    rows = rows_of(tmp_path, sweep, Manifest(tmp_path, sweep, points), points)
    figures = [row["paper_tokens_per_second_per_gpu"] for row in rows]
    assert figures == [38615, None, None, None, None, None, None, None, 38615, None]
    assert [row["attention"] for row in rows[::2]] == [
        "lightning",
        "hybrid",
        "softmax",
        "lightning",
        "lightning",
    ]
    assert "paper:" not in table(sweep, Grid(sweep, points[1:2], rows[1:2]), rows[1:2])


def test_a_hybrid_is_named_as_one_where_it_passes_softmax(tmp_path):
    models = ["tnl-tiny model.softmax_every=2", "tnl-tiny model.softmax_every=1", "llama-tiny"]
    run(tmp_path, definition(models=models, seq_lens=[512, 1024], batch_tokens=4096), {})
    text = (tmp_path / "table.md").read_text()
    assert "- tnl-tiny softmax_every=2 (hybrid) against llama-tiny: " in text
    assert "- tnl-tiny softmax_every=1" not in text


def test_the_axis_is_the_crossed_setting_where_there_is_one_length(tmp_path):
    sweep = definition(seq_lens=[64], cross=["optim.lr=0.001,0.01"], evaluate=True)
    manifest = run(tmp_path, sweep, {})
    points = expand(sweep)
    grid = Grid(sweep, points, rows_of(tmp_path, sweep, manifest, points))
    assert (grid.axis, grid.places, grid.loss_key) == ("optim.lr", ["0.001", "0.01"], "valid_loss")
    assert [line.label for line in grid.lines] == ["tnl-tiny"]
    assert "| optim.lr | 0.001 | 0.01 |" in (tmp_path / "table.md").read_text()
    assert [row["optim.lr"] for row in read_csv(tmp_path)] == ["0.001", "0.01"]
    run(tmp_path / "words", definition(seq_lens=[64], cross=["model.decay=paper,none"]), {}, plots=True)
    assert (tmp_path / "words" / "plots" / "loss.png").exists()


def test_an_engine_of_a_points_own_is_the_one_that_is_reported(tmp_path):
    sweep = definition(
        seq_lens=[64], models=["tnl-tiny", "llama-tiny engine=zero3"], cross=["engine=zero0,zero2"]
    )
    run(tmp_path, sweep, {})
    assert [row["engine"] for row in read_csv(tmp_path)] == ["zero0", "zero2"] * 2
    text = (tmp_path / "table.md").read_text()
    assert "| engine | zero0 | zero2 |" in text
    assert "engine zero0, zero2, " in text
    run(tmp_path / "own", definition(models=["tnl-tiny engine=zero3"]), {})
    assert {row["engine"] for row in read_csv(tmp_path / "own")} == {"zero3"}


def test_last_lines_of_a_long_log(tmp_path):
    log = tmp_path / "x.log"
    log.write_text("".join(f"line {index}\n\n" for index in range(20000)))
    assert last_lines(log)[-2:] == ["line 19998", "line 19999"]
    assert len(last_lines(log)) < 10000


# The command


def test_dry_run_lists_the_points_and_writes_nothing(tmp_path, capsys):
    settings = ["sweep=seq_len", "gpu=h200", "sweep.seq_lens=[1024,131072]", f"run_dir={tmp_path / 's'}"]
    assert main(compose(SweepConfig, [*settings, "dry_run=true"], "sweep")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["point", "micro-batch", "memory", "GiB", "tokens/s", "time"]
    assert sum(line.startswith(("tnl-385m", "llama-385m")) for line in lines) == 6
    assert "6 points, 1 at a time: about" in lines[-1]
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sweep=nosuch"], "nosuch"),
        (["sweep.steps=0"], r"sweep\.steps=0"),
        (["launcher=slurm"], r"launcher='slurm' is unknown\. Allowed: deepspeed, python\."),
        (["launcher=python", "sweep.num_gpus=2"], r"sweep\.num_gpus=2 needs launcher=deepspeed"),
        (["retry=[waiting]"], "Allowed: done, oom, failed"),
        (["sweep.stepz=3"], r"sweep\.stepz: unknown setting\. Did you mean sweep\.steps\?"),
    ],
)
def test_wrong_settings_of_the_command_are_refused(tmp_path, arguments, message):
    with pytest.raises(SettingError, match=message):
        main(compose(SweepConfig, [*arguments, f"run_dir={tmp_path / 's'}"], "sweep"))
    assert not (tmp_path / "s").exists()


@pytest.mark.slow
def test_a_real_point_on_the_cpu(text, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    small = ["tokenizer=bytes", "data=text", f"data.path={text}", f"data.cache_dir={tmp_path}"]
    small += ["model.num_layers=2", "model.hidden_size=64", "model.num_heads=2", "model.glu_size=64"]
    arguments = [
        "sweep=seq_len_demo",
        "sweep.models=[tnl-tiny]",
        "sweep.seq_lens=[32]",
        "sweep.batch_tokens=128",
        "sweep.steps=3",
        "sweep.skip_steps=1",
        f"sweep.settings={small}",
        f"run_dir={tmp_path / 's'}",
        "launcher=deepspeed",
    ]
    assert main(compose(SweepConfig, arguments, "sweep")) == 0
    assert "[1/1] tnl-tiny-seq-len-32:" in capsys.readouterr().err
    (row,) = read_csv(tmp_path / "s")
    assert row["status"] == "done"
    assert float(row["tokens_per_second"]) > 0
    assert float(row["loss"]) > 1
    assert (tmp_path / "s/points/tnl-tiny-seq-len-32/metrics.jsonl").exists()
    assert not (tmp_path / "s/points/tnl-tiny-seq-len-32/checkpoints").exists()
    assert main(compose(SweepConfig, arguments, "sweep")) == 0
    assert "1 done" in capsys.readouterr().err
    with pytest.raises(SettingError, match=r"sweep\.engine=zero2 \(there: zero1\)"):
        main(compose(SweepConfig, [*arguments, "sweep.engine=zero2"], "sweep"))
