"""Score a trained model on tasks of lm-evaluation-harness, which must be installed (pip install lm-eval).

    python -m scripts.lm_eval_tasks checkpoint=outputs/x tasks=[lambada_openai,piqa] documents=FOLDER

takes run folders, checkpoints and exports. With documents=, nothing is downloaded: FOLDER holds a file
TASK.jsonl for each task, with the fields of the data set that the harness would fetch. include_path= adds a
folder of tasks of your own.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from training.command import run_command
from training.errors import SettingError
from training.weights import check_precision, find_model, load_model


@dataclass(kw_only=True, slots=True)
class LmEvalConfig:
    """What to score, on which tasks, and with what data."""

    checkpoint: str | None = None  # run folder, checkpoint, import or export
    tasks: list[str] = field(default_factory=list)  # as piqa, hellaswag
    documents: str | None = None  # folder of TASK.jsonl; null lets the harness download
    include_path: str | None = None  # folder of further task definitions
    num_fewshot: int | None = None  # null: as each task says
    limit: int | None = None  # documents of each task; null for all
    seq_len: int | None = None  # longest context; null takes the run's
    batch_tokens: int = 16384  # tokens of a forward pass
    precision: str | None = None  # bf16 or fp32; null takes that of training
    output: str | None = None  # JSON file for the results

    def __post_init__(self) -> None:
        check_precision(self.precision)


def main(config: LmEvalConfig) -> None:
    """Run the harness and print its table."""
    path = find_model(config.checkpoint)
    if not config.tasks:
        raise SettingError("tasks is not set: give tasks=[piqa,arc_easy].")
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
        from lm_eval.utils import make_table

        from training.lm_eval_model import TransnormerLM
    except ImportError as error:
        raise SettingError(f"lm_eval can't be imported ({error}): pip install lm-eval.") from None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trained = load_model(path, device, config.precision)
    seq_len = config.seq_len or trained.settings.get("seq_len")
    if type(seq_len) is not int or seq_len < 1:
        raise SettingError(f"seq_len is not set, and {trained.path} does not say its own: give seq_len=1024.")
    manager = TaskManager(include_path=config.include_path)
    with tempfile.TemporaryDirectory() as folder:
        tasks = config.tasks
        if config.documents:
            tasks = [local_task(task, manager, Path(config.documents), Path(folder)) for task in tasks]
        results = simple_evaluate(
            model=TransnormerLM(trained.model, trained.tokenizer, seq_len, config.batch_tokens),
            tasks=tasks,
            num_fewshot=config.num_fewshot,
            limit=config.limit,
            task_manager=manager,
            log_samples=False,
        )
    print(make_table(results))
    if config.output:
        Path(config.output).write_text(json.dumps(results["results"], indent=1, default=str) + "\n")


def local_task(task: str, manager: Any, documents: Path, folder: Path) -> str:
    """Write the harness's own task with its data taken from a file; returns the path of its definition.

    Raises:
        SettingError: names the task that is unknown, or the file that is missing.
    """
    entry = manager.task_index.get(task)
    if entry is None or entry.yaml_path is None:
        raise SettingError(f"tasks={task}: the harness has no task of that name that is defined by a file.")
    file = documents / f"{task}.jsonl"
    if not file.is_file():
        raise SettingError(f"documents={documents} holds no {file.name}, for tasks={task}.")
    definition = {
        "include": str(entry.yaml_path),
        "task": task,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": dict.fromkeys(("train", "validation", "test"), str(file.resolve()))},
    }
    path = folder / f"{task}.yaml"
    path.write_text(yaml.safe_dump(definition))
    return str(path)


if __name__ == "__main__":
    run_command(main, LmEvalConfig, __doc__)
