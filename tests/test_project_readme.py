"""The README's commands: every one names settings that exist and a script that answers --help."""

import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

from training.config import TrainConfig, compose, sweep_points

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


@pytest.mark.parametrize("name", [*(f"scripts.{script}" for script in scripts()), "eval.py", "train.py"])
def test_every_command_answers_help(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as stop:
        run_as_main(name)
    assert stop.value.code == 0
    assert "Settings" in capsys.readouterr().out


def test_the_readme_names_every_script():
    text = (ROOT / "README.md").read_text()
    missing = [script for script in scripts() if script not in text]
    assert not missing


@pytest.mark.parametrize("target", re.findall(r"\]\(([^)#:]+)\)", (ROOT / "README.md").read_text()))
def test_links_lead_somewhere(target):
    assert (ROOT / target).exists()
