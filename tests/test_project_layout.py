"""The layout's rules: imports run one way, heavy libraries stay where they belong, every YAML composes."""

import ast
from pathlib import Path

import pytest

from training.config import CONFIG_DIR, compose
from training.train_config import TrainConfig

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("kernels", "models", "data", "training", "scripts")
MAY_IMPORT = {
    "kernels": {"kernels"},
    "models": {"kernels", "models"},
    "data": {"data"},
    "training": {"kernels", "models", "data", "training"},
    "scripts": {"kernels", "models", "data", "training"},
    "train.py": {"training", "data"},
    "eval.py": {"training", "data"},
}
ONLY_IN = {
    "deepspeed": {"training/engine.py"},
    "hydra": {"training/config.py"},
    "transformers": {"models/huggingface.py", "scripts/export_hf.py"},
    "omegaconf": {"training/config.py"},
    "wandb": {"training/metrics.py"},
}


def sources() -> list[Path]:
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    return sorted([*files, ROOT / "train.py", *ROOT.glob("eval.py")])


def imported(path: Path) -> set[str]:
    """Top-level names that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path):
    name = path.relative_to(ROOT).as_posix()
    owner = name.split("/")[0]
    ours = imported(path) & {*PACKAGES, "tests", "train", "eval"}
    assert ours <= MAY_IMPORT[owner], f"{name} imports {ours - MAY_IMPORT[owner]}"
    for library, allowed in ONLY_IN.items():
        assert library not in imported(path) or name in allowed, f"{name} imports {library}"


def test_ignore_patterns_are_anchored():
    for line in (ROOT / ".gitignore").read_text().splitlines():
        assert line.strip("/") not in PACKAGES
        assert line.startswith("/") or line in ("__pycache__/", "*.egg-info/"), line


GROUPS = ("model", "optim", "schedule", "engine")


@pytest.mark.parametrize(
    "override",
    [f"{group}={file.stem}" for group in GROUPS for file in sorted((CONFIG_DIR / group).glob("*.yaml"))],
)
def test_every_option_composes(override):
    assert isinstance(compose(TrainConfig, [override], "train"), TrainConfig)


@pytest.mark.parametrize(
    "file", sorted((CONFIG_DIR / "experiment").glob("*.yaml")), ids=lambda file: file.stem
)
def test_every_experiment_composes(file):
    overrides = [f"experiment={file.stem}"]
    if "override /data: text" in file.read_text():
        overrides.append("data.path=TEXT")
    assert isinstance(compose(TrainConfig, overrides, "train"), TrainConfig)


@pytest.mark.parametrize(
    "overrides",
    [
        ["data=python_stdlib"],
        ["data=text", "data.path=F"],
        ["data=hub", "data.name=owner/name"],
        ["data=prepared", "data.path=F"],
        ["tokenizer=sentencepiece"],
        ["tokenizer=bytes"],
        ["tokenizer=characters"],
        ["tokenizer=file", "tokenizer.path=F"],
    ],
)
def test_every_source_and_tokenizer_composes(overrides):
    assert isinstance(compose(TrainConfig, overrides, "train"), TrainConfig)
