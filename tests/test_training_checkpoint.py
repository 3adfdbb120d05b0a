"""Saving a checkpoint: what is listed while other ranks are still writing."""

import torch

from training.checkpoint import open_checkpoint, save_checkpoint
from training.distributed import World
from training.engine import Fragment


def test_a_file_that_another_rank_is_writing_is_not_listed(tmp_path):
    """safetensors writes under a temporary name in the folder that the first rank lists."""

    def write_files(folder):
        (folder / "config.yaml").write_text("{}")
        (folder / ".tmpAbC123").write_bytes(b"half a file")

    kinds = ("param", "exp_avg", "exp_avg_sq")
    fragment = Fragment("weight", (4,), 0, {kind: torch.arange(4.0) for kind in kinds})
    saved = save_checkpoint(
        tmp_path,
        step=1,
        fragments=[fragment],
        world=World(0, 1, torch.device("cpu")),
        write_files=write_files,
        state={},
        facts={},
    )
    assert set(open_checkpoint(saved).manifest["files"]) == {
        "config.yaml",
        "state.json",
        "rank00000-00000.safetensors",
    }
