"""The README's commands: every one names settings that exist and a script that answers --help."""

import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

from training.config import compose, sweep_points
from training.train_config import TrainConfig

ROOT = Path(__file__).resolve().parent.parent


def commands() -> list[str]:
    blocks = re.findall(r"```\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if re.match(r"(python|deepspeed|torchrun|make) ", line)]


def test_there_are_commands():
    found = "\n".join(commands())
    for expected in ("make demo", "make test", "deepspeed train.py", "python eval.py", "scripts.sweep"):
        assert expected in found


@pytest.mark.parametrize("command", [c for c in commands() if "train.py" in c])
def test_training_commands_compose(command):
    arguments = shlex.split(command.replace("…", ""))
    arguments = arguments[arguments.index("train.py") + 1 :]
    settings = [argument for argument in arguments if argument not in ("-m", "--help")]
    points = sweep_points(settings) if "-m" in arguments else [settings]
    assert all(isinstance(compose(TrainConfig, point, "train"), TrainConfig) for point in points)


def scripts() -> list[str]:
    return sorted(path.stem for path in (ROOT / "scripts").glob("*.py"))


def run_as_main(name: str) -> None:
    if name.endswith(".py"):
        runpy.run_path(str(ROOT / name), run_name="__main__")
    else:
        runpy.run_module(name, run_name="__main__", alter_sys=True)


COMMANDS = [*(f"scripts.{script}" for script in scripts()), "eval.py", "train.py"]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_answers_help(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    monkeypatch.delitem(sys.modules, name, raising=False)  # which runpy would warn of
    with pytest.raises(SystemExit) as stop:
        run_as_main(name)
    assert stop.value.code == 0
    assert "Settings" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        *((name, ["no_such=1"], "no_such: unknown setting") for name in COMMANDS),
        ("eval.py", ["checkpoint=none"], "checkpoint=none: no such folder"),
        ("scripts.generate", ["checkpoint=none"], "checkpoint=none: no such folder"),
        ("scripts.plan", ["gpu=abacus"], "gpu=abacus is unknown"),
        ("scripts.report", ["run_dir=none"], "run_dir=none"),
        ("scripts.sweep", ["sweep=nosuch"], "nosuch"),
        ("scripts.sweep", ["retry=[waiting]"], "Allowed: done, oom, failed"),
        ("scripts.prepare_data", ["data=text", "data.path=none"], "data.path=none"),
        ("scripts.train_tokenizer", ["tokenizer=bytes", "output=OUT"], "tokenizer=bytes is not trained"),
    ],
)
def test_every_command_refuses_with_2_and_a_line(name, arguments, message, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(SystemExit) as stop:
        run_as_main(name)
    out, err = capsys.readouterr()
    assert (stop.value.code, out) == (2, "")
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") <= 2
    assert not list(tmp_path.iterdir())


def test_the_readme_names_every_script():
    text = (ROOT / "README.md").read_text()
    missing = [script for script in scripts() if script not in text]
    assert not missing


@pytest.mark.parametrize("target", re.findall(r"\]\(([^)#:]+)\)", (ROOT / "README.md").read_text()))
def test_links_lead_somewhere(target):
    assert (ROOT / target).exists()
